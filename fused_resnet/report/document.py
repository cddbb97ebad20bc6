"""One self-contained page of a report: what was measured, drawn and in tables, for any screen."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files
from itertools import groupby

from fused_resnet.bench import Measured, Report, Result, Spread
from fused_resnet.bench_table import SHORT_DTYPES
from fused_resnet.console import duration, megabytes
from fused_resnet.contenders import CONTENDERS, is_ours, label
from fused_resnet.report.charts import Axis, Group, Row, Scale, Series, bars, dots, number, plot
from fused_resnet.rooflines import Ceiling, LayerTime, NetworkLayers

#: Single calls that a percentile needs at least, so that it is not just the slowest call.
_CALLS = {50: 1, 90: 10, 99: 100}

_FIRST_CALL = (
    "In a fresh process, from the loaded stock model to the first result: fusing, verifying, "
    "packing, compiling. What compilers and tuning keep on disk is there already."
)
_OWN = "On the CPU without pages of files, as code."
_PEAK = f"At the peak of the first three calls in a fresh process. {_OWN}"
_SERVING = f"At the peak of three later calls, once all else is let go. Weights included. {_OWN}"

_MEASURED = '<span class="tag measured">measured</span>'
_PREDICTED = '<span class="tag predicted">predicted</span>'


def page(report: Report) -> str:
    """The report as HTML, with its style and script inside.

    Args:
        report: as ``report.run`` or `bench` made it; what was not measured is left out.

    Example:
        >>> Path("index.html").write_text(page(Report.load("results.json")))
    """
    here = files("fused_resnet.report")
    style, script = (here.joinpath(name).read_text() for name in ("page.css", "page.js"))
    networks = [
        (model, list(results)) for model, results in groupby(report.results, lambda r: r.case.model)
    ]
    links = "".join(f'<a href="#{_id(model)}">{escape(model)}</a>' for model, _ in networks)
    body = "".join(
        (
            _head(report),
            _summary(report),
            *(_network(model, results, report) for model, results in networks),
            _missing(report),
            _machine(report),
            _method(report),
        )
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><title>fused_resnet benchmark</title>'
        f"<style>{style}</style></head><body>"
        f'<nav aria-label="Sections"><a href="#top">Summary</a>{links}'
        '<a href="#machine">Machine</a><a href="#method">Method</a></nav>'
        f'<main id="top">{body}</main><script>{script}</script></body></html>\n'
    )


# --------------------------------------------------------------------------------------------------
# Sections.
# --------------------------------------------------------------------------------------------------


def _head(report: Report) -> str:
    m = report.machine
    device = ", ".join(m.gpus) if _on_gpu(report) else f"{m.cpu}, {m.cores} cores"
    sentences = "".join(f"<li>{s}</li>" for s in _headlines(report))
    state = ""
    if not report.complete or report.pending:
        pending = "".join(f"<li>{escape(case)}</li>" for case in report.pending)
        state = (
            '<div class="warning"><p>Incomplete: the run was interrupted or its time was up. '
            f"The same command goes on where it stopped.</p><ul>{pending}</ul></div>"
        )
    return (
        "<header><h1>fused_resnet benchmark</h1>"
        f"<p>{escape(device)} · torch {escape(report.versions.get('torch', '?'))} · "
        f"{escape(report.created.replace('T', ' ').replace('+00:00', ' UTC'))}</p>"
        f"{state}<ul class='headlines'>{sentences}</ul></header>"
    )


def _headlines(report: Report) -> Iterator[str]:
    """The result in sentences: geometric means over all cases of the best of ours."""
    ours = [(r, key) for r in report.results if (key := _best(r, ours=True)) is not None]
    wrong = sum(not m.correct for r in report.results for m in r.contenders.values())
    if wrong:
        yield f"<strong>{wrong} results were wrong and not timed.</strong>"
    if not ours:
        return
    for words, other in (
        ("stock PyTorch as it comes (NCHW)", "stock_nchw"),
        ("stock PyTorch in channels_last", "stock_nhwc"),
        ("the fastest other engine in each case", None),
    ):
        ratios = [
            ratio.median
            for r, key in ours
            if (over := other or _best(r, ours=False)) is not None
            and (ratio := r.speedup(key, over)) is not None
        ]
        if ratios:
            mean = math.exp(statistics.fmean(map(math.log, ratios)))
            span = f"{min(ratios):.2f} to {max(ratios):.2f}" if len(ratios) > 1 else "one case"
            yield f"<strong>{mean:.2f}x</strong> the speed of {words} <small>({span})</small>"


def _summary(report: Report) -> str:
    """A row for each case: how many times as fast the best of ours is as every other contender."""
    others = [key for key in _contenders(report.results) if not is_ours(key)]
    header = ("network", "dtype", "batch", "ours", "images/s", *(label(key) for key in others))
    rows: list[list[str]] = []
    for r in report.results:
        key = _best(r, ours=True)
        if key is None:
            continue
        speed = r.images_per_second(key)
        assert speed is not None
        rows.append(
            [
                escape(r.case.model),
                _dtype(r),
                str(r.case.batch),
                escape(label(key)),
                number(speed.median),
                *(_ratio_cell(r.speedup(key, other)) for other in others),
            ]
        )
    if not rows:
        return ""
    return (
        f'<section id="summary"><h2>Ours over the others {_MEASURED}</h2>'
        "<p>How many times as fast the faster of our contenders is: median of the ratios within "
        "rounds. Green: faster beyond the quartiles; red: slower beyond them.</p>"
        f"{_table('Speed of ours over that of each contender', header, rows, 5)}</section>"
    )


def _ratio_cell(ratio: Spread | None) -> str:
    if ratio is None:
        return "-"
    kind = "better" if ratio.low > 1 else "worse" if ratio.high < 1 else "even"
    return f'<span class="{kind}">{ratio.median:.2f}</span>'


def _network(model: str, results: Sequence[Result], report: Report) -> str:
    case = results[0].case
    threads = f", {case.threads} thread{'s' if case.threads > 1 else ''}"
    threads = "" if case.device.startswith("cuda") else threads
    parts = [
        f'<section id="{_id(model)}"><h2>{escape(model)}</h2><p>{escape(case.weights)}, '
        f"{escape(case.photos)} at {case.size} x {case.size}, {escape(case.device)}{threads}</p>"
    ]
    for dtype, group in groupby(results, lambda r: r.case.dtype):
        some = list(group)
        parts.append(f"<h3>{escape(model)} in {escape(SHORT_DTYPES.get(dtype, dtype))}</h3>")
        parts.append('<div class="figures">')
        parts.extend(_figures(some))
        parts.extend(
            _layers(n, report) for n in report.layers if (n.model, n.dtype) == (model, dtype)
        )
        parts.append("</div>")
        parts.append(_numbers(model, some))
    parts.append("</section>")
    return "".join(parts)


def _figures(results: Sequence[Result]) -> Iterator[str]:
    """The charts of one network in one dtype."""
    yield _figure(
        "Throughput", "images/s, higher is better", _bars(results, _throughput), _MEASURED,
        "Median over rounds; the stroke spans the quartiles.",
    )  # fmt: skip
    if len(results) > 1:
        yield _figure(
            "Batch scaling", "images/s over images in a call", _scaling(results), _MEASURED
        )
    if any(m.latencies for r in results for m in r.contenders.values()):
        yield _figure(
            "Latency", "ms for one call, lower is better",
            dots(_rows(results, _latency)), _MEASURED,
            "Disc: p50, ring: p90, stroke: p99 (only from 100 calls on).",
        )  # fmt: skip
    for title, unit, draw, note in (
        ("First call", "s, lower is better", _first_call, _FIRST_CALL),
        ("Memory", "peak in MB above the loaded stock model", _memory, _PEAK),
        ("Memory of serving", "MB, lower is better", _serving, _SERVING),
    ):
        chart = _bars(results, draw)
        if chart:
            yield _figure(title, unit, chart, _MEASURED, note)
    errors = _rows(results, _error)
    if errors:
        yield _figure(
            "Error", "distance from float64 over its norm, log scale, left is better",
            dots(errors, log=True), _MEASURED, "Of the network's outputs on the photos.",
        )  # fmt: skip


def _layers(network: NetworkLayers, report: Report) -> str:
    """The roofline of a network's fused ops, and the bytes that they save."""
    ceiling = next((c for c in report.ceilings if c.dtype == network.dtype), None)
    if ceiling is None or not network.layers:
        return ""
    when = f"batch {network.batch}, each op by itself"
    plotted = _figure(
        "Roofline", f"GFLOP/s over FLOP per byte, {when}", _roofline(network, ceiling), _MEASURED,
        f"Ceilings: {number(ceiling.flops / 1e9)} GFLOP/s in a {network.dtype} matrix product, "
        f"{number(ceiling.bandwidth / 1e9)} GB/s in a copy. FLOP per byte is counted; for stock it "
        "is that of its separate passes. Inputs may lie in caches, so a point can be above the "
        "slope.",
    )  # fmt: skip
    totals = [
        sum(count(layer) * layer.count for layer in network.layers) / network.batch / 1e6
        for count in (_stock_bytes, _min_bytes)
    ]
    rows = [
        Row("stock", (totals[0],), f"{number(totals[0])} MB", _series("stock_nhwc")),
        Row("fused", (totals[1],), f"{number(totals[1])} MB", _series("fused"), strong=True),
    ]
    saved = _figure(
        "Bytes through memory", "MB per image, lower is better",
        bars([(f"{len(network.layers)} different fused ops, all layers", rows)]), _PREDICTED,
        "Counted from the shapes, as if nothing stayed in caches; weights shared by the batch.",
    )  # fmt: skip
    header = (
        "layer", "alike", "op", "kernel", "fused", "stock", "stock / fused", "GFLOP/s",
        "of ceiling", "FLOP/byte", "MB fused", "MB stock",
    )  # fmt: skip
    table = _table(
        f"Fused ops of {network.model} in {network.dtype}, {when}",
        header,
        [_layer_row(layer, ceiling) for layer in network.layers],
        4,
    )
    return (
        f'{plotted}{saved}<details class="wide"><summary>Layer by layer {_MEASURED}</summary>'
        f"{table}</details>"
    )


