"""Printing: the consoles of the command line, tables as plain text, errors shown in one line."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType
from rich.table import Table

#: Results go to standard output, progress and complaints to standard error.
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


class UserError(ValueError):
    """Something the user asked for cannot be done; the message says what to do instead."""


def plain(renderable: RenderableType, width: int = 100) -> str:
    """What ``renderable`` looks like without colours, at most ``width`` columns wide."""
    stream = io.StringIO()
    console = Console(file=stream, width=width, highlight=False, color_system=None)
    console.print(renderable)
    return "\n".join(line.rstrip() for line in stream.getvalue().rstrip().splitlines())


def table(title: str | None = None) -> Table:
    """An empty table in the one style that all of our tables have."""
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="dim",
    )


def megabytes(count: int | float) -> str:
    """Bytes as a person reads them: ``96 MB``, ``1.4 GB``."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    """A time as a person reads it: ``41 us``, ``3.2 ms``, ``0.71 s``."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 0.1:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
