"""Tensors that end, or begin, at a page that must not be touched.

    python -m tests.guarded MODULE KERNEL

runs a kernel of the CPU on such tensors, for the ``GEOMETRIES`` of a test module, and for its
``LARGE`` ones too unless the kernel is emulated. Who touches such a page is killed.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import subprocess
import sys

import torch
from torch import Tensor

from tests.helpers import Args, conv_problem, draw
from tests.test_cpu_amx import compiled, run

_kept: list[object] = []  # views that keep the pages mapped


def guarded(t: Tensor | None, at_end: bool) -> Tensor | None:
    """A copy of ``t`` that borders on the page behind it (``at_end``) or before it."""
    if t is None:
        return None
    page, libc = mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True)
    size = t.numel() * t.element_size()
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    view = (ctypes.c_char * len(memory)).from_buffer(memory)
    base = ctypes.addressof(view)
    for guard in (base, base + (pages + 1) * page):
        assert libc.mprotect(ctypes.c_void_p(guard), page, 0) == 0
    offset = page + (pages * page - size if at_end else 0)
    flat = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=offset)
    _kept.append(view)
    return torch.as_strided(flat, t.shape, t.stride()).copy_(t)


def check_alone(module: str, isa: str) -> None:
    """Call a test module's ``check_fenced(isa)`` in a process of its own, which may be killed."""
    code = f"from {module} import check_fenced; check_fenced({isa!r}); print('done')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.stdout.strip() == "done", (done.returncode, done.stderr)


def main(module: str, kernel: str) -> None:
    """Compare with the result on ordinary tensors."""
    tests = importlib.import_module(module)
    geometries = list(tests.GEOMETRIES.values())
    if "emulated" not in kernel:
        geometries += tests.LARGE.values()
    for geometry in geometries:
        dtype = torch.float32 if "bf16x6" in kernel else torch.bfloat16
        p = conv_problem(**{**geometry, "epilogue": "add_relu", "dtype": dtype})
        if compiled(kernel, p).why_not:  # Rows that fit the caches in bf16 alone.
            continue
        args = draw(p)
        for at_end in (False, True):
            y = run(kernel, p, Args(*(guarded(t, at_end) for t in args)), threads=2)
            assert torch.equal(y, run(kernel, p, args, threads=2)), p


if __name__ == "__main__":
    main(*sys.argv[1:])
