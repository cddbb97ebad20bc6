"""Compile CUDA C++ snippets inside a test; tests that need nvcc are skipped without it."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


@functools.cache
def compile_cuda(source: str, kind: str, arch: str, *options: str) -> tuple[bytes, str]:
    """The compiled file (``kind`` is ``ptx`` or ``cubin``) and what the compiler printed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cu")
        out = path.with_suffix("." + kind)
        path.write_text(source)
        done = subprocess.run(
            ["nvcc", f"-arch={arch}", f"-{kind}", *options, "-o", out, path],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        return out.read_bytes(), done.stderr
