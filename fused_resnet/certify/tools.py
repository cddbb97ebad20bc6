"""NVIDIA's binary tools, which come with Triton (and with the CUDA toolkit)."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import subprocess
import tempfile
from pathlib import Path


class ToolMissing(RuntimeError):
    """``cuobjdump`` or ``nvdisasm`` was found neither with Triton nor on PATH."""


@functools.cache
def find(name: str) -> Path:
    """Path of ``cuobjdump``, ``nvdisasm`` or ``ptxas``: Triton's own copy, else that on PATH.

    Triton's come first since they know every architecture that Triton compiles for.

    Raises:
        ToolMissing: neither place has it.
    """
    spec = importlib.util.find_spec("triton")
    for root in (spec.submodule_search_locations if spec is not None else None) or ():
        tool = Path(root, "backends", "nvidia", "bin", name)
        if tool.is_file():
            return tool
    on_path = shutil.which(name)
    if on_path is None:
        raise ToolMissing(f"{name} is neither in triton/backends/nvidia/bin nor on PATH")
    return Path(on_path)


@functools.lru_cache(maxsize=32)
def run(name: str, cubin: bytes, *options: str) -> str:
    """Standard output of a tool applied to a cubin.

    Raises:
        ToolMissing: the tool was not found.
        ValueError: the tool rejects the file; the message is the tool's.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [find(name), *options, file.name], capture_output=True, text=True, check=False
        )
    if done.returncode != 0:
        raise ValueError(f"{name} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout
