"""How candidates are timed: on a clock that is told what each call takes, with a busy machine."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fused_resnet
from fused_resnet import planner, tuning
from fused_resnet.problem import AddReluProblem
from fused_resnet.proving import stock_kernel
from fused_resnet.tuning import EFFORTS, Task, lower_quartile
from tests.helpers import CPU
from tests.plans import small_resnet

X = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
TASK = Task("add_relu", AddReluProblem((1,), torch.float32, False, True), CPU, ())


@dataclass
class Clock:
    """Time passes in calls alone."""

    now: float = 0.0

    def seconds(self, call: Iterator[float], calls: int, _sweep: object) -> float:
        taken = next(call)
        self.now += taken * calls
        return taken


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(tuning, "_cpu_seconds", clock.seconds)
    monkeypatch.setattr(tuning, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def timed(*calls: Sequence[float]) -> list[Any]:
    """Candidates whose calls take so long, again and again, after they were timed."""
    stock = stock_kernel("add_relu")
    error = tuning.Error(0.0, 0.0)
    found = [tuning._Candidate(stock, itertools.cycle(each), error) for each in calls]  # type: ignore[arg-type]
    tuning._time(found, TASK, EFFORTS["balanced"])
    return found


@pytest.mark.usefixtures("clock")
def test_a_kernel_that_was_disturbed_three_times_of_four_still_wins() -> None:
    quick, slow = timed([20e-3, 31e-3, 12e-3, 1e-3], [1.4e-3, 1.4e-3, 1.4e-3, 1.5e-3])
    assert quick.seconds == pytest.approx(1e-3)
    assert slow.seconds == pytest.approx(1.4e-3)
    assert len(quick.samples) == len(slow.samples) > 10


@pytest.mark.usefixtures("clock")
def test_what_is_far_behind_leaves_early() -> None:
    quick, slow = timed([1e-3], [1.6e-3])
    assert len(slow.samples) == tuning._EARLY_ROUNDS
    assert slow.seconds == pytest.approx(1.6e-3)
    assert len(quick.samples) > 50


@pytest.mark.usefixtures("clock")
def test_what_left_early_does_not_win_because_the_machine_slowed_down_later() -> None:
    early = tuning._EARLY_ROUNDS + 1
    quick, slow = timed([1e-3] * early + [2e-3] * 1000, [1.6e-3] * early + [3.2e-3] * 1000)
    assert quick.seconds == pytest.approx(2e-3)
    assert slow.seconds == pytest.approx(3.2e-3)


@pytest.mark.parametrize(("busy", "times"), [(1e-3, 1), (3e-3, tuning._PERSISTENCE)])
def test_measuring_goes_on_while_the_machine_is_busy(clock: Clock, busy: float, times: int) -> None:
    quick, _ = timed([1e-3, busy, busy], [1.2e-3])
    assert quick.spread == pytest.approx(busy / 1e-3)
    budget = 2 * EFFORTS["balanced"].seconds
    assert times * budget <= clock.now <= times * budget + 0.02


def test_the_lower_quartile_is_a_sample_with_a_quarter_of_them_at_or_below_it() -> None:
    for count in range(1, 40):
        samples = [float(i * 7 % count) for i in range(count)]
        found = lower_quartile(samples)
        assert found in samples
        assert sum(s <= found for s in samples) >= count / 4
        assert sum(s < found for s in samples) <= count / 4


@pytest.mark.parametrize("spread", [1.1, 4.0])
def test_explain_tells_of_a_busy_machine(
    spread: float, tuned: Path, hurried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsteady(found: Any, task: Any, effort: Any) -> None:
        for c in found:
            c.samples = [1.0, spread, spread]

    monkeypatch.setattr(tuning, "_time", unsteady)
    monkeypatch.setattr(planner._Planner, "contest", lambda self, proven: (0, None))
    for _ in range(2):  # the second time from the table
        report = fused_resnet.optimize(small_resnet(), X).explain()
        told = [note for note in report.parts[0].notes if "busy machine" in note]
        assert len(told) == (spread > 1.5)
        assert all("up to 4.0 times" in note and "doctor" in note for note in told)