def _layer_row(layer: LayerTime, ceiling: Ceiling) -> list[str]:
    fused, stock = statistics.median(layer.fused), statistics.median(layer.stock)
    ratio = Spread.of([b / a for a, b in zip(layer.fused, layer.stock, strict=True)])
    attained, intensity = layer.flops / fused, layer.flops / layer.min_bytes
    bound = min(ceiling.flops, intensity * ceiling.bandwidth)
    return [
        escape(layer.name),
        str(layer.count),
        escape(layer.problem),
        escape(layer.kernel),
        duration(fused),
        duration(stock),
        _ratio_cell(ratio),
        number(attained / 1e9),
        f"{attained / bound:.0%}",
        number(intensity),
        number(layer.min_bytes / 1e6),
        number(layer.stock_bytes / 1e6),
    ]


def _numbers(model: str, results: Sequence[Result]) -> str:
    """Every figure of one network in one dtype as a table."""
    header = (
        "batch", "contender", "images/s", "quartiles", "vs NCHW", "vs channels_last", "p50 ms",
        "p90 ms", "p99 ms", "first call", "peak", "serving", "error", "class", "rounds", "calls",
    )  # fmt: skip
    rows = [
        [str(r.case.batch), *_numbers_row(r, key, m)]
        for r in results
        for key, m in r.contenders.items()
        if not m.missing
    ]
    caption = f"{model} in {_dtype(results[0])}"
    return (
        f"<details><summary>All numbers of {escape(caption)} {_MEASURED}</summary>"
        f"{_table(caption, header, rows, 2)}</details>"
    )


