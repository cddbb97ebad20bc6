"""The count of bytes behind docs/chained-bottlenecks.md, against sums by hand and the problems."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.chain_traffic import (
    CUTS,
    GPUS,
    LAYERS,
    Gpu,
    link,
    megabytes,
    predicted_seconds,
    steps,
    tables,
)
from fused_resnet.problem import ChainProblem

DOCS = Path(__file__).parent.parent / "docs" / "chained-bottlenecks.md"


@pytest.mark.parametrize(
    ("network", "how", "chained", "least", "most"),
    [
        ("resnet50", "stock", (), 159.5, 159.8),
        ("resnet50", "fused", (), 51.0, 55.0),
        ("resnet50", "fused", (1, 2), 30.0, 33.0),
        ("resnet50", "fused", (1, 2, 3), 27.0, 29.0),
        ("resnet152", "stock", (), 342.4, 342.8),
    ],
)
def test_megabytes_of_an_image(
    network: str, how: str, chained: tuple[int, ...], least: float, most: float
) -> None:
    assert least <= megabytes(network, how, chained) <= most


def test_an_identity_block_moves_ten_widths_instead_of_sixteen() -> None:
    fused = [s for s in steps("resnet50", "fused") if s.stage == 1][5:8]
    assert sum(s.bytes for s in fused) == 2 * 3136 * 64 * 16
    assert link(1, 3136, 64, 64, 1, 0, "all").bytes == 2 * 3136 * 64 * 10


@pytest.mark.parametrize(
    ("m", "size", "following", "stride", "proj", "store"),
    [
        (64, 56, 64, 1, 0, "all"),
        (64, 56, 128, 1, 0, "even"),
        (64, 56, 64, 1, 64, "all"),
        (128, 28, 128, 2, 256, "all"),
        (512, 7, 0, 1, 0, "pool"),
    ],
)
def test_links_are_counted_as_their_problems(
    m: int, size: int, following: int, stride: int, proj: int, store: str
) -> None:
    step = link(0, size**2, m, following, stride, proj, store)
    h = size * stride
    problem = ChainProblem(
        1, m, h, h, 4 * m, following, proj, stride, stride if proj else 1, store, torch.float16
    )
    vectors = 8 * (m + 4 * m + following + (4 * m if proj else 0))
    assert step.bytes + 2 * step.weights == problem.min_bytes - vectors
    assert 2 * step.macs == problem.flops


def test_work_does_not_depend_on_the_cut() -> None:
    macs = {sum(s.macs for s in steps("resnet50", *cut)) for cut in CUTS.values()}
    # 8.17 GFLOP with the classifier's 2048 x 1000.
    assert macs == {(8_178_368_512 - 2 * 2048 * 1000) // 2}


def test_no_bound_is_beaten() -> None:
    plan = steps("resnet50", "fused", (1, 2))
    endless = Gpu("no arithmetic", 1e12, 1e30, 1e30, 100, 0.0)
    traffic = sum(s.bytes * 8 + 2 * s.weights for s in plan)
    assert predicted_seconds(plan, endless, 8) == pytest.approx(traffic / 1e12 + 1.5e-6 * len(plan))
    for gpu in GPUS:
        assert predicted_seconds(plan, gpu, 256) > 2 * 256 * sum(s.macs for s in plan) / gpu.tensor


def test_the_document_shows_these_numbers() -> None:
    text = DOCS.read_text()
    for table in tables():
        columns = [list(column.cells) for column in table.columns]
        for row in zip(*columns, strict=True):
            assert "| " + " | ".join(map(str, row)) + " |" in text
    assert set(LAYERS) == {"resnet50", "resnet101", "resnet152"}
