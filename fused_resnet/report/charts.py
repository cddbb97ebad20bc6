"""Charts as HTML and inline SVG: no script, no file beside the page, colours from its style sheet.

Bars and dots are HTML, so their labels keep their size on a phone; curves and scatter plots are
SVG. Every mark carries its value as text or tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

#: Coordinates of a plot: its size and the margins that the labels of the axes need.
_WIDTH, _HEIGHT = 480, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 12, 48


def number(value: float) -> str:
    """Three significant digits as a person reads them.

    >>> number(1234.5), number(4.5678), number(0.01234), number(8.88e-7)
    ('1234', '4.57', '0.0123', '8.9e-07')
    """
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


@dataclass(frozen=True)
class Scale:
    """From values to places between 0 and 1."""

    low: float
    high: float
    log: bool = False

    @staticmethod
    def of(values: Iterable[float], log: bool = False) -> Scale:
        """A scale that holds all values: from 0, or between powers of ten if logarithmic."""
        known = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
        if not log:
            return Scale(0.0, max(known, default=1.0) or 1.0)
        if not known:
            return Scale(1.0, 10.0, True)
        low, high = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
        return Scale(10.0**low, 10.0 ** max(high, low + 1), True)

    def place(self, value: float) -> float:
        """Where a value lies, cut to what the scale holds."""
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, share))

    def ticks(self) -> list[float]:
        """Round values at about equal distances."""
        if self.log:
            first, last = round(math.log10(self.low)), round(math.log10(self.high))
            return [10.0**e for e in range(first, last + 1, max(1, (last - first) // 4))]
        step = 10.0 ** math.floor(math.log10(self.high / 4))
        step *= next(f for f in (1, 2, 5, 10) if self.high / (f * step) <= 5)
        return [i * step for i in range(math.floor(self.high / step + 1e-9) + 1)]


# --------------------------------------------------------------------------------------------------
# Bars and dots.
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of a bar or dot chart.

    Attributes:
        label: what it is of.
        values: where its marks are: for bars the end of the bar, then the ends of a range if there
            are three; for dots one mark each.
        text: its value in words.
        series: number of its colour.
        strong: whether its label is emphasised.
    """

    label: str
    values: tuple[float, ...]
    text: str
    series: int
    strong: bool = False


#: Rows under a heading; all groups of a chart share one scale.
Group = tuple[str, Sequence[Row]]


def bars(groups: Sequence[Group]) -> str:
    """Horizontal bars from 0."""
    scale = Scale.of(v for _, rows in groups for row in rows for v in row.values)

    def track(row: Row) -> str:
        end, *spread = row.values
        fill = f'<i class="fill s{row.series}" style="width:{_percent(scale.place(end))}"></i>'
        return fill + (_range(scale, spread) if spread else "")

    return "".join(_group(heading, [(row, track(row)) for row in rows]) for heading, rows in groups)


def dots(groups: Sequence[Group], *, log: bool = False) -> str:
    """Marks on lines: filled, then hollow, then a stroke, for one, two or three values."""
    scale = Scale.of((v for _, rows in groups for row in rows for v in row.values), log)

    def track(row: Row) -> str:
        marks = "".join(
            f'<i class="dot d{i} s{row.series}" style="left:{_percent(scale.place(v))}"></i>'
            for i, v in enumerate(row.values)
        )
        return _range(scale, row.values) + marks

    body = "".join(_group(heading, [(row, track(row)) for row in rows]) for heading, rows in groups)
    if not log:
        return body
    ends = f"<span>{_power(scale.low)}</span><span>{_power(scale.high)}</span>"
    return (
        f'{body}<div class="bar ends"><b></b><span class="track">{ends}</span><span></span></div>'
    )


def _range(scale: Scale, values: Sequence[float]) -> str:
    low, high = scale.place(min(values)), scale.place(max(values))
    return f'<i class="range" style="left:{_percent(low)};width:{_percent(high - low)}"></i>'


def _group(heading: str, rows: Sequence[tuple[Row, str]]) -> str:
    lines = "".join(
        f'<div class="bar{" ours" if row.strong else ""}"><b>{escape(row.label)}</b>'
        f'<span class="track">{track}</span><span class="value">{escape(row.text)}</span></div>'
        for row, track in rows
    )
    return f'<div class="group"><p>{escape(heading)}</p>{lines}</div>'


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _power(value: float) -> str:
    return f"10<sup>{round(math.log10(value))}</sup>"


