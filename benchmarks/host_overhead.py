"""What one call costs on the host: fused modules against stock's, one thread, small images.

    python -m benchmarks.host_overhead

The contenders take turns, and CPU time of the thread is read, so that other load counts little.
Each line gives the medians and their ratio; below 1 the fused call is the cheaper one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torchvision
from torch import nn

import fused_resnet

_ROUNDS = 25
_CHANNELS_LAST = torch.channels_last


def _medians(runs: list[Callable[[], object]], calls: int) -> list[float]:
    """Microseconds of CPU time a call, for each of ``runs``."""
    times: list[list[float]] = [[] for _ in runs]
    for round_ in range(_ROUNDS + 1):
        for run, mine in zip(runs, times, strict=True):
            start = time.thread_time()
            for _ in range(calls):
                run()
            if round_ > 0:  # the first warms up
                mine.append((time.thread_time() - start) / calls * 1e6)
    return [statistics.median(mine) for mine in times]


def _report(
    what: str, fused: Callable[[], object], stock: Callable[[], object], calls: int
) -> None:
    ours, theirs = _medians([fused, stock], calls)
    print(f"{what:<48} fused {ours:8.1f} us  stock {theirs:8.1f} us  ratio {ours / theirs:.2f}")


def main() -> None:
    """Measure one ConvBNAct and ResNet-18 at 32x32 and 64x64, without and with version counters."""
    torch.set_num_threads(1)
    block = fused_resnet.ConvBNAct(16, 16, 3).eval().to(memory_format=_CHANNELS_LAST)
    relu = nn.ReLU(inplace=True)
    network = torchvision.models.resnet18().eval().to(memory_format=_CHANNELS_LAST)
    fused = fused_resnet.fuse(network)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            x = torch.randn(1, 16, 8, 8).contiguous(memory_format=_CHANNELS_LAST)
            _report(
                f"{mode.__name__}: ConvBNAct, 16 channels, 1x8x8",
                lambda x=x: block(x),
                lambda x=x: relu(block.bn(block.conv(x))),
                200,
            )
            for size in (32, 64):
                x = torch.randn(1, 3, size, size).contiguous(memory_format=_CHANNELS_LAST)
                _report(
                    f"{mode.__name__}: ResNet-18, 1x{size}x{size}, channels_last",
                    lambda x=x: fused(x),
                    lambda x=x: network(x),
                    5,
                )


if __name__ == "__main__":
    main()
