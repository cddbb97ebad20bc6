"""What `Plan.explain` says: each layer's kernel, time, error and rivals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape

from fused_resnet import backends
from fused_resnet.chain_planner import ChainOutcome
from fused_resnet.console import duration, megabytes, plain, table
from fused_resnet.layers import Plain
from fused_resnet.memory_report import MemoryReport
from fused_resnet.planner import Outcome, Settings, not_used
from fused_resnet.tuned_table import Timing, TunedTable

if TYPE_CHECKING:
    from fused_resnet.plan import Specialisation


#: `Entry.spread` above which the choice between kernels may have been chance.
_BUSY = 1.5


@dataclass(frozen=True)
class Rival:
    """A kernel that does not compute a layer, and why not."""

    kernel: str
    why: str


@dataclass(frozen=True)
class Row:
    """A layer of a plan.

    Attributes:
        name: path of the convolution, or name of the operator.
        problem: what is computed.
        kernel: what computes it; ``torch`` for what no kernel competes for.
        seconds: of one call, as measured when kernels were compared; None if it was not measured.
        share: of the sum of all measured times.
        error: relative distance from float64 on the layer's real input, by norm.
        stock_error: stock torch's.
        rivals: all other kernels.
        spread: how much the fastest kernel's calls differed, see `Entry`; None if not measured.
    """

    name: str
    problem: str
    kernel: str
    seconds: float | None = None
    share: float | None = None
    error: float | None = None
    stock_error: float | None = None
    rivals: tuple[Rival, ...] = ()
    spread: float | None = None


@dataclass(frozen=True)
class Part:
    """The layers for one set of shapes, what became of each bottleneck, and notes about them."""

    inputs: str
    rows: tuple[Row, ...]
    seconds: float | None = None
    notes: tuple[str, ...] = ()
    chains: tuple[ChainOutcome, ...] = ()


@dataclass(frozen=True)
class PlanReport:
    """What `Plan.explain` found; prints as a table, ``to_dict`` gives everything.

    Attributes:
        model: name of the model's class.
        mode: of tuning.
        parts: one for each set of shapes.
        memory: bytes.
        reason: why the model is not specialised and runs fused instead; None if it is.
    """

    model: str
    mode: str
    parts: tuple[Part, ...]
    memory: MemoryReport
    reason: str | None = None
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Everything, as what JSON can hold."""
        return asdict(self)

    def __str__(self) -> str:
        return plain(self, width=140)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.reason is not None:
            yield escape(
                f"{self.model} is not specialised: {self.reason}. Its fused form runs, each op "
                "by the kernel that was measured to be the fastest; no part of it is one native "
                "call, one graph or chained, and its memory is not planned. A part that can be "
                "traced can be specialised by itself: model.backbone = "
                "fused_resnet.optimize(model.backbone, what it is called with)."
            )
        for part in self.parts:
            yield from _print_part(self, part)
        yield escape(f"memory: {self.memory}")


def _print_part(report: PlanReport, part: Part) -> Iterator[Any]:
    timed = "" if part.seconds is None else f", {duration(part.seconds)} as a whole"
    yield escape(f"plan of {report.model} for {part.inputs}, mode {report.mode}{timed}")
    rows = table()
    for heading in ("layer", "problem", "kernel"):
        rows.add_column(heading, overflow="fold")
    for heading in ("time", "share", "error", "stock's"):
        rows.add_column(heading, justify="right", no_wrap=True)
    rows.add_column("next best", overflow="fold")
    for row in part.rows:
        rival = f"{row.rivals[0].kernel}: {row.rivals[0].why}" if row.rivals else ""
        cells = (
            row.name,
            row.problem,
            row.kernel,
            "" if row.seconds is None else duration(row.seconds),
            "" if row.share is None else f"{row.share:.0%}",
            "" if row.error is None else f"{row.error:.1e}",
            "" if row.stock_error is None else f"{row.stock_error:.1e}",
            rival,
        )
        rows.add_row(*map(escape, cells))
    yield rows
    for outcome in part.chains:
        yield escape(str(outcome))
        for what, why in outcome.alternatives:
            yield escape(f"    {what}: {why}")
    for note in part.notes:
        yield escape(f"note: {note}")


def report(
    name: str,
    parts: Sequence[tuple[str, Specialisation]],
    settings: Settings,
    known: TunedTable,
    reason: str | None,
    memory: MemoryReport,
) -> PlanReport:
    """The report of a plan with these programs; ``known`` tells of kernels that a file named."""
    found = tuple(_part(*part, settings, known) for part in parts)
    return PlanReport(name, settings.mode, found, memory, reason)