# --------------------------------------------------------------------------------------------------
# Plots.
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """Points of one kind.

    Attributes:
        label: as the legend names it.
        points: (x, y, tooltip).
        series: number of its colour and marker.
        joined: whether a line connects the points.
    """

    label: str
    points: Sequence[tuple[float, float, str]]
    series: int
    joined: bool = False


@dataclass(frozen=True)
class Axis:
    """A title with its unit, the scale, and ticks where the scale's own do not suit."""

    title: str
    scale: Scale
    ticks: tuple[float, ...] = ()


def plot(
    title: str,
    x: Axis,
    y: Axis,
    series: Sequence[Series],
    bound: Sequence[tuple[float, float]] = (),
) -> str:
    """A plot of points, joined or not, with its legend.

    Args:
        title: what a screen reader says of it.
        x: horizontal axis.
        y: vertical axis.
        series: what is drawn.
        bound: corners of a line that nothing should cross.
    """
    parts = [*_vertical(y), *_horizontal(x)]

    def at(u: float, v: float) -> tuple[float, float]:
        inner = (_WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM)
        return _LEFT + inner[0] * x.scale.place(u), _TOP + inner[1] * (1 - y.scale.place(v))

    if bound:
        parts.append(f'<path class="bound" d="{_path([at(*corner) for corner in bound])}"/>')
    for s in series:
        places = [at(u, v) for u, v, _ in s.points]
        if s.joined and len(places) > 1:
            parts.append(f'<path class="line s{s.series}" d="{_path(places)}"/>')
        parts.extend(
            f'<g class="s{s.series}">{_marker(s.series, *place)}<title>{escape(tip)}</title></g>'
            for place, (_, _, tip) in zip(places, s.points, strict=True)
        )
    keys = "".join(
        f'<li><svg viewBox="-7 -7 14 14" class="s{s.series}" aria-hidden="true">'
        f"{_marker(s.series, 0, 0)}</svg>{escape(s.label)}</li>"
        for s in series
    )
    keys += '<li><i class="bound"></i>measured ceiling</li>' if bound else ""
    return (
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg><ul class="legend">{keys}</ul>'
    )


def _vertical(axis: Axis) -> Iterable[str]:
    height = _HEIGHT - _TOP - _BOTTOM
    for tick in axis.ticks or axis.scale.ticks():
        place = _TOP + height * (1 - axis.scale.place(tick))
        yield f'<path class="grid" d="M{_LEFT} {place:.1f}H{_WIDTH - _RIGHT}"/>'
        yield f'<text x="{_LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{_tick(tick)}</text>'
    middle = _TOP + height / 2
    turned = f'transform="rotate(-90 14 {middle:.0f})" text-anchor="middle"'
    yield f'<text x="14" y="{middle:.0f}" {turned}>{escape(axis.title)}</text>'


def _horizontal(axis: Axis) -> Iterable[str]:
    width, bottom = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _BOTTOM
    for tick in axis.ticks or axis.scale.ticks():
        place = _LEFT + width * axis.scale.place(tick)
        yield f'<path class="grid" d="M{place:.1f} {_TOP}V{bottom}"/>'
        yield f'<text x="{place:.1f}" y="{bottom + 17}" text-anchor="middle">{_tick(tick)}</text>'
    middle, title = _LEFT + width / 2, escape(axis.title)
    yield f'<text x="{middle:.0f}" y="{_HEIGHT - 8}" text-anchor="middle">{title}</text>'


def _tick(value: float) -> str:
    return f"{value:g}" if 1e-3 <= value < 1e5 or value == 0 else f"{value:.0e}"


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{u:.1f} {v:.1f}" for u, v in places)


def _marker(series: int, u: float, v: float) -> str:
    """Shapes differ as colours do, for eyes that do not tell the colours apart."""
    shapes = (
        "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",  # Disc.
        "M-4-4h8v8h-8z",  # Square.
        "M0-5L5 4H-5z",  # Triangle.
        "M0-5.5L5.5 0L0 5.5L-5.5 0z",  # Diamond.
        "M0 5L5-4H-5z",  # Triangle upside down.
        "M-5-1.5h3.5v-3.5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5z",  # Cross.
    )
    turn, place = divmod(series, len(shapes))
    kind = "mark" if turn else "mark hollow"
    shape = shapes[place]
    return f'<path class="{kind}" transform="translate({u:.1f} {v:.1f})" d="{shape}"/>'
