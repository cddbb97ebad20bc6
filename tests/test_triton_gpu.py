"""The Triton backend on your GPU: ``pytest -m gpu tests/test_triton_gpu.py``."""

import copy
import dataclasses

import pytest
import torch
import torchvision

pytest.importorskip("triton", reason="this torch comes without Triton")

from fused_resnet import backend, fuse
from fused_resnet.backends import torch_
from fused_resnet.backends.triton_.certify import resnet_problems
from fused_resnet.backends.triton_.features import global_avg_pool, prepare_images
from fused_resnet.backends.triton_.im2col_kernel import TritonIm2col
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
@pytest.mark.parametrize("index", range(2, 25))
def test_every_configuration_that_a_tuner_times(dtype, index):
    problem = resnet_problems(50, 2, dtype)[index]
    data = data_of(problem)
    variants = CONV.variants(problem, torch.device("cuda", 0))
    assert len(variants) > 1
    for variant in variants:
        assert_right(variant.run(problem, *data), problem, data)


def test_nothing_leaks_between_merged_groups():
    problem = ConvProblem(
        2, 64, 9, 9, 64, 3, 3, (1, 1), (1, 1), (1, 1), 32, "none", torch.float16
    )  # fmt: skip
    data = data_of(problem)
    data[0][:, 4] = float("inf")  # the third group of two channels
    result = CONV.run(problem, *data)
    clean = [g for g in range(64) if g // 2 != 2]
    assert result[:, clean].isfinite().all()
    assert not result[:, 4:6].isfinite().any()


@pytest.mark.parametrize("r", [1, 3])
def test_offsets_beyond_32_bits(r):
    problem = ConvProblem(
        170, 256, 224, 224, 32, r, r, (1, 1), (r // 2, r // 2), (1, 1), 1, "relu", torch.float16
    )
    elements = problem.n * problem.c * problem.h * problem.w
    assert elements > 2**31
    if torch.cuda.mem_get_info()[0] < 3 * 2 * elements:
        pytest.skip(f"needs {6 * elements / 1e9:.0f} GB of free memory on the GPU")
    one = dataclasses.replace(problem, n=1)
    image, weight, scale, shift, _ = data_of(one)
    x = torch.zeros(
        (problem.n, *image.shape[1:]), dtype=image.dtype, device="cuda"
    ).to(memory_format=torch.channels_last)  # fmt: skip
    x[-1:] = image
    result = CONV.run(problem, x, weight, scale, shift, None)
    assert_right(result[-1:], one, (image, weight, scale, shift, None))
    zero = torch.relu(shift).to(result.dtype)
    assert torch.equal(result[0], zero[:, None, None].expand_as(result[0]))


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


@pytest.mark.parametrize(
    "problem", [p for dtype in DTYPES for p in resnet_problems(50, 32, dtype)], ids=str
)
def test_not_slower_than_stock(problem):
    if problem.pool is not None and not POOL.promising(problem, torch.device("cuda", 0)):
        pytest.skip("the heuristic takes another kernel: here too much is computed twice")
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


def test_a_graph_of_a_whole_network():
    stock = torchvision.models.resnet18().cuda().eval().half()
    model = fuse(copy.deepcopy(stock))
    x = torch.randn(2, 3, 224, 224, device="cuda", dtype=torch.float16)
    with torch.inference_mode(), backend("triton"):
        for _ in range(2):
            model(x)  # compiles, packs, and verifies each kernel
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = model(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        usual = stock(x)
        reference = copy.deepcopy(stock).double()(x.double())
        assert error(result, reference).within(error(usual, reference), torch.float16)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("index", [0, 2, 4, 9])
def test_two_devices(index):
    problem = resnet_problems(50, 2, torch.float16)[index]
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        # The current device is cuda:0 throughout.
        data = data_of(problem, device)
        result = kernel_of(problem).run(problem, *data)
        assert result.device == torch.device(device)
        assert torch.cuda.current_device() == 0
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


@pytest.mark.parametrize("epilogue", ["none", "relu", "add_relu", "relu_add_relu"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_im2col_in_gluon(dtype, stride, epilogue):
    """The kernels that no GPU had run when they were written, and that only a tuner may admit.

    5 images of 28x28 or 14x14 fill no whole number of tiles.
    """
    problem = ConvProblem(
        5, 128, 28, 28, 256, 3, 3, (stride, stride), (1, 1), (1, 1), 1, epilogue, dtype
    )
    kernel = TritonIm2col()
    reason = kernel.supports(problem, torch.device("cuda", 0))
    if reason is not None:
        pytest.skip(reason)
    data = data_of(problem)
    assert_right(kernel.run(problem, *data), problem, data)
