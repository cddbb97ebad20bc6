"""Models of timm, whose norms may carry activations: fused as far as can be, and explained."""

import pytest

from tests.families import Family, of, verify


@pytest.mark.parametrize("family", of("timm"))
def test_family(family: Family) -> None:
    verify(family)
