"""Native Winograd convolutions against float64: geometry, instruction sets, dtypes, threads."""

from __future__ import annotations

import ctypes
import ctypes.util
import itertools
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_resnet import backends
from fused_resnet._build import extension
from fused_resnet.backends.cpu import WinogradConv, native_conv
from fused_resnet.numerics import error, reference_conv, stock_conv
from fused_resnet.problem import EPILOGUES, ConvProblem
from tests.guarded import check_alone, guarded
from tests.helpers import CPU, Args, channels_last, conv_problem, draw, short

pytestmark = pytest.mark.skipif(extension is None, reason="no compiled extension")

DTYPES = (torch.float32, torch.bfloat16)
LEVELS = () if extension is None else tuple(extension.isa_available())
NAMES = ("winograd2", "winograd4", "winograd4_compact")

# The transforms' own error by norm, relative to the sums' (before scale, shift and epilogue): in
# fp32 at most 1.2e-6 for hundreds of channels, as winograd4's docstring tells; in bf16 where what
# is transformed is rounded, 4.1e-3.
FP32_LIMIT, BF16_LIMIT = 2e-6, 6e-3


def run(name: str, isa: str, p: ConvProblem, args: Args) -> Tensor:
    conv = native_conv(name, isa, p)
    assert conv.why_not == ""
    result: Tensor = conv.run(args.x, conv.pack(args.weight), args.scale, args.shift, args.residual)
    assert result.dtype == p.dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    return result


def assert_right(name: str, isa: str, p: ConvProblem, seed: int = 0) -> None:
    args = draw(p, seed)
    args = args._replace(scale=args.scale.abs() + 0.5)  # no channel is 0: all errors are seen
    found = error(run(name, isa, p, args), reference_conv(p, *args))
    allowed = error(stock_conv(p, *args), reference_conv(p, *args))
    limit = FP32_LIMIT if p.dtype == torch.float32 else BF16_LIMIT
    assert found.finite
    assert found.l2 <= limit + 2 * allowed.l2, (name, isa, str(p), found, allowed)
    assert found.worst <= 4 * limit + 2 * allowed.worst, (name, isa, str(p), found, allowed)


@st.composite
def problems(draw: st.DrawFn) -> ConvProblem:
    """Tiles of every size, any padding; channels around the widths of vectors and panels."""
    integer = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    c = groups * draw(st.sampled_from([16, 17, 31, 32, 40, 65]))
    k = groups * draw(st.sampled_from([16, 19, 33, 64, 70, 100]))
    padding = (integer(0, 4), integer(0, 4))
    h, w = (max(1, 3 - 2 * pad) + integer(0, 14) for pad in padding)
    return conv_problem(
        integer(1, 3), c, h, w, k, padding=padding, groups=groups,
        epilogue=draw(st.sampled_from(EPILOGUES)), dtype=draw(st.sampled_from(DTYPES)),
    )  # fmt: skip


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30)
@given(p=problems(), seed=st.integers(0, 1000), threads=st.integers(1, 3))
def test_any_geometry(name: str, isa: str, p: ConvProblem, seed: int, threads: int) -> None:
    torch.set_num_threads(threads)
    assert_right(name, isa, p, seed)


