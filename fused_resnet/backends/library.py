"""Backend ``library``: the fused convolutions that ATen already has, with weights prepacked.

CPU: oneDNN convolutions with post-operations (`mkldnn::_convolution_pointwise`). CUDA: cuDNN's
`cudnn_convolution_relu` and `cudnn_convolution_add_relu`. In fp32 the scale is folded into fp32
weights (computed in float64, so that folding costs at most half a rounding unit of a weight).
Scale and shift are never rounded into half-precision weights: for bf16 the convolution keeps its
own weights and one further pass applies scale, shift, residual and ReLU in fp32.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_resnet.backends.cpu import add_relu_, affine_act_
from fused_resnet.backends.kernel import Kernel, PackedKernel
from fused_resnet.backends.torch_ import finish
from fused_resnet.problem import Convolution, ConvProblem, channels_last_format


class Packed(NamedTuple):
    """Weights as a kernel wants them, and the bias that stands for the shift (None: not folded)."""

    weight: Tensor
    bias: Tensor | None


def fold_scale(weight: Tensor, scale: Tensor) -> Tensor:
    """fp32 ``weight`` [K, ...] times ``scale`` [K], multiplied in float64 and rounded once."""
    factor = scale.double().view(-1, *(1,) * (weight.dim() - 1))
    return (weight.double() * factor).to(weight.dtype)


class OneDnnConv(PackedKernel):
    """oneDNN with prepacked weights; residual and ReLU ride along as post-operations in fp32."""

    backend, op, name = "library", "conv_affine_act", "onednn"

    def supports(self, problem: Convolution, device: torch.device) -> str | None:
        """CPU, fp32 and bf16."""
        if device.type != "cpu":
            return f"oneDNN runs on CPU tensors, not on {device.type}"
        if not torch._C._has_mkldnn:
            return "this torch was built without oneDNN"
        if not torch.backends.mkldnn.enabled:
            return "torch.backends.mkldnn.flags has oneDNN switched off"
        if problem.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "this CPU has no bf16 instructions that oneDNN could use (AVX-512)"
        if problem.dtype not in (torch.float32, torch.bfloat16):
            return f"only float32 and bfloat16 are offered, not {problem.dtype}"
        return None

    def pack_key(self, problem: Convolution) -> tuple[object, ...]:
        """OneDNN picks the layout of the weights for one geometry."""
        size = (problem.n, *problem.in_shape[2:])
        return (*size, problem.stride, problem.padding, problem.dilation)

    def prepare(self, problem: Convolution, weight: Tensor, scale: Tensor, shift: Tensor) -> Packed:
        """Weights in oneDNN's blocked layout, with the scale folded in if they are fp32."""
        bias: Tensor | None = shift.detach()
        weight = weight.detach()
        if problem.dtype == torch.float32:
            weight = fold_scale(weight, scale)
        elif not bool((scale == 1).all()):
            bias = None
        packed = torch.ops.mkldnn._reorder_convolution_weight(
            weight.contiguous(memory_format=channels_last_format(weight)),
            problem.padding,
            problem.stride,
            problem.dilation,
            problem.groups,
            problem.in_shape,
        )
        return Packed(packed, bias)

    def run(self, problem: Convolution, *args: Any) -> Tensor:
        """See `Kernel`."""
        x, weight, scale, shift, residual = args
        p = problem
        packed = self.packed(p, weight, scale, shift)
        geometry = (p.padding, p.stride, p.dilation, p.groups)
        x = x.contiguous(memory_format=channels_last_format(x))
        conv = torch.ops.mkldnn._convolution_pointwise
        if packed.bias is None:
            z: Tensor = conv.default(x, packed.weight, None, *geometry, "none", [], "")
            return affine_act_(z, scale, shift, residual, p.epilogue)
        if p.epilogue == "add" and p.dtype == torch.float32:
            fused: Tensor = conv.binary(
                x, residual, packed.weight, packed.bias, *geometry, "add", 1.0, None, [], ""
            )
            return fused
        # The ReLU stays outside: oneDNN's post-operation makes 0 of a NaN, which torch keeps.
        y: Tensor = conv.default(x, packed.weight, packed.bias, *geometry, "none", [], "")
        if p.epilogue == "add_relu":
            return add_relu_(y, residual)
        return finish(y, residual, p.epilogue)


class OneDnnConv3d(OneDnnConv):
    """As `OneDnnConv`, for videos."""

    op = "conv3d_affine_act"


class OneDnnStem(OneDnnConv):
    """The stem: convolution, scale, shift and ReLU in one oneDNN call, then max_pool2d."""

    op = "conv_affine_relu_maxpool"

    def run(self, problem: Convolution, *args: Any) -> Tensor:
        """See `Kernel`."""
        assert problem.pool is not None
        y = super().run(problem, *args)
        return torch.max_pool2d(y, problem.pool.kernel, problem.pool.stride, problem.pool.padding)


