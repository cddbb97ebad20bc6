"""This project's kernels, as the emulator executes them."""

from __future__ import annotations

import functools
from pathlib import Path

from .driver import Emulator

ROOT = Path(__file__).resolve().parents[2]
INCLUDE = (ROOT / "csrc", ROOT / "csrc" / "cuda")
KERNELS = Path(__file__).resolve().parent / "kernels"


@functools.cache
def kernels(*names: str, checked: bool) -> Emulator:
    """The kernels that kernels/<name>.cpp register, for each name; of all files without any.

    Files that are asked for together are compiled in parallel; each is compiled once, whatever it
    was asked for with.
    """
    chosen = [KERNELS / f"{name}.cpp" for name in names] or sorted(KERNELS.glob("*.cpp"))
    return Emulator(chosen, checked=checked, include=INCLUDE)
