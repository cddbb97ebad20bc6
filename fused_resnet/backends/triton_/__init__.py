"""Triton backend: fused convolutions for NVIDIA GPUs of sm_80 and later.

    kernels    what the registry sees          paths     the formulations, ready to run
    plans      problem -> launches, pure       config    tile shapes and the choice among them
    launch     compile and bind a launch       layout    activations and weights in memory
    gemm conv boxes stem reduce images epilogue
    chain chain_plan chain_kernel              bottlenecks chained into one kernel
    features   images and pooled features      certify   what certificates cover
    im2col im2col_sm100 im2col_kernel          never executed; offered to the tuner alone

``KERNELS`` is empty, and ``UNAVAILABLE`` says why, where Triton cannot be imported.
"""

from __future__ import annotations

from fused_resnet.backends.kernel import Kernel

KERNELS: tuple[Kernel, ...]
UNAVAILABLE: str | None

try:
    import triton  # noqa: F401  (the probe: torch builds for the CPU come without it)
except ImportError as error:
    KERNELS, UNAVAILABLE = (), f"Triton cannot be imported: {error}"
else:
    from .kernels import KERNELS

    UNAVAILABLE = None

__all__ = ["KERNELS", "UNAVAILABLE"]
