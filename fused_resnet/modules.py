"""Drop-in modules of conv + BatchNorm + ReLU: the parts that ResNets are made of.

Each keeps stock children under torchvision's names (``conv1``, ``bn1``, ``relu``,
``downsample.0``), so that state_dicts, optimizers, hooks and initialisation are those of the stock
modules. ``forward`` is a call of ``fused_resnet.functional``: in eval mode one op for each
convolution with all that follows it, in train mode the stock modules themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet.functional import Size2, conv_bn_act, conv_bn_act_maxpool

#: Makes the norm behind a convolution from its number of channels; ``nn.BatchNorm2d`` by default.
NormLayer = Callable[[int], nn.Module]

#: How a block's input reaches its end where shapes differ; see `fused_resnet.resnet.ResNet`.
Shortcut = Literal["A", "B", "C"] | None


def _conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
) -> nn.Conv2d:
    """A convolution without bias whose padding keeps the spatial size at stride 1."""
    padding = dilation * (kernel_size - 1) // 2
    return nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False
    )


class ConvBNAct(nn.Module):
    """Convolution, batch norm and ReLU, with an optional residual: ``act(bn(conv(x)) + residual)``.

    Args:
        in_channels: C.
        out_channels: K.
        kernel_size: int or (height, width).
        stride: int or (height, width).
        padding: int, (height, width), ``"same"`` or ``"valid"``; None keeps the size at stride 1.
        dilation: int or (height, width).
        groups: blocked connections from input to output channels.
        bias: whether the convolution has a bias; None: only if there is no norm.
        padding_mode: as in ``nn.Conv2d``.
        norm_layer: makes the norm from the number of channels; None for no norm.
        act: activation module, ReLU by default; None for none. Anything but ``nn.ReLU`` runs as it
            is, behind the fused rest.

    Shapes: x [N, C, H, W] and residual [N, K, OH, OW] give [N, K, OH, OW].

    Example:
        >>> block = ConvBNAct(3, 16, 3, stride=2).eval()
        >>> block(torch.randn(1, 3, 32, 32)).shape
        torch.Size([1, 16, 16, 16])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size2 = 3,
        stride: Size2 = 1,
        padding: Size2 | str | None = None,
        dilation: Size2 = 1,
        groups: int = 1,
        bias: bool | None = None,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        norm_layer: NormLayer | None = nn.BatchNorm2d,
        act: nn.Module | Literal["relu"] | None = "relu",
    ) -> None:
        super().__init__()
        if padding is None:
            size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
            spacing = (dilation, dilation) if isinstance(dilation, int) else dilation
            padding = (spacing[0] * (size[0] - 1) // 2, spacing[1] * (size[1] - 1) // 2)
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            norm_layer is None if bias is None else bias,
            padding_mode,
        )
        self.bn = None if norm_layer is None else norm_layer(out_channels)
        self.act = nn.ReLU(inplace=True) if act == "relu" else act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``act(bn(conv(x)) + residual)``."""
        return conv_bn_act(x, self.conv, self.bn, self.act, residual)


class Stem(nn.Module):
    """The entrance of a ResNet: 7x7 convolution, norm, ReLU, 3x3 max-pooling, both of stride 2.

    Args:
        in_channels: C, 3 for RGB images.
        out_channels: K.
        norm_layer: makes the norm from the number of channels.

    Shapes: [N, C, H, W] gives [N, K, H / 4, W / 4].

    Example:
        >>> Stem().eval()(torch.randn(1, 3, 224, 224)).shape
        torch.Size([1, 64, 56, 56])
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 64,
        norm_layer: NormLayer = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, out_channels, 7, stride=2)
        self.bn1 = norm_layer(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """``maxpool(relu(bn1(conv1(x))))``."""
        return conv_bn_act_maxpool(x, self.conv1, self.bn1, self.relu, self.maxpool)


class PadShortcut(nn.Module):
    """Shortcut A of the paper: every stride-th pixel, and zeros for the channels that are missing.

    Source: He et al., Deep Residual Learning for Image Recognition (2015), section 3.3, option A.

    Args:
        in_channels: C.
        out_channels: K, at least C.
        stride: 1 or more.

    Raises:
        ValueError: if channels would have to be dropped.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        if out_channels < in_channels:
            raise ValueError(
                f"shortcut A pads channels, it cannot drop any: {in_channels} to {out_channels}"
            )
        self.stride = stride
        self.extra = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, K, H / stride, W / stride]."""
        x = x[:, :, :: self.stride, :: self.stride]
        # New channels stand half before and half behind, as in the paper's CIFAR code.
        before = self.extra // 2
        return F.pad(x, (0, 0, 0, 0, before, self.extra - before))

    def extra_repr(self) -> str:
        """Stride and number of zero channels."""
        return f"stride={self.stride}, extra={self.extra}"


def _project(downsample: nn.Module, x: Tensor) -> Tensor:
    """The shortcut's branch; the usual Sequential(conv, norm) is one fused op."""
    if type(downsample) is nn.Sequential and len(downsample) == 2:
        conv, norm = downsample
        if isinstance(conv, nn.Conv2d) and not downsample._forward_hooks:
            return conv_bn_act(x, conv, norm)
    shortcut: Tensor = downsample(x)
    return shortcut


class _Residual(nn.Module):
    """What both kinds of block share: the shortcut and what the last convolution makes of it."""

    expansion: int
    relu: nn.Module
    downsample: nn.Module | None
    residual: bool

    def _shortcut(self, x: Tensor) -> Tensor | None:
        if not self.residual:
            return None
        return x if self.downsample is None else _project(self.downsample, x)


class BasicBlock(_Residual):
    """Two 3x3 convolutions and a shortcut, the block of ResNet-18 and -34.

    Parameters, their names and their order are torchvision's. ``stride_in_1x1`` is accepted so that
    every block class has one signature; there is no 1x1 convolution here for it to move.

    Args:
        inplanes: channels that come in.
        planes: channels of both convolutions.
        stride: of the first convolution.
        downsample: brings the block's input to the shape of its output; None where they agree.
        groups: must be 1.
        base_width: must be 64.
        dilation: must be 1.
        norm_layer: makes a norm from a number of channels.
        residual: False for a plain network's block, which has no shortcut.
        stride_in_1x1: without effect.

    Raises:
        ValueError: groups or base_width of a wider block.
        NotImplementedError: dilation above 1.

    Example:
        >>> BasicBlock(64, 64).eval()(torch.randn(1, 64, 56, 56)).shape
        torch.Size([1, 64, 56, 56])
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
        *,
        residual: bool = True,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        if groups != 1 or base_width != 64:
            raise ValueError(
                f"BasicBlock supports groups=1 and base_width=64, got {groups=}, {base_width=}"
            )
        if dilation > 1:
            raise NotImplementedError(f"BasicBlock does not support dilation, got {dilation}")
        self.conv1 = _conv(inplanes, planes, 3, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv(planes, planes, 3)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """[N, inplanes, H, W] to [N, planes, H / stride, W / stride]."""
        out = conv_bn_act(x, self.conv1, self.bn1, self.relu)
        return conv_bn_act(out, self.conv2, self.bn2, self.relu, self._shortcut(x))


class Bottleneck(_Residual):
    """1x1, 3x3, 1x1 convolutions and a shortcut, the block of ResNet-50 and deeper.

    Parameters, their names and their order are torchvision's. torchvision puts the stride on the
    3x3 convolution ("v1.5"); the paper, Caffe and Detectron put it on the first 1x1 ("v1",
    ``stride_in_1x1=True``). Weights of the one load into the other without complaint and give
    other results.

    Args:
        inplanes: channels that come in.
        planes: channels of the narrow part at base_width 64 and one group.
        stride: of the block.
        downsample: brings the block's input to the shape of its output; None where they agree.
        groups: of the 3x3 convolution (ResNeXt).
        base_width: channels of a group for each 64 planes (wide ResNets, ResNeXt).
        dilation: of the 3x3 convolution.
        norm_layer: makes a norm from a number of channels.
        residual: False for a plain network's block, which has no shortcut.
        stride_in_1x1: whether the stride is on the first 1x1 convolution.

    Example:
        >>> Bottleneck(256, 64).eval()(torch.randn(1, 256, 56, 56)).shape
        torch.Size([1, 256, 56, 56])
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
        *,
        residual: bool = True,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = _conv(inplanes, width, 1, stride_1x1)
        self.bn1 = norm_layer(width)
        self.conv2 = _conv(width, width, 3, stride_3x3, dilation, groups)
        self.bn2 = norm_layer(width)
        self.conv3 = _conv(width, planes * self.expansion, 1)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """[N, inplanes, H, W] to [N, 4 * planes, H / stride, W / stride]."""
        out = conv_bn_act(x, self.conv1, self.bn1, self.relu)
        out = conv_bn_act(out, self.conv2, self.bn2, self.relu)
        return conv_bn_act(out, self.conv3, self.bn3, self.relu, self._shortcut(x))


__all__ = ["BasicBlock", "Bottleneck", "ConvBNAct", "NormLayer", "PadShortcut", "Shortcut", "Stem"]
