"""Writes docs/models.md: what `fuse` makes of the models that people have.

    python -m benchmarks.models_table            # every family; tens of minutes
    python -m benchmarks.models_table resnet     # those whose name contains "resnet"; others stay

The rows come from the same records that ``tests/test_models_*.py`` assert; a test fails where the
table and the code disagree.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tests.families import Record

PATH = Path(__file__).parent.parent / "docs" / "models.md"
COMMAND = "run: python -m benchmarks.models_table"

_COLUMNS = (
    "model",
    "conv + norm",
    "convolutions",
    "norms",
    "activations",
    "sums",
    "max-poolings",
    "what stays stock, and why",
    "error / stock's",
)

_HEAD = """# Models

<!-- Written by `python -m benchmarks.models_table`; do not edit. -->

What `fused_resnet.fuse` makes of models that people have: how many calls of each kind are part of a
fused op, of how many. *conv + norm* counts the convolutions whose result goes into a norm, as hooks
on the stock model see it. `print(fused_resnet.explain(fused))` tells the same of a model of yours,
call by call. Of detection models the error is that of the backbone, whose norms are frozen.

For each of them a test makes sure that in eval mode the outputs and every single op obey the error
rule (at most twice as far from float64 as stock torch, plus a rounding unit), that both models are
one function in float64, that results, gradients and running statistics of a training step are
stock torch's, that the `state_dict` is shared and that the model which was given is left as it was.
The last column is measured: distance from float64 in fp32, fused over stock (whichever memory
layout of stock is farther off), small random images, random weights, on one thread.

"""


def row(record: Record) -> tuple[str, ...]:
    """The cells of a record; the last is measured."""
    left = "; ".join(f"{number} {what}" for what, number in record.left.items())
    counts = [
        f"{fused} of {total}" for fused, total in (c.split("/") for c in record.counts.split())
    ]
    pairs = f"{record.pairs[0]} of {record.pairs[1]}"
    counts = ["" if c == "0 of 0" else c for c in counts]
    return record.name, pairs, *counts, left, f"{record.error_ratio:.2f}"


def read() -> dict[str, tuple[str, ...]]:
    """The rows of the committed table, by name."""
    lines = PATH.read_text().splitlines() if PATH.exists() else []
    rows = [
        tuple(c.strip() for c in line.strip("|").split("|")) for line in lines if line[:1] == "|"
    ]
    return {cells[0]: cells for cells in rows[2:]}


def write(rows: dict[str, tuple[str, ...]]) -> None:
    """Write the page, rows in their order."""
    table = [_COLUMNS, ("---",) * len(_COLUMNS), *rows.values()]
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(_HEAD + "".join(f"| {' | '.join(cells)} |\n" for cells in table))


def main(wanted: list[str]) -> int:
    """Judge the families whose name contains one of ``wanted`` (all, if there are none)."""
    from tests.families import FAMILIES, judge

    torch.set_num_threads(1)
    rows, failed = read(), 0
    for family in FAMILIES:
        if wanted and not any(part in family.name for part in wanted):
            continue
        record = judge(family)
        failed += bool(record.problems)
        print(*row(record), *record.problems, sep=" | ", flush=True)
        rows[family.name] = row(record)
        write({f.name: rows[f.name] for f in FAMILIES if f.name in rows})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
