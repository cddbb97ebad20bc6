"""Which layers keep larger weights: within the limit, and no better choice is as small."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fused_resnet.room import Option, fit

option = st.builds(Option, st.integers(1, 40).map(float), st.integers(0, 12))
# The preferred option of a layer is its fastest.
layer = st.lists(option, min_size=1, max_size=4).map(
    lambda options: sorted(options, key=lambda o: (o.seconds, o.bytes))
)


@given(st.lists(layer, max_size=4), st.integers(-2, 40))
def test_the_limit_is_kept_and_nothing_as_small_is_faster(
    layers: list[list[Option]], limit: int
) -> None:
    chosen = [options[i] for options, i in zip(layers, fit(layers, limit), strict=True)]
    taken = sum(o.bytes for o in chosen)
    assert taken <= max(limit, sum(min(o.bytes for o in options) for options in layers))
    seconds = sum(o.seconds for o in chosen)
    for other in itertools.product(*layers):
        if sum(o.bytes for o in other) <= taken:
            assert sum(o.seconds for o in other) >= seconds


def test_nothing_is_given_up_without_need() -> None:
    layers = [[Option(1.0, 10), Option(2.0, 0)], [Option(1.0, 5)]]
    assert fit(layers, 15) == [0, 0]
    assert fit(layers, 14) == [1, 0]


@pytest.mark.parametrize("limit", [-1, 0])
def test_near_ties_cost_nothing(limit: int) -> None:
    # The preferred one may be the slower one by a little.
    assert fit([[Option(1.01, 8), Option(1.0, 0)]], limit) == [1]
