"""The doctor calls broken what the user must mend, and nothing else."""

import json
import os
import subprocess
import sys

import pytest
import torch

from fused_resnet import _build, backends, doctor, machine, tuned_table
from fused_resnet.problem import AddReluProblem
from fused_resnet.tuned_table import Entry
from tests.helpers import CPU


def _find(diagnosis, section, name):
    return next(f for f in diagnosis.findings if (f.section, f.name) == (section, name))


def test_this_machine():
    diagnosis = doctor.examine()
    assert diagnosis.healthy, str(diagnosis)
    assert _find(diagnosis, "Versions", "torch").value == torch.__version__
    for name in backends.NAMES:
        assert _find(diagnosis, "Backends on cpu", name).status == "ok"
    assert "float32" in _find(diagnosis, "Backends on cpu", "torch").value
    assert json.loads(json.dumps(diagnosis.to_dict()))["healthy"] is True
    assert "Nothing to mend" in str(diagnosis)


@pytest.mark.parametrize(("file", "status"), [("_C.abi3.so", "broken"), (None, "note")])
def test_no_extension(monkeypatch, tmp_path, file, status):
    if file is not None:
        (tmp_path / file).touch()
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "doctor.py"))
    monkeypatch.setattr(_build, "extension", None)
    monkeypatch.setattr(_build, "extension_error", "made for another torch")
    diagnosis = doctor.examine()
    found = _find(diagnosis, "Compiled extension", "loaded")
    assert found.status == status
    assert "made for another torch" in found.value
    assert diagnosis.healthy == (status == "note")
    assert "not usable: the compiled extension is missing" in (
        _find(diagnosis, "Backends on cpu", "cpu").value
    )


def test_a_kernel_that_computes_nonsense(monkeypatch):
    def verdict(kernel, _device, dtype):
        return "its error is 0.3" if (kernel.name, dtype) == ("onednn", torch.float32) else None

    monkeypatch.setattr(backends, "verdict", verdict)
    diagnosis = doctor.examine()
    broken = [f for f in diagnosis.findings if f.status == "broken"]
    assert {f.name for f in broken} == {"library: onednn in float32"}
    assert "its error is 0.3" in str(diagnosis)
    assert "BROKEN" in str(diagnosis)


def test_an_old_torch(monkeypatch):
    monkeypatch.setattr(doctor, "versions", lambda: {"torch": "2.8.1+cpu"})
    found = _find(doctor.examine(), "Versions", "torch")
    assert found.status == "broken"
    assert "torch>=2.9" in found.value


def test_missing_packages_are_no_fault(monkeypatch):
    for module in (doctor, machine):
        monkeypatch.setattr(module, "package_version", lambda _name: None)
    diagnosis = doctor.examine()
    found = _find(diagnosis, "Versions", "scikit-image")
    assert found.status == "note"
    assert 'pip install "fused-resnet[bench]"' in " ".join(str(diagnosis).split())
    assert diagnosis.healthy


def test_the_environment(monkeypatch):
    monkeypatch.setenv("FUSED_RESNET_BACKEND", "torch")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    diagnosis = doctor.examine()
    assert _find(diagnosis, "Environment", "FUSED_RESNET_BACKEND").value == "torch"
    assert _find(diagnosis, "Environment", "OMP_NUM_THREADS").value == "1"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("FUSED_RESNET_BACKEND", "torch,tirton", "unknown backend 'tirton'; available: cpu, "),
        ("FUSED_RESNET_ISA", "avx1024", "expected a level that this CPU can run (generic"),
    ],
)
def test_a_wrong_setting_is_told_by_doctor_and_an_error_where_it_would_count(
    name, value, reason, tmp_path
):
    if name == "FUSED_RESNET_ISA" and _build.extension is None:
        pytest.skip("without the extension there are no levels")
    environment = {**os.environ, name: value, "OMP_NUM_THREADS": "1", "COLUMNS": "300"}

    def python(*arguments):
        return subprocess.run(
            [sys.executable, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    diagnosis = python("-m", "fused_resnet", "doctor", "--json", str(tmp_path / "found.json"))
    assert diagnosis.returncode == 1, diagnosis.stderr
    findings = json.loads((tmp_path / "found.json").read_text())["findings"]
    broken = [f for f in findings if f["status"] == "broken"]
    assert [f["name"] for f in broken] == [name]
    assert broken[0]["value"].startswith(f"{value}: unset or mend it; environment variable {name}=")
    assert reason in broken[0]["value"]
    code = (
        "import torch, fused_resnet; fused_resnet.functional.add_relu(*torch.ones(2, 1, 4, 8, 8))"
    )
    called = python("-c", code)
    assert called.returncode == 1
    assert f"ValueError: environment variable {name}=" in called.stderr
    assert reason in called.stderr
    checked = python("-m", "fused_resnet", "check", "resnet18", "--size", "32")
    assert checked.returncode == 2, checked.stderr
    assert checked.stderr.startswith(f"error: environment variable {name}="), checked.stderr


def test_a_driver_that_torch_cannot_use(monkeypatch, tmp_path):
    driver = tmp_path / "version"
    driver.touch()
    monkeypatch.setattr(doctor, "_NVIDIA_DRIVER", driver)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    facts = doctor.machine()
    if facts.gpus:
        pytest.skip("this machine has a GPU that torch can use")
    found = next(f for f in doctor._devices(facts) if f.name == "cuda")
    assert found.status == "broken"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = next(f for f in doctor._devices(facts) if f.name == "cuda")
    assert found.status == "note"


def test_the_tuned_table(tuned):
    found = _find(doctor.examine(), "Tuned table", "file")
    assert (found.value, found.status) == (f"{tuned} (not yet)", "ok")
    table = tuned_table.table()
    table.put("add_relu", AddReluProblem((1,), torch.float32, False, True), CPU, Entry(0.0, ()))
    assert table.save()
    diagnosis = doctor.examine()
    assert "as things are now" in _find(diagnosis, "Tuned table", "1 problems").value
    tuned.write_text("{")
    found = _find(doctor.examine(), "Tuned table", "file")
    assert found.status == "note"
    assert "is not used: it is not JSON" in found.value
    assert tuned.read_text() == "{"  # To look is not to mend.


def test_no_tuned_table(monkeypatch):
    monkeypatch.setenv(tuned_table.ENV, "off")
    assert "switches it off" in _find(doctor.examine(), "Tuned table", "file").value
