"""The convolution on AMX tiles of 16 images: on this CPU's tiles, and on emulated ones."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_resnet._build import extension, extension_error
from fused_resnet.backends.cpu_program import Conv, CpuProgram
from fused_resnet.numerics import error
from fused_resnet.problem import EPILOGUES, ConvProblem
from tests.helpers import assert_within_rule, draw, reference, short, stock
from tests.test_cpu_amx import bf16, check, compiled, needs_amx, run

pytestmark = pytest.mark.skipif(
    extension is None, reason=f"no compiled extension: {extension_error}"
)

tiles = pytest.mark.parametrize(
    "tiles", [pytest.param("amx_images", marks=needs_amx), "amx_emulated_images"]
)

GEOMETRIES = {
    "3x3": {"n": 16, "c": 32, "k": 32, "h": 5, "w": 4},
    "two_chunks_two_panels": {"n": 16, "c": 64, "k": 48, "h": 3, "w": 3},
    "fifteen_images": {"n": 15, "c": 32, "k": 16, "h": 3, "w": 2},
    "tiles_of_twelve_images": {"n": 24, "c": 32, "k": 32, "h": 2, "w": 3},
    "last_tile_of_images_smaller": {"n": 47, "c": 32, "k": 16, "h": 2, "w": 2},
    "stride_2": {"n": 16, "c": 32, "k": 32, "h": 7, "w": 6, "stride": (2, 2)},
    "asymmetric": {"n": 12, "c": 32, "k": 16, "h": 6, "w": 7, "r": 5, "s": 3, "stride": (1, 2),
                   "padding": (2, 0)},
    "dilation": {"n": 12, "c": 32, "k": 16, "h": 6, "w": 5, "padding": (2, 3), "dilation": (2, 3)},
    "windows_in_the_padding": {"n": 12, "c": 32, "k": 16, "h": 2, "w": 3, "padding": (4, 5)},
    "no_padding": {"n": 16, "c": 32, "k": 16, "h": 4, "w": 5, "padding": (0, 0)},
    "one_column": {"n": 16, "c": 32, "k": 16, "h": 5, "w": 1, "s": 1, "padding": (1, 0)},
    "groups": {"n": 16, "c": 24, "k": 40, "h": 3, "w": 4, "groups": 4},
    "groups_of_two_chunks": {"n": 12, "c": 100, "k": 70, "h": 3, "w": 2, "groups": 2},
    "cells_not_full": {"n": 16, "c": 63, "k": 33, "h": 3, "w": 3},
}  # fmt: skip


@tiles
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_geometries(tiles: str, geometry: dict[str, Any], epilogue: str) -> None:
    check(tiles, bf16(**{**geometry, "epilogue": epilogue}))


#: Several blocks of rows, of images, and more panels than threads take at a time.
LARGE = {
    "blocks_of_rows": {"n": 16, "c": 256, "k": 96, "h": 14, "w": 14},
    "blocks_of_rows_stride_2": {"n": 16, "c": 256, "k": 32, "h": 15, "w": 17, "stride": (2, 2)},
    "blocks_of_one_row": {"n": 16, "c": 512, "k": 32, "h": 4, "w": 40},
    "blocks_of_images": {"n": 32, "c": 64, "k": 544, "h": 4, "w": 4},
    "dilated_blocks": {"n": 16, "c": 128, "k": 32, "h": 30, "w": 22, "padding": (3, 3),
                       "dilation": (3, 3)},
}  # fmt: skip


@needs_amx
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("geometry", LARGE.values(), ids=LARGE)
def test_large(geometry: dict[str, Any], threads: int) -> None:
    check("amx_images", bf16(**{**geometry, "epilogue": "add_relu"}), threads=threads)


@st.composite
def problems(draw_: st.DrawFn, most: int) -> ConvProblem:
    sizes = st.integers
    r = draw_(sizes(1, 4))
    s = draw_(sizes(2 if r == 1 else 1, 4))
    dilation = draw_(sizes(1, 3)), draw_(sizes(1, 3))
    groups = draw_(st.sampled_from([1, 1, 2, 5]))
    # Other numbers of channels share cells where there is one group.
    channels = st.sampled_from([31, 32, 63, 64]) if groups == 1 else sizes(1, 70)
    return bf16(
        n=draw_(st.sampled_from([12, 13, 16, 24, 31, 48])),
        c=groups * draw_(channels),
        h=draw_(sizes(1, most)) + dilation[0] * (r - 1),
        w=draw_(sizes(1, most)) + dilation[1] * (s - 1),
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
@settings(max_examples=40, deadline=None)
@given(problems(most=8), st.integers(1, 3))
def test_any_problem(p: ConvProblem, threads: int) -> None:
    check("amx_images", p, threads=threads)


@settings(max_examples=5, deadline=None)
@given(problems(most=2), st.integers(1, 3))
def test_any_problem_emulated(p: ConvProblem, threads: int) -> None:
    check("amx_emulated_images", p, threads=threads)


@needs_amx
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_emulation_is_exact(geometry: dict[str, Any]) -> None:
    # Powers of two: whether the epilogue's product is rounded makes no difference.
    p = bf16(**{**geometry, "epilogue": "add_relu"})
    args = draw(p)
    args = args._replace(scale=torch.exp2(args.scale.round()))
    assert torch.equal(run("amx_images", p, args), run("amx_emulated_images", p, args))


@tiles
@pytest.mark.parametrize("geometry", ["3x3", "groups", "last_tile_of_images_smaller"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=short)
def test_nan_and_infinities_stay_in_their_image(tiles: str, geometry: str, value: float) -> None:
    p = bf16(**GEOMETRIES[geometry])
    args = draw(p)
    args.x[p.n - 1, 1, p.h // 2, p.w // 2] = value
    wanted = reference(p, args)
    assert not wanted.isfinite().all()
    found = error(run(tiles, p, args), wanted)
    assert found.finite
    assert found.l2 < 2**-7


@tiles
def test_refusals(tiles: str) -> None:
    for words, geometry in {
        "batch of 11 does not fill": {"n": 11, "c": 32},
        "batch of 20 does not fill": {"n": 20, "c": 32},
        "batch of 0 does not fill": {"n": 0, "c": 32},
        "1x1": {"n": 16, "c": 32, "r": 1, "padding": (0, 0)},
        "share cells": {"n": 16, "c": 8},
        "larger than the cache": {"n": 16, "c": 512, "w": 100},
        "strides": {"n": 16, "c": 32, "h": 40, "stride": (9, 1)},
    }.items():
        assert words in compiled(tiles, bf16(**geometry)).why_not


@needs_amx
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_step_that_runs_depth_first_has_too_few_images(threads: int) -> None:
    # Large images pass one at a time: then rows of pixels fill the tiles.
    p = bf16(n=16, c=32, k=32, h=112, w=112, epilogue="relu")
    args = draw(p)
    packed = compiled("amx_images", p).pack(args.weight)
    values = {0: ((p.n, p.c, p.h, p.w), p.dtype), 1: (p.out_shape, p.dtype)}
    step = Conv(0, 1, p, "amx_images", packed, args.scale, args.shift, None)
    program = CpuProgram([step], values, [0], [1])
    assert program.leading == 1
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        (y,) = program(args.x)
    finally:
        torch.set_num_threads(before)
    assert_within_rule(y, reference(p, args), stock(p, args), p.dtype)


@tiles
def test_nothing_outside_of_the_tensors_is_read(tiles: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.guarded", __name__, tiles],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
