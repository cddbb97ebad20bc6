"""The rule itself, and the float64 reference against a convolution written as loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fused_resnet.numerics import Error, apply_epilogue, error, reference_conv, stock_conv
from fused_resnet.problem import EPILOGUES, ConvProblem, MaxPool
from tests.helpers import Args, conv_problem, draw

INF, NAN = float("inf"), float("nan")


def test_error_of_known_tensors() -> None:
    reference = torch.tensor([3.0, -4.0], dtype=torch.float64)
    found = error(torch.tensor([3.0, -3.5]), reference)
    assert found == Error(0.5 / 5, 0.5 / 4, True)
    assert error(reference, reference) == Error(0.0, 0.0)
    assert error(torch.empty(0, 3), torch.empty(0, 3)) == Error(0.0, 0.0)
    assert error(torch.ones(2), torch.zeros(2)) == Error(INF, INF)
    assert error(torch.zeros(2), torch.zeros(2)) == Error(0.0, 0.0)


def test_error_of_shapes_that_differ() -> None:
    with pytest.raises(ValueError, match=r"shapes \(2, 1\) and \(2,\)"):
        error(torch.ones(2, 1), torch.ones(2))


@pytest.mark.parametrize(
    ("actual", "reference", "finite"),
    [
        ([1.0, INF], [1.0, INF], True),
        ([1.0, NAN], [1.0, NAN], True),
        ([1.0, -INF], [1.0, INF], False),
        ([1.0, NAN], [1.0, INF], False),
        ([1.0, NAN], [1.0, 2.0], False),
        ([INF, 2.0], [1.0, 2.0], False),
        ([1.0, 2.0], [1.0, NAN], False),
    ],
)
def test_infinities_and_nans(actual: list[float], reference: list[float], finite: bool) -> None:
    found = error(torch.tensor(actual), torch.tensor(reference))
    assert found.finite == finite
    assert found.within(Error(1.0, 1.0), torch.float32) == finite


def test_overflow_is_excused_only_where_stock_overflows_too() -> None:
    assert Error(0.0, 0.0, False).within(Error(0.0, 0.0, False), torch.float16)
    assert not Error(0.0, 0.0, False).within(Error(0.0, 0.0, True), torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rule(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    stock = Error(3 * eps, 5 * eps)
    # The order of an fp32 sum moves single elements by some fp32 units, whatever the dtype.
    worst = 11 * eps + 8 * torch.finfo(torch.float32).eps
    assert Error(7 * eps, worst).within(stock, dtype)
    assert not Error(7.1 * eps, 0.0).within(stock, dtype)
    assert not Error(0.0, 1.01 * worst).within(stock, dtype)
    assert not Error(NAN, 0.0).within(stock, dtype)
    assert not Error(0.0, INF).within(stock, dtype)


def loops(p: ConvProblem, args: Args) -> Tensor:
    """The op by its definition, one number after another."""
    x, weight, scale, shift, residual = (None if t is None else t.double() for t in args)
    oh, ow = p.conv_size
    y = torch.zeros(p.n, p.k, oh, ow, dtype=torch.float64)
    per_group = p.k // p.groups
    for n, k, i, j in itertools.product(range(p.n), range(p.k), range(oh), range(ow)):
        total = 0.0
        for c, r, s in itertools.product(range(p.c // p.groups), range(p.r), range(p.s)):
            h = i * p.stride[0] - p.padding[0] + r * p.dilation[0]
            w = j * p.stride[1] - p.padding[1] + s * p.dilation[1]
            if 0 <= h < p.h and 0 <= w < p.w:
                channel = k // per_group * (p.c // p.groups) + c
                total += float(x[n, channel, h, w]) * float(weight[k, c, r, s])
        z = total * float(scale[k]) + float(shift[k])
        r_value = 0.0 if residual is None else float(residual[n, k, i, j])
        y[n, k, i, j] = {
            "none": z,
            "relu": max(z, 0.0),
            "add": z + r_value,
            "add_relu": max(z + r_value, 0.0),
            "relu_add_relu": max(max(z, 0.0) + r_value, 0.0),
        }[p.epilogue]
    return y


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("groups", [1, 2])
def test_references_against_loops(epilogue: str, groups: int) -> None:
    p = conv_problem(
        1, 4, 5, 4, 2, 3, 2, (2, 1), (1, 2), (1, 2), groups, epilogue, torch.float64
    )  # fmt: skip
    args = draw(p)
    wanted = loops(p, args)
    for function in (reference_conv, stock_conv):
        actual = function(p, *args)
        assert actual.dtype == torch.float64
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


def test_reference_of_the_stem() -> None:
    pool = MaxPool((3, 2), (2, 1), (1, 0))
    p = conv_problem(1, 2, 5, 6, 3, dtype=torch.float64, pool=pool)
    y = loops(p, draw(p))
    padded = torch.full((1, 3, 7, 6), -INF, dtype=torch.float64)
    padded[:, :, 1:-1] = y
    for function in (reference_conv, stock_conv):
        actual = function(p, *draw(p))
        assert tuple(actual.shape) == p.out_shape
        for i, j in itertools.product(range(p.out_shape[2]), range(p.out_shape[3])):
            window = padded[:, :, 2 * i : 2 * i + 3, j : j + 2].amax((2, 3))
            torch.testing.assert_close(actual[:, :, i, j], window, rtol=1e-12, atol=1e-12)


def test_reference_of_low_precision_is_float64() -> None:
    p = conv_problem(dtype=torch.bfloat16, epilogue="add_relu")
    args = draw(p)
    assert reference_conv(p, *args).dtype == torch.float64
    assert stock_conv(p, *args).dtype == torch.bfloat16


def test_apply_epilogue_leaves_its_arguments() -> None:
    z, r = torch.tensor([-1.0, 2.0]), torch.tensor([0.5, -5.0])
    wanted = {"none": [-1, 2], "relu": [0, 2], "add": [-0.5, -3], "add_relu": [0, 0],
              "relu_add_relu": [0.5, 0]}  # fmt: skip
    for epilogue, values in wanted.items():
        given = None if epilogue in ("none", "relu") else r
        assert apply_epilogue(z, given, epilogue).tolist() == values
    assert z.tolist() == [-1.0, 2.0]
    assert r.tolist() == [0.5, -5.0]
