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
from fused_resnet.problem import EPILOGUES, AddReluProblem, ConvProblem, MaxPool


def affine_act_(
    y: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, epilogue: str
) -> Tensor:
    """The whole epilogue over a convolution's result, in place: one compiled pass, one rounding.

    Without the compiled extension ATen does it in up to four passes.

    Args:
        y: [N, K, H, W] or [N, K, D, H, W], dense in channels_last order; overwritten.
        scale: fp32 [K].
        shift: fp32 [K].
        residual: of y's shape, dtype and layout where the epilogue reads one.
        epilogue: see ``fused_resnet.problem.EPILOGUES``.
    """
    if _build.extension is None:
        return finish(affine(y, scale, shift), residual, epilogue)
    flat, added = y, residual
    if y.dim() == 5:  # The frames of a video, one under the other, are a tall image.
        flat = y.flatten(2, 3)
        added = None if residual is None else residual.flatten(2, 3)
    _build.extension.affine_act_(flat, scale, shift, added, epilogue)
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


def geometry(problem: ConvProblem) -> tuple[int, ...]:
    """Sizes of a convolution in the order in which the compiled extension takes them."""
    p = problem
    image, window = (p.n, p.c, p.h, p.w, p.k, p.r, p.s), (*p.stride, *p.padding, *p.dilation)
    return *image, *window, p.groups


def pool_window(pool: MaxPool) -> tuple[int, ...]:
    """Kernel, stride and padding of a pooling as the compiled extension takes them."""
    return *pool.kernel, *pool.stride, *pool.padding


@functools.lru_cache(maxsize=4096)
def native_conv(name: str, isa: str, problem: ConvProblem) -> Any:
    """The compiled convolution ``name`` at level ``isa`` for one problem, see ``_C.CpuConv``."""
    assert _build.extension is not None
    epilogue = EPILOGUES.index(problem.epilogue)
    return _build.extension.CpuConv(name, isa, geometry(problem), epilogue, problem.dtype)


@functools.lru_cache(maxsize=1024)
def native_stem(isa: str, problem: ConvProblem) -> Any:
    """The compiled stem at level ``isa`` for one problem with pooling, see ``_C.CpuStem``."""
    assert _build.extension is not None
    assert problem.pool is not None
    window = pool_window(problem.pool)
    return _build.extension.CpuStem(isa, geometry(problem), window, problem.dtype)


def unavailable(problem: ConvProblem, device: torch.device) -> str | None:
    """Why no native convolution can be offered a problem, whatever its geometry."""
    if device.type != "cpu":
        return f"compiled for the CPU, not for {device.type}"
    if _build.extension is None:
        return f"the compiled extension is missing: {_build.extension_error}"
    if problem.dtype not in (torch.float32, torch.bfloat16):
        return f"only float32 and bfloat16 are offered, not {problem.dtype}"
    return None


def _is_small(problem: ConvProblem) -> bool:
    """Whether this is a convolution in fp32 of one small image, at the level that was measured.

    There the calls of ATen and oneDNN cost more than the arithmetic: on one thread the layers of a
    ResNet-18 at 32x32 took half of stock torch's time or less, none took longer.
    """
    return (
        _build.extension is not None
        and _build.extension.isa() == "avx512"
        and problem.dtype == torch.float32
        and problem.n == 1
        and problem.groups == 1
        and problem.c * problem.h * problem.w <= SMALL_IMAGE
    )


#: Elements of an image for which ATen, too, leaves oneDNN aside.
SMALL_IMAGE = 20480


