"""The chained bottleneck of csrc/cuda, executed on the emulator, against float64."""

from __future__ import annotations

import dataclasses

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

#: Kernels by the channels of the 3x3 and whether all weights stay in shared memory.
KERNELS = ((64, True), (64, False), (128, False))

#: N, H, W: whole tiles of 8 x 16 pixels, ragged ones, images smaller than a tile.
SIZES = {
    "whole": (1, 16, 32),
    "ragged": (2, 9, 21),
    "small": (3, 5, 3),
    "pixel": (1, 1, 1),
    "resnet": (1, 28, 28),
}


def problem_of(name: str, mid: int, dtype: str, has_next: bool) -> ChainProblem:
    following = mid if has_next else 0
    return chain_problem(mid, *SIZES[name], following=following, dtype=emulated.DTYPES[dtype])


def check(run: emulated.Run, problem: ChainProblem, resident: bool, blocks: int) -> None:
    args = chain_data(problem)
    results = emulated.bottleneck_chain(run, problem, resident, blocks, *args)
    assert run.findings == []
    references, stocks = reference_chain(problem, *args), stock_chain(problem, *args)
    for result, reference, stock in zip(results, references, stocks, strict=True):
        assert result.shape == reference.shape
        if result.numel():
            found = error(result, reference)
            assert found.within(error(stock, reference), problem.dtype), f"{problem}: {found}"


@pytest.mark.parametrize("has_next", [True, False], ids=["next", "last"])
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(("mid", "resident"), KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_chain(dtype: str, mid: int, resident: bool, name: str, has_next: bool) -> None:
    """Fewer blocks than tiles, so that each goes on to the next tile."""
    turn = list(SIZES).index(name) + has_next
    run = emulated.Run(
        schedule=SCHEDULES[turn % 3], seed=turn, placement=("right", "left")[turn % 2]
    )
    check(run, problem_of(name, mid, dtype, has_next), resident, 1 + turn % 3)


@pytest.mark.parametrize("has_next", [True, False], ids=["next", "last"])
@pytest.mark.parametrize(("mid", "resident"), KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_checked_build_reports_nothing(
    dtype: str, mid: int, resident: bool, has_next: bool
) -> None:
    turn = KERNELS.index((mid, resident)) + has_next
    run = emulated.Run(
        checked=True, schedule=SCHEDULES[turn % 3], seed=turn, placement=("left", "right")[turn % 2]
    )
    check(run, problem_of("ragged", mid, dtype, has_next), resident, 3)
    (report,) = run.reports
    for kind in ("ldmatrix", "shared_load", "shared_store", "cp_async"):
        assert report.conflicts(kind) == 1.0, kind
    assert report.unread_copies == {}


def test_results_are_written_once_by_16_bytes() -> None:
    problem = problem_of("ragged", 64, "float16", True)
    run = emulated.Run(checked=True)
    check(run, problem, True, 2)
    buffers = run.reports[0].buffers
    for name, shape in (("out", problem.out_shape), ("mid_next", problem.next_shape)):
        traffic = buffers[name]
        assert {width for width, count in traffic.writes.items() if count} == {"16"}
        size = 2 * torch.Size(shape).numel()
        assert traffic.bytes_written == traffic.unique_bytes_written == size
    for name in ("mid1", "residual", "weight2", "weight3", "weight1"):
        traffic = buffers[name]
        assert {width for width, count in traffic.reads.items() if count} == {"16"}
    # Once by each of two blocks.
    assert buffers["weight2"].bytes_read == 2 * buffers["weight2"].unique_bytes_read


@pytest.mark.parametrize("has_next", [True, False], ids=["next", "last"])
def test_nan_arrives(has_next: bool) -> None:
    problem = problem_of("whole", 64, "float16", has_next)
    mid, *rest = chain_data(problem)
    assert mid is not None
    mid[0, 5, 7, 16] = float("nan")
    results = emulated.bottleneck_chain(emulated.Run(), problem, True, 2, mid, *rest)
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
        assert kernel.supports(problem, device) is None
        assert kernel.supports(dataclasses.replace(problem, next=0), device) is None
        assert kernel.supports(chain_problem(128), device) is None
        for other, reason in (
            (dataclasses.replace(problem, dtype=torch.float32), "fp16 and bf16"),
            (chain_problem(256), "64 and 128 channels"),
            (dataclasses.replace(problem, next=128), "64 and 128 channels"),
            (dataclasses.replace(problem, stride=2), "stride 1"),
            (chain_problem(64, proj=64), "projection"),
            (dataclasses.replace(problem, store="even"), "all of their output"),
            (dataclasses.replace(problem, n=2**20, h=64, w=64), "too large"),
        ):
            refusal = kernel.supports(other, device)
            assert refusal is not None
            assert reason in refusal
