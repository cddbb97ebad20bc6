"""The command line: what it prints, where, and with which exit code."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fused_resnet import bench, cli, doctor, zoo
from fused_resnet.cli import app
from fused_resnet.contenders import CONTENDERS
from fused_resnet.version import __version__

runner = CliRunner()
QUICK = ["--dtype", "fp32", "--seconds", "0", "--no-memory"]


def _run(*args):
    return runner.invoke(app, [str(a) for a in args])


def test_bench(tmp_path):
    path = tmp_path / "r.json"
    result = _run("bench", "cifar_resnet8", "-b", "1,2", *QUICK, "--json", path)
    assert result.exit_code == 0, result.output
    for text in ("cifar_resnet8", "fp32 x2", "vs NCHW", "stock NHWC", "random weights", "means"):
        assert text in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    report = bench.Report.load(path)
    assert [r.case.batch for r in report.results] == [1, 2]


def test_bench_of_photos_of_ones_own(tmp_path):
    Image.effect_noise((50, 40), 60).save(tmp_path / "a.png")
    Image.linear_gradient("L").save(tmp_path / "b.png")
    (tmp_path / "c.png").write_text("broken")
    result = _run("bench", "cifar_resnet8", "-b", "1", *QUICK, "--images", tmp_path)
    assert result.exit_code == 0, result.output
    assert "c.png was skipped" in result.stdout


def test_bench_several_models_and_dtypes():
    args = ("cifar_resnet8", "cifar_resnet14", "-b", "1", "-t", "fp32", "-t", "bf16")
    result = _run("bench", *args, "--seconds", "0", "--no-memory")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("bf16 x1") == 2


def test_bench_interrupted(monkeypatch, tmp_path):
    def interrupted(runs, inputs, **_kwargs):
        return bench.Rounds({k: [1.0, 1.0] for k in runs}, dict.fromkeys(runs, 1), complete=False)

    monkeypatch.setattr(bench, "interleave", interrupted)
    path = tmp_path / "r.json"
    result = _run("bench", "cifar_resnet8", "-b", "1,2", *QUICK, "--json", path)
    assert result.exit_code == 130
    assert "Interrupted" in result.stdout
    assert "fp32 x1" in result.stdout
    assert "Traceback" not in result.output
    assert json.loads(path.read_text())["complete"] is False


def test_ctrl_c_elsewhere_leaves_no_traceback(monkeypatch):
    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(zoo, "load", interrupt)
    result = _run("check", "cifar_resnet8")
    assert result.exit_code == 130
    assert "Traceback" not in result.output


@pytest.fixture
def wrong_twin(monkeypatch):
    right = zoo.fused

    def wrong(name, stock, *_example):
        model = right(name, stock)
        with torch.no_grad():
            model.bn1.eps = 0.1
        return model

    monkeypatch.setattr(zoo, "fused", wrong)
    contender = dataclasses.replace(CONTENDERS["fused"], make=wrong)
    monkeypatch.setitem(CONTENDERS, "fused", contender)


def test_check(tmp_path):
    path = tmp_path / "c.json"
    result = _run("check", "cifar_resnet8", "-b", "2", "-t", "fp32,bf16", "--json", path)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("passed") == 2
    assert "layer3.0.conv2" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    checks = json.loads(path.read_text())["checks"]
    assert [c["dtype"] for c in checks] == ["float32", "bfloat16"]
    assert all(c["passed"] for c in checks)


@pytest.mark.usefixtures("wrong_twin")
def test_a_failed_check_fails():
    result = _run("check", "cifar_resnet8", "-b", "2", "-t", "fp32", "--no-layers")
    assert result.exit_code == 1
    assert "FAILED" in result.stdout


@pytest.mark.usefixtures("wrong_twin")
def test_bench_of_a_wrong_network_fails():
    result = _run("bench", "cifar_resnet8", "-b", "2", *QUICK)
    assert result.exit_code == 1
    assert "WRONG" in result.stdout


def test_explain(tmp_path):
    path = tmp_path / "e.json"
    result = _run("explain", "cifar_resnet8", "--json", path)
    assert result.exit_code == 0, result.output
    assert "layer1.0.conv1" in result.stdout
    assert "layer1.0.conv1" in path.read_text()
    assert json.loads(path.read_text())["model"] == "cifar_resnet8"


def test_doctor(tmp_path):
    path = tmp_path / "d.json"
    result = _run("doctor", "--json", path)
    assert result.exit_code == 0, result.output
    assert "Backends on cpu" in result.stdout
    assert json.loads(path.read_text())["healthy"] is True


def test_doctor_with_something_to_mend(monkeypatch):
    broken = doctor.Diagnosis((doctor.Finding("Versions", "torch", "too old", "broken"),))
    monkeypatch.setattr(cli, "examine", lambda: broken)
    result = _run("doctor")
    assert result.exit_code == 1
    assert "too old" in result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["bench", "resnet5"], "did you mean resnet"),
        (["check", "timm:resnet5"], "did you mean timm:resnet"),
        (["bench", "--dtype", "int8"], "unknown dtype 'int8'; fp32, bf16, fp16 or fp64"),
        (["bench", "--batch", "0"], "positive whole numbers, got '0'"),
        (["bench", "--batch", "1,x"], "positive whole numbers, got 'x'"),
        (["bench", "--backend", "tritom"], "unknown backend 'tritom'"),
        (["bench", "--device", "gpu"], "unknown device 'gpu'"),
        (["bench", "--device", "mps"], "not supported; cpu, cuda"),
        (["check", "cifar_resnet8", "--images", "nowhere"], "no folder nowhere"),
        (["check", "cifar_resnet8", "--weights", "nowhere.pt"], "no checkpoint at nowhere.pt"),
        (["bench", "--json", "no/such/folder/r.json"], "there is no folder no/such/folder"),
        (["explain", "resnet18", "--dtype", "fp32,bf16"], "--dtype takes one value here"),
        (["check", "nowhere:model"], "cannot import nowhere"),
        (["check", "alexnet", "--size", "8"], "does not run on photos"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(args, message):
    result = _run(*args)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_no_cuda_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    result = _run("bench", "--device", "cuda")
    assert result.exit_code == 2
    assert "no CUDA device" in result.stderr
    assert "--device cpu" in result.stderr


def test_missing_scikit_image_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    result = _run("check", "cifar_resnet8")
    assert result.exit_code == 2
    assert 'pip install "fused-resnet[bench]"' in result.stderr


def test_python_m():
    command = [sys.executable, "-m", "fused_resnet", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == __version__
    assert done.stderr == ""


def test_help_names_the_commands():
    result = _run("--help")
    assert result.exit_code == 0
    for name in ("bench", "check", "explain", "doctor"):
        assert name in result.stdout
