"""Chained bottlenecks in the interpreter, against float64."""

import itertools

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet import backends, planner, tuning
from fused_resnet.backends import torch_
from fused_resnet.backends.triton_.chain_kernel import TritonChain
from fused_resnet.backends.triton_.chain_plan import chain_tiles, offers
from fused_resnet.numerics import error, reference_chain, stock_chain
from fused_resnet.problem import ChainProblem

from .harness import FAMILIES

CPU = torch.device("cpu")
DTYPES = [torch.float16, torch.bfloat16]


def problem_of(m=64, n=2, h=7, w=9, *, k=None, following=None, proj=0, stride=1, step=None,
               store="all", dtype=torch.float16):  # fmt: skip
    following = m if following is None else following
    step = (stride if proj else 1) if step is None else step
    return ChainProblem(n, m, h, w, k or 4 * m, following, proj, stride, step, store, dtype)


def data_of(p, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    def image(*shape):
        return draw(*shape).to(p.dtype).contiguous(memory_format=torch.channels_last)

    def conv(k, c, r):
        weight = (draw(k, c, r, r) / (c * r * r) ** 0.5).to(p.dtype)
        return weight, draw(k) * 0.3 + 1, draw(k)

    nothing = (None, None, None)
    residual = (p.n, p.proj, p.h, p.w) if p.step > 1 else p.residual_shape
    return (
        image(p.n, p.m, p.h, p.w),
        image(*residual),
        *conv(p.m, p.m, 3),
        *conv(p.k, p.m, 1),
        *(conv(p.k, p.proj, 1) if p.proj else nothing),
        *(conv(p.next, p.k, 1) if p.next else nothing),
    )


def assert_right(results, problem, data):
    references, stocks = reference_chain(problem, *data), stock_chain(problem, *data)
    for result, reference, stock in zip(results, references, stocks, strict=True):
        assert result.dtype == problem.dtype
        assert result.shape == reference.shape
        assert result.is_contiguous(memory_format=torch.channels_last)
        found, allowed = error(result, reference), error(stock, reference)
        assert found.within(allowed, problem.dtype), f"{problem}: {found!r}, stock {allowed!r}"


def check(problem, kernel=None):
    kernel = kernel or TritonChain()
    assert kernel.supports(problem, CPU) is None
    data = data_of(problem)
    assert_right(kernel.run(problem, *data), problem, data)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("store", ["all", "even"])
@pytest.mark.parametrize("m", [64, 128, 256])
def test_identity_blocks(m, store, dtype):
    check(problem_of(m, 1 if m == 256 else 2, 5 if m == 256 else 7, store=store, dtype=dtype))


@pytest.mark.parametrize("store", ["all", "pool"])
def test_a_last_block(store):
    check(problem_of(following=0, store=store, n=3))
    check(problem_of(following=0, store=store, n=2, h=11, w=13, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("h", "w"), [(14, 14), (13, 11)])
@pytest.mark.parametrize("step", [1, 2])
def test_strided_blocks_with_the_projection_inside(h, w, step, dtype):
    check(problem_of(128, 1, h, w, proj=256, stride=2, step=step, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_block_of_a_network(dtype):
    check(problem_of(64, 1, 7, 6, proj=64, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_blocks_with_the_projection_outside(dtype):
    check(problem_of(128, 1, 9, 7, stride=2, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stage_transitions(dtype):
    check(problem_of(64, 1, 9, 10, following=128, store="even", dtype=dtype))
    # A stage of one block.
    check(problem_of(64, 1, 5, 6, following=128, proj=64, store="even", dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_networks(dtype):
    check(problem_of(128, 1, k=256, proj=64, dtype=dtype))


def test_extents_of_one():
    check(problem_of(64, 1, 1, 1))
    check(problem_of(128, 1, 1, 1, proj=256, stride=2, step=1))
    check(problem_of(64, 1, 1, 1, following=0, store="pool"))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_passes_every_relu():
    problem = problem_of()
    data = data_of(problem)
    data[0][0, 3, 2, 2] = float("nan")
    out, mid_next = TritonChain().run(problem, *data)
    assert_right((out, mid_next), problem, data)
    assert mid_next.isnan().any()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_configuration(family):
    arch = FAMILIES[family]
    seen = set()
    for m, wide, proj in itertools.product((64, 128, 256), (1, 2), (False, True)):
        stride, size = (1, 5) if m == 64 or not proj else (2, 9)
        channels = (64 if m == 64 else 2 * m) if proj else 0
        problem = problem_of(m, 1, size, size, following=m * wide, proj=channels, stride=stride)
        for tile in chain_tiles(problem, arch):
            check(problem, TritonChain(arch, tile))
            seen.add(tile)
    assert seen == {offer.tile for offer in offers(arch)}


def test_what_is_refused_is_said():
    kernel = TritonChain()
    assert "not torch.float32" in kernel.supports(problem_of(dtype=torch.float32), CPU)
    assert "not of 32" in kernel.supports(problem_of(32), CPU)
    assert "not of 512" in kernel.supports(problem_of(512), CPU)
    assert "multiple of 64" in kernel.supports(problem_of(k=96), CPU)
    assert "power of two" in kernel.supports(problem_of(following=96), CPU)
    assert "fits this GPU" in kernel.supports(problem_of(256, following=4096), CPU)
    tile = chain_tiles(problem_of(128), FAMILIES["mma"])[0]
    assert "not offered" in TritonChain(tile=tile).supports(problem_of(256), CPU)


class Pair(nn.Module):
    """Two bottlenecks of 64 channels behind a 1x1, and their mean."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 1)
        down = nn.Sequential(nn.Conv2d(64, 256, 1, bias=False), nn.BatchNorm2d(256))
        self.blocks = nn.Sequential(
            fused_resnet.Bottleneck(64, 64, downsample=down), fused_resnet.Bottleneck(256, 64)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        return self.pool(self.blocks(self.stem(x)))


@pytest.mark.parametrize("family", ["mma", "wgmma"])
def test_a_plan_runs_chains(family, monkeypatch):
    """With weights packed beforehand, by descriptors or not; the clock says chains are fast."""
    kernel = TritonChain(FAMILIES[family])
    monkeypatch.setattr(backends, "KERNELS", (kernel, *torch_.KERNELS))
    monkeypatch.setitem(backends._verdicts, (kernel, CPU, torch.float16), None)

    def instant(found, task, effort):
        for c in found:
            c.samples = [0.5 if c.kernel.name == "chain" else 1.0]

    monkeypatch.setattr(tuning, "_time", instant)
    monkeypatch.setattr(planner, "_seconds", lambda program, inputs: len(program.layers.layers))
    torch.manual_seed(0)
    model, x = Pair().half().eval(), torch.randn(2, 3, 5, 4).half()
    plan = fused_resnet.optimize(model, x, cache=False)
    (part,) = plan.explain().parts
    assert [row.kernel for row in part.rows if row.problem.startswith("chain")] == [
        "triton/chain", "triton/chain",
    ]  # fmt: skip
    with torch.no_grad(), fused_resnet.backend("torch"):
        stock, exact = model(x), model.double()(x.double())
    assert error(plan(x), exact).within(error(stock, exact), torch.float16)
