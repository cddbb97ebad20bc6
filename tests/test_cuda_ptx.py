"""What nvcc makes of csrc/cuda, executed by the PTX runner: each template, once per dtype."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fused_resnet.backends import cuda, cuda_chain
from fused_resnet.backends.cuda_schedule import TILES, ConvSchedule
from fused_resnet.numerics import error, reference_chain, stock_chain
from tests import cuda_emulated as emulated
from tests import ptx
from tests.chain_cases import chain_data, chain_problem
from tests.nvcc import compile_cuda, needs_nvcc
from tests.test_cuda_conv import assert_right, inputs, problem_of
from tests.test_cuda_stem import POOL
from tests.test_cuda_stem import assert_right as assert_stem_right
from tests.test_cuda_stem import inputs as stem_inputs

pytestmark = needs_nvcc

ROOT = Path(__file__).resolve().parents[1]
ARITHMETICS = tuple(emulated.DTYPES)
MATHS = {
    "float16": "Float16Math",
    "bfloat16": "BFloat16Math",
    "tf32": "Tf32Math",
    "float32": "Float32Math",
}
TILE = TILES[3]

#: N, C, H, W, K, (R, S), stride, padding, dilation, groups: the vector and the gathering kernels.
GEOMETRIES = {
    "entry_conv": (1, 24, 7, 6, 40, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "entry_gather": (1, 3, 9, 8, 16, (3, 3), (2, 1), (1, 1), (1, 1), 1),
    "entry_gather_pairs": (1, 6, 7, 8, 16, (3, 3), (2, 1), (1, 1), (1, 1), 1),
    "entry_gather_wide": (1, 3, 2, 20, 8, (1, 17), (1, 1), (0, 3), (1, 1), 1),
}


@functools.cache
def module(arithmetic: str) -> Any:
    source = (ROOT / "tests" / "cuda_entries.cu").read_text()
    options = (f"-DMATH={MATHS[arithmetic]}", f"-I{ROOT / 'csrc' / 'cuda'}", "-std=c++20")
    if arithmetic in ("float16", "bfloat16"):
        options += ("-DCHAIN",)
    text, _ = compile_cuda(source, "ptx", "sm_80", *options)
    return ptx.load(text.decode())


def array(tensor: Tensor | None) -> Any:
    """A tensor's memory as numpy sees it; null for None."""
    if tensor is None:
        return 0
    flat = tensor.contiguous()
    return (flat.view(torch.int16) if flat.element_size() == 2 else flat).numpy()


