"""The extension's build: what is built where, and what happens where it cannot be."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_resnet
from fused_resnet import _build

ROOT = Path(__file__).parents[1]
HAS_COMPILER = shutil.which(os.environ.get("CXX", "c++").split()[0]) is not None


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the package is built from."""
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "Makefile"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "fused_resnet"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    return tmp_path


def run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command with extra environment variables; stdout holds what it printed."""
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=300,
    )


def setup_py(checkout: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "setup.py", "--name", cwd=checkout, **env)


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
def test_extension_is_there_where_a_compiler_is() -> None:
    assert _build.extension is not None, _build.extension_error
    assert _build.extension_error is None


@pytest.mark.skipif(_build.extension is None, reason=f"no extension: {_build.extension_error}")
def test_build_info() -> None:
    assert _build.extension is not None
    info = _build.extension.build_info()
    assert info["torch"] == torch.__version__
    assert info["cplusplus"] >= 202002
    assert re.search(r"\d", info["compiler"])
    assert info["openmp"] is (sys.platform == "linux")
    assert info["cuda"] is None or set(info["cuda"]) == {"version", "archs"}


def test_no_extension_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fused_resnet._C", None)
    extension, error = _build.load_extension()
    assert extension is None
    assert error is not None
    assert error.startswith("the extension was not built")
    assert "pip install" in error


def test_extension_that_does_not_load_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError("undefined symbol: _ZN2at4_ops3add4callE")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.warns(UserWarning, match="runs without its compiled kernels: .*undefined symbol"):
        extension, error = _build.load_extension()
    assert extension is None
    assert error is not None
    assert "undefined symbol: _ZN2at4_ops3add4callE" in error


@pytest.mark.skipif(_build.extension is None, reason=f"no extension: {_build.extension_error}")
def test_extension_of_another_torch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    built = torch.__version__
    monkeypatch.setattr(torch, "__version__", "2.99.0+cu199")
    with pytest.warns(UserWarning, match="runs without its compiled kernels"):
        extension, error = _build.load_extension()
    assert extension is None
    assert error is not None
    assert f"built against torch {built}, but torch 2.99.0+cu199 is running" in error


@pytest.mark.skipif(_build.extension is None, reason=f"no extension: {_build.extension_error}")
def test_another_build_of_the_same_torch_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", torch.__version__.partition("+")[0] + "+local")
    assert _build.load_extension() == (_build.extension, None)


def test_installs_and_imports_without_a_compiler(checkout: Path) -> None:
    wheels = checkout / "wheels"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-v", "--no-deps"]
    command = [*pip, "--no-build-isolation", "-w", str(wheels), "."]
    built = run(*command, cwd=checkout, CXX="/bin/false", CC="/bin/false")
    assert built.returncode == 0, built.stdout
    warning = "warning: fused_resnet is installed without its extension: /bin/false cannot compile"
    assert warning in built.stdout
    (wheel,) = wheels.iterdir()
    assert wheel.name == f"fused_resnet-{fused_resnet.__version__}-py3-none-any.whl"

    site = checkout / "site"
    shutil.unpack_archive(wheel, site, "zip")
    # An editable install would serve the extension that the wheel lacks.
    code = """
import sys
sys.meta_path = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__edit")]
from fused_resnet import _build
print(_build.__file__, _build.extension_error)
"""
    used = run(sys.executable, "-c", code, cwd=site, PYTHONPATH=str(site))
    assert used.returncode == 0, used.stdout
    assert str(site) in used.stdout
    assert "the extension was not built" in used.stdout


def test_missing_compiler_is_an_error_if_the_extension_is_required(checkout: Path) -> None:
    done = setup_py(checkout, FUSED_RESNET_EXTENSION="1", CXX="no-such-compiler")
    assert done.returncode != 0
    assert (
        "FUSED_RESNET_EXTENSION=1, but there is no C++ compiler 'no-such-compiler'" in done.stdout
    )


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
def test_code_that_does_not_compile_is_an_error(checkout: Path) -> None:
    (checkout / "csrc" / "cpu" / "isa.h").write_text("#error broken\n")
    done = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=checkout)
    assert done.returncode != 0
    assert "#error broken" in done.stdout


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
def test_cuda_that_is_required_but_cannot_be_built_is_an_error(checkout: Path) -> None:
    (checkout / "csrc" / "cuda").mkdir(exist_ok=True)
    (checkout / "csrc" / "cuda" / "kernel.cu").touch()
    done = setup_py(checkout, FUSED_RESNET_CUDA="1", CUDA_HOME=str(checkout))
    assert done.returncode != 0
    assert re.search(
        r"FUSED_RESNET_CUDA=1, but (nvcc was not found|torch .* without CUDA)", done.stdout
    )


@pytest.mark.parametrize("name", ["FUSED_RESNET_EXTENSION", "FUSED_RESNET_CUDA"])
def test_unknown_setting_is_an_error(checkout: Path, name: str) -> None:
    if name == "FUSED_RESNET_CUDA" and not HAS_COMPILER:
        pytest.skip("no C++ compiler, so CUDA is not asked about")
    done = setup_py(checkout, **{name: "yes"})
    assert done.returncode != 0
    assert re.search(rf"{name}=yes: expected .*0, 1 or nothing", done.stdout)


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
@pytest.mark.skipif(_build.extension is None, reason=f"no extension: {_build.extension_error}")
def test_wide_registers_appear_only_in_code_of_their_level() -> None:
    # One binary must run on every x86-64: a function that is shared among files, but was compiled
    # for a higher level, would crash on an older CPU. Levels above generic have their namespaces,
    # and names of the kernels on tiles say so.
    assert _build.extension is not None
    path = str(_build.extension.__file__)
    listing = run("objdump", "--disassemble", "--no-show-raw-insn", path, cwd=ROOT).stdout
    if "file format elf64-x86-64" not in listing:
        pytest.skip("not an x86-64 binary")
    wide = {"avx2": 0, "avx512": 0, "amx": 0}
    for function in listing.split("\n\n"):
        head, _, body = function.partition("\n")
        if not re.search(r"%[yz]mm|\tv[a-z]", body):
            continue
        level = next((level for level in reversed(wide) if level in head.lower()), None)
        assert level is not None, f"AVX instructions in {head}"
        assert level != "avx2" or "%zmm" not in body, f"AVX-512 instructions in {head}"
        wide[level] += 1
    assert all(wide.values()), f"functions found by level: {wide}"


def test_makefile_asks_for_a_newer_python(checkout: Path) -> None:
    python = checkout / "old-python"
    python.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.18\nexit 1\n')
    python.chmod(0o755)
    done = run("make", "bench", f"PYTHON={python}", f"VENV={checkout / 'venv'}", cwd=checkout)
    assert done.returncode != 0
    assert f"error: Python >= 3.10 is needed, found {python}: Python 3.9.18" in done.stdout
