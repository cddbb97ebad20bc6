"""What plans take of memory while they serve, and what the limit on it costs in speed.

    python -m benchmarks.memory [--model resnet18 resnet50] [--batch 1 16] [--dtype float32]
        [--rounds 15]

Plans with each value of ``compact`` take turns: their speed is the median over the rounds of
``compact=False``'s time divided by theirs. Then each, and stock torch in channels_last order, runs
in a process of its own, which reads it from a file: measured are the bytes of the process's own at
the most during three later calls, above those after the imports. Bytes that a plan counts stand
beside them.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import fused_resnet
from fused_resnet import footprint, images, zoo

_COMPACT = {"None": None, "False": False, "True": True}


def serve(kind: str, model: str, folder: Path) -> int:
    """Bytes that this process holds at the most while ``kind`` answers three times."""
    before = _settled()
    x = torch.load(folder / "x.pt", weights_only=True)
    run: Callable[[Any], Any]
    if kind == "stock":
        with torch.device("meta"):
            stock: nn.Module = torchvision.models.get_model(model)
        state = torch.load(folder / "stock.pt", weights_only=True)
        stock.load_state_dict(state, assign=True)
        dtype = next(t.dtype for t in state.values() if t.is_floating_point())
        x = x.to(dtype, memory_format=torch.channels_last)
        run = stock.eval()
        del state
    else:
        run = fused_resnet.load(folder / f"{kind}.plan")
    with torch.inference_mode():
        for _ in range(3):
            run(x)
        _settled()
        for _ in range(3):
            run(x)
    peak = footprint.peak()
    assert peak is not None
    return peak - before


def _settled() -> int:
    """Bytes held now, from which on the peak is measured."""
    gc.collect()
    footprint.give_back()
    held = footprint.resident()
    if held is None or not footprint.reset_peak():
        raise SystemExit("this system does not tell what a process holds: Linux's /proc is needed")
    return held


def measured(kind: str, model: str, folder: Path) -> float:
    """`serve` in a process of its own; in MB."""
    command = [sys.executable, "-m", "benchmarks.memory"]
    command += ["--serve", kind, "--folder", str(folder), "--model", model]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout) / 1e6


def rows(name: str, batch: int, dtype: torch.dtype, rounds: int, folder: Path) -> list[list[str]]:
    """Lines of the table for one network and batch."""
    network = zoo.load(name)
    zoo.settle(network, images.load().batch(16))
    x = images.load().batch(batch)
    plans = {
        kind: fused_resnet.optimize(network.model, x, dtype=dtype, compact=compact)
        for kind, compact in _COMPACT.items()
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in plans}
    with torch.inference_mode():
        for round_ in track(range(rounds + 1), f"{name}, batch {batch}", transient=True):
            for kind, plan in plans.items():
                start = time.perf_counter()
                plan(x)
                if round_ > 0:  # the first warms up
                    seconds[kind].append(time.perf_counter() - start)
    stock = zoo.converted(network, dtype, x.device, channels_last=True)
    torch.save(stock.state_dict(), folder / "stock.pt")
    torch.save(x, folder / "x.pt")
    title = f"{name}, {str(dtype).removeprefix('torch.')}, batch {batch}"
    counted = plans["None"].memory.stock_total / 1e6
    found = [
        [title, "stock", "", f"{measured('stock', name, folder):.0f}", f"{counted:.0f}"],
    ]
    for kind, plan in plans.items():
        plan.save(folder / f"{kind}.plan")
        ratios = [a / b for a, b in zip(seconds["False"], seconds[kind], strict=True)]
        speed, held = statistics.median(ratios), measured(kind, name, folder)
        counted = plan.memory.total / 1e6
        found.append(["", f"compact={kind}", f"{speed:.2f}", f"{held:.0f}", f"{counted:.0f}"])
    return found


def main() -> None:
    """Print the table, or for ``--serve`` the bytes of one contender."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--model", nargs="+", default=["resnet18", "resnet50"], help="torchvision's names"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--serve", choices=["stock", *_COMPACT], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in options.model:
        if name not in torchvision.models.list_models(torchvision.models):
            parser.error(f"torchvision.models has no {name!r}")

    if options.serve is not None:
        print(serve(options.serve, options.model[0], options.folder))
        return
    table = Table()
    for column in ("", "", "speed", "MB measured", "MB counted"):
        table.add_column(column, justify="right")
    for name in options.model:
        for batch in options.batch:
            with tempfile.TemporaryDirectory() as folder:
                dtype = getattr(torch, options.dtype)
                for row in rows(name, batch, dtype, options.rounds, Path(folder)):
                    table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
