"""What certificates cover: every launch that the heuristic can return for ResNet layers, per GPU.

Nothing here runs a kernel. A case is compiled ahead of time by ``launch.compile_for`` and judged
from its machine code; whatever is concluded from that is *predicted*.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

import torch
from rich.table import Table
from triton.backends.compiler import GPUTarget

from fused_resnet.certify import LABEL, Certificate, MainLoop, Work, certify_triton
from fused_resnet.problem import AddReluProblem, ChainProblem, ConvProblem, MaxPool

from .chain import chain_kernel
from .chain_plan import Offer, chain_launch, offers
from .config import ARCHS, MIN_SHARE, Arch, Config, heuristic, stem_pool_tile
from .launch import TYPES, Launch, compile_for
from .plans import add_relu_launch, conv_launches, mean_launch, pad_launch, stem_pool_launch
from .reduce import reduce_kernel


@dataclass(frozen=True)
class Case:
    """One launch of one problem on one GPU; ``config`` is None where there is nothing to choose."""

    problem: ConvProblem | AddReluProblem | ChainProblem | str
    arch: Arch
    launch: Launch
    config: Config | None = None
    precision: str = "tf32"
    offer: Offer | None = None


def resnet_problems(depth: int, n: int, dtype: torch.dtype, size: int = 224) -> list[ConvProblem]:
    """The distinct convolutions of torchvision's ResNet-18 or ResNet-50 and their epilogues."""
    if depth not in (18, 50):
        raise ValueError(f"layers are listed for ResNet-18 and ResNet-50, not ResNet-{depth}")

    def conv(
        c: int, hw: int, k: int, r: int, stride: int, epilogue: str, pool: MaxPool | None = None
    ) -> ConvProblem:
        return ConvProblem(
            n, c, hw, hw, k, r, r, (stride, stride), (r // 2, r // 2), (1, 1), 1, epilogue, dtype,
            pool=pool,
        )  # fmt: skip

    problems = [
        conv(3, size, 64, 7, 2, "relu", MaxPool((3, 3), (2, 2), (1, 1))),
        conv(3, size, 64, 7, 2, "relu"),
    ]
    c, hw = 64, size // 4
    for stage, blocks in enumerate({18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}[depth]):
        width = 64 << stage
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            out = hw // stride
            if depth == 18:
                body = [
                    conv(c, hw, width, 3, stride, "relu"),
                    conv(width, out, width, 3, 1, "add_relu"),
                ]
            else:
                body = [
                    conv(c, hw, width, 1, 1, "relu"),
                    conv(width, hw, width, 3, stride, "relu"),
                    conv(width, out, 4 * width, 1, 1, "add_relu"),
                ]
            k = body[-1].k
            if stride != 1 or c != k:
                body.append(conv(c, hw, k, 1, stride, "none"))
            problems += body
            c, hw = k, out
    return list(dict.fromkeys(problems))


def precisions(dtype: torch.dtype) -> tuple[str, ...]:
    """Modes of a dtype: fp32 has two."""
    return ("tf32", "ieee") if dtype == torch.float32 else ("tf32",)


def conv_cases(problem: ConvProblem, arch: Arch, precision: str) -> Iterator[Case]:
    """The launches that the heuristic's choice for a convolution makes."""
    if problem.pool is not None:
        tile = stem_pool_tile(problem.dtype, precision)
        yield Case(problem, arch, stem_pool_launch(problem, tile, arch, precision), None, precision)
        return
    config = heuristic(problem, arch, precision)
    for launch in conv_launches(problem, config, arch, precision):
        yield Case(problem, arch, launch, config, precision)


def layer_cases(
    archs: Iterable[Arch] = ARCHS,
    depths: Iterable[int] = (18, 50),
    batches: Iterable[int] = (1, 32, 256),
    dtypes: Iterable[torch.dtype] = (torch.float16, torch.bfloat16, torch.float32),
) -> Iterator[Case]:
    """Every launch of every convolution; many of them share one machine code."""
    for arch, dtype, depth, n in product(archs, dtypes, depths, batches):
        for problem, precision in product(resnet_problems(depth, n, dtype), precisions(dtype)):
            yield from conv_cases(problem, arch, precision)


def other_cases(
    archs: Iterable[Arch] = ARCHS,
    dtypes: Iterable[torch.dtype] = (torch.float16, torch.bfloat16, torch.float32),
) -> Iterator[Case]:
    """The kernels that do nothing but move memory, for ResNet-50 at batch 32."""
    for arch, dtype in product(archs, dtypes):
        flat = AddReluProblem((32, 256, 56, 56), dtype, False, True)
        yield Case(flat, arch, add_relu_launch(flat))
        pooled = mean_launch(32, 2048, 49, dtype)
        yield Case(f"global average pool 2048 7x7 {TYPES[dtype]}", arch, pooled)
        image = pad_launch(
            (32, 3, 224, 224), (224, 224, 4), torch.uint8, dtype, 32 * 3 * 224**2, True
        )
        yield Case(f"uint8 image to channels_last {TYPES[dtype]}", arch, image)


def code_of(case: Case) -> Hashable:
    """What the machine code of a case depends on: launches that differ in the grid have one."""
    launch = case.launch
    return launch.kernel.fn, launch.signature, launch.constants, launch.options, case.arch


def configuration_of(case: Case) -> Hashable:
    """What of a case is chosen for it, whatever the layer: kernel, types, tile and its schedule."""
    launch = case.launch
    if case.offer is not None:
        return case.offer, launch.signature[0], case.arch
    chosen = tuple((name, value) for name, value in launch.constants if name in _CHOSEN)
    return launch.kernel.fn, launch.signature, chosen, launch.options, case.arch, case.precision


#: Constants that are the shape of a tile.
_BLOCKS = ("BLOCK_M", "BLOCK_N", "BLOCK_C", "BLOCK_K", "BLOCK")

#: Constants of kernels that a configuration fixes; the rest are sizes and epilogues of layers.
_CHOSEN = frozenset(
    {*_BLOCKS, "PARTS", "GROUP_M", "W_TMA", "TMA", "WARP_SPECIALIZE", "STAGES_1", "STAGES_2"}
)


def cases(
    archs: Iterable[Arch] = ARCHS,
    depths: Iterable[int] = (18, 50),
    batches: Iterable[int] = (1, 32, 256),
    dtypes: Iterable[torch.dtype] = (torch.float16, torch.bfloat16, torch.float32),
) -> list[Case]:
    """The cases that are compiled: the first of each distinct machine code."""
    archs, dtypes = tuple(archs), tuple(dtypes)
    distinct: dict[Hashable, Case] = {}
    for case in chain(
        layer_cases(archs, tuple(depths), tuple(batches), dtypes), other_cases(archs, dtypes)
    ):
        distinct.setdefault(code_of(case), case)
    return list(distinct.values())


def chain_problems(offer: Offer, n: int, dtype: torch.dtype) -> list[ChainProblem]:
    """The blocks of ResNet-50 that an offer serves, and the widest block that it may be given."""
    m, size = offer.m, 3584 // offer.m

    def block(following: int, proj: int, store: str) -> ChainProblem:
        stride = 2 if proj > m else 1
        hw = size * stride
        step = stride if proj else 1
        return ChainProblem(n, m, hw, hw, 4 * m, following, proj, stride, step, store, dtype)

    found = [block(min(m, offer.next), 0, "all"), block(min(2 * m, offer.next), 0, "even")]
    if offer.proj:
        found.append(block(min(m, offer.next), offer.proj, "all"))
    found.append(block(offer.next, offer.proj, "even"))
    found.append(block(0, 0, "pool"))
    return [p for p in dict.fromkeys(found) if p.store in offer.stores]


def chain_cases(
    archs: Iterable[Arch] = ARCHS,
    dtypes: Iterable[torch.dtype] = (torch.float16, torch.bfloat16),
    n: int = 32,
) -> list[Case]:
    """Every offer for chained bottlenecks with every block that it serves."""
    dtypes = tuple(dtypes)
    return [
        Case(problem, arch, chain_launch(problem, offer.tile), offer=offer)
        for arch in archs
        for dtype in dtypes
        for offer in offers(arch)
        for problem in chain_problems(offer, n, dtype)
    ]


def compile_case(case: Case) -> Any:
    """The compiled kernel of a case: a ``triton.compiler.CompiledKernel``; needs no GPU."""
    return compile_for(case.launch, GPUTarget("cuda", case.arch.capability, 32))


def complaints(case: Case, certificate: Certificate) -> list[str]:
    """What of the space's promises this machine code does not keep; empty is good.

    Only what the code itself says and the loop model predicts; nothing is timed.
    """
    found = []
    if certificate.spills:
        found.append("it uses local memory")
    if not certificate.fits:
        found.append(f"a block does not fit: {certificate.shared} bytes of shared memory")
    if case.launch.kernel is chain_kernel:
        return found + _chain_complaints(case, certificate)
    if not isinstance(case.problem, ConvProblem) or case.launch.kernel is reduce_kernel:
        return found
    found += [
        f"{opcode} moves {certificate.widths(opcode)} bytes a thread"
        for opcode in ("LDGSTS", "STG")
        if any(width != 16 for width in certificate.widths(opcode))
    ]
    kinds = {"mma": "mma.sync", "wgmma": "wgmma", "tcgen05": "tcgen05"}
    kind = "fp32" if full_precision(case) else kinds[case.arch.family]
    if certificate.tensor_kind != kind:
        found.append(f"it multiplies by {certificate.tensor_kind}, not {kind}")
    loop = certificate.loop
    tile = case.config.tile if case.config is not None else None
    if not is_dissolved(case):
        found += _loop_complaints(loop)
        # With specialised warps, the copies are issued by a warp with a loop of its own.
        specialised = case.config is not None and case.config.warp_specialize
        copies = loop.async_copies if loop is not None and not specialised else None
        if not (certificate.async_copies if copies is None else copies):
            found.append("no asynchronous copies feed the main loop")
        share = loop.share if loop is not None else None
        if is_large(case.problem) and not full_precision(case) and (share or 0) < MIN_SHARE - 0.01:
            found.append(f"predicted share {share} of the tensor rate, not {MIN_SHARE}")
    if tile is not None and certificate.occupancy.blocks < tile.resident:
        found.append(f"{certificate.occupancy.blocks} blocks per SM, not {tile.resident}")
    return found


def _chain_complaints(case: Case, certificate: Certificate) -> list[str]:
    assert isinstance(case.problem, ChainProblem)
    assert case.offer is not None
    found = []
    kind = {"mma": "mma.sync", "wgmma": "wgmma", "tcgen05": "tcgen05"}[case.arch.family]
    if certificate.tensor_kind != kind:
        found.append(f"it multiplies by {certificate.tensor_kind}, not {kind}")
    # Sums of a pooled output are fp32 vectors, one element a thread.
    stored = certificate.widths("STG")
    if case.problem.store != "pool" and any(width != 16 for width in stored):
        found.append(f"STG moves {stored} bytes a thread")
    if 16 not in certificate.widths("LDGSTS"):
        found.append("pixels are not copied asynchronously, 16 bytes a thread")
    if dict(case.launch.constants)["TMA"] and "UTMALDG" not in certificate.async_copies:
        found.append("weights do not come through tensor descriptors")
    if certificate.loop is None or certificate.loop.divisions:
        found.append("no main loop, or one that divides")
    resident = case.offer.resident(case.arch)
    if certificate.occupancy.blocks < resident:
        found.append(f"{certificate.occupancy.blocks} blocks per SM, not {resident}")
    if certificate.shared > 1024 * case.offer.shared:
        found.append(f"{certificate.shared} bytes of shared memory, not {case.offer.shared} KiB")
    return found


def _loop_complaints(loop: MainLoop | None) -> list[str]:
    if loop is None:
        return ["it has no main loop"]
    found = []
    if loop.wgmma_waited_at_once:
        found.append("wgmma is waited for at once")
    if loop.divisions:
        found.append(f"{loop.divisions} integer divisions in the main loop")
    return found


def full_precision(case: Case) -> bool:
    """Whether a convolution multiplies in fp32, so that tensor cores have no part in it."""
    dtype = case.problem.dtype if isinstance(case.problem, ConvProblem) else None
    return dtype == torch.float32 and case.precision == "ieee"


def is_dissolved(case: Case) -> bool:
    """Whether slices are no more than stages, so that all loads are in flight at once.

    The compiler then makes straight code of the main loop, and there is none to judge.
    """
    return slices(case) <= dict(case.launch.options)["num_stages"]


def slices(case: Case) -> int:
    """Slices of the reduction that one program walks through."""
    constants: dict[str, int] = dict(case.launch.constants)
    if "SEG" in constants:
        return math.ceil(constants["R"] * constants["SEG"] / constants["BLOCK_K"])
    taps = constants.get("R", 1) * constants.get("S", 1)
    steps = taps * math.ceil(constants["C"] / constants["BLOCK_K"])
    return math.ceil(steps / constants.get("SPLIT_K", 1))


def is_large(problem: ConvProblem) -> bool:
    """Whether the GEMM of a layer is at least 128 deep and 128 wide."""
    depth = problem.c // problem.groups * problem.r * problem.s
    return min(depth, problem.k) >= 128


def certify_case(case: Case) -> Certificate:
    """Compile a case and read its certificate; the roofline in it is *predicted*."""
    problem = case.problem
    work = None
    if not isinstance(problem, str) and case.launch.kernel is not reduce_kernel:
        flops = 0 if isinstance(problem, AddReluProblem) else problem.flops
        kinds = {torch.float32: "fp32" if case.precision == "ieee" else "tf32"}
        work = Work(flops, problem.min_bytes, kinds.get(problem.dtype, "f16"))
    warps = dict(case.launch.options)["num_warps"]
    specialised = case.config is not None and case.config.warp_specialize
    return certify_triton(compile_case(case), loop_warps=1 if specialised else warps, work=work)


def name_of(case: Case) -> str:
    """A key for a case: architecture, kernel, problem and configuration."""
    launch = case.launch
    constants = dict(launch.constants)
    shape = "x".join(str(constants[b]) for b in _BLOCKS if b in constants)
    options = dict(launch.options)
    parts = [
        f"sm_{case.arch.capability}",
        launch.kernel.fn.__name__,
        str(case.problem),
        case.precision if case.precision == "ieee" else "",
        f"tile {shape} warps {options['num_warps']} stages {options['num_stages']}",
        f"split {constants['SPLIT_K']}" if constants.get("SPLIT_K", 1) > 1 else "",
    ]
    return " | ".join(part for part in parts if part)


def summary(certificates: Mapping[str, Certificate]) -> Table:
    """A line for each kernel and GPU: the extremes over all its certificates."""
    groups: dict[tuple[str, int], list[Certificate]] = {}
    for name, certificate in certificates.items():
        groups.setdefault((name.split(" | ")[1], certificate.sm), []).append(certificate)
    table = Table(title="Triton kernels: the worst of each figure", caption=LABEL)
    table.add_column("kernel")
    for column in ("sm", "codes", "registers", "spills", "shared KiB"):
        table.add_column(column, justify="right")
    table.add_column("tensor instructions")
    table.add_column("predicted share", justify="right")
    table.add_column("predicted bound of the layers", justify="right")
    for (kernel, sm), group in sorted(groups.items()):
        kinds = sorted({c.tensor_kind for c in group if c.tensor_kind})
        shares = [c.share for c in group if c.share is not None]
        bounds = [b for c in group for b in c.bounds]
        times = [b.predicted_us for b in bounds]
        table.add_row(
            kernel,
            str(sm),
            str(len(group)),
            str(max(c.registers for c in group)),
            str(sum(c.spills for c in group)),
            f"{max(c.shared for c in group) / 1024:.0f}",
            ", ".join(kinds) or "-",
            f"{min(shares):.2f}-{max(shares):.2f}" if shares else "-",
            f"{bounds[0].device} {min(times):.1f}-{max(times):.1f} us" if times else "-",
        )
    return table
