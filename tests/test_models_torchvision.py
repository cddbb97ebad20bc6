"""Models of torchvision: fused as far as can be, right in eval and train mode, explained."""

import pytest

from tests.families import Family, of, verify


@pytest.mark.parametrize("family", of("torchvision"))
def test_family(family: Family) -> None:
    verify(family)
