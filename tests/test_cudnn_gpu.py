"""The backend cudnn on your GPU: ``pytest -m gpu tests/test_cudnn_gpu.py``."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from torch import Tensor

from fused_resnet.backends import cudnn
from fused_resnet.problem import EPILOGUES, ConvProblem
from tests.helpers import GEOMETRIES, Args, assert_within_rule, conv_problem, draw, reference, stock

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        torch.cuda.is_available() and cudnn.unavailable(torch.device("cuda", 0)) is not None,
        reason="nvidia-cudnn-frontend or cuDNN is missing or too old, or the GPU is",
    ),
]

DEVICE = torch.device("cuda", 0)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KERNEL = cudnn.CudnnGraph()
LAYER = conv_problem(n=8, c=64, k=64, h=28, w=28, epilogue="add_relu", dtype=torch.float16)


def on_gpu(p: ConvProblem) -> Args:
    return Args(*(None if t is None else t.to(DEVICE) for t in draw(p)))


def judge(result: Tensor, p: ConvProblem, args: Args) -> None:
    assert_within_rule(result, reference(p, args), stock(p, args), p.dtype)


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_plan_is_right(geometry: str, epilogue: str, dtype: torch.dtype, tf32: bool) -> None:
    if tf32 and dtype != torch.float32:
        pytest.skip("tf32 is of fp32 tensors")
    problem = conv_problem(**GEOMETRIES[geometry], epilogue=epilogue, dtype=dtype)
    args = on_gpu(problem)
    with torch.backends.cudnn.flags(allow_tf32=tf32):
        reason = KERNEL.supports(problem, DEVICE)
        if reason is not None:
            pytest.skip(reason)
        for variant in KERNEL.variants(problem, DEVICE):
            judge(variant.run(problem, *args), problem, args)


def test_nan_passes_the_relu() -> None:
    problem = dataclasses.replace(LAYER, epilogue="relu")
    args = on_gpu(problem)
    args.x[0, 3, 5, 5] = float("nan")
    assert KERNEL.run(problem, *args).isnan().any()


def test_streams_and_threads() -> None:
    args = on_gpu(LAYER)
    expected = KERNEL.run(LAYER, *args)
    torch.cuda.synchronize()
    results: list[Tensor] = []

    def work() -> None:
        stream = torch.cuda.Stream(DEVICE)
        with torch.cuda.stream(stream):
            found = [KERNEL.run(LAYER, *args) for _ in range(20)]
        stream.synchronize()
        results.extend(found)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    for result in results:
        judge(result, LAYER, args)
    assert torch.equal(results[0], expected)


def test_a_captured_graph_replays() -> None:
    args = on_gpu(LAYER)
    for _ in range(2):
        KERNEL.run(LAYER, *args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = KERNEL.run(LAYER, *args)
    args.x.normal_()
    graph.replay()
    torch.cuda.synchronize()
    judge(result, LAYER, args)
