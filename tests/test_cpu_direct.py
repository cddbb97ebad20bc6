"""Direct convolutions of the CPU against float64, and what no native kernel may touch."""

from __future__ import annotations

import ctypes
import mmap
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fused_resnet._build import extension
from fused_resnet.backends.cpu import native_conv
from fused_resnet.numerics import reference_conv, stock_conv
from fused_resnet.problem import EPILOGUES, ConvProblem, conv_out_size
from tests.guarded import check_alone
from tests.helpers import GEOMETRIES, assert_within_rule, channels_last, conv_problem, draw, short

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
    # oneDNN 3.12 itself crashes on some dilated and strided bf16 convolutions of few pixels.
    with torch.backends.mkldnn.flags(enabled=False):
        stock = stock_conv(p, *args)
    assert_within_rule(result, expected, stock, p.dtype)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", GEOMETRIES, ids=short)
@pytest.mark.parametrize("isa", LEVELS)
def test_geometry(isa: str, shape: str, dtype: torch.dtype) -> None:
    assert_right(conv_problem(**{**GEOMETRIES[shape], "dtype": dtype}), isa)


#: Wide enough for several slices of the reduction, several blocks of pixels, several panels.
LARGE = {
    "slices_of_taps": {"n": 1, "c": 300, "k": 70, "h": 6, "w": 6},
    "slices_of_channels": {"n": 2, "c": 2100, "k": 65, "h": 3, "w": 3, "r": 1, "padding": (0, 0)},
    "blocks": {"n": 2, "c": 65, "k": 130, "h": 19, "w": 18},
    "resnext": {"n": 1, "c": 128, "k": 128, "h": 11, "w": 13, "groups": 32},
    "groups_of_4": {"n": 2, "c": 40, "k": 40, "h": 9, "w": 10, "groups": 10, "stride": (2, 1)},
    "odd_groups_of_4": {"n": 1, "c": 44, "k": 44, "h": 9, "w": 10, "groups": 11},
    "slices_of_groups_of_4": {"n": 1, "c": 8, "k": 8, "r": 9, "padding": (4, 4), "groups": 2},
    "groups_of_8": {"n": 2, "c": 88, "k": 88, "h": 9, "w": 10, "groups": 11, "stride": (1, 2)},
    "slices_of_groups_of_8": {"n": 1, "c": 24, "k": 24, "r": 7, "padding": (3, 3), "groups": 3},
    "resnext_wide": {"n": 1, "c": 256, "k": 256, "h": 7, "w": 7, "groups": 8},
    # Blocks begin in rows whose windows lie beneath an image.
    "padding": {"n": 4, "c": 16, "k": 9, "h": 3, "w": 3, "r": 1, "padding": (5, 6)},
    "strides": {"n": 2, "c": 24, "k": 40, "h": 31, "w": 30, "r": 2, "stride": (3, 2)},
    "linear": {"n": 3, "c": 512, "k": 1000, "h": 1, "w": 1, "r": 1, "padding": (0, 0)},
}


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("isa", LEVELS)
def test_large(isa: str, shape: str, dtype: torch.dtype, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_right(conv_problem(**{**LARGE[shape], "dtype": dtype, "epilogue": "add_relu"}), isa)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("isa", LEVELS)
def test_empty_batch(isa: str, dtype: torch.dtype) -> None:
    p = conv_problem(n=0, dtype=dtype)
    assert run(p, isa, *draw(p)).shape == p.out_shape


@pytest.mark.parametrize("channels", [(5, 19, 1), (16, 16, 4), (24, 24, 3)], ids=short)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("isa", LEVELS)
def test_odd_values_go_where_torch_has_them(
    isa: str, dtype: torch.dtype, epilogue: str, channels: tuple[int, int, int]
) -> None:
    # One pixel of each kind, far enough apart that no output reads two.
    c, k, groups = channels
    p = conv_problem(n=1, c=c, k=k, groups=groups, h=9, w=21, dtype=dtype, epilogue=epilogue)
    x, weight, _scale, shift, residual = draw(p)
    for column, value in ((2, float("nan")), (8, float("inf")), (14, float("-inf"))):
        x[0, 3, 4, column] = value
    if residual is not None:
        residual[0, 7, 0, 0] = float("nan")
        residual[0, 7, 0, 18] = float("-inf")
    args = (x, weight, torch.ones(p.k), shift, residual)
    result, expected = run(p, isa, *args), reference_conv(p, *args)
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.isposinf(), expected.isposinf())
    assert torch.equal(result.isneginf(), expected.isneginf())


@pytest.mark.parametrize("isa", LEVELS)
def test_subnormal_numbers(isa: str) -> None:
    # The products are exact and subnormal: flushed to zero, they would be lost.
    p = conv_problem(n=1, c=3, k=17, h=3, w=3, r=1, padding=(0, 0), epilogue="none")
    x = channels_last(torch.full((1, 3, 3, 3), 2.0**-100))
    weight = torch.full((17, 3, 1, 1), 2.0**-40)
    result = run(p, isa, x, weight, torch.ones(17), torch.zeros(17), None)
    assert torch.equal(result, torch.full_like(result, 3 * 2.0**-140))


