"""Native convolutions of the CPU against float64: geometry, instruction sets, dtypes, odd values."""

from __future__ import annotations

import ctypes
import ctypes.util
import mmap
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fused_resnet._build import extension
from fused_resnet.backends.cpu import native_conv
from fused_resnet.numerics import error, reference_conv, stock_conv
from fused_resnet.problem import EPILOGUES, ConvProblem, conv_out_size
from tests.helpers import GEOMETRIES, conv_problem, draw, short

pytestmark = pytest.mark.skipif(extension is None, reason="no compiled extension")

DTYPES = (torch.float32, torch.bfloat16)
LEVELS = () if extension is None else tuple(extension.isa_available())


def run(p: ConvProblem, isa: str, *args: Tensor | None, name: str = "direct") -> Tensor:
    x, weight, scale, shift, residual = args
    conv = native_conv(name, isa, p)
    result: Tensor = conv.run(x, conv.pack(weight), scale, shift, residual)
    return result


def assert_right(p: ConvProblem, isa: str, seed: int = 0) -> None:
    args = draw(p, seed)
    result = run(p, isa, *args)
    assert result.dtype == p.dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    expected = reference_conv(p, *args)
    found, allowed = error(result, expected), error(stock_conv(p, *args), expected)
    assert found.within(allowed, p.dtype), (str(p), str(found), str(allowed))


@st.composite
def problems(draw: st.DrawFn) -> ConvProblem:
    """Any geometry that has an output; channels around the widths of vectors and panels."""
    integer = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 4, 8, 17]))
    c, k = (groups * draw(st.sampled_from([1, 2, 3, 4, 5, 8, 11, 16, 33])) for _ in range(2))
    if groups == 1:
        c, k = integer(1, 80), draw(st.sampled_from([1, 7, 16, 17, 40, 48, 64, 65, 100, 140]))
    r, s = integer(1, 4), integer(1, 4)
    stride, padding = (integer(1, 3), integer(1, 3)), (integer(0, 4), integer(0, 4))
    dilation = (integer(1, 3), integer(1, 3))
    # The least image on which the kernel fits, and up to 12 pixels more.
    low_h = max(1, dilation[0] * (r - 1) + 1 - 2 * padding[0])
    low_w = max(1, dilation[1] * (s - 1) + 1 - 2 * padding[1])
    h, w = low_h + integer(0, 12), low_w + integer(0, 12)
    assert conv_out_size(h, r, stride[0], padding[0], dilation[0]) > 0
    return conv_problem(
        integer(1, 3), c, h, w, k, r, s, stride, padding, dilation, groups,
        draw(st.sampled_from(EPILOGUES)), draw(st.sampled_from(DTYPES)),
    )  # fmt: skip


@pytest.mark.parametrize("isa", LEVELS)
@given(p=problems(), seed=st.integers(0, 1000))
def test_any_geometry(isa: str, p: ConvProblem, seed: int) -> None:
    assert_right(p, isa, seed)
