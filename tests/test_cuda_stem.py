"""The stem of csrc/cuda, executed on the emulator, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fused_resnet.backends.cuda import round_to_tf32
from fused_resnet.numerics import error, reference_conv, stock_conv
from fused_resnet.problem import ConvProblem, MaxPool
from tests import cuda_emulated as emulated
from tests.emulator import SCHEDULES

ARITHMETICS = tuple(emulated.DTYPES)
POOL = MaxPool((3, 3), (2, 2), (1, 1))

#: N, C, H, W, K, padding.
SIZES = {
    "image": (1, 3, 64, 64, 64, (3, 3)),
    "odd": (2, 3, 37, 51, 64, (3, 3)),
    "ragged_channels": (1, 3, 33, 20, 72, (3, 3)),
    "odd_channels": (1, 3, 21, 35, 37, (3, 3)),
    "gray": (1, 1, 30, 31, 64, (3, 3)),
    "four_channels": (1, 4, 25, 26, 64, (3, 3)),
    "no_padding": (1, 3, 23, 24, 64, (0, 0)),
    "uneven_padding": (1, 3, 23, 19, 64, (5, 2)),
    "smallest": (1, 3, 1, 1, 64, (3, 3)),
}

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def problem_of(name: str, arithmetic: str) -> ConvProblem:
    n, c, h, w, k, padding = SIZES[name]
    dtype = emulated.DTYPES[arithmetic]
    return ConvProblem(n, c, h, w, k, 7, 7, (2, 2), padding, (1, 1), 1, "relu", dtype, True, POOL)


def inputs(problem: ConvProblem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p, generator = problem, torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weight = draw(p.k, p.c, 7, 7) / math.sqrt(p.c * 49)
    return draw(p.n, p.c, p.h, p.w).to(p.dtype), weight.to(p.dtype), draw(p.k) + 1, draw(p.k)


def assert_right(
    result: Tensor, problem: ConvProblem, arithmetic: str, x: Tensor, weight: Tensor, *rest: Tensor
) -> None:
    reference = reference_conv(problem, x, weight, *rest, None)
    if arithmetic == "tf32":
        x, weight = round_to_tf32(x.float()), round_to_tf32(weight)
    stock = stock_conv(problem, x.to(problem.dtype), weight, *rest, None)
    found, allowed = error(result, reference), error(stock, reference)
    assert found.within(allowed, problem.dtype), f"{problem}: {found}, stock {allowed}"


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_stem(arithmetic: str, name: str) -> None:
    problem = problem_of(name, arithmetic)
    x, *rest = inputs(problem)
    turn = list(SIZES).index(name)
    x = x.contiguous(memory_format=list(LAYOUTS.values())[turn % 2])
    run = emulated.Run(schedule=SCHEDULES[turn % 3], seed=turn)
    result = emulated.stem(run, problem, arithmetic, x, *rest)
    assert run.findings == []
    assert_right(result, problem, arithmetic, x, *rest)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_stem_full_size(arithmetic: str, layout: str) -> None:
    problem = ConvProblem(
        2, 3, 224, 224, 64, 7, 7, (2, 2), (3, 3), (1, 1), 1, "relu", emulated.DTYPES[arithmetic],
        True, POOL,
    )  # fmt: skip
    x, *rest = inputs(problem)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    result = emulated.stem(emulated.Run(), problem, arithmetic, x, *rest)
    assert_right(result, problem, arithmetic, x, *rest)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_bytes_are_normalised(arithmetic: str, layout: str) -> None:
    """Bytes less mean over std, and zeros (not black) around the image."""
    problem = problem_of("odd", arithmetic)
    _, *rest = inputs(problem)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    generator = torch.Generator().manual_seed(1)
    shape = (problem.n, problem.c, problem.h, problem.w)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    pixels = pixels.contiguous(memory_format=LAYOUTS[layout])
    run = emulated.Run()
    result = emulated.stem(run, problem, arithmetic, pixels, *rest, mean, std)
    assert run.findings == []
    means, stds = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (mean, std))
    assert_right(result, problem, arithmetic, (pixels.double() / 255 - means) / stds, *rest)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_nan_survives_relu_and_pool(arithmetic: str) -> None:
    problem = problem_of("odd", arithmetic)
    x, *rest = inputs(problem)
    x[0, 1, 20, 30] = float("nan")
    result = emulated.stem(emulated.Run(), problem, arithmetic, x, *rest)
    reference = reference_conv(problem, x, *rest, None)
    assert 0 < int(reference.isnan().sum()) < reference.numel()
    assert torch.equal(result.isnan(), reference.isnan())


@pytest.mark.parametrize("name", ["odd", "odd_channels"])
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_checked_build_reports_nothing(arithmetic: str, name: str) -> None:
    problem = problem_of(name, arithmetic)
    x, *rest = inputs(problem)
    turn = ARITHMETICS.index(arithmetic)
    run = emulated.Run(
        checked=True, schedule=SCHEDULES[turn % 3], placement=("left", "right")[turn % 2]
    )
    result = emulated.stem(run, problem, arithmetic, x, *rest)
    assert run.findings == []
    assert_right(result, problem, arithmetic, x, *rest)
    (report,) = run.reports
    assert report.conflicts("ldmatrix") == 1.0
    y = report.buffers["y"]
    assert y.bytes_written == y.unique_bytes_written == result.numel() * result.element_size()