# The layers of ResNet: threads that work on tiles of their own, and that share them.
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(("c", "size"), [(64, 56), (128, 28), (256, 14), (512, 7)])
@pytest.mark.parametrize("name", NAMES)
def test_layers_of_resnet(name: str, c: int, size: int, dtype: torch.dtype) -> None:
    p = conv_problem(1, c, size, size, c, epilogue="add_relu", dtype=dtype)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert_right(name, LEVELS[-1], p)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_blocks_of_tiles_that_do_not_fit_a_cache(name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    # Tiles of all four kinds, more than a block holds.
    assert_right(name, LEVELS[-1], conv_problem(3, 96, 61, 58, 80, epilogue="relu_add_relu"))
    assert_right(name, LEVELS[-1], conv_problem(70, 272, 6, 7, 272, epilogue="add"))


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_rounding_is_what_the_arithmetic_gives(isa: str, dtype: torch.dtype) -> None:
    # Integers that every transform of F(2x2, 3x3) and every sum holds exactly, bf16 included.
    p = conv_problem(2, 18, 9, 8, 20, epilogue="add_relu", dtype=dtype)
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int, step: int = 1, low: int = -3, high: int = 4) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).mul(step).to(dtype)

    args = Args(
        channels_last(integers(p.n, p.c, p.h, p.w)),
        integers(p.k, p.c, 3, 3, step=4, low=-1, high=2),
        integers(p.k).float(),
        integers(p.k).float(),
        channels_last(integers(*p.out_shape)),
    )
    expected = reference_conv(p, *args)
    assert torch.equal(run("winograd2", isa, p, args), expected.to(dtype))


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("epilogue", ["none", "relu", "relu_add_relu"])
def test_no_nan_or_infinity_is_lost(
    name: str, isa: str, dtype: torch.dtype, odd: float, epilogue: str
) -> None:
    p = conv_problem(1, 16, 11, 10, 16, epilogue=epilogue, dtype=dtype)
    clean = draw(p)
    whole = run(name, isa, p, clean)
    for y, x, c in ((0, 0, 0), (3, 4, 15), (5, 2, 3), (10, 9, 7)):
        args = clean._replace(x=clean.x.clone(memory_format=torch.preserve_format))
        args.x[0, c, y, x] = odd
        found, expected = run(name, isa, p, args), reference_conv(p, *args)
        assert not bool((~expected.isfinite() & found.isfinite()).any())
        # It stays within the tiles that read it, and changes nothing else.
        reach = torch.zeros(p.out_shape, dtype=torch.bool)
        m = 2 if name == "winograd2" else 4
        top, left = (max(v - 1, 0) // m * m for v in (y, x))
        bottom, right = ((v + 1) // m * m + m for v in (y, x))
        reach[:, :, top:bottom, left:right] = True
        assert torch.equal(found[~reach], whole[~reach])


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("name", NAMES)
def test_nan_weight_reaches_every_output_of_its_channel(name: str, isa: str) -> None:
    p = conv_problem(1, 16, 7, 9, 18, epilogue="relu")
    args = draw(p)
    args.weight[5, 3, 1, 2] = math.nan
    found = run(name, isa, p, args)
    assert bool(found[:, 5].isnan().all())
    others = [k for k in range(18) if k != 5]
    assert bool(found[:, others].isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_nan_of_a_residual_passes_and_minus_zero_stays(name: str) -> None:
    p = conv_problem(1, 16, 5, 5, 16, epilogue="add_relu")
    args = draw(p)
    assert args.residual is not None
    args.residual[0, 3, 2, 2] = math.nan
    args.x.zero_()
    args.shift.fill_(-0.0)
    args.scale.fill_(-1.0)
    args.residual[0, 4] = -0.0
    found = run(name, LEVELS[-1], p, args)
    assert bool(found[0, 3, 2, 2].isnan())
    assert int(found.isnan().sum()) == 1
    assert bool(torch.signbit(found[0, 4]).all())


@pytest.mark.parametrize("name", NAMES)
def test_results_do_not_depend_on_the_batch_beside(name: str) -> None:
    torch.set_num_threads(1)
    p = conv_problem(5, 32, 14, 14, 48, epilogue="relu")
    args = draw(p)
    whole = run(name, LEVELS[-1], p, args)
    one = conv_problem(1, 32, 14, 14, 48, epilogue="relu")
    for i in range(p.n):
        alone = run(name, LEVELS[-1], one, args._replace(x=channels_last(args.x[i : i + 1])))
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=1e-5, atol=1e-5)


def test_the_floating_point_environment_is_left_alone() -> None:
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    before = libm.fegetround()
    tiny = torch.tensor([1e-40])
    for name in NAMES:
        assert_right(name, LEVELS[-1], conv_problem(1, 32, 9, 9, 32, dtype=torch.bfloat16))
        assert libm.fegetround() == before
        assert float(tiny * 0.5) != 0.0, "subnormal numbers are flushed"


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("name", NAMES)
def test_subnormal_results_are_not_flushed(name: str, isa: str) -> None:
    # All inner outputs are 288 * 2^-140, far below the least normal number.
    p = conv_problem(1, 32, 10, 11, 16, epilogue="none")
    x = channels_last(torch.full((1, 32, 10, 11), 2.0**-100))
    args = Args(x, torch.full((16, 32, 3, 3), 2.0**-40), torch.ones(16), torch.zeros(16), None)
    inner = run(name, isa, p, args)[..., 1:-1, 1:-1]
    assert torch.allclose(inner.double(), torch.tensor(288 * 2.0**-140).double(), rtol=1e-3, atol=0)


def check_fenced(isa: str) -> None:
    """Run on tensors that border on pages which must not be touched; with tails of vectors."""
    for name, dtype, at_end in itertools.product(NAMES, DTYPES, (False, True)):
        p = conv_problem(2, 19, 9, 7, 21, epilogue="add_relu", dtype=dtype)
        args = draw(p)
        fenced = Args(*(guarded(t, at_end) for t in args))
        assert torch.equal(run(name, isa, p, fenced), run(name, isa, p, args))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect is called as on Linux")
@pytest.mark.parametrize("isa", LEVELS)
def test_nothing_beside_the_tensors_is_touched(isa: str) -> None:
    check_alone("tests.test_cpu_winograd", isa)


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("name", NAMES)
def test_batch_of_none(name: str, dtype: torch.dtype, isa: str) -> None:
    p = conv_problem(0, 32, 9, 9, 32, dtype=dtype)
    assert run(name, isa, p, draw(p)).shape == p.out_shape


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"r": 5, "padding": (2, 2)}, "3x3"),
        ({"r": 3, "s": 1, "padding": (1, 0)}, "3x3"),
        ({"stride": (1, 2)}, "stride 1"),
        ({"dilation": (2, 1)}, "dilation 1"),
        ({"groups": 4}, "8 channels a group"),
        ({"c": 3}, "3 channels a group"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_what_it_declines(name: str, change: dict[str, object], reason: str) -> None:
    p = conv_problem(**{"c": 32, "k": 32, **change})  # type: ignore[arg-type]
    assert reason in native_conv(name, LEVELS[-1], p).why_not


def test_never_chosen_unmeasured() -> None:
    inexact = [k for k in backends.KERNELS if not k.exact]
    assert {k.name for k in inexact} == set(NAMES)
    assert all(isinstance(k, WinogradConv) for k in inexact)
    p = conv_problem(1, 64, 14, 14, 64)
    assert all(k.supports(p, CPU) is None for k in inexact)
    assert not {k.name for k in backends.candidates("conv_affine_act", p, CPU)} & set(NAMES)
    with backends.backend("cpu"):
        assert backends.choose("conv_affine_act", p, CPU).kernel.exact
