"""The Triton backend on your GPU: ``pytest -m gpu tests/test_triton_gpu.py``."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton", reason="this torch comes without Triton")

from fused_resnet.backends import torch_
from fused_resnet.backends.triton_.certify import resnet_problems
from fused_resnet.backends.triton_.features import global_avg_pool, prepare_images
from fused_resnet.backends.triton_.kernels import TritonAddRelu, TritonConv, TritonStemPool
from fused_resnet.numerics import error, reference_conv, stock_conv
from fused_resnet.problem import AddReluProblem, ConvProblem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CONV, POOL = TritonConv(), TritonStemPool()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def kernel_of(problem):
    return CONV if problem.pool is None else POOL


def data_of(problem, device="cuda"):
    p = problem
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, device=device)

    def image(*shape):
        return draw(*shape).to(p.dtype).contiguous(memory_format=torch.channels_last)

    weight = draw(p.k, p.c // p.groups, p.r, p.s) / (p.c // p.groups * p.r * p.s) ** 0.5
    residual = image(*p.out_shape) if p.has_residual else None
    return image(p.n, p.c, p.h, p.w), weight.to(p.dtype), draw(p.k) + 1, draw(p.k), residual


def assert_right(result, problem, data):
    reference = reference_conv(problem, *data)
    stock = error(stock_conv(problem, *data), reference)
    found = error(result, reference)
    assert found.within(stock, problem.dtype), f"{problem}: {found}, stock torch's {stock}"


def odd_problems(dtype):
    for c, k, r, stride, dilation, groups in (
        (64, 64, 3, 1, 1, 1), (17, 19, 3, 2, 1, 1), (8, 24, 1, 1, 1, 1), (128, 128, 3, 1, 1, 32),
        (32, 32, 3, 2, 1, 32), (48, 80, 3, 1, 2, 1), (3, 32, 7, 2, 1, 1), (512, 512, 3, 1, 1, 1),
    ):  # fmt: skip
        for epilogue in ("none", "add_relu", "relu_add_relu"):
            pad = r // 2 * dilation
            yield ConvProblem(
                3, c, 13, 11, k, r, r, (stride, stride), (pad, pad), (dilation, dilation), groups,
                epilogue, dtype,
            )  # fmt: skip


@dtypes
@pytest.mark.parametrize("tf32", [False, True])
def test_convolutions(dtype, tf32, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    for problem in odd_problems(dtype):
        if kernel_of(problem).supports(problem, torch.device("cuda", 0)) is None:
            data = data_of(problem)
            assert_right(CONV.run(problem, *data), problem, data)


@dtypes
@pytest.mark.parametrize("n", [1, 8])
def test_resnet_layers(dtype, n):
    for depth in (18, 50):
        for problem in resnet_problems(depth, n, dtype):
            data = data_of(problem)
            assert_right(kernel_of(problem).run(problem, *data), problem, data)


@dtypes
def test_memory_bound_kernels(dtype):
    a, b = torch.randn(2, 8, 64, 28, 28, device="cuda").to(dtype)
    result = TritonAddRelu().run(AddReluProblem(tuple(a.shape), dtype, False, True), a, b)
    assert torch.equal(result, torch.relu(a + b))
    reference = a.double().mean((2, 3), keepdim=True)
    stock = error(torch.nn.functional.adaptive_avg_pool2d(a, 1), reference)
    assert error(global_avg_pool(a), reference).within(stock, dtype)
    raw = torch.randint(0, 256, (4, 3, 224, 224), dtype=torch.uint8, device="cuda")
    images = prepare_images(raw, dtype)
    assert error(images, raw.double() / 255).within(error(raw.to(dtype) / 255, raw / 255.0), dtype)


def milliseconds(run, repeats=20):
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * repeats)]
    for start, stop in zip(events[::2], events[1::2], strict=True):
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    times = [
        start.elapsed_time(stop) for start, stop in zip(events[::2], events[1::2], strict=True)
    ]
    return sorted(times)[repeats // 2]


@pytest.mark.parametrize("problem", resnet_problems(50, 32, torch.float16), ids=str)
def test_not_slower_than_stock(problem):
    stock = next(k for k in torch_.KERNELS if k.op == kernel_of(problem).op)
    data = data_of(problem)
    contenders = {k: (lambda k=k: k.run(problem, *data)) for k in (stock, kernel_of(problem))}
    for run in contenders.values():
        for _ in range(5):
            run()
    # Interleaved, and the best of three medians each, so that clocks and neighbours weigh the same.
    rounds = [{k: milliseconds(run) for k, run in contenders.items()} for _ in range(3)]
    best = {k: min(times[k] for times in rounds) for k in contenders}
    assert best[kernel_of(problem)] <= best[stock] * 1.02, {k.full_name: t for k, t in best.items()}


@pytest.mark.parametrize("index", [0, 1, 3, 9])
def test_cuda_graph(index):
    problem = resnet_problems(50, 2, torch.float16)[index]
    kernel = kernel_of(problem)
    data = data_of(problem)
    kernel.run(problem, *data)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = kernel.run(problem, *data)
    data[0].copy_(torch.randn_like(data[0]))
    graph.replay()
    torch.cuda.synchronize()
    assert_right(result, problem, data)


def test_two_streams():
    problem = dataclasses.replace(resnet_problems(50, 4, torch.float16)[3])
    results, streams = [], [torch.cuda.Stream() for _ in range(2)]
    inputs = [data_of(problem) for _ in streams]
    inputs[1][0].neg_()
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, data in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                results.append((data, CONV.run(problem, *data)))
    torch.cuda.synchronize()
    for data, result in results:
        assert_right(result, problem, data)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_devices():
    problem = resnet_problems(50, 2, torch.float16)[4]
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        # The current device is cuda:0 throughout.
        data = data_of(problem, device)
        result = CONV.run(problem, *data)
        assert result.device == torch.device(device)
        assert_right(result, problem, data)


def test_no_synchronisation():
    problem = resnet_problems(50, 2, torch.float16)[4]
    data = data_of(problem)
    CONV.run(problem, *data)
    torch.cuda.set_sync_debug_mode("error")
    try:
        CONV.run(problem, *data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
