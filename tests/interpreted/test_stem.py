"""Convolutions of few input channels, with and without the fused max-pool, in the interpreter."""

import dataclasses

import pytest
import torch

from fused_resnet.backends.triton_.certify import resnet_problems
from fused_resnet.backends.triton_.config import ARCHS, stem_pool_tile
from fused_resnet.backends.triton_.kernels import STEM_POOL, TritonConv, TritonStemPool
from fused_resnet.backends.triton_.paths import RowsPath, StemPoolPath
from fused_resnet.backends.triton_.plans import pool_strip, stem_excess
from fused_resnet.problem import EPILOGUES, MaxPool

from .harness import CONV, DTYPES, assert_right, check, conv_data, conv_problem

CPU = torch.device("cpu")
dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
nonfinite = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
POOL = TritonStemPool()


def stem(h, w, c=3, **more):
    return conv_problem(c, 64, 7, n=2, h=h, w=w, stride=2, **more)


def pooled(h, w, **more):
    return stem(h, w, pool=STEM_POOL, **more)


def path_of(problem):
    return CONV["mma"]._path(problem, CPU)


@dtype
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_stem(dtype, epilogue):
    problem = stem(21, 18, dtype=dtype, epilogue=epilogue)
    assert isinstance(path_of(problem), RowsPath)
    check(CONV["mma"], problem)


@pytest.mark.parametrize("c", [1, 2, 4, 5, 8])
@pytest.mark.parametrize(
    ("r", "s", "stride", "padding"),
    [(7, 7, 2, 3), (3, 3, 1, 1), (3, 3, 3, 0), (2, 1, 1, 2), (1, 1, 2, 0), (9, 5, (1, 2), (4, 0))],
)
def test_few_channels(c, r, s, stride, padding):
    problem = conv_problem(c, 40, r, s=s, h=11, w=12, stride=stride, padding=padding)
    assert isinstance(path_of(problem), RowsPath)
    check(CONV["mma"], problem)


def test_images_of_any_layout_need_no_copy_of_their_own():
    problem = stem(16, 16)
    data = conv_data(problem)
    strided = torch.zeros(2, 3, 32, 16, dtype=torch.float16)[:, :, ::2]
    strided.copy_(data[0])
    for x in (data[0].contiguous(), strided):
        assert_right(CONV["mma"].run(problem, x, *data[1:]), problem, data)


def test_what_is_no_stem_takes_another_path():
    for problem in (
        conv_problem(3, 8, 3, dilation=2),
        conv_problem(9, 8, 3),
        conv_problem(4, 8, 3, groups=2),
        conv_problem(3, 8, 3, s=16, dtype=torch.float32),
    ):
        assert not isinstance(path_of(problem), RowsPath)
        check(CONV["mma"], problem)


@nonfinite
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_windows_do_not_see_pixels_beside_them(value):
    # A run of 8 pixels is longer than a filter row of 7, and slices hold 8 filter rows of 7.
    problem = stem(16, 16, epilogue="none")
    data = conv_data(problem)
    data[0][0, 1, 8, 8] = value
    result = CONV["mma"].run(problem, *data)
    assert_right(result, problem, data)
    assert not result.isfinite().all()


@dtype
@pytest.mark.parametrize(("h", "w"), [(14, 18), (33, 31), (7, 262)])
def test_pooled_stem(dtype, h, w):
    check(POOL, pooled(h, w, dtype=dtype))


@pytest.mark.parametrize("c", [1, 8])
def test_pooled_convolution_of_another_shape(c):
    problem = conv_problem(c, 24, 3, n=1, h=10, w=9, stride=1, pool=STEM_POOL)
    check(POOL, problem)


def test_strips_meet_without_a_gap():
    problem = pooled(64, 20)
    assert problem.out_shape[2] > 2 * pool_strip(
        problem, stem_pool_tile(problem.dtype, ""), ARCHS[0]
    )
    check(TritonStemPool(ARCHS[0]), problem)


def test_conv_rows_outside_the_image_do_not_win_the_maximum():
    # All conv values are negative before the affine step, and zero after the ReLU.
    problem = pooled(12, 12)
    x, weight, scale, shift, _ = conv_data(problem)
    data = x, weight, scale, shift - 100, None
    assert_right(POOL.run(problem, *data), problem, data)


@nonfinite
def test_nan_passes_the_pool_as_in_torch():
    problem = pooled(20, 20)
    data = conv_data(problem)
    data[0][0, 1, 8, 8] = float("nan")
    assert_right(POOL.run(problem, *data), problem, data)


def test_the_pooled_stem_goes_first_where_it_computes_less_than_30_percent_twice(monkeypatch):
    """Conv pixels computed per conv pixel needed, for 224x224 images on every GPU."""
    monkeypatch.setattr(TritonStemPool, "supports", lambda self, problem, device: None)
    cuda = torch.device("cuda")
    for arch in ARCHS:
        for n in (1, 32, 256):
            problem = resnet_problems(50, n, torch.float16)[0]
            oh, ow = problem.conv_size
            tile = stem_pool_tile(problem.dtype, "tf32")
            strip = pool_strip(problem, tile, arch)
            rows = sum(2 * min(strip, 56 - first) + 1 for first in range(0, 56, strip))
            columns = -(-56 // (tile.block_m // 2 - 1)) * tile.block_m
            recomputed = rows * columns / (oh * ow) - 1
            assert stem_excess(problem, tile, arch) == pytest.approx(recomputed)
            assert TritonStemPool(arch).promising(problem, cuda) == (recomputed < 0.3)
            assert recomputed < 0.3 or n == 1, (arch, n, recomputed)


def test_reasons_for_refusal():
    other = MaxPool((2, 2), (2, 2), (0, 0))
    assert "3x3" in POOL.supports(stem(8, 8, pool=other), CPU)
    assert "relu" in POOL.supports(pooled(8, 8, epilogue="none"), CPU)
    assert "channels" in POOL.supports(conv_problem(16, 16, 3, pool=STEM_POOL), CPU)
    assert "max-pooling" in CONV["mma"].supports(pooled(8, 8), CPU)
    assert POOL.supports(pooled(8, 8), CPU) is None


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: str(arch.capability))
def test_whole_stem(arch):
    problem = dataclasses.replace(resnet_problems(50, 1, torch.bfloat16)[0], h=112, w=112)
    kernel = TritonStemPool(arch)
    assert isinstance(kernel._path(problem, CPU), StemPoolPath)
    check(kernel, problem)
    check(TritonConv(arch), dataclasses.replace(problem, pool=None))
