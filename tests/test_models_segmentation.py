"""Segmentation models with a ResNet encoder, and a U-Net written by hand."""

import pytest

from tests.families import Family, of, verify


@pytest.mark.parametrize("family", of("segmentation_models_pytorch", "own"))
def test_family(family: Family) -> None:
    verify(family)
