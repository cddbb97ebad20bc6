"""Where values lie in one arena: buffers whose lifetimes do not overlap share memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: Offsets are multiples of a cache line.
ALIGNMENT = 64


@dataclass(frozen=True)
class Lifetime:
    """A buffer of ``size`` bytes that is in use from step ``begin`` to step ``end``, both included.

    A step's result must not lie where its operands do, so a value lives from the step that makes
    it to the last step that reads it.
    """

    size: int
    begin: int
    end: int

    def meets(self, other: Lifetime) -> bool:
        """Whether both are in use at some step."""
        return self.begin <= other.end and other.begin <= self.end


def plan(lifetimes: Sequence[Lifetime], alignment: int = ALIGNMENT) -> tuple[list[int], int]:
    """Offsets of buffers in one arena, and the arena's size.

    Larger buffers are placed first, each in the smallest gap that fits it between those that are in
    use at the same time (Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net
    Inference", 2020, greedy by size).

    Args:
        lifetimes: one for each buffer.
        alignment: of every offset, in bytes.

    Returns:
        The offset of each buffer, in the order given, and the bytes that the arena needs.

    Example:
        >>> plan([Lifetime(64, 0, 1), Lifetime(64, 1, 2), Lifetime(64, 2, 3)])
        ([0, 64, 0], 128)
    """
    offsets = [0] * len(lifetimes)
    placed: list[tuple[int, int, Lifetime]] = []  # begin and end in the arena
    total = 0
    for i in sorted(range(len(lifetimes)), key=lambda i: -lifetimes[i].size):
        lifetime = lifetimes[i]
        size = -(-lifetime.size // alignment) * alignment
        busy = sorted((b, e) for b, e, other in placed if other.meets(lifetime))
        offset = _smallest_gap(busy, size)
        offsets[i] = offset
        placed.append((offset, offset + size, lifetime))
        total = max(total, offset + size)
    return offsets, total


def _smallest_gap(busy: Sequence[tuple[int, int]], size: int) -> int:
    """Where ``size`` bytes fit most tightly between busy ranges, or else behind them."""
    best: tuple[int, int] | None = None
    end = 0
    for begin, stop in busy:
        if begin - end >= size and (best is None or begin - end < best[0]):
            best = (begin - end, end)
        end = max(end, stop)
    return end if best is None else best[1]
