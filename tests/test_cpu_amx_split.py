"""Convolutions of fp32 on AMX tiles, each number split into three of bf16; emulated as well."""

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

from fused_resnet import backends
from fused_resnet._build import extension, extension_error
from fused_resnet.backends import cpu
from fused_resnet.numerics import error
from fused_resnet.problem import EPILOGUES, ConvProblem
from tests import test_cpu_amx, test_cpu_amx_images
from tests.helpers import GEOMETRIES, Args, conv_problem, draw, reference, short
from tests.test_cpu_amx import check, compiled, needs_amx, run

pytestmark = pytest.mark.skipif(
    extension is None, reason=f"no compiled extension: {extension_error}"
)

ROWS = [pytest.param("amx_bf16x6", marks=needs_amx), "amx_emulated_bf16x6"]
IMAGES = [pytest.param("amx_bf16x6_images", marks=needs_amx), "amx_emulated_bf16x6_images"]
rows = pytest.mark.parametrize("tiles", ROWS)
images = pytest.mark.parametrize("tiles", IMAGES)

#: Several blocks of pixels too, which split numbers make of 1x1s that bf16 reads in place.
LARGE = {
    **test_cpu_amx.LARGE,
    "1x1_of_very_many_channels": {"n": 1, "c": 8192, "k": 32, "h": 9, "w": 5, "r": 1,
                                  "padding": (0, 0)},
    "1x1_blocks_of_pixels": {"n": 3, "c": 1024, "k": 64, "h": 17, "w": 19, "r": 1,
                             "padding": (0, 0)},
}  # fmt: skip

#: Split numbers take three times the room.
LARGE_IMAGES = {
    **test_cpu_amx_images.LARGE,
    "blocks_of_one_row": {**test_cpu_amx_images.LARGE["blocks_of_one_row"], "c": 128},
}


def with_epilogues(suffix: str) -> pytest.MarkDecorator:
    """Every epilogue on the tiles of this CPU; one on emulated ones, which are slow."""
    native = [
        pytest.param(f"amx_bf16x6{suffix}", epilogue, marks=needs_amx) for epilogue in EPILOGUES
    ]
    emulated = (f"amx_emulated_bf16x6{suffix}", "relu_add_relu")
    return pytest.mark.parametrize(("tiles", "epilogue"), [*native, emulated])


def fp32(**geometry: Any) -> ConvProblem:
    return conv_problem(**geometry)


@with_epilogues("")
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_geometries(tiles: str, geometry: dict[str, Any], epilogue: str) -> None:
    check(tiles, fp32(**{**geometry, "epilogue": epilogue}))


@with_epilogues("_images")
@pytest.mark.parametrize(
    "geometry", test_cpu_amx_images.GEOMETRIES.values(), ids=test_cpu_amx_images.GEOMETRIES
)
def test_geometries_of_images(tiles: str, geometry: dict[str, Any], epilogue: str) -> None:
    check(tiles, fp32(**{**geometry, "epilogue": epilogue}))


@needs_amx
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("geometry", LARGE.values(), ids=LARGE)
def test_large(geometry: dict[str, Any], threads: int) -> None:
    check("amx_bf16x6", fp32(**{**geometry, "epilogue": "add_relu"}), threads=threads)


@needs_amx
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("geometry", LARGE_IMAGES.values(), ids=LARGE_IMAGES)
def test_large_images(geometry: dict[str, Any], threads: int) -> None:
    check("amx_bf16x6_images", fp32(**{**geometry, "epilogue": "add_relu"}), threads=threads)


@needs_amx
def test_a_result_that_passes_the_caches_by() -> None:
    check("amx_bf16x6", fp32(n=1, c=32, k=256, h=112, w=112, r=1, padding=(0, 0)))


@needs_amx
@settings(max_examples=60, deadline=None)
@given(test_cpu_amx.problems(), st.integers(1, 3))
def test_any_problem(p: ConvProblem, threads: int) -> None:
    check("amx_bf16x6", replace(p, dtype=torch.float32), threads=threads)