@pytest.mark.parametrize("isa", LEVELS)
def test_flushing_of_subnormal_numbers_is_left_as_the_caller_set_it(isa: str) -> None:
    p = conv_problem(n=1)
    args = draw(p)
    tiny = torch.tensor([1e-39])
    assert torch.set_flush_denormal(True)
    try:
        run(p, isa, *args)
        assert (tiny * 1.0).item() == 0.0
    finally:
        torch.set_flush_denormal(False)
    run(p, isa, *args)
    assert (tiny * 1.0).item() != 0.0


class Fenced:
    """Memory that ends, or begins, at a page that may not be touched."""

    def __init__(self, size: int, at_end: bool) -> None:
        page = mmap.PAGESIZE
        whole = -(-max(size, 1) // page) * page
        self._map = mmap.mmap(-1, whole + 2 * page)
        self._anchor = ctypes.c_char.from_buffer(self._map)
        self._base = ctypes.addressof(self._anchor)
        libc = ctypes.CDLL(None, use_errno=True)
        for fence in (self._base, self._base + page + whole):
            if libc.mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(page), 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        self.offset = page + (whole - size if at_end else 0)

    def tensor(self, like: Tensor) -> Tensor:
        """A copy of ``like`` in this memory, with its strides."""
        flat = torch.frombuffer(self._map, dtype=like.dtype, count=like.numel(), offset=self.offset)
        copy = flat.as_strided(like.shape, like.stride())
        return copy.copy_(like)


FENCED_SHAPES = (
    {"c": 3, "k": 7, "r": 3},
    {"c": 5, "k": 17, "r": 1, "padding": (0, 0)},
    {"c": 12, "k": 12, "groups": 3},
    {"c": 21, "k": 21, "groups": 7},
    {"c": 16, "k": 16, "groups": 4},
    {"c": 24, "k": 24, "groups": 3},
    {"c": 33, "k": 65, "stride": (2, 2)},
    # Winograd's tiles of every size: images that no tile divides.
    {"c": 17, "k": 19, "h": 7, "w": 9},
    {"c": 34, "k": 70, "h": 10, "w": 5, "groups": 2, "padding": (0, 2)},
)


def check_fenced(isa: str) -> None:
    """Run kernels on tensors that end, or begin, where memory does; a stray access kills."""
    assert extension is not None
    for name in extension.cpu_conv_kernels(isa):
        for dtype in DTYPES:
            for shape in FENCED_SHAPES:
                for at_end in (True, False):
                    p = conv_problem(**{"n": 1, "dtype": dtype, "epilogue": "add", **shape})
                    conv = native_conv(name, isa, p)
                    if conv.why_not:
                        continue
                    x, weight, scale, shift, residual = draw(p)
                    packed = conv.pack(weight)
                    operands = [x, packed, scale, shift, residual]
                    fences = [Fenced(t.nbytes, at_end) for t in operands]
                    copies = [f.tensor(t) for f, t in zip(fences, operands, strict=True)]
                    expected = conv.run(*operands)
                    assert torch.equal(conv.run(*copies), expected)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect is called as on Linux")
@pytest.mark.parametrize("isa", LEVELS)
def test_nothing_beside_the_tensors_is_touched(isa: str) -> None:
    check_alone("tests.test_cpu_direct", isa)


def test_the_result_goes_where_it_is_told() -> None:
    p = conv_problem(epilogue="add_relu")
    conv = native_conv("direct", LEVELS[0], p)
    x, weight, scale, shift, residual = draw(p)
    assert residual is not None
    packed = conv.pack(weight)
    wanted = conv.run(x, packed, scale, shift, residual)
    for out in (torch.empty_like(wanted), residual):
        result = conv.run(x, packed, scale, shift, residual, out)
        assert result.data_ptr() == out.data_ptr()
        assert torch.equal(out, wanted)


def test_refuses_what_does_not_fit() -> None:
    p = conv_problem(n=1, c=8, k=8)
    conv = native_conv("direct", LEVELS[0], p)
    x, weight, scale, shift, _residual = draw(p)
    packed = conv.pack(weight)
    for args, raised, message in (
        ((x[:, :4], packed, scale, shift, None), ValueError, "expected x"),
        ((x.bfloat16(), packed, scale, shift, None), TypeError, "expected x of dtype"),
        ((x, packed[1:], scale, shift, None), ValueError, "as pack"),
        ((x, packed, scale[1:], shift, None), ValueError, "expected scale"),
        ((x, packed, scale, shift.double(), None), TypeError, "float32 shift"),
        ((x, packed, scale, shift, x), ValueError, "reads no residual"),
        ((x, packed, scale, shift, None, x[:, :4]), ValueError, "expected out"),
        ((x, packed, scale, shift, None, x), ValueError, "no memory with x"),
    ):
        with pytest.raises(raised, match=message):
            conv.run(*args)
    with pytest.raises(ValueError, match="expected a weight"):
        conv.pack(weight[1:])
