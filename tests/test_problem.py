"""Problems as values: shapes, strides, counts, keys and their one-line form."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from fused_resnet.problem import (
    EPILOGUES,
    RESIDUAL_EPILOGUES,
    AddReluProblem,
    MaxPool,
    channels_last_strides,
    conv_out_size,
)
from tests.helpers import GEOMETRIES, conv_problem, draw, stock


@given(st.integers(1, 20), *[st.integers(1, 5)] * 2, st.integers(0, 5), st.integers(1, 4))
def test_out_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> None:
    # The number of places where the window fits into the padded line.
    last = dilation * (kernel - 1)
    places = sum(1 for i in range(0, size + 2 * padding, stride) if i + last < size + 2 * padding)
    assert max(conv_out_size(size, kernel, stride, padding, dilation), 0) == places


@given(*[st.integers(0, 3)] * 4)
def test_channels_last_strides(n: int, c: int, h: int, w: int) -> None:
    wanted = torch.empty((n, c, h, w), memory_format=torch.channels_last).stride()
    assert channels_last_strides(n, c, h, w) == wanted


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_out_shape(geometry: str) -> None:
    p = conv_problem(**GEOMETRIES[geometry])
    assert p.out_shape == tuple(stock(p, draw(p)).shape)
    if min(p.conv_size) > 1:
        pooled = replace(p, pool=MaxPool((3, 2), (2, 1), (1, 1)))
        assert pooled.out_shape == tuple(stock(pooled, draw(pooled)).shape)
        assert pooled.conv_size == p.conv_size


def test_residual_epilogues() -> None:
    assert set(EPILOGUES) >= RESIDUAL_EPILOGUES
    for epilogue in EPILOGUES:
        assert conv_problem(epilogue=epilogue).has_residual == ("add" in epilogue)


def test_is_gemm() -> None:
    p = conv_problem(r=1, padding=(0, 0))
    assert p.is_gemm
    for change in (
        {"r": 3},
        {"s": 3},
        {"stride": (1, 2)},
        {"padding": (1, 0)},
        {"groups": 2},
    ):
        assert not replace(p, **change).is_gemm


def test_counts_of_a_known_layer() -> None:
    # The first 3x3 of ResNet-50's second block: 56x56, 64 -> 64, fp16, batch 2.
    p = conv_problem(2, 64, 56, 56, 64, 3, epilogue="add_relu", dtype=torch.float16)
    assert p.flops == 2 * 2 * 56 * 56 * 64 * 64 * 9
    image = 2 * 64 * 56 * 56 * 2
    assert p.min_bytes == 3 * image + 64 * 64 * 9 * 2 + 64 * 2 * 4
    assert replace(p, epilogue="relu").min_bytes == p.min_bytes - image
    assert AddReluProblem((2, 3), torch.float16, False, True).min_bytes == 36


def test_problems_are_keys() -> None:
    p = conv_problem()
    assert p == conv_problem()
    assert hash(p) == hash(conv_problem())
    changes = {
        "n": 9, "c": 4, "h": 8, "w": 8, "k": 6, "r": 1, "s": 1, "stride": (2, 1),
        "padding": (1, 0), "dilation": (1, 2), "groups": 2, "epilogue": "none",
        "dtype": torch.float16, "x_channels_last": False, "pool": MaxPool((2, 2), (2, 2), (0, 0)),
    }  # fmt: skip
    assert set(changes) == set(p.__dataclass_fields__)
    assert len({p, *(replace(p, **{k: v}) for k, v in changes.items())}) == len(changes) + 1
    with pytest.raises(FrozenInstanceError):
        p.n = 3  # type: ignore[misc]


def test_one_line_form() -> None:
    assert str(conv_problem()) == "conv 3x3 8->12 2x9x7 float32 relu"
    p = conv_problem(
        8, 64, 56, 56, 128, 3, 1, (2, 2), (1, 1), (2, 1), 32, "add_relu", torch.bfloat16
    )
    assert str(p) == "conv 3x1/2 64->128 groups=32 dilation=2x1 8x56x56 bfloat16 add_relu"
    p = conv_problem(stride=(2, 1), epilogue="none", pool=MaxPool((3, 3), (2, 2), (1, 1)))
    assert str(p) == "conv 3x3/2x1 8->12 2x9x7 float32 maxpool 3x3"
    assert str(AddReluProblem((2, 3, 4), torch.float16, True, True)) == "add_relu 2x3x4 float16"
