"""How fast each kernel of the CPU computes the convolutions of a ResNet-50, and how exactly.

    python -m benchmarks.layers [--dtype float32] [--batch 16] [--rounds 40] [--kernels direct ...]

All kernels of a layer take turns, on memory that is there. Each has its GFLOP/s (operations of the
definition) in the fastest call, which tells what the machine can do while nothing else holds it up,
and in the median call, and its error against float64 by norm. `ReLU(conv * scale + shift)`, random
weights, inputs behind a ReLU.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fused_resnet.numerics import error
from fused_resnet.problem import ConvProblem
from fused_resnet.tuning import EFFORTS, Task, call_of, contenders, reference

CPU = torch.device("cpu")
#: Input channels, output channels, height and width, window.
LAYERS = (
    (64, 64, 56, 1),
    (64, 64, 56, 3),
    (64, 256, 56, 1),
    (256, 64, 56, 1),
    (128, 128, 28, 3),
    (128, 512, 28, 1),
    (512, 128, 28, 1),
    (256, 256, 14, 3),
    (256, 1024, 14, 1),
    (1024, 256, 14, 1),
    (512, 512, 7, 3),
    (512, 2048, 7, 1),
    (2048, 512, 7, 1),
)


def layer(batch: int, c: int, k: int, size: int, window: int, dtype: torch.dtype) -> Task:
    """One layer with its tensors."""
    pad, last = window // 2, torch.channels_last
    p = ConvProblem(
        batch, c, size, size, k, window, window, (1, 1), (pad, pad), (1, 1), 1, "relu", dtype
    )  # fmt: skip
    x = torch.randn(p.in_shape).relu().to(dtype, memory_format=last)
    weight = (torch.randn(p.weight_shape) / (c * window**2) ** 0.5).to(dtype, memory_format=last)
    return Task("conv_affine_act", p, CPU, (x, weight, torch.rand(k) + 0.5, torch.randn(k), None))


def row(task: Task, rounds: int, names: list[str]) -> dict[str, str]:
    """For each kernel that computes the layer what the table says of it."""
    p = task.problem
    assert isinstance(p, ConvProblem)
    out = torch.empty(p.out_shape, dtype=p.dtype, memory_format=torch.channels_last)
    kernels = [k for k in contenders(task, EFFORTS["balanced"]) if k.supports(p, CPU) is None]
    kernels = [k for k in kernels if not names or k.name in names]
    calls = {k.name: call_of(k, task, out) for k in kernels}
    (exact,) = reference(task)
    errors = {name: error(call(), exact).l2 for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    gflop = p.flops / 1e9
    return {
        name: f"{gflop / min(t):.0f} {gflop / statistics.median(t):.0f}  {errors[name]:.1e}"
        for name, t in seconds.items()
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--kernels", nargs="*", default=[], help="default: all")
    options = parser.parse_args()

    rows: dict[str, dict[str, str]] = {}
    with torch.inference_mode():
        for c, k, size, window in track(LAYERS, "measuring", transient=True):
            task = layer(options.batch, c, k, size, window, getattr(torch, options.dtype))
            name = f"{window}x{window} {c}->{k} {size}x{size}"
            rows[name] = row(task, options.rounds, options.kernels)
    setting = f"{options.dtype}, batch {options.batch}, {torch.get_num_threads()} threads"
    table = Table(title=f"{setting}: GFLOP/s in the fastest and the median call, error by norm")
    names = dict.fromkeys(name for found in rows.values() for name in found)
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for name, found in rows.items():
        table.add_row(name, *(found.get(kernel, "") for kernel in names))
    Console().print(table)


if __name__ == "__main__":
    main()
