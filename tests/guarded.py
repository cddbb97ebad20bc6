"""Tensors that end, or begin, at a page that must not be touched."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_kept: list[object] = []  # views that keep the pages mapped


def guarded(t: Tensor | None, at_end: bool) -> Tensor | None:
    """A copy of ``t`` that touches the page behind it (``at_end``) or before it.

    Whoever reads or writes that page is killed, so this is for a process of its own.
    """
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