class FoldedAtenConv(PackedKernel):
    """conv2d with the scale folded into fp32 weights and the shift as its bias, then add and ReLU.

    For small inputs ATen's own convolution starts several times quicker than oneDNN does.
    """

    backend, op, name = "library", "conv_affine_act", "aten_folded"

    def supports(self, problem: Convolution, device: torch.device) -> str | None:
        """CPU, fp32."""
        if device.type != "cpu":
            return f"meant for small inputs on the CPU, not for {device.type}"
        if problem.dtype != torch.float32:
            return f"folding the scale into {problem.dtype} weights would round it"
        return None

    def promising(self, problem: ConvProblem, device: torch.device) -> bool:
        """Where ATen leaves oneDNN aside by itself: one small image; 1x1 on one thread.

        Few weights are done sooner so. Long sums come out more exact by the matrix product that
        ATen calls there: oneDNN's are up to 3.3 times as far from float64 (measured: 512 channels,
        3x3, few pixels; with AVX2 also 2048 channels, 1x1, any number of pixels), more than the
        rule of ``fused_resnet.numerics`` allows.
        """
        p = problem
        if p.groups != 1 or max(p.r, p.s) > 3:
            return False
        terms = p.c * p.r * p.s
        if p.n == 1 and p.c * p.h * p.w <= 20480:
            return p.k * terms <= 65536 or terms >= 512
        if not p.is_gemm or torch.get_num_threads() != 1:
            return False
        return p.n * p.h * p.w <= 64 or (p.n < 16 and terms >= 512)

    def prepare(self, problem: Convolution, weight: Tensor, scale: Tensor, shift: Tensor) -> Packed:
        """Folded weights, dense in channels_last order."""
        folded = fold_scale(weight.detach(), scale)
        return Packed(folded.contiguous(memory_format=torch.channels_last), shift.detach())

    def run(self, problem: Convolution, *args: Any) -> Tensor:
        """See `Kernel`."""
        x, weight, scale, shift, residual = args
        packed = self.packed(problem, weight, scale, shift)
        y = torch.conv2d(
            x.contiguous(memory_format=torch.channels_last),
            packed.weight,
            packed.bias,
            problem.stride,
            problem.padding,
            problem.dilation,
            problem.groups,
        )
        return finish(y, residual, problem.epilogue)


class FoldedAtenConv3d(FoldedAtenConv):
    """As `FoldedAtenConv`, for videos; ATen multiplies matrices where it leaves oneDNN aside."""

    op = "conv3d_affine_act"

    def promising(self, problem: Convolution, device: torch.device) -> bool:
        """Where ATen leaves oneDNN aside by itself, and sums are long: for one small video.

        oneDNN would be quicker there, but up to 5 times as far from float64 (measured, 512
        channels, 3x3x3), more than the rule of ``fused_resnet.numerics`` allows.
        """
        p = problem
        # What ATen asks of the tensors are their shapes: no memory is taken for them.
        x, weight = (
            torch.empty((), dtype=p.dtype, device="cpu").expand(shape)
            for shape in (p.in_shape, p.weight_shape)
        )
        window = (p.stride, p.padding, p.dilation, False, (0, 0, 0), p.groups)
        chosen = torch._C._select_conv_backend(x, weight, None, *window, None)
        onednn = torch._C._ConvBackend.Mkldnn  # type: ignore[attr-defined]
        return bool(chosen != onednn and math.prod(p.weight_shape[1:]) >= 512)

    def prepare(self, problem: Convolution, weight: Tensor, scale: Tensor, shift: Tensor) -> Packed:
        """Folded weights, contiguous."""
        return Packed(fold_scale(weight.detach(), scale).contiguous(), shift.detach())

    def run(self, problem: Convolution, *args: Any) -> Tensor:
        """See `Kernel`."""
        x, weight, scale, shift, residual = args
        packed = self.packed(problem, weight, scale, shift)
        window = (problem.stride, problem.padding, problem.dilation, problem.groups)
        # The shift comes behind the sums. As the bias it would begin them, and where few pixels
        # make one long chain of them each addition would round off a larger number.
        assert packed.bias is not None
        y = torch.conv3d(x, packed.weight, None, *window)
        return finish(y.add_(packed.bias.view(-1, 1, 1, 1)), residual, problem.epilogue)


class CudnnConv(PackedKernel):
    """cuDNN's convolution + bias (+ residual) + ReLU in one call; TF32 as torch's flag says."""

    backend, op, name = "library", "conv_affine_act", "cudnn_relu"

    def supports(self, problem: Convolution, device: torch.device) -> str | None:
        """CUDA (not ROCm), fp32, epilogues that end in the ReLU that the call contains."""
        if device.type != "cuda" or torch.version.hip is not None:
            return f"cuDNN runs on NVIDIA GPUs, not on {device.type}"
        if not torch._C._has_cudnn or not torch.backends.cudnn.enabled:
            return "cuDNN is not available or switched off"
        if problem.dtype != torch.float32:
            return f"folding the scale into {problem.dtype} weights would round it"
        if problem.epilogue not in ("relu", "add_relu"):
            return f"cuDNN's call ends in a ReLU, epilogue {problem.epilogue!r} does not fit it"
        return None

    def prepare(self, problem: Convolution, weight: Tensor, scale: Tensor, shift: Tensor) -> Packed:
        """Folded weights, dense in channels_last order."""
        folded = fold_scale(weight.detach(), scale)
        layout = channels_last_format(folded)
        return Packed(folded.contiguous(memory_format=layout), shift.detach())

    def run(self, problem: Convolution, *args: Any) -> Tensor:
        """See `Kernel`."""
        x, weight, scale, shift, residual = args
        packed = self.packed(problem, weight, scale, shift)
        x = x.contiguous(memory_format=channels_last_format(x))
        geometry = (problem.stride, problem.padding, problem.dilation, problem.groups)
        if residual is None:
            return torch.cudnn_convolution_relu(x, packed.weight, packed.bias, *geometry)
        return torch.cudnn_convolution_add_relu(
            x, packed.weight, residual, 1.0, packed.bias, *geometry
        )


class CudnnConv3d(CudnnConv):
    """As `CudnnConv`, for videos: ATen gives cuDNN a bias of five dimensions there."""

    op = "conv3d_affine_act"


KERNELS: tuple[Kernel, ...] = (
    FoldedAtenConv(),
    FoldedAtenConv3d(),
    OneDnnConv(),
    OneDnnConv3d(),
    OneDnnStem(),
    CudnnConv(),
    CudnnConv3d(),
)
