"""Which devices and dtypes the backend serves, and what of the process's settings it follows."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import torch

from .config import ARCHS, Arch

#: Whether kernels run in Triton's interpreter, on CPU tensors: read as Triton does, without it.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "on", "true")

#: Dtypes that the kernels compute in.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def refusal(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why no kernel of this backend runs on ``device`` in ``dtype``, or None."""
    if dtype not in DTYPES:
        return f"{dtype} is not among float32, float16 and bfloat16"
    if device.type == "cpu":
        return (
            None if INTERPRETING else "CPU tensors need Triton's interpreter (TRITON_INTERPRET=1)"
        )
    if device.type != "cuda":
        return f"no Triton kernels for {device.type} devices"
    if torch.version.hip is not None:
        return "the Triton kernels are not verified on ROCm"
    if arch_of(device).capability < 80:
        return "Triton makes no tensor-core code for GPUs before sm_80"
    return None


def arch_of(device: torch.device) -> Arch:
    """Architecture of a device; the interpreter is an A100 of one SM, which favours large tiles."""
    if device.type == "cpu":
        return dataclasses.replace(ARCHS[0], sms=1)
    return _cuda_arch(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache(maxsize=64)
def _cuda_arch(index: int) -> Arch:
    properties = torch.cuda.get_device_properties(index)
    return Arch(10 * properties.major + properties.minor, properties.multi_processor_count)


def precision_of(dtype: torch.dtype) -> str:
    """``tf32`` or ``ieee`` for fp32 products, as ``torch.backends.cudnn.allow_tf32`` says.

    16-bit products do not depend on it and always report ``tf32``.
    """
    if dtype != torch.float32:
        return "tf32"
    # ``allow_tf32`` sets this too, but cannot be read once convolutions and RNNs differ.
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return "tf32" if conv.fp32_precision == "tf32" else "ieee"


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """A guard that makes a CUDA device current, where it is not already."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
