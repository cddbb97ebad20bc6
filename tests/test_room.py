"""Which layers give up larger weights: no better choice is as small."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from fused_resnet.room import Option, cheapest_step

option = st.builds(Option, st.integers(1, 40).map(float), st.integers(0, 12))
# A layer begins with its fastest option.
layer = st.lists(option, min_size=1, max_size=4).map(
    lambda options: sorted(options, key=lambda o: (o.seconds, o.bytes))
)


@given(st.lists(layer, max_size=4))
def test_after_every_step_nothing_as_small_is_faster(layers: list[list[Option]]) -> None:
    chosen = [options[0] for options in layers]
    while True:
        taken = sum(o.bytes for o in chosen)
        seconds = sum(o.seconds for o in chosen)
        for other in itertools.product(*layers):
            if sum(o.bytes for o in other) <= taken:
                assert sum(o.seconds for o in other) >= seconds
        # What a layer has goes first.
        orders = [[o, *options] for o, options in zip(chosen, layers, strict=True)]
        step = cheapest_step(orders)
        if step is None:
            break
        number, i = step
        assert orders[number][i].bytes < chosen[number].bytes
        chosen[number] = orders[number][i]
    smallest = [min(o.bytes for o in options) for options in layers]
    assert [o.bytes for o in chosen] == smallest


def test_what_costs_nothing_goes_first() -> None:
    # The one that a layer has may be slower than another by a near-tie.
    near_tie = [Option(1.01, 8), Option(1.0, 0)]
    assert cheapest_step([[Option(1.0, 100), Option(1.1, 0)], near_tie]) == (1, 1)
