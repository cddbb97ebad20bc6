"""The scripts of benchmarks/ that people run by hand, on the smallest of what they measure."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import layers, memory, scaling
from fused_resnet import footprint
from fused_resnet._build import extension


def run(monkeypatch: pytest.MonkeyPatch, script: str, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", [script, *options])
    monkeypatch.setenv("COLUMNS", "120")
    {"layers": layers, "memory": memory, "scaling": scaling}[script].main()


@pytest.mark.slow
@pytest.mark.skipif(extension is None, reason="no compiled extension")
@pytest.mark.skipif(footprint.resident() is None, reason="the system tells of no pages of files")
def test_memory_has_a_line_for_each_contender(
    tuned: Path,
    hurried: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(monkeypatch, "memory", "--model", "resnet18", "--batch", "1", "--rounds", "1")
    lines = [line.split("│")[2:-1] for line in capsys.readouterr().out.splitlines()]
    found = {cells[0].strip(): cells[1:] for cells in lines if cells}
    assert set(found) == {"stock", "compact=None", "compact=False", "compact=True"}
    for _, measured, counted in found.values():
        # Interpreters and their libraries take some MB more or less.
        assert float(measured) == pytest.approx(float(counted), abs=20)


def test_memory_names_a_model_that_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "memory", "--model", "resnet17")
    assert "torchvision.models has no 'resnet17'" in capsys.readouterr().err


@pytest.mark.skipif(extension is None, reason="no compiled extension")
def test_layers_has_a_line_for_each_layer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(layers, "LAYERS", ((32, 64, 14, 1), (32, 32, 12, 3)))
    run(monkeypatch, "layers", "--batch", "1", "--rounds", "2", "--kernels", "direct", "winograd4")
    lines = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines()]
    found = {cells[0].strip(): [c.strip() for c in cells[1:]] for cells in lines if cells}
    assert set(found) == {"1x1 32->64 14x14", "3x3 32->32 12x12"}
    assert found["1x1 32->64 14x14"][1] == ""  # Winograd has no such layer.
    for cells in found.values():
        best, median, error = map(float, cells[0].split())
        assert 0 < median <= best
        assert 0 < error < 1e-6


@pytest.mark.slow
@pytest.mark.usefixtures("tuned", "hurried")
def test_scaling_has_a_line_for_each_shape(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--batch", "1", "2", "--size", "64", "--threads", "1", "--rounds", "1"]
    run(monkeypatch, "scaling", "--model", "resnet18", *options)
    text = capsys.readouterr().out
    for name in ("batch 1", "batch 2", "64x64", "threads: 1"):
        assert f" {name} │" in text
