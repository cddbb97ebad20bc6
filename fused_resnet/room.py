"""Which layers may keep their weights in a larger form, when memory is short.

A kernel that keeps weights transformed is quicker and larger. Given a limit for all layers
together, each layer takes one of its kernels: a multiple-choice knapsack. It is solved greedily by
the time that is lost for a byte that is saved, as the linear relaxation is (Sinha and Zoltners,
"The Multiple-Choice Knapsack Problem", Operations Research 27, 1979).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """A kernel of a layer: seconds of a call, and bytes beyond those of the weights."""

    seconds: float
    bytes: int


def fit(layers: Sequence[Sequence[Option]], limit: int) -> list[Option]:
    """One option of each layer, such that all together take at most ``limit`` bytes.

    Args:
        layers: options of each layer, the preferred one first.
        limit: in bytes. Where no choice is that small, the smallest is taken.

    Example:
        >>> fit([[Option(1.0, 30), Option(1.5, 0)], [Option(2.0, 10), Option(9.0, 0)]], 15)
        [Option(seconds=1.5, bytes=0), Option(seconds=2.0, bytes=10)]
    """
    chosen = [options[0] for options in layers]
    while sum(option.bytes for option in chosen) > limit:
        smaller = [
            ((option.seconds - now.seconds) / (now.bytes - option.bytes), n, option)
            for n, (now, options) in enumerate(zip(chosen, layers, strict=True))
            for option in options
            if option.bytes < now.bytes
        ]
        if not smaller:
            break
        _, n, option = min(smaller, key=lambda each: each[0])
        chosen[n] = option
    return chosen


__all__ = ["Option", "fit"]
