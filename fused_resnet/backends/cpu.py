"""Backend ``cpu``: the package's own compiled CPU kernels (``csrc/cpu``)."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from fused_resnet import _build
from fused_resnet.backends.kernel import Kernel, PackedKernel
from fused_resnet.backends.torch_ import affine, finish
from fused_resnet.problem import EPILOGUES, AddReluProblem, ConvProblem


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


@functools.lru_cache(maxsize=4096)
def native_conv(name: str, isa: str, problem: ConvProblem) -> Any:
    """The compiled convolution ``name`` at level ``isa`` for one problem, see ``_C.CpuConv``."""
    assert _build.extension is not None
    p = problem
    geometry = (
        *(p.n, p.c, p.h, p.w, p.k, p.r, p.s),
        *(*p.stride, *p.padding, *p.dilation, p.groups),
    )
    return _build.extension.CpuConv(name, isa, geometry, EPILOGUES.index(p.epilogue), p.dtype)


class NativeConv(PackedKernel):
    """A native convolution (``csrc/cpu/conv_kernels.h``) with its whole epilogue in registers.

    Args:
        name: the kernel, as ``_C.cpu_conv_kernels`` lists it.
    """

    backend, op = "cpu", "conv_affine_act"
    packs_vectors = False

    def __init__(self, name: str) -> None:
        super().__init__()
        # An instance's name: the class variable of Kernel is only declared.
        self.name = name  # type: ignore[misc]

    def conv(self, problem: ConvProblem) -> Any:
        """The compiled convolution for ``problem``, at the instruction-set level in use."""
        assert _build.extension is not None
        return native_conv(self.name, _build.extension.isa(), problem)

    def supports(self, problem: ConvProblem, device: torch.device) -> str | None:
        """CPU, fp32 and bf16, and what the compiled kernel says."""
        if device.type != "cpu":
            return f"compiled for the CPU, not for {device.type}"
        if _build.extension is None:
            return f"the compiled extension is missing: {_build.extension_error}"
        if problem.dtype not in (torch.float32, torch.bfloat16):
            return f"only float32 and bfloat16 are offered, not {problem.dtype}"
        isa = _build.extension.isa()
        if self.name not in _build.extension.cpu_conv_kernels(isa):
            return f"this CPU, or level {isa}, lacks the instructions"
        return self.conv(problem).why_not or None

    def promising(self, problem: ConvProblem, device: torch.device) -> bool:
        """No: that it beats oneDNN is for a measurement to say."""
        return False

    def pack_key(self, problem: ConvProblem) -> Hashable:
        """The layout differs between levels, and otherwise depends on the weight's shape alone."""
        assert _build.extension is not None
        return _build.extension.isa(), problem.groups

    def prepare(self, problem: ConvProblem, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """The weight in the kernel's layout, as bytes."""
        packed: Tensor = self.conv(problem).pack(weight.detach())
        return packed

    def run(self, problem: ConvProblem, *args: Any) -> Tensor:
        """See `Kernel`."""
        x, weight, scale, shift, residual = args
        packed = self.packed(problem, weight, scale, shift)
        x = x.contiguous(memory_format=torch.channels_last)
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        result: Tensor = self.conv(problem).run(x, packed, scale, shift, residual)
        return result


def _native_convs() -> tuple[NativeConv, ...]:
    """A kernel for each name that any level of this CPU offers, simplest first."""
    extension = _build.extension
    if extension is None:
        return ()
    levels = (extension.cpu_conv_kernels(isa) for isa in extension.isa_available())
    names = dict.fromkeys(name for level in levels for name in level)
    return tuple(NativeConv(name) for name in names)


KERNELS: tuple[Kernel, ...] = (NativeAddRelu(), *_native_convs())
