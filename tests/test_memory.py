"""The arena's plan: nothing overlaps while it is in use, and little is wasted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fused_resnet.memory import ALIGNMENT, Lifetime, plan

lifetimes = st.builds(
    lambda size, begin, length: Lifetime(size, begin, begin + length),
    st.integers(0, 5000),
    st.integers(0, 20),
    st.integers(0, 8),
)


@given(st.lists(lifetimes, max_size=24))
def test_buffers_in_use_at_once_do_not_overlap(buffers: list[Lifetime]) -> None:
    offsets, total = plan(buffers)
    assert len(offsets) == len(buffers)
    for i, (a, at) in enumerate(zip(buffers, offsets, strict=True)):
        assert at >= 0
        assert at % ALIGNMENT == 0
        assert at + a.size <= total
        for b, other in zip(buffers[:i], offsets[:i], strict=True):
            if a.begin <= b.end and b.begin <= a.end and a.size and b.size:
                assert at + a.size <= other or other + b.size <= at


@given(st.lists(lifetimes, max_size=24))
def test_no_more_than_all_beside_each_other_and_no_less_than_the_busiest_step(
    buffers: list[Lifetime],
) -> None:
    aligned = [-(-b.size // ALIGNMENT) * ALIGNMENT for b in buffers]
    _, total = plan(buffers)
    busiest = max(
        (
            sum(s for b, s in zip(buffers, aligned, strict=True) if b.begin <= step <= b.end)
            for step in range(30)
        ),
        default=0,
    )
    assert busiest <= total <= sum(aligned)


def test_a_chain_needs_two_buffers() -> None:
    chain = [Lifetime(1000, i, i + 1) for i in range(10)]
    offsets, total = plan(chain)
    assert total == 2048
    assert set(offsets) == {0, 1024}


def test_a_small_buffer_takes_the_smallest_gap() -> None:
    # At step 5 there are two gaps, 512 wide and 384 wide.
    wide = [Lifetime(640, 0, 9), Lifetime(512, 0, 2), Lifetime(448, 0, 9), Lifetime(384, 0, 2)]
    wide.append(Lifetime(320, 0, 9))
    offsets, total = plan([*wide, Lifetime(256, 5, 6)])
    assert offsets[-1] == offsets[3]
    assert total == plan(wide)[1]
