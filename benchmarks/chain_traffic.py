"""Bytes of a bottleneck network, cut in several ways, and what they allow: a model.

    python -m benchmarks.chain_traffic

Prints the tables of ``docs/chained-bottlenecks.md``. Bytes are counted: activations that kernels
read and write once each, for one image of 224x224 in 16 bits, weights left out. Times and their
ratios are *predicted*: the larger of four bounds per kernel, see `predicted_seconds`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

ITEM = 2
LAYERS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3), "resnet152": (3, 8, 36, 3)}


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet.

    Attributes:
        name: of it.
        dram: bytes a second.
        l2: bytes a second from L2, as measured by others.
        tensor: fp16 operations a second, dense.
        sms: multiprocessors.
        l2_size: bytes.
    """

    name: str
    dram: float
    l2: float
    tensor: float
    sms: int
    l2_size: float


GPUS = (
    Gpu("A100", 2.0e12, 5e12, 312e12, 108, 40e6),
    Gpu("H100", 3.35e12, 6e12, 989e12, 132, 50e6),
    Gpu("B200", 8.0e12, 10e12, 2250e12, 148, 126e6),
)

#: Share of the tensor rate that a kernel is granted, and seconds from one kernel to the next.
TENSOR_SHARE, LAUNCH = 0.7, 1.5e-6

#: Pixels and channels of a program.
BLOCK_M, BLOCK_N = 128, 128


@dataclass(frozen=True)
class Step:
    """One kernel, for one image; sizes in elements.

    Attributes:
        stage: 0 for the stem, 1 to 4.
        pixels: of its output.
        read: elements of activations read.
        written: elements of activations written.
        weights: elements of weights.
        macs: multiply-adds.
        l2: elements that programs ask L2 for.
        columns: programs that share the same pixels.
    """

    stage: int
    pixels: int
    read: int
    written: int
    weights: int = 0
    macs: int = 0
    l2: float = 0.0
    columns: int = 1

    @property
    def bytes(self) -> int:
        """Bytes of activations through memory."""
        return ITEM * (self.read + self.written)


