"""What an image costs as the batch, the resolution and the number of threads grow.

    python -m benchmarks.scaling [--model resnet50] [--dtype float32] [--batch 1 2 4 8 16 32 64]
        [--size 64 112 224 448] [--threads 1 2] [--rounds 15]

All plans of one table, and stock torch in channels_last order, take turns, so that a slow moment of
the machine meets all alike. Each line gives milliseconds an image (of 224x224 pixels, where the
sizes differ), their ratio to the first line's, and stock's milliseconds divided by the plan's: the
medians over the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fused_resnet import images, optimize, zoo

_PIXELS = 224 * 224


@dataclass(frozen=True)
class Line:
    """One line of a table: two contenders, and how many standard images a call is worth."""

    name: str
    plan: Callable[[], object]
    stock: Callable[[], object]
    threads: int
    worth: float


def line(
    network: zoo.Network, dtype: torch.dtype, batch: int, size: int, threads: int, name: str
) -> Line:
    """Optimize the network for one shape [batch, 3, size, size] on ``threads`` threads."""
    torch.set_num_threads(threads)
    x = images.load(transform=images.standard_transform(size)).batch(batch)
    plan = optimize(network.model, x, dtype=dtype)
    stock = zoo.converted(network, dtype, x.device, channels_last=True)
    same = x.to(dtype, memory_format=torch.channels_last)
    worth = batch * size * size / _PIXELS
    return Line(name, lambda: plan(x), lambda: stock(same), threads, worth)


def seconds(run: Callable[[], object], threads: int) -> float:
    """Of one call. New threads begin beside the one that made them: two calls let them spread."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
        run(), run()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def table(title: str, lines: list[Line], rounds: int) -> Table:
    """Time all lines in turns."""
    plans: list[list[float]] = [[] for _ in lines]
    stocks: list[list[float]] = [[] for _ in lines]
    for round_ in track(range(rounds + 1), title, transient=True):
        for i, each in enumerate(lines):
            plan = seconds(each.plan, each.threads) / each.worth
            stock = seconds(each.stock, each.threads) / each.worth
            if round_ > 0:  # the first warms up
                plans[i].append(plan)
                stocks[i].append(stock)
    result = Table(title=title)
    for column in ("", "ms an image", "against the first", "stock / plan"):
        result.add_column(column, justify="right")
    for each, plan_times, stock_times in zip(lines, plans, stocks, strict=True):
        first = [a / b for a, b in zip(plan_times, plans[0], strict=True)]
        gain = [a / b for a, b in zip(stock_times, plan_times, strict=True)]
        cost = statistics.median(plan_times) * 1e3
        against = statistics.median(first)
        result.add_row(each.name, f"{cost:.2f}", f"{against:.2f}", f"{statistics.median(gain):.2f}")
    return result


def main() -> None:
    """Print a table for the batches, one for the sizes, one for the threads."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--size", type=int, nargs="*", default=[64, 112, 224, 448])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()

    dtype = getattr(torch, options.dtype)
    network = zoo.load(options.model)
    zoo.settle(network, images.load().batch(16))
    most = min(torch.get_num_threads(), os.cpu_count() or 1)
    console = Console()
    shapes = {
        "batch": [(n, 224, most, f"batch {n}") for n in options.batch],
        "resolution, batch 1": [(1, s, most, f"{s}x{s}") for s in options.size],
        "threads, batch 1": [(1, 224, t, f"threads: {t}") for t in options.threads],
        "threads, batch 16": [(16, 224, t, f"threads: {t}") for t in options.threads],
    }
    with torch.inference_mode():
        for title, wanted in shapes.items():
            if wanted:
                lines = [line(network, dtype, *shape) for shape in wanted]
                title = f"{options.model} {options.dtype}: {title}"
                console.print(table(title, lines, options.rounds))


if __name__ == "__main__":
    main()
