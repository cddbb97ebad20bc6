"""add_relu, input images and global average pool in the interpreter."""

import pytest
import torch

from fused_resnet.backends.triton_.features import global_avg_pool, prepare_images
from fused_resnet.backends.triton_.kernels import TritonAddRelu
from fused_resnet.numerics import error
from fused_resnet.problem import AddReluProblem

from .harness import DTYPES

CPU = torch.device("cpu")
dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def images(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


@dtype
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("shape", [(2, 16, 5, 7), (1, 1, 1, 1), (3, 64, 9, 5), (4097,)])
def test_add_relu(dtype, inplace, shape):
    a, b = images(*shape, dtype=dtype), images(*shape, dtype=dtype).roll(1)
    if a.ndim == 4:
        a, b = (t.contiguous(memory_format=torch.channels_last) for t in (a, b))
    expected = torch.relu(a.double() + b.double()).to(dtype)
    problem = AddReluProblem(shape, dtype, inplace, True)
    kernel = TritonAddRelu()
    assert kernel.supports(problem, CPU) is None
    result = kernel.run(problem, a, b)
    assert (result is a) == inplace
    assert result.stride() == b.stride()
    # One exact sum rounded once: no error is allowed at all.
    assert torch.equal(result, expected)


def test_add_relu_of_misaligned_memory():
    a, b = images(1001)[1:], images(1002)[2:]
    result = TritonAddRelu().run(AddReluProblem((1000,), torch.float32, False, True), a, b)
    assert torch.equal(result, torch.relu(a + b))


def test_add_relu_keeps_nan():
    a = torch.tensor([float("nan"), -1.0, float("inf")])
    result = TritonAddRelu().run(AddReluProblem((3,), torch.float32, False, True), a, a)
    assert torch.equal(result, torch.relu(a + a)) or result[0].isnan()
    assert result[0].isnan()
    assert result[1:].tolist() == [0.0, float("inf")]


def test_add_relu_wants_tensors_that_lie_alike():
    assert "lie alike" in TritonAddRelu().supports(
        AddReluProblem((2, 2), torch.float32, False, False), CPU
    )


@dtype
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_uint8_images(dtype, layout):
    raw = (images(2, 3, 19, 23) * 60 + 128).clamp(0, 255).to(torch.uint8)
    result = prepare_images(raw.contiguous(memory_format=layout), dtype, MEAN, STD)
    mean, std = (v.double().view(1, 3, 1, 1) for v in (MEAN, STD))
    reference = (raw.double() / 255 - mean) / std
    stock = ((raw.to(dtype) / 255) - mean.to(dtype)) / std.to(dtype)
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert error(result, reference).within(error(stock, reference), dtype)


@dtype
def test_uint8_images_without_normalisation(dtype):
    raw = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).view(2, 3, 4, 5)
    result = prepare_images(raw, dtype)
    reference = raw.double() / 255
    assert error(result, reference).within(error(raw.to(dtype) / 255, reference), dtype)


def test_float_images_are_cast_and_moved():
    x = images(3, 5, 7, 9)[:, :, ::2]
    result = prepare_images(x, torch.bfloat16)
    assert torch.equal(result, x.to(torch.bfloat16))
    assert result.is_contiguous(memory_format=torch.channels_last)
    # Many channels, a broadcast dimension, and no images at all.
    wide = images(1, 130, 3, 1).expand(2, 130, 3, 4)
    assert torch.equal(prepare_images(wide, torch.float32), wide)
    assert prepare_images(images(0, 3, 4, 4), torch.float16).shape == (0, 3, 4, 4)


def test_images_are_checked():
    with pytest.raises(ValueError, match="both"):
        prepare_images(images(1, 3, 2, 2), torch.float32, MEAN)
    with pytest.raises(ValueError, match=r"\[4\]"):
        prepare_images(images(1, 4, 2, 2), torch.float32, MEAN, STD)
    with pytest.raises(ValueError, match=r"\[N, C, H, W\]"):
        prepare_images(images(3, 2, 2), torch.float32)
    with pytest.raises(TypeError, match="int32"):
        prepare_images(torch.zeros(1, 3, 2, 2, dtype=torch.int32), torch.float32)
    with pytest.raises(RuntimeError, match="float64"):
        prepare_images(images(1, 3, 2, 2), torch.float64)


@dtype
@pytest.mark.parametrize(("c", "h", "w"), [(64, 7, 7), (70, 1, 1), (3, 9, 13)])
def test_global_avg_pool(dtype, c, h, w):
    x = images(2, c, h, w, dtype=dtype).contiguous(memory_format=torch.channels_last)
    result = global_avg_pool(x)
    assert result.shape == (2, c, 1, 1)
    reference = x.double().mean((2, 3), keepdim=True)
    stock = torch.nn.functional.adaptive_avg_pool2d(x, 1)
    assert error(result, reference).within(error(stock, reference), dtype)
    assert torch.equal(global_avg_pool(x.contiguous()), result)


def test_global_avg_pool_of_nothing():
    assert global_avg_pool(images(0, 8, 2, 2)).shape == (0, 8, 1, 1)
    with pytest.raises(ValueError, match="pixel"):
        global_avg_pool(images(1, 8, 0, 2))
