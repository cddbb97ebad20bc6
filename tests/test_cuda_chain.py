"""The chained bottleneck of csrc/cuda, executed on the emulator, against float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fused_resnet.numerics import Error, error
from tests import cuda_emulated as emulated
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


@dataclass
class Chain:
    """One bottleneck's arguments, NCHW; scale and shift are fp32."""

    mid1: Tensor
    residual: Tensor
    weight2: Tensor
    affine2: tuple[Tensor, Tensor]
    weight3: Tensor
    affine3: tuple[Tensor, Tensor]
    weight1: Tensor | None
    affine1: tuple[Tensor, Tensor] | None


def draw_chain(size: tuple[int, int, int], mid: int, dtype: str, has_next: bool) -> Chain:
    n, h, w = size
    generator = torch.Generator().manual_seed(mid + h)
    of = emulated.DTYPES[dtype]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def weight(k: int, c: int, r: int) -> Tensor:
        return (draw(k, c, r, r) / math.sqrt(c * r * r)).to(of)

    def affine(k: int) -> tuple[Tensor, Tensor]:
        return draw(k) + 1, draw(k)

    return Chain(
        draw(n, mid, h, w).to(of),
        draw(n, 4 * mid, h, w).to(of),
        weight(mid, mid, 3),
        affine(mid),
        weight(4 * mid, mid, 1),
        affine(4 * mid),
        weight(mid, 4 * mid, 1) if has_next else None,
        affine(mid) if has_next else None,
    )


def stock(chain: Chain, dtype: torch.dtype) -> list[Tensor]:
    """Unfused, each convolution and batch norm rounded to ``dtype``."""

    def conv(x: Tensor, weight: Tensor, affine: tuple[Tensor, Tensor]) -> Tensor:
        y = F.conv2d(x, weight.to(dtype), padding=weight.shape[-1] // 2)
        mean, var = torch.zeros_like(affine[0]), torch.ones_like(affine[0])
        if dtype == torch.float64:
            mean, var = mean.double(), var.double()
            affine = (affine[0].double(), affine[1].double())
        return F.batch_norm(y, mean, var, *affine, eps=0.0)

    c = chain
    mid2 = conv(c.mid1.to(dtype), c.weight2, c.affine2).relu()
    out = (conv(mid2, c.weight3, c.affine3) + c.residual.to(dtype)).relu()
    if c.weight1 is None or c.affine1 is None:
        return [out]
    return [out, conv(out, c.weight1, c.affine1).relu()]


def check(run: emulated.Run, chain: Chain, dtype: str, resident: bool, blocks: int) -> None:
    results = emulated.bottleneck_chain(run, dtype, resident, blocks, *vars(chain).values())
    assert run.findings == []
    references, stocks = stock(chain, torch.float64), stock(chain, emulated.DTYPES[dtype])
    for result, reference, allowed in zip(results, references, stocks, strict=True):
        found: Error = error(result, reference)
        assert found.within(error(allowed, reference), emulated.DTYPES[dtype]), str(found)


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
    check(run, draw_chain(SIZES[name], mid, dtype, has_next), dtype, resident, 1 + turn % 3)


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
    check(run, draw_chain(SIZES["ragged"], mid, dtype, has_next), dtype, resident, 3)
    (report,) = run.reports
    for kind in ("ldmatrix", "shared_load", "shared_store", "cp_async"):
        assert report.conflicts(kind) == 1.0, kind
    assert report.unread_copies == {}
