"""Fixtures of several test files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fused_resnet._build import extension, extension_error


@pytest.fixture(params=["generic", "avx2", "avx512"])
def native(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The compiled extension with its CPU kernels at one instruction-set level."""
    if extension is None:
        pytest.skip(f"no compiled extension: {extension_error}")
    if request.param not in extension.isa_available():
        pytest.skip(f"this CPU cannot run {request.param} kernels")
    before = extension.isa()
    extension.set_isa(request.param)
    yield extension
    extension.set_isa(before)
