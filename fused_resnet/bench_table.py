"""A benchmark's report as a person reads it: a table for each network, and what it means."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from rich.console import RenderableType
from rich.markup import escape

from fused_resnet.bench import Measured, Report, Result, Spread
from fused_resnet.console import duration, megabytes, table
from fused_resnet.contenders import is_ours, label

#: Names of dtypes as tables print them.
SHORT_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}

_LEGEND = (
    "All figures are measured. img/s: median over rounds in which the contenders took turns. "
    "vs: median of the ratios within the rounds, ± half the distance between their quartiles. "
    "first: first call in a fresh process, from the loaded stock model to the first result. "
    "peak: most memory of that process during this and two more calls, above the loaded stock "
    "model. "
    "serving: most memory during three later calls, weights included, all else let go. "
    "Memory on the CPU is the process's own: pages of files, as code, are not counted. "
    "error: of the outputs, relative to float64. "
    "class: images whose best class is float64's. "
    "Each contender gets its input in its own memory layout."
)


def parts(report: Report) -> Iterator[RenderableType]:
    """What to print, one after another."""
    for model, results in groupby(report.results, key=lambda r: r.case.model):
        yield from _network(model, list(results))
    yield f"[dim]{_LEGEND}[/]"
    for note in report.notes:
        yield f"[yellow]note:[/] {escape(note)}"
    for result in report.results:
        for key, m in result.contenders.items():
            if m.note or m.missing:
                text = m.note or f"could not run: {m.missing}"
                yield f"[yellow]note:[/] {result.case}, {label(key)}: {escape(text)}"
    for case in report.pending:
        yield f"[yellow]note:[/] not measured, the time was up: {escape(case)}"
    if not report.complete:
        yield "[yellow]Interrupted: the table holds what was measured until then.[/]"
    meanings = [meaning(r) for r in report.results if "fused" in r.contenders]
    if meanings:
        yield ""
        yield "[bold]What it means[/]"
        yield from meanings


def meaning(result: Result) -> str:
    """The result of one case in a sentence."""
    case, fused = result.case, result.contenders["fused"]
    what = f"{case.model}, batch {case.batch}, {SHORT_DTYPES.get(case.dtype, case.dtype)}"
    if not fused.correct:
        return f"[red]{what}: the fused network is WRONG and was not timed: {escape(fused.note)}[/]"
    nchw, nhwc = result.speedup("fused", "stock_nchw"), result.speedup("fused", "stock_nhwc")
    if nchw is None or nhwc is None:
        return f"{what}: right; not timed."
    return (
        f"{what}: fused is {_times(nchw)} stock PyTorch as it comes (NCHW) and {_times(nhwc)} "
        "stock PyTorch in channels_last."
    )


def _times(ratio: Spread) -> str:
    if ratio.low <= 1.0 <= ratio.high:
        return f"neither faster nor slower beyond the noise ({ratio.median:.2f}x) than"
    if ratio.median > 1.0:
        return f"[green]{ratio.median:.2f}x as fast as[/]"
    return f"[red]slower ({ratio.median:.2f}x) than[/]"


def _network(model: str, results: list[Result]) -> Iterator[RenderableType]:
    case = results[0].case
    threads = f", {case.threads} thread{'s' if case.threads > 1 else ''}"
    threads = "" if case.device.startswith("cuda") else threads
    forced = f", backend {','.join(case.backends)}" if case.backends else ""
    yield (
        f"[bold]{model}[/] ({case.weights}), {case.photos} at {case.size}x{case.size}, "
        f"{case.device}{threads}{forced}"
    )
    rows = table()
    rows.padding = (0, 1, 0, 0)
    speeds, memory = ("img/s", "vs NCHW", "vs NHWC", "first"), ("peak", "serving")
    for name in ("", "", *speeds, *memory, "error", "class"):
        rows.add_column(name, justify="left" if name == "" else "right", no_wrap=True)
    for result in results:
        what = f"{SHORT_DTYPES.get(result.case.dtype, result.case.dtype)} x{result.case.batch}"
        for key, measured in result.contenders.items():
            rows.add_row(what, *_cells(result, key, measured))
            what = ""
        rows.add_section()
    yield rows
    yield ""


def _cells(result: Result, key: str, m: Measured) -> list[str]:
    name = f"[bold]{label(key)}[/]" if is_ours(key) else label(key)
    error = "-" if m.error is None else f"{m.error:.1e}"
    if not m.correct:
        blank = ["-"] * 5
        return [name, "[red]WRONG[/]", *blank, f"[red]{error}[/]", _percent(m.top1)]
    speed = result.images_per_second(key)
    return [
        name,
        "-" if speed is None else f"{speed.median:.1f}",
        _ratio(result, key, "stock_nchw"),
        _ratio(result, key, "stock_nhwc"),
        "-" if m.first_call is None else duration(m.first_call),
        "-" if m.peak_memory is None else megabytes(m.peak_memory),
        "-" if m.serving_memory is None else megabytes(m.serving_memory),
        error,
        _percent(m.top1),
    ]


def _ratio(result: Result, key: str, over: str) -> str:
    ratio = result.speedup(key, over)
    if ratio is None:
        return "-"
    if key == over:
        return "1"
    return f"{ratio.median:.2f} ±{ratio.half_width:.2f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
