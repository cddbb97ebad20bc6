"""What one call costs on the host: fused modules against stock's, one thread, small images.

    python -m benchmarks.host_overhead

The contenders take turns, and CPU time of the thread is read, so that other load counts little.
Each line gives the medians and their ratio; below 1 the fused call is the cheaper one.

The last lines are of Triton's kernels with the launch replaced by nothing, so that no GPU is
needed: what remains is looking up the problem, allocating the result and gathering the arguments,
beside allocating the result alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from unittest import mock

import torch
import torchvision
from torch import nn

import fused_resnet
from fused_resnet.problem import ConvProblem

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


def _report_triton() -> None:
    """Calls of Triton's kernels whose launches do nothing, for one GPU of each kind."""
    from fused_resnet.backends.triton_ import kernels, launch, layout, paths
    from fused_resnet.backends.triton_.config import ARCHS

    def bind(_launch: object, _device: object) -> Callable[..., None]:
        return lambda *_arguments: None

    patches = [mock.patch.object(module, "bind", bind) for module in (paths, layout, launch)]
    with ExitStack() as stack, torch.inference_mode():
        for patch in patches:
            stack.enter_context(patch)
        for name, k, r in (("1x1", 256, 1), ("3x3", 64, 3)):
            pad = (r // 2, r // 2)
            p = ConvProblem(
                8, 64, 14, 14, k, r, r, (1, 1), pad, (1, 1), 1, "add_relu", torch.float16
            )
            x = torch.zeros(8, 64, 14, 14, dtype=p.dtype).to(memory_format=_CHANNELS_LAST)
            # A parameter: what is not may be a temporary, and is packed at every call.
            weight = nn.Parameter(torch.zeros(k, 64, r, r, dtype=p.dtype), requires_grad=False)
            residual = torch.zeros(p.out_shape, dtype=p.dtype).to(memory_format=_CHANNELS_LAST)
            data = x, weight, torch.ones(k), torch.zeros(k), residual
            for arch in ARCHS:
                if arch.capability not in (80, 90, 100):
                    continue
                kernel = kernels.TritonConv(arch)
                runs = [partial(kernel.run, p, *data), partial(torch.empty_like, residual)]
                called, allocated = _medians(runs, 200)
                print(
                    f"{f'Triton, sm_{arch.capability}, {name}, launch stubbed':<48} "
                    f"call  {called:8.1f} us  empty {allocated:8.1f} us"
                )


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
    try:
        _report_triton()
    except ImportError:
        print("Triton is not installed: its calls are left out")


if __name__ == "__main__":
    main()
