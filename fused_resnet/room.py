"""Which layer gives up its larger form of weights first, when memory is short.

A kernel that keeps weights transformed is quicker and larger. Where all layers together are to
stay below some size, each takes one of its kernels: a multiple-choice knapsack. It is solved
greedily, step by step, each time by the least time that is lost for a byte that is saved, as the
linear relaxation is (Sinha and Zoltners, "The Multiple-Choice Knapsack Problem", Operations
Research 27, 1979).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """A kernel of a layer: seconds of a call, and bytes beyond those of the weights."""

    seconds: float
    bytes: int


def cheapest_step(layers: Sequence[Sequence[Option]]) -> tuple[int, int] | None:
    """The next step to fewer bytes: which layer takes another option, and the option's position.

    Args:
        layers: options of each layer, the one that it has first.

    Returns:
        None if no layer has a smaller option.

    Example:
        >>> cheapest_step([[Option(1.0, 30), Option(1.5, 0)], [Option(2.0, 10), Option(9.0, 0)]])
        (0, 1)
    """
    steps = [
        ((option.seconds - options[0].seconds) / (options[0].bytes - option.bytes), layer, i)
        for layer, options in enumerate(layers)
        for i, option in enumerate(options)
        if option.bytes < options[0].bytes
    ]
    return min(steps)[1:] if steps else None


__all__ = ["Option", "cheapest_step"]
