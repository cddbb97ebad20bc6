"""From a chained bottleneck to its launch: tile shapes, the choice among them, and the signature.

Pure functions, as ``config`` and ``plans`` are for the convolutions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fused_resnet.problem import ChainProblem

from .chain import chain_kernel
from .config import Arch
from .launch import Launch, box, pointer
from .plans import is_wide


@dataclass(frozen=True)
class ChainTile:
    """One program's work: BLOCK_M pixels; of the 3x3 BLOCK_K products, of out BLOCK_C channels.

    ``stages_1`` and ``stages_2`` are the depths of the software pipelines of the two loops. With
    ``tma`` weights come through tensor descriptors.
    """

    block_m: int
    block_c: int
    block_k: int
    num_warps: int
    stages_1: int
    stages_2: int
    tma: bool = False

    def __str__(self) -> str:
        tma = " tma" if self.tma else ""
        shape = f"{self.block_m}x{self.block_c}x{self.block_k}"
        return f"{shape} warps {self.num_warps} stages {self.stages_1}/{self.stages_2}{tma}"


#: Channels of the 3x3 that the kernel is made for.
WIDTHS = (64, 128, 256)


def unsupported(problem: ChainProblem) -> str | None:
    """Why the kernel does not compute ``problem`` on any GPU, or None."""
    p = problem
    if p.m not in WIDTHS:
        return f"bottlenecks of {', '.join(map(str, WIDTHS))} channels are chained, not of {p.m}"
    if p.k % 64:
        return f"the output's channels must be a multiple of 64, not {p.k}"
    for what, channels in (("the next 1x1's", p.next), ("the projection's", p.proj)):
        if channels and (channels < 64 or channels & (channels - 1)):
            return f"{what} channels must be a power of two of at least 64, not {channels}"
    return None


def chain_launch(problem: ChainProblem, tile: ChainTile) -> Launch:
    """The launch of a chain in one configuration."""
    p, t = problem, tile
    data, vector = pointer(p.dtype), pointer(torch.float32)

    def weight(rows: int, cols: int, used: bool = True) -> str:
        return box(p.dtype, rows, cols) if t.tma and used else data

    signature = [
        ("mid", data),
        ("residual", data),
        ("w2", weight(p.m, t.block_k)),
        ("scale2", vector),
        ("shift2", vector),
        ("w3", weight(t.block_c, p.m)),
        ("scale3", vector),
        ("shift3", vector),
        ("wp", weight(t.block_c, p.proj, p.proj > 0)),
        ("scale_p", vector),
        ("shift_p", vector),
        ("w1", weight(p.next, t.block_c, p.next > 0)),
        ("scale1", vector),
        ("shift1", vector),
        ("out", vector if p.store == "pool" else data),
        ("mid_next", data),
        *((name, "i32") for name in ("n", "h", "w_in", "oh", "ow", "rh", "rw")),
    ]
    oh, ow = p.size
    constants = {
        "M": p.m,
        "K": p.k,
        "NEXT": p.next,
        "PROJ": p.proj,
        "STRIDE": p.stride,
        "STEP": p.step,
        "STORE": p.store,
        "BLOCK_M": t.block_m,
        "BLOCK_C": t.block_c,
        "BLOCK_K": t.block_k,
        "STAGES_1": t.stages_1,
        "STAGES_2": t.stages_2,
        "TMA": t.tma,
        "WIDE": is_wide(
            p.n * p.h * p.w * max(p.m, p.proj * p.step**2), p.n * oh * ow * max(p.k, p.next)
        ),
    }
    return Launch(
        chain_kernel,
        tuple(signature),
        tuple(constants.items()),
        (("num_warps", t.num_warps), ("num_stages", max(t.stages_1, t.stages_2))),
        (programs(problem, tile), 1, 1),
    )


def programs(problem: ChainProblem, tile: ChainTile) -> int:
    """Programs of a launch; with ``pool`` none spans two images."""
    pixels = math.prod(problem.size)
    if problem.store == "pool":
        return problem.n * math.ceil(pixels / tile.block_m)
    return math.ceil(problem.n * pixels / tile.block_m)


@dataclass(frozen=True)
class Offer:
    """A configuration, and the widest problem for which it compiles without spills.

    Attributes:
        m: channels of the 3x3.
        next: most channels of the next 1x1.
        proj: most channels of the projection's input.
        shared: KiB of shared memory that the widest problem takes.
        registers: programs that one SM's registers hold at once, at least.
        tile: the configuration.
        stores: what it may store; addresses of even pixels and sums of a pool take registers.
    """

    m: int
    next: int
    proj: int
    shared: int
    registers: int
    tile: ChainTile
    stores: tuple[str, ...] = ("all", "even", "pool")

    def resident(self, arch: Arch) -> int:
        """Programs that one SM holds at once."""
        # Each block takes 1 KiB more than it asks for, and so does the limit of one block.
        kib = arch.shared_memory // 1024 + 1
        return min(self.registers, kib // (self.shared + 1))


_64, _128 = (64, 64, 64, 4, 3, 2), (128, 64, 64, 8, 3, 2)
_WIDE, _THIN = (64, 64, 64, 8, 3, 2), (64, 32, 64, 8, 3, 2)

# What the compiler gives for each family of tensor instructions, fp16 and bf16 alike; `make
# certify` proves every line.
_MMA = (
    Offer(64, 64, 0, 41, 2, ChainTile(*_64)),
    Offer(64, 128, 64, 66, 2, ChainTile(*_64)),
    Offer(64, 64, 64, 74, 1, ChainTile(*_128)),
    Offer(128, 128, 0, 73, 2, ChainTile(*_64)),
    Offer(128, 128, 0, 97, 1, ChainTile(*_128), stores=("all", "pool")),
    Offer(128, 256, 0, 89, 1, ChainTile(*_WIDE)),
    Offer(128, 128, 256, 89, 1, ChainTile(64, 32, 64, 4, 3, 2)),
    Offer(128, 256, 256, 97, 1, ChainTile(*_THIN)),
    Offer(256, 512, 0, 93, 1, ChainTile(*_THIN)),
    Offer(256, 256, 0, 121, 1, ChainTile(128, 32, 64, 8, 3, 2)),
    Offer(256, 256, 512, 117, 1, ChainTile(32, 32, 64, 4, 3, 2)),
)
_WGMMA = (
    Offer(64, 64, 0, 49, 3, ChainTile(*_64, tma=True)),
    Offer(64, 128, 64, 82, 2, ChainTile(*_64, tma=True)),
    Offer(64, 128, 64, 98, 1, ChainTile(*_128, tma=True)),
    Offer(128, 128, 0, 82, 2, ChainTile(*_64, tma=True)),
    Offer(128, 256, 0, 130, 1, ChainTile(*_128, tma=True)),
    Offer(128, 128, 256, 210, 1, ChainTile(*_128, tma=True)),
    Offer(128, 256, 256, 218, 1, ChainTile(*_WIDE, tma=True)),
    Offer(128, 256, 256, 134, 1, ChainTile(*_THIN, tma=True)),
    Offer(256, 256, 0, 145, 1, ChainTile(128, 32, 64, 8, 3, 2, tma=True)),
    Offer(256, 512, 0, 137, 1, ChainTile(*_THIN, tma=True)),
)
_TCGEN05 = (
    Offer(64, 64, 0, 52, 3, ChainTile(*_64, tma=True)),
    Offer(64, 128, 64, 84, 2, ChainTile(*_64, tma=True)),
    Offer(64, 128, 0, 86, 1, ChainTile(*_128, tma=True)),
    Offer(128, 128, 0, 92, 2, ChainTile(*_64, tma=True)),
    Offer(128, 128, 0, 118, 1, ChainTile(*_128, tma=True), stores=("all", "even")),
    Offer(128, 256, 256, 218, 1, ChainTile(*_WIDE, tma=True)),
    Offer(256, 256, 0, 121, 1, ChainTile(*_THIN, tma=True)),
)
_OFFERS = {"mma": _MMA, "wgmma": _WGMMA, "tcgen05": _TCGEN05}

#: Cycles that one wave of programs needs beside its loops.
_WAVE_CYCLES = 2400

#: Bytes that L2 gives one SM in one cycle while all of them ask, as weights are asked for here.
_L2_BYTES = 32

#: Share of the tensor rate that the model grants.
_TENSOR_SHARE = 0.7


def offers(arch: Arch) -> tuple[Offer, ...]:
    """All configurations of one GPU."""
    return tuple(o for o in _OFFERS[arch.family] if 1024 * o.shared <= arch.shared_memory)


def chain_tiles(problem: ChainProblem, arch: Arch) -> tuple[ChainTile, ...]:
    """The configurations of one GPU for a supported problem, the predicted best first."""
    p = problem
    fitting = [
        offer
        for offer in offers(arch)
        if offer.m == p.m
        and p.next <= offer.next
        and p.proj <= offer.proj
        and p.store in offer.stores
    ]
    fitting.sort(key=lambda offer: predicted_cycles(problem, offer, arch))
    return tuple(dict.fromkeys(offer.tile for offer in fitting))


def chain_tile(problem: ChainProblem, arch: Arch) -> ChainTile:
    """The configuration that the model predicts to be the fastest.

    Raises:
        ValueError: if there is none, see `chain_tiles`.
    """
    tiles = chain_tiles(problem, arch)
    if not tiles:
        raise ValueError(f"no configuration for {problem} on sm_{arch.capability}")
    return tiles[0]


def predicted_cycles(problem: ChainProblem, offer: Offer, arch: Arch) -> float:
    """Cycles by waves: the busiest SM's programs, each bound by tensor cores or by L2 bandwidth.

    A *prediction* that ranks configurations of one problem; it is not a time.
    """
    p, tile = problem, offer.tile
    weights = 9 * p.m * p.m + p.k * (p.m + p.proj + p.next)
    compute = tile.block_m * weights / (_TENSOR_SHARE * arch.multiply_adds(p.dtype, "tf32"))
    pixel = 9 * p.m + (p.proj or p.k) + (0 if p.store == "pool" else p.k) + p.next
    loads = p.dtype.itemsize * (weights + tile.block_m * pixel) / _L2_BYTES
    per_sm = math.ceil(programs(problem, tile) / arch.sms)
    waves = math.ceil(per_sm / offer.resident(arch))
    return float(per_sm * max(compute, loads) + waves * _WAVE_CYCLES)
