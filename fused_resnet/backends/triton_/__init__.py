"""Triton backend: fused convolutions for NVIDIA GPUs of sm_80 and later.

    kernels    what the registry sees          paths     the formulations, ready to run
    plans      problem -> launches, pure       config    tile shapes and the choice among them
    launch     compile and bind a launch       layout    activations and weights in memory
    dense      aligned tensors, no Triton
    gemm conv boxes stem reduce images epilogue      the device code
    chain chain_plan chain_kernel              bottlenecks chained into one kernel
    features   images and pooled features      certify   what certificates cover
    im2col im2col_sm100 im2col_kernel          never executed; offered to the tuner alone

``KERNELS`` is empty, and ``UNAVAILABLE`` says why, where Triton is not installed. Where it is, the
first kernel that is made ready to run imports it.
"""

from __future__ import annotations

import importlib.util

from fused_resnet.backends.kernel import Kernel

KERNELS: tuple[Kernel, ...]
UNAVAILABLE: str | None

# Torch builds for the CPU come without it.
if importlib.util.find_spec("triton") is None:
    KERNELS, UNAVAILABLE = (), "Triton is not installed"
else:
    from .kernels import KERNELS

    UNAVAILABLE = None

__all__ = ["KERNELS", "UNAVAILABLE"]
