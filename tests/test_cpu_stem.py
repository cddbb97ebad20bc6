"""The native stem against float64: every level of the CPU, and AMX tiles, real and emulated."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_resnet import backends
from fused_resnet._build import extension, extension_error
from fused_resnet.backends.cpu import NativeStem, geometry, native_stem, pool_window
from fused_resnet.numerics import reference_conv, stock_conv
from fused_resnet.problem import ConvProblem, MaxPool
from tests.helpers import assert_within_rule, conv_problem, draw, short
from tests.test_cpu_amx import has_amx, needs_amx

pytestmark = pytest.mark.skipif(
    extension is None, reason=f"no compiled extension: {extension_error}"
)

DTYPES = (torch.float32, torch.bfloat16)
LEVELS = ("generic",) if extension is None else tuple(extension.isa_available())
POOL = MaxPool((3, 3), (2, 2), (1, 1))

#: Level, how the convolution is computed, and which elements it has.
STEMS = [
    *(pytest.param(isa, "direct", dtype, id=f"{isa}-{short(dtype)}")
      for isa in LEVELS for dtype in DTYPES),
    pytest.param(LEVELS[-1], "amx", torch.bfloat16, id="amx", marks=needs_amx),
    pytest.param(LEVELS[-1], "amx_emulated", torch.bfloat16, id="amx_emulated"),
]  # fmt: skip
every_stem = pytest.mark.parametrize(("isa", "name", "dtype"), STEMS)

#: How x lies in memory.
LAYOUTS = ("nchw", "channels_last", "every_other")


def stem(isa: str, name: str, p: ConvProblem) -> Any:
    assert extension is not None
    assert p.pool is not None
    return extension.CpuStem(isa, geometry(p), pool_window(p.pool), p.dtype, name)


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def lay_out(x: Tensor, layout: str) -> Tensor:
    if layout == "nchw":
        return x.contiguous()
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    wide = x.new_full((x.size(0), 2 * x.size(1), x.size(2), 2 * x.size(3)), math.nan)
    wide[:, ::2, :, ::2] = x
    return wide[:, ::2, :, ::2]


def check(
    isa: str, name: str, p: ConvProblem, layout: str = "nchw", wide: bool = False, threads: int = 1
) -> None:
    x, weight, scale, shift, _residual = draw(p)
    given = lay_out(x, layout)
    # A little less than x, which is what it is rounded to.
    given = given.float() * (1 - 2**-12) if wide and p.dtype == torch.bfloat16 else given
    compiled = stem(isa, name, p)
    with on_threads(threads):
        result = compiled.run(given, compiled.pack(weight), scale, shift)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert result.shape == p.out_shape
    with torch.backends.mkldnn.flags(enabled=False):
        stock = stock_conv(p, x, weight, scale, shift, None)
    assert_within_rule(result, reference_conv(p, x, weight, scale, shift, None), stock, p.dtype)


@st.composite
def problems(draw_: st.DrawFn, dtype: torch.dtype, small: bool) -> ConvProblem:
    integer = lambda low, high: draw_(st.integers(low, high))  # noqa: E731
    window, padding = (integer(1, 4), integer(1, 4)), (integer(0, 2), integer(0, 2))
    pool = MaxPool(
        window,
        (integer(1, 3), integer(1, 3)),
        (min(padding[0], window[0] // 2), min(padding[1], window[1] // 2)),
    )
    return conv_problem(
        integer(0, 1 if small else 3), draw_(st.sampled_from([1, 3, 4, 5, 11])),
        integer(12, 40), integer(12, 40),
        draw_(st.sampled_from([1, 33] if small else [1, 16, 40, 64, 70])),
        integer(1, 7), integer(1, 7), (integer(1, 2), integer(1, 3)),
        (integer(0, 3), integer(0, 3)), dtype=dtype, pool=pool,
    )  # fmt: skip


@every_stem
@settings(deadline=None)
@given(data=st.data())
def test_any_problem(isa: str, name: str, dtype: torch.dtype, data: st.DataObject) -> None:
    # Emulation is slow.
    p = data.draw(problems(dtype, small=name == "amx_emulated"))
    layout = data.draw(st.sampled_from(LAYOUTS))
    check(isa, name, p, layout, data.draw(st.booleans()), data.draw(st.integers(1, 3)))


@every_stem
@pytest.mark.parametrize("layout", LAYOUTS)
def test_odd_values_pass(isa: str, name: str, dtype: torch.dtype, layout: str) -> None:
    p = conv_problem(1, 3, 24, 40, 20, 7, None, (2, 2), (3, 3), dtype=dtype, pool=POOL)
    x, weight, _scale, shift, _residual = draw(p)
    for column, value in ((5, math.nan), (20, math.inf), (35, -math.inf)):
        x[0, 1, 12, column] = value
    compiled = stem(isa, name, p)
    result = compiled.run(lay_out(x, layout), compiled.pack(weight), torch.ones(p.k), shift)
    expected = reference_conv(p, x, weight, torch.ones(p.k), shift, None)
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.isinf(), expected.isinf())


#: A ResNet's, and tails of tiles and panels: of one pixel, of one channel.
LARGE = {
    "resnet": {"n": 2, "c": 3, "h": 224, "w": 224, "k": 64},
    "tails": {"n": 3, "c": 4, "h": 31, "w": 33, "k": 33},
}


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("size", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("name", ["direct", pytest.param("amx", marks=needs_amx)])
def test_large(name: str, size: dict[str, int], threads: int) -> None:
    p = conv_problem(**size, r=7, stride=(2, 2), padding=(3, 3), dtype=torch.bfloat16, pool=POOL)  # type: ignore[arg-type]
    check(LEVELS[-1], name, p, threads=threads, wide=True)


@needs_amx
@pytest.mark.parametrize("c", [1, 3, 5])
def test_emulation_is_exact(c: int) -> None:
    # Powers of two: whether the epilogue's product is rounded makes no difference.
    p = conv_problem(
        1, c, 23, 37, 40, 7, None, (2, 2), (3, 3), dtype=torch.bfloat16, pool=POOL
    )  # fmt: skip
    x, weight, scale, shift, _residual = draw(p)
    results = [
        compiled.run(x, compiled.pack(weight), torch.exp2(scale.round()), shift)
        for compiled in (stem(LEVELS[-1], name, p) for name in ("amx", "amx_emulated"))
    ]
    assert torch.equal(*results)


@needs_amx
def test_tiles_go_first() -> None:
    p = conv_problem(dtype=torch.bfloat16, pool=POOL, h=40, w=40)
    op, cpu = "conv_affine_relu_maxpool", torch.device("cpu")
    assert backends.candidates(op, p, cpu)[0].full_name == "cpu/stem"
    kernel = NativeStem()
    assert not kernel.promising(replace(p, dtype=torch.float16), cpu)
    assert not kernel.promising(p, torch.device("cuda"))


def test_tiles_are_taken_where_the_cpu_has_them() -> None:
    for isa in LEVELS:
        for dtype in DTYPES:
            tiles = has_amx() and isa == "avx512" and dtype == torch.bfloat16
            p = conv_problem(dtype=dtype, pool=POOL)
            assert native_stem(isa, p).name == ("amx" if tiles else "direct")
            with pytest.raises(ValueError, match="named winograd"):
                stem(isa, "winograd", p)
            if dtype == torch.float32:
                with pytest.raises(ValueError, match="named amx_emulated"):
                    stem(isa, "amx_emulated", p)
