"""Comparing reports: what changed is told from noise, by ratios that no busy machine can shift."""

import json
import random

import pytest
from typer.testing import CliRunner

from fused_resnet.bench import Case, Measured, Report, Result
from fused_resnet.cli import app
from fused_resnet.machine import Machine
from fused_resnet.report.comparison import compare

MACHINE = Machine("a CPU", 2, 1 << 34, "AVX512", (), (), "Linux")


def _report(seed, *, fused=1.0, machine_speed=1.0, batch=4, rounds=60, noise=0.03, **changes):
    """A run: stock takes 2 s, fused 1 s, with 10 % noise that both share, and ``noise`` of its own.

    ``fused`` and ``machine_speed`` are factors of speed.
    """
    draw = random.Random(seed)
    seconds = {"stock_nhwc": [], "fused": []}
    for _ in range(rounds):
        shared = draw.lognormvariate(0, 0.1) / machine_speed
        seconds["stock_nhwc"].append(2 * shared * draw.lognormvariate(0, noise))
        seconds["fused"].append(shared / fused * draw.lognormvariate(0, noise))
    case = Case("net", "random weights", "2 photos", "float32", batch, 32, "cpu", 1)
    contenders = {key: Measured(seconds=s, error=1e-7) for key, s in seconds.items()}
    for name, value in changes.items():
        setattr(contenders["fused"], name, value)
    return Report(MACHINE, {"torch": "2"}, [], "", [Result(case, contenders)])


def _fused(comparison):
    [change] = [c for c in comparison.changes if c.contender == "fused"]
    return change


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.0, "same"), (0.97, "same"), (0.85, "slower"), (1.2, "faster")]
)
def test_changes_are_told_from_noise(factor, verdict):
    for seed in range(10):
        comparison = compare(_report(seed), _report(100 + seed, fused=factor))
        change = _fused(comparison)
        assert change.verdict == verdict
        assert change.ratio == pytest.approx(factor, rel=0.03)
        assert change.low <= change.ratio <= change.high
        assert change.old == pytest.approx(2, rel=0.03)
        assert comparison.passed == (verdict != "slower")


def test_the_interval_covers_what_is_true():
    """Of 100 intervals about 95 should; the blocks of a bootstrap make them a little short."""
    covered = 0
    for seed in range(100):
        change = _fused(compare(_report(seed), _report(1000 + seed, fused=0.9)))
        covered += change.low <= 0.9 <= change.high
    assert covered >= 85


def test_what_noise_alone_does_is_no_change():
    """Where rounds are few and wild, medians differ by much, and yet nothing is claimed."""
    wild = {"rounds": 9, "noise": 0.3}
    changes = [
        _fused(compare(_report(seed, **wild), _report(500 + seed, **wild))) for seed in range(40)
    ]
    assert sum(abs(c.ratio - 1) > 0.05 for c in changes) > 20
    assert sum(c.verdict != "same" for c in changes) <= 8


def test_a_slower_machine_is_no_regression():
    comparison = compare(_report(0), _report(1, machine_speed=0.5))
    stock, fused = comparison.changes
    assert (stock.contender, stock.verdict) == ("stock_nhwc", "slower")
    assert stock.old == pytest.approx(2.0, rel=0.05)  # Images per second: 4 in 2 s.
    assert fused.verdict == "same"
    assert comparison.passed


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"correct": False, "seconds": []}, "wrong"),
        ({"error": 3e-7}, "less exact"),
        ({"seconds": [], "missing": "no compiler"}, "gone"),
    ],
)
def test_what_else_is_a_regression(changes, verdict):
    comparison = compare(_report(0), _report(1, **changes))
    assert _fused(comparison).verdict == verdict
    assert not comparison.passed


def test_nothing_in_common_is_no_success():
    comparison = compare(_report(0, batch=1), _report(1, batch=2))
    assert {c.verdict for c in comparison.changes} == {"gone", "new"}
    assert not comparison.passed


def test_a_peer_that_became_slower_is_shown_and_fails_nothing():
    reports = [_report(0), _report(1, fused=0.5)]
    for report in reports:
        contenders = report.results[0].contenders
        contenders["compile"] = contenders.pop("fused")
    comparison = compare(*reports)
    assert comparison.changes[-1].verdict == "slower"
    assert comparison.passed


def test_on_the_command_line(tmp_path):
    old, same, slow = (tmp_path / f"{name}.json" for name in ("old", "same", "slow"))
    _report(0).save(old)
    _report(1).save(same)
    report = _report(2, fused=0.8)
    report.versions["torch"] = "3"
    report.save(slow)
    result = CliRunner().invoke(app, ["bench", "--compare", str(old), str(same)])
    assert result.exit_code == 0, result.output
    assert "No regression" in result.stdout
    file = tmp_path / "c.json"
    result = CliRunner().invoke(
        app, ["bench", "--compare", str(old), str(slow), "--json", str(file)]
    )
    assert result.exit_code == 1, result.output
    for text in ("slower", "Regressions: 1", "torch: 2 before, 3 now"):
        assert text in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert json.loads(file.read_text())["passed"] is False
    result = CliRunner().invoke(
        app, ["bench", "--compare", str(old), str(slow), "--threshold", "0.3"]
    )
    assert result.exit_code == 0


def _without_cases(data):
    data["results"] = [{}]


def _without_numbers(data):
    data["results"][0]["contenders"]["fused"]["seconds"] = ["fast"]


def _with_something_else(data):
    data["colour"] = "blue"


def _of_another_version(data):
    data["schema"] = "fused_resnet.bench/0"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        ("[]", "schema None"),
        ("{", "is not JSON"),
        (_of_another_version, "schema fused_resnet.bench/0, not fused_resnet.bench/1"),
        (_without_cases, "KeyError: 'case'"),
        (_without_numbers, "ValueError: could not convert string to float: 'fast'"),
        (_with_something_else, "unexpected keyword argument 'colour'"),
    ],
)
def test_a_file_that_is_no_report(tmp_path, content, reason):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    _report(0).save(old)
    if callable(content):
        data = json.loads(old.read_text())
        content(data)
        new.write_text(json.dumps(data))
    elif content is not None:
        new.write_text(content)
    for files in ((old, new), (new, old)):
        result = CliRunner().invoke(app, ["bench", "--compare", *map(str, files)])
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: {new} ") or f"cannot read {new}" in result.stderr
        assert reason in result.stderr


def test_what_was_timed_in_neither_run_is_no_row():
    """A peer that is not installed, say; one that was installed since is new."""
    reports = [_report(0), _report(1)]
    for report in reports:
        report.results[0].contenders["openvino"] = Measured(missing="not installed")
    assert [c.contender for c in compare(*reports).changes] == ["stock_nhwc", "fused"]
    reports[1].results[0].contenders["openvino"] = Measured(seconds=[1.0] * 60)
    change = compare(*reports).changes[1]
    assert (change.contender, change.verdict) == ("openvino", "new")