def _part(
    inputs: str, specialisation: Specialisation, settings: Settings, known: TunedTable
) -> Part:
    decision = specialisation.decision
    outcomes = {o.layer.result: o for o in decision.outcomes}
    layers = specialisation.program.layers
    device = layers.graph.meta[layers.graph.inputs[0]].device
    rows = [
        Row(layer.name, "", "torch")
        if isinstance(layer, Plain)
        else _row(outcomes[layer.result], settings, known, device, decision.notes)
        for layer in layers.layers
    ]
    total = sum(row.seconds or 0.0 for row in rows)
    shared = tuple(
        row if row.seconds is None or total == 0.0
        else Row(**{**vars(row), "share": row.seconds / total})
        for row in rows
    )  # fmt: skip
    notes = (*decision.notes, *_unsteady(rows))
    return Part(inputs, shared, decision.seconds, notes, decision.chains)


def _unsteady(rows: Sequence[Row]) -> Iterator[str]:
    """A note, if kernels were compared while the machine did something else."""
    spreads = [row.spread for row in rows if row.spread is not None and row.spread > _BUSY]
    if spreads:
        yield (
            f"{len(spreads)} layers were measured on a busy machine: the typical call of a kernel "
            f"took up to {max(spreads):.1f} times as long as its quick ones. To measure again when "
            "it is idle, remove the table (fused-resnet doctor names it), or use cache=False"
        )


def _row(
    outcome: Outcome,
    settings: Settings,
    known: TunedTable,
    device: torch.device,
    notes: Sequence[str],
) -> Row:
    layer, name = outcome.layer, outcome.kernel.full_name
    entry = outcome.entry or known.entry(layer.op, layer.problem, device)
    seconds = None
    rivals: list[Rival] = []
    if entry is not None:
        timings = {t.kernel: t for t in entry.timings}
        mine = timings.get(name)
        seconds = None if mine is None else mine.seconds
        tolerance = settings.tolerance_of(layer.problem.dtype)
        others = sorted((t for t in timings.values() if t is not mine), key=lambda t: t.seconds)
        for timing in others:
            kernel = backends.named(layer.op, timing.kernel, layer.problem, device)
            larger = 0 if kernel is None else kernel.expansion(layer.problem)
            mine_larger = outcome.kernel.expansion(layer.problem)
            why = (
                _too_inexact(timing, tolerance)
                or _wrong_here(layer.name, timing, notes)
                or _too_large(larger - mine_larger, settings, timing, mine)
                or _too_slow(timing, mine)
            )
            rivals.append(Rival(timing.kernel, why))
        rivals += [Rival(kernel, why) for kernel, why in entry.rejected]
    return Row(
        layer.name,
        str(layer.problem),
        name,
        seconds,
        None,
        outcome.error,
        outcome.stock_error,
        tuple(rivals),
        None if entry is None else entry.spread,
    )


def _too_inexact(timing: Timing, tolerance: float | None) -> str | None:
    if not timing.exact and tolerance is None:
        return f"inexact (error {timing.error:.1e}), which the mode excludes"
    if not timing.exact and tolerance is not None and timing.error > tolerance:
        return f"its error {timing.error:.1e} exceeds the tolerance {tolerance:.1e}"
    return None


def _wrong_here(layer: str, timing: Timing, notes: Sequence[str]) -> str | None:
    """Why a kernel was found wrong with the layer's own weights, if it was."""
    found = (n for n in notes if n.startswith(not_used(layer, timing.kernel)))
    return next((n.removeprefix(not_used(layer, timing.kernel)) for n in found), None)


def _too_large(bytes_: int, settings: Settings, timing: Timing, mine: Timing | None) -> str | None:
    """Why a kernel that takes so many bytes more for the layer's weights is left out, if it is."""
    if bytes_ <= 0 or settings.compact is False:
        return None
    more = f"its packed weights take {megabytes(bytes_)} more"
    if settings.compact:
        return f"{more}, and the plan is compact"
    if mine is None or timing.seconds >= mine.seconds:
        return None
    return f"{timing.seconds / mine.seconds:.2f} of the time, but {more}: see compact of optimize"


def _too_slow(timing: Timing, mine: Timing | None) -> str:
    if mine is None:
        return f"{duration(timing.seconds)}, where the chosen kernel was not measured"
    ratio = timing.seconds / mine.seconds
    if ratio >= 1.0:
        return f"{ratio:.2f} times as slow"
    return f"{ratio:.2f} of the time by itself: a near-tie, or slower within the network"


__all__ = ["Part", "PlanReport", "Rival", "Row", "report"]
