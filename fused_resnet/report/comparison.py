"""`compare`: what became faster or slower from one benchmark report to another, beyond noise.

Two runs never meet the same machine: it may be busier, hotter or of another build. So a
contender's speed is taken relative to stock torch's in the same rounds, and what is compared
between the reports is that ratio. Stock torch itself is compared by time, which tells how far the
machines agree.

A change counts if its 95 % interval leaves out 1 and it is larger than a threshold. Rounds that
follow each other are alike, so the interval comes from a moving-block bootstrap: Kunsch, "The
jackknife and the bootstrap for general stationary observations", Annals of Statistics 17(3), 1989.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from torch import Tensor

from fused_resnet.bench import Case, Measured, Report, Result
from fused_resnet.bench_table import SHORT_DTYPES
from fused_resnet.console import plain, table
from fused_resnet.contenders import CONTENDERS, is_ours, label

Verdict = Literal["faster", "slower", "same", "wrong", "less exact", "gone", "new"]

#: Verdicts that make a comparison fail, where they are about one of our contenders.
_REGRESSIONS = ("slower", "wrong", "less exact", "gone")
_RESAMPLES = 2000
_LEVEL = 0.95
#: Errors this many times as large are no rounding of another order of summation.
_LESS_EXACT = 2.0

#: What identifies a case in both reports; photos, weights and device may differ in their wording.
_Key = tuple[str, int, str, int, tuple[str, ...]]


@dataclass(frozen=True)
class Change:
    """What became of one contender in one case.

    Attributes:
        model: name of the network.
        batch: images in a call.
        dtype: as torch names it.
        contender: its key.
        over: key of the stock contender that speeds are relative to; None where they are absolute.
        old: speed in the old report: relative to ``over``, or images per second.
        new: the same in the new one.
        ratio: new / old; more than 1 is faster. None where one of them is missing.
        low: lower end of the ratio's 95 % interval.
        high: upper end.
        verdict: what it means.
    """

    model: str
    batch: int
    dtype: str
    contender: str
    over: str | None
    old: float | None
    new: float | None
    ratio: float | None
    low: float | None
    high: float | None
    verdict: Verdict

    @property
    def regression(self) -> bool:
        """Whether one of our contenders became worse."""
        return is_ours(self.contender) and self.verdict in _REGRESSIONS


@dataclass(frozen=True)
class Comparison:
    """All changes. Print it, ask ``passed``, or take the data by `to_dict`.

    Attributes:
        changes: of every contender in every case of either report.
        differences: what else differs between the reports: machine, versions, threads.
        threshold: changes smaller than this share are taken for noise.
    """

    changes: tuple[Change, ...]
    differences: tuple[str, ...]
    threshold: float

    @property
    def passed(self) -> bool:
        """Whether there is something to compare and nothing became worse."""
        compared = any(c.ratio is not None for c in self.changes)
        return compared and not any(c.regression for c in self.changes)

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain data, ready for JSON."""
        return {"passed": self.passed, **asdict(self)}

    def __str__(self) -> str:
        return plain(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows = table()
        rows.padding = (0, 1, 0, 0)
        for name in ("network", "", "contender", "old", "new", "new / old", "95 %", ""):
            right = name in ("old", "new", "new / old", "95 %")
            rows.add_column(name, justify="right" if right else "left", no_wrap=True)
        before = None
        for c in self.changes:
            case = (c.model, f"{SHORT_DTYPES.get(c.dtype, c.dtype)} x{c.batch}")
            shown = ("", "") if case == before else (escape(case[0]), case[1])
            before = case
            rows.add_row(*shown, label(c.contender), *_cells(c))
        yield rows
        yield ""
        yield (
            f"[dim]Measured. Contenders: speed over stock torch's in the same rounds (x); stock "
            f"torch: images per second. A change counts if its 95 % interval leaves out 1 and it "
            f"exceeds {self.threshold:.0%}.[/]"
        )
        for difference in self.differences:
            yield f"[yellow]note:[/] {escape(difference)}"
        worse = [c for c in self.changes if c.regression]
        if worse:
            yield f"[red]Regressions: {len(worse)}.[/]"
        elif self.passed:
            yield "[green]No regression.[/]"
        else:
            yield "[red]The reports have no timed case in common.[/]"


def compare(old: Report, new: Report, threshold: float = 0.05) -> Comparison:
    """Compare two reports of `bench`.

    Args:
        old: the earlier report.
        new: the later one.
        threshold: changes of speed smaller than this share are taken for noise.

    Example:
        >>> comparison = compare(Report.load("old.json"), Report.load("new.json"))
        >>> comparison.passed
        True
    """
    before = {_key(r.case): r for r in old.results}
    after = {_key(r.case): r for r in new.results}
    changes = [
        _change(result.case, key, before.get(k), after.get(k), threshold)
        for k, result in {**before, **after}.items()
        for key in _contenders(before.get(k), after.get(k))
    ]
    return Comparison(tuple(changes), tuple(_differences(old, new)), threshold)


def _key(case: Case) -> _Key:
    return case.model, case.batch, case.dtype, case.size, case.backends


def _contenders(old: Result | None, new: Result | None) -> list[str]:
    """Contenders that were timed in either, or were wrong, in the order of tables."""
    results = [result for result in (old, new) if result is not None]
    found = {k for r in results for k, m in r.contenders.items() if m.seconds or not m.correct}
    return sorted(found, key=lambda key: [*CONTENDERS, key].index(key))


def _change(
    case: Case, key: str, old: Result | None, new: Result | None, threshold: float
) -> Change:
    a, b = _measured(old, key), _measured(new, key)
    if a is None or b is None or not a.seconds or not b.seconds:
        verdict: Verdict = "gone" if a is not None and a.seconds else "new"
        if b is not None and not b.correct:
            verdict = "wrong"
        return Change(
            case.model, case.batch, case.dtype, key, None, None, None, None, None, None, verdict
        )
    assert old is not None
    assert new is not None
    over = _baseline(key, old, new)
    was, now = _speeds(old, key, over), _speeds(new, key, over)
    ratio = (now.quantile(0.5) / was.quantile(0.5)).item()
    resampled = _medians(now) / _medians(was)
    tail = (1 - _LEVEL) / 2
    low, high = torch.quantile(resampled, torch.tensor([tail, 1 - tail], dtype=now.dtype)).tolist()
    verdict = "same"
    if not b.correct:
        verdict = "wrong"
    elif a.error is not None and b.error is not None and b.error > _LESS_EXACT * a.error:
        verdict = "less exact"
    elif high < 1 and ratio < 1 - threshold:
        verdict = "slower"
    elif low > 1 and ratio > 1 + threshold:
        verdict = "faster"
    scale = 1.0 if over is not None else float(case.batch)
    return Change(
        case.model,
        case.batch,
        case.dtype,
        key,
        over,
        was.quantile(0.5).item() * scale,
        now.quantile(0.5).item() * scale,
        ratio,
        low,
        high,
        verdict,
    )


def _measured(result: Result | None, key: str) -> Measured | None:
    return None if result is None else result.contenders.get(key)


def _baseline(key: str, old: Result, new: Result) -> str | None:
    """The stock contender in the contender's own layout, or any, that was timed in both runs."""
    contender = CONTENDERS.get(key)
    if contender is not None and contender.role == "stock":
        return None
    for stock in ("stock_nhwc", "stock_nchw"):
        both = (_measured(old, stock), _measured(new, stock))
        if all(m is not None and m.seconds for m in both):
            return stock
    return None


def _speeds(result: Result, key: str, over: str | None) -> Tensor:
    """Calls per second in each round, or how many times as fast as ``over`` in the same round."""
    ours = torch.tensor(result.contenders[key].seconds, dtype=torch.float64)
    if over is None:
        return 1 / ours
    theirs = torch.tensor(result.contenders[over].seconds, dtype=torch.float64)
    n = min(len(ours), len(theirs))
    return theirs[:n] / ours[:n]


def _medians(values: Tensor) -> Tensor:
    """Medians of resampled series, made of blocks of neighbouring values: [_RESAMPLES]."""
    n = len(values)
    length = max(1, round(math.sqrt(n)))
    blocks = math.ceil(n / length)
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(n - length + 1, (_RESAMPLES, blocks, 1), generator=generator)
    picked = (starts + torch.arange(length)).flatten(1)[:, :n]
    return values[picked].quantile(0.5, dim=1)


def _differences(old: Report, new: Report) -> list[str]:
    """What a reader must know who takes the reports for measurements of one thing."""
    found = []
    for name in sorted({*old.versions, *new.versions}):
        a, b = old.versions.get(name, "none"), new.versions.get(name, "none")
        if a != b:
            found.append(f"{name}: {a} before, {b} now")
    was, now = asdict(old.machine), asdict(new.machine)
    found.extend(f"{k}: {was[k]} before, {now[k]} now" for k in was if was[k] != now[k])
    threads = [sorted({r.case.threads for r in report.results}) for report in (old, new)]
    if threads[0] != threads[1]:
        found.append(f"threads: {_words(threads[0])} before, {_words(threads[1])} now")
    for name, report in (("old", old), ("new", new)):
        if not report.complete:
            found.append(f"the {name} report is incomplete: its run was interrupted")
    return found


def _words(values: Sequence[int]) -> str:
    return ", ".join(map(str, values)) or "none"


def _cells(c: Change) -> list[str]:
    colours = {"faster": "green", "same": "dim", "new": "dim"}
    colour = "red" if c.regression else colours.get(c.verdict, "yellow")
    verdict = f"[{colour}]{c.verdict}[/]"
    if c.ratio is None or c.old is None or c.new is None:
        return ["-", "-", "-", "-", verdict]
    unit = "x" if c.over is not None else ""
    old, new = (f"{v:.2f}{unit}" if unit else f"{v:.1f}" for v in (c.old, c.new))
    return [old, new, f"{c.ratio:.3f}", f"{c.low:.3f} .. {c.high:.3f}", verdict]
