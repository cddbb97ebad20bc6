"""Settings of every test: one thread, one seed, repeatable examples, a registry left as it was."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from fused_resnet import backends, ops, planner, tuned_table, tuning
from fused_resnet._build import extension, extension_error

# What was measured on this machine before decides nothing here; processes that tests start inherit
# it.
os.environ[tuned_table.ENV] = "off"

settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    max_examples=60,
    database=None,
    # The fixtures below set a seed and restore tables; no example depends on them.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that the Triton interpreter runs first, lest one process ends alone with a long one."""
    items.sort(key=lambda item: item.path.name != "test_triton_interpreted.py")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    # Test processes run side by side; small problems gain nothing from threads anyhow. Said for
    # each test, since one before may have asked for more: memory, forks and kernels depend on it.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A tuned table of the test's own, at this path."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tuned.json"
        monkeypatch.setenv(tuned_table.ENV, str(path))
        yield path
        ops._remembered.clear()


@pytest.fixture
def fresh_registry() -> Iterator[None]:
    """Verdicts, warnings and remembered choices start empty and are restored afterwards."""
    tables = (backends._verdicts, backends._warned, ops._remembered)
    saved = [table.copy() for table in tables]
    for table in tables:
        table.clear()
    yield
    for table, content in zip(tables, saved, strict=True):
        table.clear()
        table.update(content)
    ops._remembered.clear()


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


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """`optimize` measures hardly at all: for tests of anything but the clock."""
    efforts = {name: replace(e, rounds=1, seconds=0.0) for name, e in tuning.EFFORTS.items()}
    for module in (tuning, planner):
        monkeypatch.setattr(module, "EFFORTS", efforts)
    monkeypatch.setattr(planner, "_CONTEST_ROUNDS", (1, 1))
