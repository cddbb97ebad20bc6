"""The CUDA kernels on a GPU, against float64, and under compute-sanitizer."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.certify_cuda import LAYERS, layer
from fused_resnet.backends import cuda, cuda_chain
from fused_resnet.numerics import (
    error,
    reference_chain,
    reference_conv,
    stock_chain,
    stock_conv,
)
from fused_resnet.problem import EPILOGUES, AddReluProblem, ConvProblem
from tests.chain_cases import chain_data
from tests.test_cuda_chain import KERNELS as CHAINS
from tests.test_cuda_chain import problem_of as chain_of
from tests.test_cuda_conv import ODD, inputs, problem_of
from tests.test_cuda_stem import SIZES
from tests.test_cuda_stem import inputs as stem_inputs
from tests.test_cuda_stem import problem_of as stem_problem_of

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KERNELS = [k for k in cuda.KERNELS if k.op == "conv_affine_act"]
STEMS = [k for k in cuda.KERNELS if k.op == "conv_affine_relu_maxpool"]


def check(kernel: cuda.Kernel, problem: ConvProblem, args: tuple) -> None:
    reason = kernel.supports(problem, DEVICE)
    if reason is not None:
        pytest.skip(reason)
    x, *rest = (None if a is None else a.to(DEVICE) for a in args)
    x = x.contiguous(memory_format=torch.channels_last)
    precise = torch.backends.cudnn.conv.fp32_precision
    reference = reference_conv(problem, x, *rest)
    try:
        torch.backends.cudnn.conv.fp32_precision = "tf32" if kernel.tf32 else "ieee"
        stock = stock_conv(problem, x, *rest)
    finally:
        torch.backends.cudnn.conv.fp32_precision = precise
    result = kernel.run(problem, x, *rest)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert error(result, reference).within(error(stock, reference), problem.dtype)


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("arithmetic", ["float16", "bfloat16", "float32"])
def test_odd_geometries(arithmetic: str, kernel, name: str, epilogue: str) -> None:
    problem = problem_of(ODD[name], arithmetic, epilogue)
    check(kernel, problem, inputs(problem))


@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("index", range(len(LAYERS)))
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_of_resnets(dtype: torch.dtype, kernel, index: int, batch: int) -> None:
    problem = dataclasses.replace(layer(index, dtype), n=batch)
    check(kernel, problem, inputs(problem))


@pytest.mark.parametrize("size", [(1, 56), (32, 28), (3, 7)], ids=str)
@pytest.mark.parametrize(("m", "block"), sorted({(m, block) for m, block, _ in CHAINS}))
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_chain(dtype: torch.dtype, m: int, block: str, size: tuple[int, int]) -> None:
    n, h = size
    shape = chain_of("whole", m, "float16", block)
    problem = dataclasses.replace(shape, n=n, h=h, w=h, dtype=dtype)
    kernel = cuda_chain.CudaChain()
    reason = kernel.supports(problem, DEVICE)
    if reason is not None:
        pytest.skip(reason)
    args = [None if t is None else t.to(DEVICE) for t in chain_data(problem)]
    results = kernel.run(problem, *args)
    for result, reference, stock in zip(
        results, reference_chain(problem, *args), stock_chain(problem, *args), strict=True
    ):
        assert result.shape == reference.shape
        if result.numel():
            assert error(result, reference).within(error(stock, reference), dtype)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("kernel", STEMS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("arithmetic", ["float16", "bfloat16", "float32"])
def test_stem(arithmetic: str, kernel, name: str) -> None:
    problem = stem_problem_of(name, arithmetic)
    check(kernel, problem, (*stem_inputs(problem), None))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("count", [1, 7, 4096, 1_000_003])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_relu(dtype: torch.dtype, count: int, inplace: bool) -> None:
    kernel = cuda.CudaAddRelu()
    a, b = torch.randn(2, count + 1, device=DEVICE).to(dtype)[:, 1:]
    expected = torch.relu(a + b)
    result = kernel.run(AddReluProblem(a.shape, dtype, inplace, True), a, b)
    assert torch.equal(result, expected)
    assert (result is a) == inplace


def test_runs_on_the_current_stream() -> None:
    """A kernel must wait for what its stream does before it, and nothing else may wait for it."""
    problem = problem_of(ODD["ragged"], "float16", "relu")
    x, *rest = (None if a is None else a.to(DEVICE) for a in inputs(problem))
    kernel = cuda.ImplicitGemm()
    expected = kernel.run(problem, x, *rest)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    late = torch.zeros_like(x)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        result = kernel.run(problem, late, *rest)
    stream.synchronize()
    assert torch.equal(result, expected)


def test_captured_in_a_graph() -> None:
    problem = problem_of(ODD["ragged"], "float16", "add_relu")
    args = [None if a is None else a.to(DEVICE) for a in inputs(problem)]
    kernel = cuda.ImplicitGemm()
    expected = kernel.run(problem, *args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = kernel.run(problem, *args)
    graph.replay()
    assert torch.equal(result, expected)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on PATH")
    command = [
        *(sanitizer, "--tool", tool, "--error-exitcode", "99", "--kernel-name"),
        *("kernel_substring=fused_resnet", sys.executable, "-m", "pytest", "-q", "-m", "gpu"),
        *(
            str(Path(__file__)),
            "-k",
            "relu_add_relu and (ragged or three_channels) or test_stem and odd",
        ),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
