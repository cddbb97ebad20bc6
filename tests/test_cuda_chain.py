"""The chained bottleneck of csrc/cuda, executed on the emulator, against float64."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fused_resnet import backends
from fused_resnet.backends import cuda_chain
from fused_resnet.numerics import error, reference_chain, stock_chain
from fused_resnet.problem import ChainProblem
from tests import cuda_emulated as emulated
from tests.chain_cases import chain_data, chain_problem
from tests.emulator import SCHEDULES

DTYPES = ("float16", "bfloat16")

#: The blocks that the kernels are for.
BLOCKS: dict[str, dict[str, Any]] = {
    "next": {},
    "last": {"following": 0},
    "wider": {"following": 2},
    "even": {"following": 2, "store": "even"},
    "projected": {"proj": 1},
    "strided": {"proj": 2, "stride": 2},
    "thinned": {"proj": 2, "stride": 2, "step": 1},
}

#: Channels of the 3x3, a block, and the way of the kernel, as `cuda_emulated.plan_chain` has it.
KERNELS = (
    *(
        (64, block, way)
        for block in ("next", "last", "wider", "even", "projected")
        for way in ("resident", "streamed")
    ),
    *(
        (128, block, "streamed")
        for block in ("next", "last", "wider", "even", "strided", "thinned")
    ),
)

#: N, H, W of mid2: whole tiles of 8 x 16 pixels, ragged ones, images smaller than a tile; "wide"
#: and "resnet" are cut into tiles of 4 x 32.
SIZES = {
    "whole": (1, 16, 32),
    "ragged": (2, 9, 16),
    "wide": (2, 9, 21),
    "small": (3, 5, 3),
    "pixel": (1, 1, 1),
    "resnet": (1, 28, 28),
}


def problem_of(name: str, mid: int, dtype: str, block: str, turn: int = 0) -> ChainProblem:
    """Of stride 2 the inputs' sizes are even and odd by turns."""
    n, h, w = SIZES[name]
    options = dict(BLOCKS[block])
    stride = options.get("stride", 1)
    for channels in ("following", "proj"):
        if channels in options:
            options[channels] *= mid
    h, w = (stride * side - (turn + i) % stride for i, side in enumerate((h, w)))
    return chain_problem(mid, n, h, w, dtype=emulated.DTYPES[dtype], **options)


