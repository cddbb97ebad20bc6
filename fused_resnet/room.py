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


def fit(layers: Sequence[Sequence[Option]], limit: int) -> list[int]:
    """The position of one option of each layer, such that all take at most ``limit`` bytes.

    Args:
        layers: options of each layer, the preferred one first.
        limit: in bytes. Where no choice is that small, the smallest is taken.

    Example:
        >>> fit([[Option(1.0, 30), Option(1.5, 0)], [Option(2.0, 10), Option(9.0, 0)]], 15)
        [1, 0]
    """
    chosen = [0] * len(layers)
    while sum(options[i].bytes for options, i in zip(layers, chosen, strict=True)) > limit:
        smaller = [
            ((option.seconds - options[i].seconds) / (options[i].bytes - option.bytes), layer, j)
            for layer, (options, i) in enumerate(zip(layers, chosen, strict=True))
            for j, option in enumerate(options)
            if option.bytes < options[i].bytes
        ]
        if not smaller:
            break
        _, layer, j = min(smaller)
        chosen[layer] = j
    return chosen


__all__ = ["Option", "fit"]