@settings(max_examples=5, deadline=None)
@given(test_cpu_amx.problems(), st.integers(1, 3))
def test_any_problem_emulated(p: ConvProblem, threads: int) -> None:
    narrow = replace(p, c=p.groups * min(p.c // p.groups, 24), dtype=torch.float32)
    check("amx_emulated_bf16x6", narrow, threads=threads)


@needs_amx
@settings(max_examples=30, deadline=None)
@given(test_cpu_amx_images.problems(most=8), st.integers(1, 3))
def test_any_problem_of_images(p: ConvProblem, threads: int) -> None:
    check("amx_bf16x6_images", replace(p, dtype=torch.float32), threads=threads)


@needs_amx
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_emulation_is_exact(geometry: dict[str, Any]) -> None:
    # Powers of two: whether the epilogue's product is rounded makes no difference.
    p = fp32(**{**geometry, "epilogue": "add_relu"})
    args = draw(p)
    args = args._replace(scale=torch.exp2(args.scale.round()))
    assert torch.equal(run("amx_bf16x6", p, args), run("amx_emulated_bf16x6", p, args))


def plain(p: ConvProblem, args: Args) -> Args:
    """The same with an epilogue that changes nothing."""
    return args._replace(scale=torch.ones(p.k), shift=torch.zeros(p.k))


POINTWISE = fp32(c=32, k=32, r=1, padding=(0, 0), epilogue="none")


@rows
def test_all_24_bits_count(tiles: str) -> None:
    # One product a sum: x passes through weights of one, and through weights of three parts.
    p = POINTWISE
    args = plain(p, draw(p))
    parts = 1 + 2**-9 + 2**-17
    x = args.x.clone()
    x[0, :, 0, 0] = 1 + torch.arange(p.c) * 2**-23
    x[0, :, 0, 1] = 2 - 2**-23
    x[0, :, 0, 2] = parts
    ones = args._replace(x=x, weight=torch.eye(p.c).view(p.weight_shape))
    assert torch.equal(run(tiles, p, ones), x)
    fine = ones._replace(weight=ones.weight * parts)
    relative = (run(tiles, p, fine).double() - reference(p, fine)) / reference(p, fine)
    assert relative.abs().max() < 2**-22


@with_epilogues("")
@pytest.mark.parametrize("geometry", ["1x1", "3x3", "groups", "stem_7x7", "padding_beyond_kernel"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -3.4e38], ids=short)
def test_what_does_not_split_passes(tiles: str, geometry: str, epilogue: str, value: float) -> None:
    p = fp32(**{**GEOMETRIES[geometry], "epilogue": epilogue})
    args = draw(p)
    args.x[0, 1, p.h // 2, p.w // 2] = value
    args.x[0, 0, 0, 0] = torch.tensor(0x7F800001).int().view(torch.float32)  # NaN in its last bit.
    wanted = reference(p, args).float()
    assert not wanted.isfinite().all()
    found = error(run(tiles, p, args), wanted.double())
    assert found.finite
    assert found.l2 < 1e-6


@images
@pytest.mark.parametrize("geometry", ["3x3", "groups", "last_tile_of_images_smaller"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=short)
def test_what_does_not_split_stays_in_its_image(tiles: str, geometry: str, value: float) -> None:
    p = fp32(**test_cpu_amx_images.GEOMETRIES[geometry])
    args = draw(p)
    args.x[p.n - 1, 1, p.h // 2, p.w // 2] = value
    wanted = reference(p, args)
    assert not wanted.isfinite().all()
    found = error(run(tiles, p, args), wanted)
    assert found.finite
    assert found.l2 < 1e-6


@rows
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3.4e38], ids=short)
def test_weights_that_do_not_split_pass(tiles: str, value: float) -> None:
    p = POINTWISE
    args = plain(p, draw(p))
    args.weight[3, 5] = value
    args.x[:, 5] = 0.25
    wanted = reference(p, args)
    found = error(run(tiles, p, args), wanted)
    assert found.finite
    assert found.l2 < 1e-6


@rows
def test_numbers_that_are_nearly_subnormal(tiles: str) -> None:
    p = POINTWISE
    args = plain(p, draw(p))
    weight = torch.eye(p.c).view(p.weight_shape)

    def worst(scale: float) -> float:
        given = args._replace(x=args.x.sign() * args.x.abs().clamp(0.5, 2) * scale, weight=weight)
        found = run(tiles, p, given).double()
        return float(((found - given.x) / given.x).abs().max())

    assert worst(2.0**-102) == 0
    assert 0 < worst(2.0**-116) < 2**-8
    assert worst(1e-40) == 1


@rows
def test_batch_of_none(tiles: str) -> None:
    p = fp32(n=0)
    assert run(tiles, p, draw(p)).shape == p.out_shape


@rows
def test_refusals(tiles: str) -> None:
    assert "splitting" in compiled(tiles, fp32(dtype=torch.bfloat16)).why_not
    assert "strides" in compiled(tiles, fp32(h=40, stride=(9, 1))).why_not


@pytest.mark.parametrize("tiles", [*ROWS, *IMAGES])
def test_nothing_outside_of_the_tensors_is_read(tiles: str) -> None:
    module = "tests.test_cpu_amx_images" if tiles.endswith("images") else __name__
    result = subprocess.run(
        [sys.executable, "-m", "tests.guarded", module, tiles],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@needs_amx
def test_offered_by_measurement_only() -> None:
    (kernel,) = (k for k in cpu.KERNELS if k.name == "amx_bf16x6")
    p, device = fp32(n=16, c=64, k=64, h=56, w=56), torch.device("cpu")
    assert kernel.supports(p, device) is None
    assert kernel.exact
    assert not kernel.promising(p, device)
    assert kernel.expansion(p) == p.k * p.c * 9 * 2
    assert kernel.full_name == "cpu/amx_bf16x6"
    assert backends.verdict(kernel, device, torch.float32) is None