class NativeConv(PackedKernel):
    """A native convolution (``csrc/cpu/conv_kernels.h``) with its whole epilogue in registers.

    Args:
        name: the kernel, as ``_C.cpu_conv_kernels`` lists it.
    """

    backend, op = "cpu", "conv_affine_act"
    packs_vectors = False
    takes_out = True

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
        if reason := unavailable(problem, device):
            return reason
        assert _build.extension is not None
        isa = _build.extension.isa()
        if self.name not in _build.extension.cpu_conv_kernels(isa):
            return f"this CPU, or level {isa}, lacks the instructions"
        try:
            return self.conv(problem).why_not or None
        except ValueError as error:  # a size beyond 32 bits
            return str(error)

    def promising(self, problem: ConvProblem, device: torch.device) -> bool:
        """For one small image; elsewhere that it beats oneDNN is for a measurement to say."""
        return _is_small(problem)

    def pack_key(self, problem: ConvProblem) -> Hashable:
        """The layout differs between levels, and otherwise depends on the weight's shape alone."""
        assert _build.extension is not None
        return _build.extension.isa(), problem.groups

    def prepare(self, problem: ConvProblem, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """The weight in the kernel's layout, as bytes."""
        packed: Tensor = self.conv(problem).pack(weight.detach())
        return packed

    def packing_expansion(self, problem: ConvProblem) -> int:
        """Bytes that the packed weight takes beyond the weight's own."""
        p = problem
        weight = p.k * (p.c // p.groups) * p.r * p.s * p.dtype.itemsize
        packed: int = self.conv(p).packed_bytes
        return max(0, packed - weight)

    def run(self, problem: ConvProblem, *args: Any) -> Tensor:
        """See `Kernel`."""
        return self._run(problem, None, *args)

    def run_into(self, problem: ConvProblem, out: Tensor, *args: Any) -> Tensor:
        """See `Kernel`; ``out`` is dense in channels_last order and may be the residual."""
        return self._run(problem, out, *args)

    def _run(self, problem: ConvProblem, out: Tensor | None, *args: Any) -> Tensor:
        x, weight, scale, shift, residual = args
        packed = self.packed(problem, weight, scale, shift)
        x = x.contiguous(memory_format=torch.channels_last)
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        result: Tensor = self.conv(problem).run(x, packed, scale, shift, residual, out)
        return result


class NativeStem(PackedKernel):
    """The stem in one pass over x, NCHW or channels_last; see ``csrc/cpu/stem.h``.

    In bf16 on AMX tiles where the CPU has them: there, as in `AmxConv`, subnormal numbers count as
    zeros.
    """

    backend, op, name = "cpu", "conv_affine_relu_maxpool", "stem"
    packs_vectors = False

    def stem(self, problem: ConvProblem) -> Any:
        """The compiled stem for ``problem``, at the instruction-set level in use."""
        assert _build.extension is not None
        return native_stem(_build.extension.isa(), problem)

    def supports(self, problem: ConvProblem, device: torch.device) -> str | None:
        """CPU, fp32 and bf16, no groups, no dilation."""
        if reason := unavailable(problem, device):
            return reason
        try:
            return self.stem(problem).why_not or None
        except ValueError as error:  # a size beyond 32 bits, or a window the extension refuses
            return str(error)

    def promising(self, problem: ConvProblem, device: torch.device) -> bool:
        """For one small image, and on AMX tiles; elsewhere a measurement is to say.

        On tiles one thread was 1.7 to 12 times as fast as oneDNN in each of ten stems measured:
        batch 1 to 16, 1 to 64 channels, windows of 3x3 and 7x7.
        """
        if _is_small(problem):
            return True
        return self.supports(problem, device) is None and self.stem(problem).name == "amx"

    def pack_key(self, problem: ConvProblem) -> Hashable:
        """The layout differs between levels, and otherwise depends on the weight's shape alone."""
        assert _build.extension is not None
        isa: str = _build.extension.isa()
        return isa

    def prepare(self, problem: ConvProblem, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """The weight in the stem's layout, as bytes."""
        packed: Tensor = self.stem(problem).pack(weight.detach())
        return packed

    def run(self, problem: ConvProblem, *args: Any) -> Tensor:
        """See `Kernel`."""
        x, weight, scale, shift, _residual = args
        packed = self.packed(problem, weight, scale, shift)
        result: Tensor = self.stem(problem).run(x, packed, scale, shift)
        return result


class WinogradConv(NativeConv):
    """A 3x3 convolution of stride 1 by Winograd's minimal filtering (``csrc/cpu/winograd.h``).

    ``winograd2`` computes tiles of 2x2 outputs, with 2.25 times fewer products than the definition;
    ``winograd4`` and ``winograd4_compact`` tiles of 4x4, with 4 times fewer, at the interpolation
    points 0, +-5/8, +-3/2 and infinity. ``winograd4_compact`` reads the weights as they are, a
    quarter of the bytes, and transforms them while it runs: for small batches and wide layers.

    Inputs, weights and sums pass through transforms, whose rounding adds to the error. Against
    float64 by norm (and the worst element, relative to the largest), with AVX-512, as
    ``benchmarks/winograd_error.py`` measures it; stock torch in the order NCHW:

    ==================  =================  =================  =================  ==========

    layer, fp32         stock              winograd2          winograd4          winograd4_compact
    ==================  =================  =================  =================  =================
    64 channels 56x56   1.6e-7 (2.7e-7)    2.3e-7 (3.2e-7)    6.3e-7 (1.5e-6)    6.4e-7 (1.7e-6)
    128 channels 28x28  1.7e-7 (2.3e-7)    2.4e-7 (2.7e-7)    6.6e-7 (1.2e-6)    6.7e-7 (1.5e-6)
    256 channels 14x14  1.6e-7 (1.9e-7)    2.3e-7 (2.4e-7)    6.2e-7 (9.9e-7)    6.4e-7 (1.1e-6)
    512 channels 7x7    1.8e-7 (2.3e-7)    2.6e-7 (2.7e-7)    7.2e-7 (9.5e-7)    7.3e-7 (8.7e-7)
    ResNet-18           1.5e-7 (2.2e-7)    1.7e-7 (2.1e-7)    1.7e-7 (2.4e-7)    2.5e-7 (3.3e-7)
    ==================  =================  =================  =================  =================

    On the same layers stock torch in channels_last order is off by 3.0e-7 to 7.9e-7.

    In bf16 only ``winograd2`` on a CPU with AVX512_BF16 rounds what it transforms to bf16: its
    layers are off by 3.7e-3 to 3.9e-3 where stock torch's are by 1.7e-3, a whole ResNet-18 by
    3.3e-3 where it is by 2.7e-3. Else the arithmetic is fp32 and the error that of rounding the
    result, as stock torch's.

    A NaN or infinity of the input reaches all outputs of its tile (up to 6x6 inputs make 4x4
    outputs), and so some that the definition leaves finite. An output whose definition is not
    finite never is, unless ReLU makes 0 of -infinity.
    """

    exact = False

    def expansion(self, problem: Any) -> int:
        """Transformed weights are (m + 2)^2 numbers in the place of 9."""
        return 0 if self.name.endswith("_compact") else self.packing_expansion(problem)


class AmxConv(NativeConv):
    """The convolution on AMX tiles: bf16, fp32 sums and epilogue.

    Rows of a tile are neighbouring output pixels of an image (``amx``, ``csrc/cpu/amx_conv.h``), or
    the same pixel of 16 images (``amx_images``, ``csrc/cpu/amx_images.h``), which leaves out the
    taps that lie in the padding. Both read the same packed weights.

    As in oneDNN, whose instructions are the same, subnormal bf16 inputs count as zeros and
    subnormal results become zeros; NaN and infinities pass.
    """

    def promising(self, problem: ConvProblem, device: torch.device) -> bool:
        """From 32 channels a group on: fewer leave tiles empty, and oneDNN was quicker there."""
        return min(problem.c, problem.k) // problem.groups >= 32


class SplitConv(NativeConv):
    """A convolution in fp32 on AMX tiles, which multiply bf16: each number is the sum of three.

    ``amx_bf16x6`` and ``amx_bf16x6_images`` arrange tiles as `AmxConv`'s two. Of the nine products
    of two numbers' parts six are computed (``csrc/cpu/amx_factors.h``), for which AMX takes down to
    half of the time that AVX-512 takes for one product in fp32. Sums, scale, shift and epilogue are
    fp32, and the error is that of a plain sum in fp32: by norm on the layers of a ResNet-50 4e-8 to
    2.7e-7, where oneDNN's is 6e-8 to 4.5e-7 and ``direct``'s 6e-8 to 1.3e-7
    (``benchmarks/layers.py``). NaN and infinities give what they give in torch; an output that an
    infinity reaches without a NaN is computed one product after the other, which takes long.

    Numbers smaller than 2^-103 (9.9e-32), of which parts may be subnormal, can lose their last
    bits, those smaller than 2^-126 count as zeros; so do subnormal sums of products.
    """

    def expansion(self, problem: Any) -> int:
        """Three numbers of bf16 take the place of one of fp32."""
        return self.packing_expansion(problem)

    def promising(self, problem: ConvProblem, device: torch.device) -> bool:
        """Only where a measurement says so."""
        return False


def _native_conv(name: str) -> NativeConv:
    if name.startswith("amx_bf16x6"):
        return SplitConv(name)
    if name.startswith("amx"):
        return AmxConv(name)
    return WinogradConv(name) if name.startswith("winograd") else NativeConv(name)


def _native_convs() -> tuple[NativeConv, ...]:
    """A kernel for each name that any level of this CPU offers, simplest first."""
    extension = _build.extension
    if extension is None:
        return ()
    levels = (extension.cpu_conv_kernels(isa) for isa in extension.isa_available())
    names = dict.fromkeys(name for level in levels for name in level)
    return tuple(_native_conv(name) for name in names)


KERNELS: tuple[Kernel, ...] = (NativeAddRelu(), *_native_convs(), NativeStem())