def conv(
    stage: int, pixels: int, c: int, k: int, taps: int, source: int, residual: bool = False
) -> Step:
    """A convolution of ``source`` elements to ``pixels`` x ``k``, with a fused epilogue."""
    columns = max(k // BLOCK_N, 1)
    depth = c * taps
    weights = depth * k
    l2 = pixels * (depth * columns + weights / BLOCK_M + k * (2 if residual else 1))
    read = source + (pixels * k if residual else 0)
    return Step(stage, pixels, read, pixels * k, weights, pixels * weights, l2, columns)


def elementwise(stage: int, pixels: int, channels: int, operands: int = 1) -> Step:
    """An operation on whole activations, of one or two operands."""
    n = pixels * channels
    return Step(stage, pixels, operands * n, n, l2=(operands + 1) * n)


def link(
    stage: int, pixels: int, m: int, following: int, stride: int, proj: int, store: str
) -> Step:
    """A chained bottleneck, from its 3x3 to the next block's 1x1."""
    k = 4 * m
    kept = {"all": k * pixels, "even": k * pixels // 4, "pool": k}[store]
    read = m * pixels * stride**2 + (proj or k) * pixels
    weights = 9 * m * m + k * (m + following + proj)
    l2 = pixels * (9 * m + weights / BLOCK_M + (proj or k) + following) + kept
    return Step(stage, pixels, read, kept + following * pixels, weights, pixels * weights, l2)


def steps(network: str, how: str, chained: Iterable[int] = ()) -> list[Step]:
    """The kernels of one forward pass of a bottleneck ResNet at 224x224.

    Args:
        network: key of `LAYERS`.
        how: ``stock`` (convolution, norm, ReLU, sum and pooling one by one, in place where torch
            does) or ``fused`` (one kernel a convolution, the stem with its pooling).
        chained: with ``fused``, stages whose blocks are links. Their projections of up to 256
            channels are computed within the links, stages end in thinned or pooled outputs.
    """
    chained, fused = set(chained), how == "fused"
    image, stem, pixels = 3 * 224**2, 112**2, 56**2
    pooled = pixels * 64
    if fused:
        found = [Step(0, stem, image, pooled, 147 * 64, stem * 147 * 64, stem * 147 + pooled)]
    else:
        found = [conv(0, stem, 3, 64, 49, image), *(elementwise(0, stem, 64) for _ in range(2))]
        found.append(Step(0, pixels, stem * 64, pooled, l2=stem * 64 + pooled))

    def layer(*args: int, relu: bool = True, residual: bool = False) -> list[Step]:
        stage, out, _, k = args[:4]
        if fused:
            return [conv(*args, residual=residual)]
        extra = [elementwise(stage, out, k)] + [elementwise(stage, out, k)] * relu
        sums = [elementwise(stage, out, k, 2)] if residual else []
        return [conv(*args), extra[0], *sums, *extra[1:]]

    c, side, ready = 64, 56, False
    blocks = LAYERS[network]
    for stage, count in enumerate(blocks, 1):
        m, stride = 64 << (stage - 1), 1 if stage == 1 else 2
        for block in range(count):
            first, last = block == 0, block == count - 1
            step = stride if first else 1
            before, out = side**2, (side // step) ** 2
            if not ready:
                found += layer(stage, before, c, m, 1, c * before)
            ready = False
            proj = c if first and stage in chained and c <= 256 else 0
            if first and not proj:
                # A strided projection reads its own pixels only; their channels lie together.
                found += layer(stage, out, c, 4 * m, 1, c * out, relu=False)
            if stage in chained:
                following = m if not last else 2 * m if stage < 4 else 0
                store = "all" if not last else "even" if stage < 4 else "pool"
                found.append(link(stage, out, m, following, step, proj, store))
                ready = following > 0
            else:
                found += layer(stage, out, m, m, 9, m * before)
                found += layer(stage, out, m, 4 * m, 1, m * out, residual=True)
            c, side = 4 * m, side // step
    if 4 not in chained:
        found.append(Step(4, 1, c * side**2, c, l2=c * side**2))
    return found


def megabytes(network: str, how: str, chained: Iterable[int] = ()) -> float:
    """MB of activations through memory for one image."""
    return sum(step.bytes for step in steps(network, how, chained)) / 1e6


def predicted_seconds(plan: list[Step], gpu: Gpu, batch: int) -> float:
    """Predicted time of one forward pass: each kernel's largest bound of these, and a launch.

    - memory: activations and weights at the DRAM rate; activations are free where two of a stage's
      block outputs fit into 70% of L2;
    - L2: all that programs ask for;
    - tensor cores: whole waves of programs, one at a time on each SM, at `TENSOR_SHARE`.
    """
    total = 0.0
    for step in plan:
        traffic = step.bytes * batch
        width = max(64 << max(step.stage - 1, 0), 64)
        if ITEM * 10 * width * step.pixels * batch <= 0.7 * gpu.l2_size:
            traffic = 0
        memory = (traffic + ITEM * step.weights) / gpu.dram
        programs = math.ceil(step.pixels * batch / BLOCK_M) * step.columns
        waves = math.ceil(programs / gpu.sms)
        macs = step.macs / (step.pixels * step.columns) * BLOCK_M
        compute = waves * 2 * macs / (gpu.tensor / gpu.sms * TENSOR_SHARE)
        total += max(memory, ITEM * step.l2 * batch / gpu.l2, compute) + LAUNCH
    return total


CUTS: dict[str, tuple[str, tuple[int, ...]]] = {
    "stock": ("stock", ()),
    "fused": ("fused", ()),
    "stage 1": ("fused", (1,)),
    "stages 1-2": ("fused", (1, 2)),
    "stages 1-3": ("fused", (1, 2, 3)),
}


def tables() -> list[Table]:
    """Bytes of every network and cut; predicted ratios for every GPU and batch."""
    counted = Table("MB an image", *CUTS, title="Counted: activations through memory, 16 bits")
    for network in LAYERS:
        row = (f"{megabytes(network, *cut):.1f}" for cut in CUTS.values())
        counted.add_row(network, *row)
    ratios = Table(
        "ResNet-50", "batch", *CUTS, title="Predicted: speed relative to fused convolutions"
    )
    for gpu in GPUS:
        for batch in (1, 32, 256):
            times = [
                predicted_seconds(steps("resnet50", *cut), gpu, batch) for cut in CUTS.values()
            ]
            ratios.add_row(gpu.name, str(batch), *(f"{times[1] / t:.2f}" for t in times))
    return [counted, ratios]


if __name__ == "__main__":
    for table in tables():
        Console(width=100).print(table)
