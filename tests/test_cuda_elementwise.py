"""add_relu, global_average_pool and transpose of csrc/cuda, executed on the emulator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_resnet.numerics import error
from tests import cuda_emulated as emulated
from tests.emulator import SCHEDULES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def runs(seed: int) -> tuple[emulated.Run, emulated.Run]:
    schedule = SCHEDULES[seed % 3]
    return (
        emulated.Run(schedule=schedule, seed=seed),
        emulated.Run(checked=True, schedule=schedule, seed=seed),
    )


@pytest.mark.parametrize("count", [1, 7, 8, 9, 31, 4096, 10_007])
@pytest.mark.parametrize(
    "placements",
    [("left",) * 3, ("right",) * 3, ("left", "right", "right"), ("right", "right", "left"), None],
    ids=["aligned", "alike", "a_differs", "y_differs", "inplace"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_relu(dtype: torch.dtype, placements, count: int) -> None:
    a, b = draw(count, dtype=dtype), draw(count, 1, dtype=dtype).flatten()
    a[count // 2] = float("nan")
    for run in runs(count):
        y = emulated.add_relu(run, a, b, placements)
        assert run.findings == []
        # One addition, rounded once, has one right result.
        torch.testing.assert_close(y, torch.relu(a + b), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_relu_moves_16_bytes(dtype: torch.dtype) -> None:
    a = draw(4099, dtype=dtype)
    run = emulated.Run(checked=True)
    emulated.add_relu(run, a, a.clone(), ("right",) * 3)
    for traffic in run.reports[0].buffers.values():
        widths = {**traffic.reads, **traffic.writes} if traffic.bytes_written else traffic.reads
        singles = sum(n for width, n in widths.items() if width not in ("16", "other"))
        assert widths["16"] >= 4099 * dtype.itemsize // 16 - 1
        assert singles < 2 * 16 // dtype.itemsize


@pytest.mark.parametrize("shape", [(1, 49, 512), (2, 1, 64), (3, 50, 37), (1, 4, 300), (2, 9, 8)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_global_average_pool(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    x = draw(*shape, dtype=dtype)
    reference = x.double().mean(1)
    stock = torch.nn.functional.adaptive_avg_pool2d(x.mT[..., None], 1).flatten(1)
    for run in runs(sum(shape)):
        y = emulated.global_average_pool(run, x)
        assert run.findings == []
        assert error(y, reference).within(error(stock, reference), dtype)


@pytest.mark.parametrize(
    "shape", [(1, 64, 64), (2, 3, 50), (1, 65, 130), (2, 72, 40), (1, 1, 7), (1, 37, 64)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transpose(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    x = draw(*shape, dtype=dtype)
    for run in runs(sum(shape)):
        y = emulated.transpose(run, x)
        assert run.findings == []
        assert torch.equal(y, x.mT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transpose_moves_16_bytes_without_conflicts(dtype: torch.dtype) -> None:
    run = emulated.Run(checked=True)
    emulated.transpose(run, draw(1, 128, 192, dtype=dtype))
    (report,) = run.reports
    assert {w for w, n in report.buffers["x"].reads.items() if n} == {"16"}
    assert {w for w, n in report.buffers["y"].writes.items() if n} == {"16"}
    assert report.conflicts("shared_load") == report.conflicts("shared_store") == 1.0