def check(run: emulated.Run, problem: ChainProblem, way: str, blocks: int) -> None:
    args = chain_data(problem)
    results = emulated.bottleneck_chain(run, problem, way, blocks, *args)
    assert run.findings == []
    references, stocks = reference_chain(problem, *args), stock_chain(problem, *args)
    for result, reference, stock in zip(results, references, stocks, strict=True):
        assert result.shape == reference.shape
        if result.numel():
            found = error(result, reference)
            assert found.within(error(stock, reference), problem.dtype), f"{problem}: {found}"


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(("mid", "block", "way"), KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_chain(dtype: str, mid: int, block: str, way: str, name: str) -> None:
    """Fewer blocks than tiles, so that each goes on to the next tile."""
    turn = list(SIZES).index(name) + KERNELS.index((mid, block, way))
    run = emulated.Run(
        schedule=SCHEDULES[turn % 3], seed=turn, placement=("right", "left")[turn % 2]
    )
    check(run, problem_of(name, mid, dtype, block, turn), way, 1 + turn % 3)


@pytest.mark.parametrize("name", ["ragged", "wide"])
@pytest.mark.parametrize(("mid", "block", "way"), KERNELS)
def test_checked_build_reports_nothing(mid: int, block: str, way: str, name: str) -> None:
    turn = KERNELS.index((mid, block, way)) + (name == "wide")
    run = emulated.Run(
        checked=True, schedule=SCHEDULES[turn % 3], seed=turn, placement=("left", "right")[turn % 2]
    )
    check(run, problem_of(name, mid, DTYPES[turn % 2], block, turn), way, 3)
    (report,) = run.reports
    for kind in ("ldmatrix", "shared_load", "shared_store", "cp_async"):
        assert report.conflicts(kind) == 1.0, kind
    assert report.unread_copies == {}


@pytest.mark.parametrize(
    ("mid", "block", "way"),
    [
        (64, "next", "resident"),
        (64, "even", "resident"),
        (64, "projected", "resident"),
        (128, "strided", "streamed"),
    ],
)
def test_results_are_written_once_by_16_bytes(mid: int, block: str, way: str) -> None:
    problem = problem_of("ragged", mid, "float16", block)
    run = emulated.Run(checked=True)
    check(run, problem, way, 2)
    buffers = run.reports[0].buffers
    for name, shape in (("out", problem.out_shape), ("mid_next", problem.next_shape)):
        traffic = buffers[name]
        assert {width for width, count in traffic.writes.items() if count} == {"16"}
        size = 2 * torch.Size(shape).numel()
        assert traffic.bytes_written == traffic.unique_bytes_written == size
    weights = ["weight2", "weight3", "weight1"] + ["weight_proj"] * (problem.proj > 0)
    for name in ("mid1", "residual", *weights):
        traffic = buffers[name]
        assert {width for width, count in traffic.reads.items() if count} == {"16"}
    # Of the residual each pixel that is sampled, once.
    n, k, oh, ow = problem.n, problem.proj or problem.k, *problem.size
    residual = buffers["residual"]
    assert residual.bytes_read == residual.unique_bytes_read == 2 * n * k * oh * ow
    if way == "resident":
        # Once by each of two blocks.
        for name in weights:
            assert buffers[name].bytes_read == 2 * buffers[name].unique_bytes_read


@pytest.mark.parametrize(
    ("h", "w", "tile", "tiles"),
    [
        (28, 28, (4, 32), 7),
        (9, 21, (4, 32), 3),
        # Of equal numbers the one of the smaller halo.
        (56, 56, (8, 16), 28),
        (32, 32, (8, 16), 8),
        (16, 16, (8, 16), 2),
    ],
)
@pytest.mark.parametrize("block", ["next", "strided"])
def test_the_fewest_tiles_that_cover_an_image(
    block: str, h: int, w: int, tile: tuple[int, int], tiles: int
) -> None:
    options = BLOCKS["strided"] | {"proj": 256} if block == "strided" else {}
    stride = 2 if options else 1
    problem = chain_problem(128, 3, h * stride, w * stride, **options)
    given = emulated.chain_args(problem, torch.empty(problem.residual_shape))
    emulated.plan_chain(given, problem, "streamed")
    assert (given.tile_h, given.tile_w) == tile
    assert given.tiles == 3 * tiles


@pytest.mark.parametrize("has_next", [True, False], ids=["next", "last"])
def test_nan_arrives(has_next: bool) -> None:
    problem = problem_of("whole", 64, "float16", "next" if has_next else "last")
    mid, *rest = chain_data(problem)
    assert mid is not None
    mid[0, 5, 7, 16] = float("nan")
    results = emulated.bottleneck_chain(emulated.Run(), problem, "resident", 2, mid, *rest)
    references = reference_chain(problem, mid, *rest)
    for result, reference in zip(results, references, strict=True):
        assert torch.equal(result.isnan(), reference.isnan())
    assert results[0].isnan().sum() == 9 * problem.k


def test_channel_order_gives_each_lane_eight_neighbours() -> None:
    order = cuda_chain.channel_order(64).view(2, 4, 4, 2)  # [32 columns, j, t, e]
    for t in range(4):
        channels = order[:, :, t].flatten(1)
        assert torch.equal(channels, torch.arange(8) + 8 * t + 32 * torch.arange(2)[:, None])


class TestKernel:
    def test_is_registered(self) -> None:
        names = {k.full_name for k in backends.KERNELS if k.op == "bottleneck_chain"}
        assert "cuda/chain" in names

    def test_refuses_what_it_does_not_compute(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kernel, device = cuda_chain.CudaChain(), torch.device("cpu")
        problem = chain_problem(64)
        assert kernel.supports(problem, device) == "needs a CUDA device, not cpu"
        monkeypatch.setattr(cuda_chain, "unavailable", lambda device: None)
        gpu = SimpleNamespace(shared_memory_per_block_optin=166912)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
        for mid, block, _ in KERNELS:
            assert kernel.supports(problem_of("whole", mid, "float16", block), device) is None
        for other, reason in (
            (dataclasses.replace(problem, dtype=torch.float32), "fp16 and bf16"),
            (chain_problem(256), "64 and 128 channels"),
            (chain_problem(128, k=256), "64 and 128 channels"),
            (dataclasses.replace(problem, next=256), "256 next"),
            (dataclasses.replace(problem, stride=2), "stride 2 with no projection"),
            (chain_problem(64, proj=128), "a projection of 128"),
            (chain_problem(64, following=0, store="pool"), "not their mean"),
            (dataclasses.replace(problem, n=2**20, h=64, w=64), "too large"),
        ):
            refusal = kernel.supports(other, device)
            assert refusal is not None
            assert reason in refusal

    def test_serves_the_smallest_gpu_and_no_smaller_one(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kernel, device = cuda_chain.CudaChain(), torch.device("cpu")
        monkeypatch.setattr(cuda_chain, "unavailable", lambda device: None)
        gpu = SimpleNamespace(shared_memory_per_block_optin=101376)  # sm_86, sm_89, sm_120
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
        for mid, block, _ in KERNELS:
            problem = problem_of("whole", mid, "float16", block)
            assert kernel.supports(problem, device) is None
        gpu.shared_memory_per_block_optin = 98304
        refusal = kernel.supports(chain_problem(128), device)
        assert refusal == "needs 101376 bytes of shared memory, this GPU has 98304"
        assert kernel.supports(chain_problem(64), device) is None

    def test_shared_memory_is_that_of_the_smallest_kernel(self) -> None:
        found: dict[tuple[int, ...], int] = {}
        for mid, block, way in KERNELS:
            problem = problem_of("whole", mid, "float16", block)
            residual = torch.empty(problem.residual_shape)
            given = emulated.chain_args(problem, residual)
            _, _, shared_bytes = emulated.plan_chain(given, problem, way)
            key = problem.m, problem.next, problem.proj, problem.stride
            found[key] = min(found.get(key, shared_bytes), shared_bytes)
        assert found == cuda_chain._SHARED_BYTES