def result_of(memory: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(memory).view(dtype)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("entry", GEOMETRIES)
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_conv(arithmetic: str, entry: str, splits: int) -> None:
    problem = problem_of(GEOMETRIES[entry], arithmetic, ("add_relu", "relu_add_relu")[splits - 1])
    args = inputs(problem)
    x, weight, scale, shift, residual = args
    packed = cuda.pack(problem, weight, arithmetic == "tf32")
    assert (packed.gather is not None) == entry.startswith("entry_gather")
    n, k, oh, ow = problem.out_shape
    y = array(torch.zeros(n, oh, ow, k, dtype=problem.dtype))
    partial = np.zeros((splits, y.size), np.float32)
    given = emulated.ConvArgs(
        problem=emulated.c_problem(problem),
        splits=splits,
        reduction=packed.weight.shape[1],
        gather=1 if packed.gather is not None else None,
    )
    pointers = [
        array(emulated.nhwc(x)),
        array(packed.weight),
        array(scale),
        array(shift),
        array(emulated.nhwc(residual)),
        y,
        partial,
        array(packed.gather),
    ]
    entries = module(arithmetic)
    for launch, is_reduction in emulated.planned(given, arithmetic, TILE.index):
        entries["entry_reduce" if is_reduction else entry].run(
            tuple(launch.grid),
            launch.threads,
            [*pointers, bytes(launch.args)],
            launch.shared_bytes,
        )
    result = result_of(y, problem.dtype).permute(0, 3, 1, 2)
    assert_right(result, problem, arithmetic, args)
    same = emulated.conv(emulated.Run(), problem, arithmetic, ConvSchedule(TILE, splits), *args)
    assert error(result, same.double()).l2 < torch.finfo(problem.dtype).eps


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_stem(arithmetic: str) -> None:
    dtype = emulated.DTYPES[arithmetic]
    problem = cuda.ConvProblem(
        1, 3, 13, 15, 64, 7, 7, (2, 2), (3, 3), (1, 1), 1, "relu", dtype, True, POOL
    )
    x, weight, scale, shift = stem_inputs(problem)
    packed = cuda.pack_stem(weight, arithmetic == "tf32")
    n, k, ph, pw = problem.out_shape
    y = array(torch.zeros(n, ph, pw, k, dtype=dtype))
    given = emulated.StemArgs(problem=emulated.c_problem(problem), pool_h=ph, pool_w=pw)
    for dimension, stride in zip("nchw", x.stride(), strict=True):
        setattr(given, f"stride_{dimension}", stride)
    module(arithmetic)["entry_stem"].run(
        (-(-ph // 4) * -(-pw // 8), 1),
        160,
        [*map(array, (x, packed, scale, shift)), y, bytes(given)],
        39296 if dtype.itemsize == 2 else 74112,
    )
    result = result_of(y, dtype).permute(0, 3, 1, 2)
    assert_stem_right(result, problem, arithmetic, x, weight, scale, shift)


#: A chained bottleneck and the way of its kernel, as `cuda_emulated.plan_chain` has it.
CHAINS = {
    "entry_chain": (chain_problem(64, 1, 3, 18), "streamed"),
    "entry_chain_wider": (chain_problem(64, 1, 3, 5, following=128, store="even"), "streamed"),
    "entry_chain_projected": (chain_problem(64, 1, 3, 5, proj=64), "streamed"),
    "entry_chain_strided": (chain_problem(128, 1, 5, 8, proj=256, stride=2), "streamed"),
}


@pytest.mark.parametrize("entry", CHAINS)
@pytest.mark.parametrize("arithmetic", ["float16", "bfloat16"])
def test_chain(arithmetic: str, entry: str) -> None:
    """One block and one or two tiles, most of whose pixels lie outside of the image."""
    problem, way = CHAINS[entry]
    problem = dataclasses.replace(problem, dtype=emulated.DTYPES[arithmetic])
    args = chain_data(problem)
    mid, residual, *convs = args
    arrays = [array(emulated.nhwc(mid)), array(emulated.nhwc(residual))]
    for i, layout in enumerate(cuda_chain.layouts(problem)):
        weight, scale, shift = convs[3 * i : 3 * i + 3]
        packed = None if weight is None else cuda_chain.PACK[layout](weight)
        arrays += map(array, (packed, scale, shift))
    out, following = (
        array(torch.zeros(n, h, w, c, dtype=problem.dtype))
        for n, c, h, w in (problem.out_shape, problem.next_shape)
    )
    given = emulated.chain_args(problem, residual)
    _, threads, shared_bytes = emulated.plan_chain(given, problem, way)
    module(arithmetic)[entry].run(1, threads, [*arrays, out, following, bytes(given)], shared_bytes)
    results = [result_of(y, problem.dtype).permute(0, 3, 1, 2) for y in (out, following)]
    for result, reference, stock in zip(
        results, reference_chain(problem, *args), stock_chain(problem, *args), strict=True
    ):
        assert error(result, reference).within(error(stock, reference), problem.dtype)


@pytest.mark.parametrize("arithmetic", ["float16", "bfloat16", "float32"])
def test_elementwise(arithmetic: str) -> None:
    dtype = emulated.DTYPES[arithmetic]
    entries = module(arithmetic)
    a, b = torch.randn(2, 307, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = array(torch.zeros_like(a))
    entries["add_relu"].run(2, 256, [array(a), array(b), y, 307])
    assert torch.equal(result_of(y, dtype), torch.relu(a + b))

    x = torch.randn(2, 19, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    mean = array(torch.zeros(2, 64, dtype=dtype))
    entries["global_average_pool"].run((2, 2), 256, [array(x), mean, 19, 64])
    reference, stock = x.double().mean(1), x.mean(1)
    found = error(result_of(mean, dtype), reference)
    assert found.within(error(stock, reference), dtype)

    turned = array(torch.zeros(2, 64, 19, dtype=dtype))
    entries["transpose"].run((1, 2), 256, [array(x), turned, 19, 64])
    assert torch.equal(result_of(turned, dtype), x.mT)


def test_struct_sizes() -> None:
    """The structs of Python are those that nvcc sees."""
    text = (
        '#include <cstdio>\n#include "chain_args.h"\n#include "conv_tile.h"\n'
        '#include "stem_args.h"\n'
        "static_assert(sizeof(fused_resnet::ChainArgs) == "
        f"{ctypes.sizeof(emulated.ChainArgs)});\n"
        "static_assert(sizeof(fused_resnet::ConvArgs) == "
        f"{ctypes.sizeof(emulated.ConvArgs)});\n"
        "static_assert(sizeof(fused_resnet::StemArgs) == "
        f"{ctypes.sizeof(emulated.StemArgs)});\n"
        'extern "C" __global__ void empty() {}\n'
    )
    compile_cuda(text, "ptx", "sm_80", f"-I{ROOT / 'csrc' / 'cuda'}", "-std=c++20")
