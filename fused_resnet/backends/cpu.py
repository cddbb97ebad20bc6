"""Backend ``cpu``: the package's own compiled CPU kernels (``csrc/cpu``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_resnet import _build
from fused_resnet.backends.kernel import Kernel
from fused_resnet.backends.torch_ import affine, finish
from fused_resnet.problem import AddReluProblem


def affine_act_(
    y: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, epilogue: str
) -> Tensor:
    """The whole epilogue over a convolution's result, in place: one compiled pass, one rounding.

    Without the compiled extension ATen does it in up to four passes.

    Args:
        y: [N, K, H, W], dense in channels_last order; overwritten.
        scale: fp32 [K].
        shift: fp32 [K].
        residual: of y's shape, dtype and layout where the epilogue reads one.
        epilogue: see ``fused_resnet.problem.EPILOGUES``.
    """
    if _build.extension is None:
        return finish(affine(y, scale, shift), residual, epilogue)
    _build.extension.affine_act_(y, scale, shift, residual, epilogue)
    return y


def add_relu_(y: Tensor, residual: Tensor) -> Tensor:
    """``relu(y + residual)`` into y, in one compiled pass where the two lie alike in memory."""
    if _build.extension is None or y.stride() != residual.stride():
        return finish(y, residual, "add_relu")
    _build.extension.add_relu(y, residual, True)
    return y


class NativeAddRelu(Kernel):
    """Vectorised ``relu(a + b)``: two reads and one write of every element, fp32 arithmetic."""

    backend, op, name = "cpu", "add_relu", "add_relu"

    def supports(self, problem: AddReluProblem, device: torch.device) -> str | None:
        """CPU, two dense tensors of one layout."""
        if device.type != "cpu":
            return f"compiled for the CPU, not for {device.type}"
        if _build.extension is None:
            return f"the compiled extension is missing: {_build.extension_error}"
        if not problem.same_dense_strides:
            return "the tensors are not dense or differ in memory layout"
        return None

    def run(self, problem: AddReluProblem, *args: Any) -> Tensor:
        """See `Kernel`."""
        a, b = args
        assert _build.extension is not None
        result: Tensor = _build.extension.add_relu(a, b, problem.inplace)
        return result


KERNELS: tuple[Kernel, ...] = (NativeAddRelu(),)