def _numbers_row(r: Result, key: str, m: Measured) -> list[str]:
    speed = r.images_per_second(key)
    return [
        f"<strong>{escape(label(key))}</strong>" if is_ours(key) else escape(label(key)),
        "wrong" if not m.correct else "-" if speed is None else number(speed.median),
        "-" if speed is None else f"{number(speed.low)} .. {number(speed.high)}",
        _ratio_cell(r.speedup(key, "stock_nchw")),
        _ratio_cell(r.speedup(key, "stock_nhwc")),
        *("-" if (v := percentile(m, p)) is None else number(1e3 * v) for p in _CALLS),
        "-" if m.first_call is None else duration(m.first_call),
        "-" if m.peak_memory is None else megabytes(m.peak_memory),
        "-" if m.serving_memory is None else megabytes(m.serving_memory),
        "-" if m.error is None else f"{m.error:.1e}",
        "-" if m.top1 is None else f"{m.top1:.0%}",
        str(len(m.seconds)),
        str(len(m.latencies)),
    ]


def _missing(report: Report) -> str:
    """Contenders that did not run, and why."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for r in report.results:
        for key, m in r.contenders.items():
            if m.missing:
                reasons.setdefault((key, m.missing), []).append(str(r.case))
    rows = [
        [
            escape(label(key)),
            escape(reason),
            "all" if len(c) == len(report.results) else escape("; ".join(c)),
        ]
        for (key, reason), c in reasons.items()
    ]
    if not rows:
        return ""
    table = _table("Contenders that did not run", ("contender", "reason", "cases"), rows, 3)
    return f"<section><h2>Not measured</h2>{table}</section>"


def _machine(report: Report) -> str:
    m = report.machine
    facts = [
        ("processor", m.cpu),
        ("cores for this process", str(m.cores)),
        ("memory", megabytes(m.memory)),
        ("instruction set", " ".join((m.isa, *m.features))),
        ("GPUs", ", ".join(m.gpus) or "none"),
        ("system", m.system),
        *report.versions.items(),
    ]
    rows = [[escape(name), escape(value)] for name, value in facts]
    return (
        '<section id="machine"><h2>Machine and versions</h2>'
        f"{_table('Machine and versions', ('what', 'value'), rows, 2)}</section>"
    )


def _method(report: Report) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in dict.fromkeys(report.notes))
    for r in report.results:
        for key, m in r.contenders.items():
            if m.note:
                notes += f"<li>{escape(f'{r.case}, {label(key)}: {m.note}')}</li>"
    return (
        '<section id="method"><h2>How it was measured</h2>'
        f"<p>By <code>{escape(' '.join(_command(report)))}</code></p><ul>"
        "<li>Every contender is compared with float64 first; ours are timed only if their error is "
        "at most twice that of stock torch in the same dtype, plus a rounding unit.</li>"
        "<li>In a round every contender runs a block of calls, in rotating order, on several "
        "batches of photos in turn. A ratio is the median of the ratios within rounds.</li>"
        "<li>All have the same weights, dtype and threads; each gets its input in its own memory "
        "layout, and returns its result to torch.</li>"
        f"<li>{_MEASURED} figures were timed or read on this machine. {_PREDICTED} figures were "
        f"counted or computed.</li>{notes}</ul>"
        '<p>The data are in <a href="results.json">results.json</a>; '
        "<code>fused-resnet bench --compare OLD.json NEW.json</code> compares two of them.</p>"
        "</section>"
    )


# --------------------------------------------------------------------------------------------------
# Charts of measured contenders.
# --------------------------------------------------------------------------------------------------

#: The marks of a contender in a case and their text; None where there is nothing to draw.
_Marks = Callable[[Result, str, Measured], tuple[tuple[float, ...], str] | None]


def _rows(results: Sequence[Result], marks: _Marks) -> list[Group]:
    groups: list[Group] = []
    for r in results:
        rows = []
        for key, m in r.contenders.items():
            found = marks(r, key, m)
            if found is not None:
                rows.append(Row(label(key), *found, _series(key), is_ours(key)))
        if rows:
            groups.append((f"batch {r.case.batch}", rows))
    return groups


def _bars(results: Sequence[Result], marks: _Marks) -> str:
    return bars(_rows(results, marks))


def _throughput(r: Result, key: str, _m: Measured) -> tuple[tuple[float, ...], str] | None:
    speed = r.images_per_second(key)
    if speed is None:
        return None
    return (speed.median, speed.low, speed.high), number(speed.median)


def _latency(_r: Result, _key: str, m: Measured) -> tuple[tuple[float, ...], str] | None:
    found = [1e3 * v for p in _CALLS if (v := percentile(m, p)) is not None]
    return (tuple(found), number(found[0])) if found else None


def _first_call(_r: Result, _key: str, m: Measured) -> tuple[tuple[float, ...], str] | None:
    return None if m.first_call is None else ((m.first_call,), number(m.first_call))


def _memory(_r: Result, _key: str, m: Measured) -> tuple[tuple[float, ...], str] | None:
    if m.peak_memory is None:
        return None
    return (max(0.0, m.peak_memory / 1e6),), number(m.peak_memory / 1e6)


def _serving(_r: Result, _key: str, m: Measured) -> tuple[tuple[float, ...], str] | None:
    if m.serving_memory is None:
        return None
    return (m.serving_memory / 1e6,), number(m.serving_memory / 1e6)


def _error(_r: Result, _key: str, m: Measured) -> tuple[tuple[float, ...], str] | None:
    return ((m.error,), f"{m.error:.1e}") if m.error else None


def percentile(m: Measured, p: int) -> float | None:
    """The ``p``-th percentile of single calls in seconds; None if there are too few of them."""
    if len(m.latencies) < _CALLS[p]:
        return None
    if len(m.latencies) == 1:
        return m.latencies[0]
    return statistics.quantiles(m.latencies, n=100, method="inclusive")[p - 1]


def _scaling(results: Sequence[Result]) -> str:
    batches = [float(r.case.batch) for r in results]
    series = []
    for key in _contenders(results):
        points = [
            (r.case.batch, s.median, f"{label(key)}, batch {r.case.batch}: {number(s.median)}")
            for r in results
            if (s := r.images_per_second(key)) is not None
        ]
        if points:
            series.append(Series(label(key), points, _series(key), joined=True))
    top = max((v for s in series for _, v, _ in s.points), default=1.0)
    return plot(
        "Throughput over batch size",
        Axis("batch", Scale(min(batches), max(batches), log=True), tuple(batches)),
        Axis("images/s", Scale.of([1.05 * top])),
        series,
    )


def _roofline(network: NetworkLayers, ceiling: Ceiling) -> str:
    kinds: list[tuple[str, str, Callable[[LayerTime], int], Callable[[LayerTime], Sequence[float]]]]
    kinds = [
        ("stock", "stock_nhwc", _stock_bytes, lambda layer: layer.stock),
        ("fused", "fused", _min_bytes, lambda layer: layer.fused),
    ]
    series = []
    for name, key, count, seconds in kinds:
        points = []
        for layer in network.layers:
            speed = layer.flops / statistics.median(seconds(layer)) / 1e9
            tip = f"{layer.name} ({layer.problem}), {name}: {number(speed)} GFLOP/s"
            points.append((layer.flops / count(layer), speed, tip))
        series.append(Series(name, points, _series(key)))
    ridge = ceiling.flops / ceiling.bandwidth
    x = Scale.of([ridge, *(u for s in series for u, _, _ in s.points)], log=True)
    peak, slope = ceiling.flops / 1e9, ceiling.bandwidth / 1e9
    y = Scale.of([peak, *(v for s in series for _, v, _ in s.points)], log=True)
    left = max(x.low, y.low / slope)
    bound = [(left, left * slope), (ridge, peak), (x.high, peak)]
    return plot("Roofline", Axis("FLOP per byte", x), Axis("GFLOP/s", y), series, bound)


def _min_bytes(layer: LayerTime) -> int:
    return layer.min_bytes


def _stock_bytes(layer: LayerTime) -> int:
    return layer.stock_bytes


# --------------------------------------------------------------------------------------------------
# Small things.
# --------------------------------------------------------------------------------------------------


def _figure(title: str, unit: str, chart: str, tag: str, note: str = "") -> str:
    below = f"<p class='note'>{escape(note)}</p>" if note else ""
    return (
        f"<figure><figcaption><strong>{escape(title)}</strong> <small>{escape(unit)}</small> "
        f"{tag}</figcaption>{chart}{below}</figure>"
    )


def _table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], words: int) -> str:
    """A table whose first ``words`` columns are text; cells are HTML, the header is not."""
    kinds = ["" if i < words else ' class="n"' for i in range(len(header))]
    head = "".join(
        f'<th scope="col"{kind}>{escape(name)}</th>'
        for kind, name in zip(kinds, header, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="table"><button type="button" class="copy">Copy</button>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
        "</table></div></div>"
    )


def _contenders(results: Iterable[Result]) -> list[str]:
    """Contenders that were timed in any of the results, in the order of tables."""
    timed = {key for r in results for key, m in r.contenders.items() if m.seconds}
    return sorted(timed, key=_series)


def _best(result: Result, *, ours: bool) -> str | None:
    """The fastest of our contenders, or of the peers."""
    role = "ours" if ours else "peer"
    timed = [
        key
        for key, m in result.contenders.items()
        if m.seconds and key in CONTENDERS and CONTENDERS[key].role == role
    ]
    seconds = {key: statistics.median(result.contenders[key].seconds) for key in timed}
    return min(timed, key=seconds.__getitem__, default=None)


def _series(key: str) -> int:
    """The number of a contender's colour, the same in every chart; ours begin at 9."""
    alike = [k for k in CONTENDERS if is_ours(k) == is_ours(key)]
    return [*alike, key].index(key) + (9 if is_ours(key) else 0)


def _dtype(result: Result) -> str:
    return SHORT_DTYPES.get(result.case.dtype, result.case.dtype)


def _on_gpu(report: Report) -> bool:
    return any(r.case.device.startswith("cuda") for r in report.results)


def _command(report: Report) -> list[str]:
    program, *arguments = report.command or [""]
    return [
        "fused-resnet" if program.endswith(("fused-resnet", "__main__.py")) else program,
        *arguments,
    ]


def _id(model: str) -> str:
    return "net-" + "".join(c if c.isalnum() else "-" for c in model)
