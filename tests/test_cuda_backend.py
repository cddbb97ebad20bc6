"""The cuda backend's own decisions: what it supports, how it packs, which schedule it picks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fused_resnet.backends import cuda
from fused_resnet.backends.cuda_schedule import TILES, candidates, choose, slices
from fused_resnet.problem import AddReluProblem, ConvProblem, MaxPool
from tests.test_cuda_conv import ODD, problem_of

CPU = torch.device("cpu")
LAYER = ConvProblem(1, 256, 14, 14, 256, 3, 3, (1, 1), (1, 1), (1, 1), 1, "relu", torch.float16)
STEM = ConvProblem(
    1, 3, 64, 64, 64, 7, 7, (2, 2), (3, 3), (1, 1), 1, "relu", torch.float16, True,
    MaxPool((3, 3), (2, 2), (1, 1)),
)  # fmt: skip


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device on which nothing but the problem can be refused."""
    monkeypatch.setattr(cuda, "unavailable", lambda device: None)
    return torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("8.0 9.0", (8, 0), True),
        ("8.0 9.0", (8, 6), True),
        ("8.6", (8, 0), False),
        ("8.0;9.0", (9, 0), True),
        ("8.0 9.0", (10, 0), False),
        ("8.0 12.0+PTX", (12, 1), True),
        ("8.0+PTX", (12, 0), True),
        ("12.0+PTX", (9, 0), False),
        ("9.0a", (9, 0), True),
    ],
)
def test_runs_on(archs: str, capability: tuple[int, int], runs: bool) -> None:
    assert cuda.runs_on(archs, *capability) == runs


def test_every_kernel_says_why_it_does_not_run_on_a_cpu() -> None:
    add = AddReluProblem((2, 3), torch.float16, False, True)
    problems = {"conv_affine_act": LAYER, "conv_affine_relu_maxpool": STEM, "add_relu": add}
    for kernel in cuda.KERNELS:
        assert "CUDA device" in (kernel.supports(problems[kernel.op], CPU) or "")


def test_names_are_unique() -> None:
    assert len({kernel.full_name for kernel in cuda.KERNELS}) == len(cuda.KERNELS)


def test_refusals_name_the_reason(on_gpu: torch.device) -> None:
    gemm, tf32, stem = cuda.ImplicitGemm(), cuda.ImplicitGemm(tf32=True), cuda.CudaStem()

    def refusal(kernel: cuda.Kernel, problem: object, **changes: object) -> str:
        return kernel.supports(dataclasses.replace(problem, **changes), on_gpu) or ""

    assert refusal(gemm, LAYER) == ""
    assert "float64" in refusal(gemm, LAYER, dtype=torch.float64)
    assert "32-bit" in refusal(gemm, LAYER, n=2**24)
    assert "tf32 serves fp32" in refusal(tf32, LAYER)
    assert refusal(stem, STEM) == ""
    assert "7x7" in refusal(stem, STEM, r=3, s=3)
    assert "pools" in refusal(stem, STEM, pool=MaxPool((2, 2), (2, 2), (0, 0)))
    assert "epilogue" in refusal(stem, STEM, epilogue="none")
    wide = cuda.ImplicitGemm(TILES[0])
    assert "gathered" in refusal(wide, problem_of(ODD["one_channel"], "float16", "none"))
    add = AddReluProblem((2, 3), torch.float16, False, False)
    assert "layout" in refusal(cuda.CudaAddRelu(), add)


def test_tf32_obeys_torch(on_gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = dataclasses.replace(LAYER, dtype=torch.float32)
    for kernel in (cuda.ImplicitGemm(tf32=True), cuda.CudaStem(tf32=True)):
        other = problem if kernel.op == "conv_affine_act" else STEM
        other = dataclasses.replace(other, dtype=torch.float32)
        monkeypatch.setattr(cuda, "allows_tf32", lambda: True)
        assert kernel.supports(other, on_gpu) is None
        monkeypatch.setattr(cuda, "allows_tf32", lambda: False)
        assert "tf32" in (kernel.supports(other, on_gpu) or "")


def test_allows_tf32_reads_torchs_setting() -> None:
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        assert not cuda.allows_tf32()
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        assert cuda.allows_tf32()
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def test_round_to_tf32() -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    rounded = cuda.round_to_tf32(x)
    assert bool((rounded.view(torch.int32) & 0x1FFF == 0).all())
    assert float(((rounded.double() - x.double()) / x.double()).abs().max()) <= 2.0**-11
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, 1 + 2.0**-11])
    expected = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, 1 + 2.0**-10])
    torch.testing.assert_close(
        cuda.round_to_tf32(special), expected, rtol=0, atol=0, equal_nan=True
    )


def test_bundled_groups_compute_the_same() -> None:
    for name, count in (("resnext", 16), ("depthwise", 48), ("groups", 1), ("odd_groups", 1)):
        problem = problem_of(ODD[name], "float32", "none")
        assert cuda.bundle(problem) == count
        p = problem
        x = torch.randn(p.n, p.c, p.h, p.w, dtype=torch.float64)
        weight = torch.randn(p.k, p.c // p.groups, p.r, p.s, dtype=torch.float64)
        wide = cuda.bundle_weight(weight, p.groups, count)
        torch.testing.assert_close(
            torch.conv2d(x, wide, groups=p.groups // count),
            torch.conv2d(x, weight, groups=p.groups),
        )


@pytest.mark.parametrize(
    ("name", "dtype", "piece"),
    [
        ("odd_channels", "float16", 1),
        ("even_channels", "float16", 2),
        ("even_channels", "float32", 1),
        ("kernel_17", "float16", 1),
    ],
)
def test_gather_table_points_at_the_elements_of_the_window(
    name: str, dtype: str, piece: int
) -> None:
    p = problem_of(ODD[name], dtype, "none")
    assert cuda.gather_piece(p) == piece
    offsets, taps = cuda.gather_table(p).long().unbind(1)
    (dr, ds), x = p.dilation, torch.arange(p.h * p.w * p.c).view(p.h, p.w, p.c)
    window = x[: dr * (p.r - 1) + 1 : dr, : ds * (p.s - 1) + 1 : ds]
    count = p.r * p.s * p.c // piece
    assert torch.equal(x.flatten()[offsets[:count]], window.flatten()[::piece])
    row, column = torch.meshgrid(torch.arange(p.r), torch.arange(p.s), indexing="ij")
    expected = row * dr + (column * ds << 16) if p.r > 16 else (1 << row) + (1 << 16 + column)
    assert torch.equal(taps[:count], expected.flatten().repeat_interleave(p.c // piece))
    assert (taps[count:] < 0).all()
    assert len(taps) * piece * p.dtype.itemsize % 128 == 0


@pytest.mark.parametrize("batch", [1, 8, 256])
@pytest.mark.parametrize("gather", [False, True])
def test_the_choice_is_a_candidate(batch: int, gather: bool) -> None:
    problem = dataclasses.replace(LAYER, n=batch)
    schedule = choose(problem, 108, gather)
    assert schedule in candidates(problem, gather)
    assert schedule == choose(problem, 108, gather)


def test_few_pixels_are_split_and_many_are_not() -> None:
    """One image fills an eighth of an A100 with whole tiles, 256 images all of it."""
    assert choose(LAYER, 108).splits > 1
    many = choose(dataclasses.replace(LAYER, n=256), 108)
    assert (many.tile.name, many.splits) == ("128x128", 1)


def test_splits_keep_four_slices() -> None:
    for schedule in candidates(LAYER):
        assert schedule.splits == 1 or slices(LAYER, schedule.tile, False) >= 4 * schedule.splits
