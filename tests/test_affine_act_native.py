"""The native epilogue pass over a convolution's result, at every level, against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_resnet._build import extension
from fused_resnet.problem import EPILOGUES, RESIDUAL_EPILOGUES

pytestmark = pytest.mark.quick

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def vector_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def reference(
    y: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, epilogue: str
) -> Tensor:
    """The definition of the epilogues, in float64."""
    z = y.double() * scale.double().view(1, -1, 1, 1) + shift.double().view(1, -1, 1, 1)
    if epilogue in ("relu", "relu_add_relu"):
        z = z.relu()
    if residual is not None:
        z = z + residual.double()
    if epilogue in ("add_relu", "relu_add_relu"):
        z = z.relu()
    return z


def make(
    shape: tuple[int, int, int, int], dtype: torch.dtype, epilogue: str
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(sum(shape))

    def channels_last() -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(dtype).to(memory_format=torch.channels_last)

    k = shape[1]
    scale = torch.randn(k, generator=generator, dtype=torch.float64).to(vector_dtype(dtype))
    shift = torch.randn(k, generator=generator, dtype=torch.float64).to(vector_dtype(dtype))
    y, residual = channels_last(), channels_last()
    return y, scale, shift, residual if epilogue in RESIDUAL_EPILOGUES else None


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# K of whole vectors, of less than one, and of some with a rest; enough pixels for several threads.
@pytest.mark.parametrize("shape", [(2, 64, 5, 3), (1, 3, 7, 2), (1, 37, 1, 1), (3, 40, 29, 31)])
def test_error_is_one_rounding(
    native: Any, shape: tuple[int, int, int, int], dtype: torch.dtype, epilogue: str
) -> None:
    y, scale, shift, residual = make(shape, dtype, epilogue)
    exact = reference(y, scale, shift, residual, epilogue)
    # Terms that may cancel: fp32 (float64) arithmetic errs relative to these, three times at most.
    size = (y.double() * scale.double().view(1, -1, 1, 1)).abs() + shift.double().abs().view(
        1, -1, 1, 1
    )
    if residual is not None:
        size = size + residual.double().abs()
    arithmetic = 3 * torch.finfo(vector_dtype(dtype)).eps / 2 * size
    rounding = torch.finfo(dtype).eps / 2 * exact.abs()
    before = None if residual is None else residual.clone()
    strides, version = y.stride(), y._version

    assert native.affine_act_(y, scale, shift, residual, epilogue) is None
    assert y.stride() == strides
    assert y._version > version, "autograd would not see the edit"
    assert residual is None or torch.equal(residual, before)
    assert bool(((y.double() - exact).abs() <= rounding * (1 + 1e-3) + arithmetic).all())


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(native: Any, dtype: torch.dtype, epilogue: str) -> None:
    info = torch.finfo(dtype)
    values = [0.0, -0.0, math.inf, -math.inf, math.nan, info.max, info.min, info.tiny, -info.tiny]
    y = torch.tensor(values, dtype=torch.float64).to(dtype).view(1, -1, 1, 1)
    y = y.expand(1, len(values), 3, 3).contiguous(memory_format=torch.channels_last)
    one = torch.ones(len(values), dtype=vector_dtype(dtype))
    # With -0 a sum keeps the sign of a zero.
    shift = torch.full_like(one, -0.0)
    residual = torch.full_like(y, -0.0) if epilogue in RESIDUAL_EPILOGUES else None
    wanted = reference(y, one, shift, residual, epilogue).to(dtype)
    native.affine_act_(y, one, shift, residual, epilogue)
    torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)
    number = ~wanted.isnan()
    assert torch.equal(y.signbit()[number], wanted.signbit()[number])


@pytest.mark.parametrize("epilogue", ["none", "add_relu"])
def test_one_rounding_where_two_would_differ(native: Any, epilogue: str) -> None:
    # bf16 holds 256 and 258 but not 257: the intermediate 257 must not be rounded before the -256.
    y = torch.full((1, 16, 2, 2), 256.0, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    scale, shift = torch.ones(16), torch.full((16,), 1.0 if epilogue == "add_relu" else -255.0)
    residual = torch.full_like(y, -256.0) if epilogue == "add_relu" else None
    native.affine_act_(y, scale, shift, residual, epilogue)
    assert torch.equal(y, torch.ones_like(y))


def test_residual_may_be_y_itself(native: Any) -> None:
    y, scale, shift, _ = make((2, 24, 3, 3), torch.float32, "none")
    wanted = reference(y, scale, shift, y.clone(), "add_relu").float()
    native.affine_act_(y, scale, shift, y, "add_relu")
    torch.testing.assert_close(y, wanted)


@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (2, 0, 3, 3), (2, 8, 0, 3)])
def test_empty(native: Any, shape: tuple[int, int, int, int]) -> None:
    y, scale, shift, residual = make(shape, torch.float32, "add_relu")
    native.affine_act_(y, scale, shift, residual, "add_relu")
    assert y.shape == shape


@pytest.mark.skipif(extension is None, reason="no compiled extension")
def test_refuses_what_it_cannot_compute() -> None:
    assert extension is not None
    y = torch.ones(2, 8, 3, 3).to(memory_format=torch.channels_last)
    v = torch.ones(8)
    refused: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        ((y.contiguous(), v, v, None, "relu"), ValueError, "channels_last"),
        ((y[0], v, v, None, "relu"), ValueError, r"\[N, K, H, W\]"),
        ((y.int(), v, v, None, "relu"), TypeError, "found Int"),
        ((y.to("meta"), v, v, None, "relu"), ValueError, "on the CPU"),
        ((y, v[:7], v, None, "relu"), ValueError, r"scale \[8\], .* found sizes \[7\]"),
        ((y, v, v.view(8, 1), None, "relu"), ValueError, r"shift \[8\]"),
        ((y, v.bfloat16(), v, None, "relu"), TypeError, "scale of dtype Float, found BFloat16"),
        ((y.double(), v, v, None, "relu"), TypeError, "scale of dtype Double, found Float"),
        ((y, v, v, None, "gelu"), ValueError, "found 'gelu'"),
        ((y, v, v, None, "add"), ValueError, "needs a residual"),
        ((y, v, v, y.clone(), "relu"), ValueError, "reads no residual"),
        ((y, v, v, y.half(), "add"), TypeError, "residual of dtype Float, found Half"),
        ((y, v, v, y[:1], "add"), ValueError, r"residual \[2, 8, 3, 3\]"),
        ((y, v, v, y.contiguous(), "add"), ValueError, "residual .* channels_last"),
        ((y[:1], v, v, shifted(y), "add"), ValueError, "partial overlap"),
    ]
    for arguments, error, message in refused:
        with pytest.raises(error, match=message):
            extension.affine_act_(*arguments)


def shifted(y: Tensor) -> Tensor:
    """An image that begins one pixel after the first of ``y`` in the same memory."""
    n, k, h, w = (1, *y.shape[1:])
    return y.as_strided((n, k, h, w), (h * w * k, 1, w * k, k), k)
