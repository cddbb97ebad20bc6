"""The convolution on AMX tiles: on the tiles of this CPU, and the same source on emulated ones."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_resnet._build import extension, extension_error
from fused_resnet.numerics import error
from fused_resnet.problem import EPILOGUES, ConvProblem
from tests.helpers import (
    GEOMETRIES,
    Args,
    assert_within_rule,
    conv_problem,
    draw,
    reference,
    short,
    stock,
)

pytestmark = pytest.mark.skipif(
    extension is None, reason=f"no compiled extension: {extension_error}"
)


def has_amx() -> bool:
    return extension is not None and any(
        "amx" in extension.cpu_conv_kernels(isa) for isa in extension.isa_available()
    )


needs_amx = pytest.mark.skipif(not has_amx(), reason="this CPU has no AMX for bf16")
tiles = pytest.mark.parametrize("tiles", [pytest.param("amx", marks=needs_amx), "amx_emulated"])


def compiled(name: str, p: ConvProblem) -> Any:
    assert extension is not None
    geometry = (p.n, p.c, p.h, p.w, p.k, p.r, p.s, *p.stride, *p.padding, *p.dilation, p.groups)
    isa = extension.isa_available()[-1]
    return extension.CpuConv(name, isa, geometry, EPILOGUES.index(p.epilogue), p.dtype)


def run(name: str, p: ConvProblem, args: Args, threads: int = 1) -> Tensor:
    conv = compiled(name, p)
    assert conv.why_not == ""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y: Tensor = conv.run(args.x, conv.pack(args.weight), *args[2:])
    finally:
        torch.set_num_threads(before)
    assert y.is_contiguous(memory_format=torch.channels_last)
    return y


def bf16(**geometry: Any) -> ConvProblem:
    return conv_problem(**{"dtype": torch.bfloat16, **geometry})


def check(name: str, p: ConvProblem, seed: int = 0, threads: int = 1) -> None:
    args = draw(p, seed)
    # ATen's own convolution: oneDNN's for AMX crashes where windows lie in the padding.
    with torch.backends.mkldnn.flags(enabled=False):
        allowed = stock(p, args)
    assert_within_rule(run(name, p, args, threads), reference(p, args), allowed, p.dtype)


@tiles
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_geometries(tiles: str, geometry: dict[str, Any], epilogue: str) -> None:
    check(tiles, bf16(**{**geometry, "epilogue": epilogue}))


#: Several blocks, panels and chunks: tails of each.
LARGE = {
    "1x1_in_place": {"n": 2, "c": 96, "k": 80, "h": 19, "w": 17, "r": 1, "padding": (0, 0)},
    "1x1_wide": {"n": 1, "c": 2048, "k": 544, "h": 9, "w": 5, "r": 1, "padding": (0, 0)},
    "1x1_stride_2": {"c": 64, "k": 160, "h": 15, "r": 1, "stride": (2, 2), "padding": (0, 0)},
    "3x3_blocks_of_rows": {"n": 1, "c": 256, "k": 33, "h": 40, "w": 36},
    "3x3_blocks_of_images": {"n": 9, "c": 64, "k": 32, "h": 7, "w": 7},
    "3x3_small": {"n": 1, "c": 512, "k": 512, "h": 7, "w": 7},
    # The last window of a row ends in a column of padding that has no like at the row's beginning.
    "4x4_stride_2": {"n": 2, "c": 64, "k": 32, "h": 20, "w": 20, "r": 4, "stride": (2, 2),
                     "padding": (1, 1)},
    "groups_of_16": {"n": 3, "c": 64, "k": 128, "h": 14, "w": 14, "groups": 4},
    "groups_of_32_in_place": {"c": 128, "k": 64, "r": 1, "padding": (0, 0), "groups": 4},
    "stem": {"n": 1, "c": 3, "k": 64, "h": 64, "w": 70, "r": 7, "stride": (2, 2),
             "padding": (3, 3)},
}  # fmt: skip


@needs_amx
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("geometry", LARGE.values(), ids=LARGE)
def test_large(geometry: dict[str, Any], threads: int) -> None:
    check("amx", bf16(**{**geometry, "epilogue": "add_relu"}), threads=threads)


@needs_amx
def test_a_result_that_passes_the_caches_by() -> None:
    check("amx", bf16(n=1, c=32, k=256, h=112, w=112, r=1, padding=(0, 0)))


@st.composite
def problems(draw_: st.DrawFn) -> ConvProblem:
    sizes = st.integers
    r, s = draw_(sizes(1, 5)), draw_(sizes(1, 5))
    dilation = draw_(sizes(1, 3)), draw_(sizes(1, 3))
    groups = draw_(st.sampled_from([1, 1, 1, 2, 5]))
    return bf16(
        n=draw_(sizes(1, 3)),
        c=groups * draw_(sizes(1, 70)),
        h=draw_(sizes(1, 20)) + dilation[0] * (r - 1),
        w=draw_(sizes(1, 20)) + dilation[1] * (s - 1),
        k=groups * draw_(sizes(1, 70)),
        r=r,
        s=s,
        stride=(draw_(sizes(1, 4)), draw_(sizes(1, 4))),
        padding=(draw_(sizes(0, 5)), draw_(sizes(0, 5))),
        dilation=dilation,
        groups=groups,
        epilogue=draw_(st.sampled_from(EPILOGUES)),
    )


@needs_amx
@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(1, 3))
def test_any_problem(p: ConvProblem, threads: int) -> None:
    check("amx", p, threads=threads)


@settings(max_examples=15, deadline=None)
@given(problems(), st.integers(1, 3))
def test_any_problem_emulated(p: ConvProblem, threads: int) -> None:
    check("amx_emulated", replace(p, c=p.groups * min(p.c // p.groups, 40)), threads=threads)


@needs_amx
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_emulation_is_exact(geometry: dict[str, Any]) -> None:
    # Powers of two: whether the epilogue's product is rounded makes no difference.
    p = bf16(**{**geometry, "epilogue": "add_relu"})
    args = draw(p)
    args = args._replace(scale=torch.exp2(args.scale.round()))
    assert torch.equal(run("amx", p, args), run("amx_emulated", p, args))


@tiles
@pytest.mark.parametrize("geometry", ["1x1", "3x3", "groups", "stem_7x7"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=short)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_nan_and_infinities_pass(tiles: str, geometry: str, epilogue: str, value: float) -> None:
    p = bf16(**{**GEOMETRIES[geometry], "epilogue": epilogue})
    args = draw(p)
    args.x[0, 1, p.h // 2, p.w // 2] = value
    wanted = reference(p, args)
    assert not wanted.isfinite().all()
    found = error(run(tiles, p, args), wanted)
    assert found.finite
    assert found.l2 < 2**-7


@tiles
def test_subnormal_numbers_count_as_zeros(tiles: str) -> None:
    p = bf16(c=32, k=32, r=1, padding=(0, 0), epilogue="none")
    args = draw(p)
    ones = args._replace(
        weight=torch.ones_like(args.weight), scale=torch.ones(p.k), shift=torch.zeros(p.k)
    )
    tiny = ones._replace(x=torch.full_like(args.x, 1e-39))
    assert (tiny.x > 0).all()
    assert (run(tiles, p, tiny) == 0).all()
    # As in torch, whose oneDNN computes on the same instructions where the CPU has them.
    if tiles == "amx":
        assert (torch.conv2d(tiny.x, tiny.weight) == 0).all()
    assert (run(tiles, p, ones._replace(scale=torch.full((p.k,), 1e-40))) == 0).all()


@tiles
def test_batch_of_none(tiles: str) -> None:
    p = bf16(n=0)
    assert run(tiles, p, draw(p)).shape == p.out_shape


@tiles
def test_refusals(tiles: str) -> None:
    assert "fp32" in compiled(tiles, replace(bf16(), dtype=torch.float32)).why_not
    assert "strides" in compiled(tiles, bf16(h=40, stride=(9, 1))).why_not


def test_the_emulation_is_not_offered() -> None:
    assert extension is not None
    for isa in extension.isa_available():
        assert not any("emulated" in name for name in extension.cpu_conv_kernels(isa))


@tiles
def test_nothing_outside_of_the_tensors_is_read(tiles: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.guarded", __name__, tiles],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
