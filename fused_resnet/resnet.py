"""ResNets of fused blocks: torchvision's family, the paper's CIFAR family, and plain controls.

Names, signatures, parameter order and initialisation are torchvision's, so its checkpoints load
with ``strict=True`` in both directions, and the same seed gives the same weights.

Sources: He et al., Deep Residual Learning for Image Recognition (2015); Xie et al., Aggregated
    Residual Transformations (2016); Zagoruyko and Komodakis, Wide Residual Networks (2016).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet import checkpoints
from fused_resnet.checkpoints import Weights
from fused_resnet.functional import conv_bn_act, conv_bn_act_maxpool
from fused_resnet.modules import (
    BasicBlock,
    Bottleneck,
    NormLayer,
    PadShortcut,
    Shortcut,
)


class ResNet(nn.Module):
    """A residual network, of any block class with the signature of `BasicBlock`.

    Args:
        block: class of the blocks.
        layers: blocks in each stage.
        num_classes: outputs of the classifier.
        zero_init_residual: start the last batch norm of each block at zero.
        groups: of the 3x3 convolutions of bottlenecks (ResNeXt).
        width_per_group: channels of a group for each 64 planes.
        replace_stride_with_dilation: for each stage but the first, whether its stride becomes
            dilation.
        norm_layer: makes a norm from a number of channels; ``nn.BatchNorm2d`` by default.
        shortcut: ``"A"`` zero-padded identity, ``"B"`` projection where shapes differ, ``"C"``
            projection everywhere, None for a plain network without shortcuts.
        stride_in_1x1: put a bottleneck's stride on its first 1x1 convolution ("v1") instead of on
            the 3x3 ("v1.5", torchvision).
        features_only: return the outputs of all stages, for detection and segmentation, and have no
            classifier.
        planes: width of each stage.
        small_input: a 3x3 stem of stride 1 without pooling, for 32x32 images, instead of 7x7 and
            pooling.

    Shapes: [N, 3, H, W] gives [N, num_classes], or with ``features_only`` a list of [N, C_i, H_i,
        W_i].

    Raises:
        ValueError: for an unknown shortcut, or lists of the wrong length.

    Example:
        >>> model = ResNet(Bottleneck, [3, 4, 6, 3], features_only=True).eval()
        >>> [tuple(f.shape) for f in model(torch.randn(1, 3, 64, 64))]
        [(1, 256, 16, 16), (1, 512, 8, 8), (1, 1024, 4, 4), (1, 2048, 2, 2)]
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: NormLayer | None = None,
        *,
        shortcut: Shortcut = "B",
        stride_in_1x1: bool = False,
        features_only: bool = False,
        planes: Sequence[int] = (64, 128, 256, 512),
        small_input: bool = False,
    ) -> None:
        super().__init__()
        if shortcut not in ("A", "B", "C", None):
            raise ValueError(f"shortcut must be 'A', 'B', 'C' or None, got {shortcut!r}")
        if len(layers) != len(planes):
            raise ValueError(
                f"layers and planes must have one entry a stage, got {layers}, {planes}"
            )
        dilate = replace_stride_with_dilation or [False] * (len(planes) - 1)
        if len(dilate) != len(planes) - 1:
            raise ValueError(
                "replace_stride_with_dilation must be None or have an entry for each stage but the "
                f"first ({len(planes) - 1}), got {replace_stride_with_dilation}"
            )
        self._norm_layer: NormLayer = norm_layer or nn.BatchNorm2d
        self.groups = groups
        self.base_width = width_per_group
        self.shortcut = shortcut
        self.stride_in_1x1 = stride_in_1x1
        self.features_only = features_only
        self.stages = len(planes)
        self.inplanes = planes[0]
        self.dilation = 1

        kernel, stride, padding = (3, 1, 1) if small_input else (7, 2, 3)
        self.conv1 = nn.Conv2d(3, self.inplanes, kernel, stride, padding, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool: nn.Module = (
            nn.Identity() if small_input else nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        )
        for i, (width, blocks, dilated) in enumerate(
            zip(planes, layers, [False, *dilate], strict=True)
        ):
            stage = self._make_layer(block, width, blocks, 1 if i == 0 else 2, dilated)
            self.add_module(f"layer{i + 1}", stage)
        if not features_only:
            self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
            self.fc = nn.Linear(planes[-1] * block.expansion, num_classes)
        self._initialise(zero_init_residual)

    def _initialise(self, zero_init_residual: bool) -> None:
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(m, nn.BatchNorm2d | nn.GroupNorm) and m.weight is not None:
                nn.init.ones_(m.weight)
                nn.init.zeros_(m.bias)
        if zero_init_residual:
            for m in self.modules():
                last = getattr(m, "bn3", None) or getattr(m, "bn2", None)
                if isinstance(last, nn.Module) and last.weight is not None:
                    nn.init.zeros_(last.weight)  # type: ignore[arg-type]

    def _make_layer(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        planes: int,
        blocks: int,
        stride: int,
        dilate: bool,
    ) -> nn.Sequential:
        dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        layers = []
        for i in range(blocks):
            extra: dict[str, bool] = {}
            if self.shortcut is None:
                extra["residual"] = False
            if self.stride_in_1x1:
                extra["stride_in_1x1"] = True
            layers.append(
                block(
                    self.inplanes,
                    planes,
                    stride if i == 0 else 1,
                    self._downsample(planes * block.expansion, stride if i == 0 else 1),
                    self.groups,
                    self.base_width,
                    dilation if i == 0 else self.dilation,
                    self._norm_layer,
                    **extra,
                )
            )
            self.inplanes = planes * block.expansion
        return nn.Sequential(*layers)

    def _downsample(self, channels: int, stride: int) -> nn.Module | None:
        """What the shortcut of a block with this output needs; None for the identity."""
        same = stride == 1 and self.inplanes == channels
        if self.shortcut is None or (same and self.shortcut != "C"):
            return None
        if self.shortcut == "A":
            return PadShortcut(self.inplanes, channels, stride)
        return nn.Sequential(
            nn.Conv2d(self.inplanes, channels, 1, stride, bias=False),
            self._norm_layer(channels),
        )

    def forward(self, x: Tensor) -> Any:
        """[N, 3, H, W] to logits, or to the list of all stages' outputs with ``features_only``."""
        if isinstance(self.maxpool, nn.Identity):
            x = conv_bn_act(x, self.conv1, self.bn1, self.relu)
        else:
            x = conv_bn_act_maxpool(x, self.conv1, self.bn1, self.relu, self.maxpool)
        features = []
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
            features.append(x)
        if self.features_only:
            return features
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _build(
    name: str,
    block: type[BasicBlock] | type[Bottleneck],
    layers: Sequence[int],
    weights: Weights,
    progress: bool,
    **kwargs: Any,
) -> ResNet:
    """Build a network and load ``weights``: torchvision's by name or member, or a file by path."""
    if weights is None:
        return ResNet(block, layers, **kwargs)
    if checkpoints.is_path(weights):
        state = checkpoints.load_file(weights)  # type: ignore[arg-type]
    else:
        entry = checkpoints.torchvision_entry(name, weights)  # type: ignore[arg-type]
        classes = len(entry.meta["categories"])
        if kwargs.setdefault("num_classes", classes) != classes:
            raise ValueError(
                f"{entry} has {classes} classes, but num_classes={kwargs['num_classes']} was "
                "given; load without num_classes and replace model.fc"
            )
        state = entry.get_state_dict(progress=progress, check_hash=True)
    model = ResNet(block, layers, **kwargs)
    if model.features_only:
        state = {k: v for k, v in state.items() if not k.startswith("fc.")}
    model.load_state_dict(state)
    return model


def resnet18(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-18.

    Args:
        weights: a member of torchvision's ``ResNet18_Weights`` or its name (``"DEFAULT"``), the
            path of a safetensors file or of a ``state_dict`` saved by torch, or None for random
            weights.
        progress: show the progress of a download.
        **kwargs: see `ResNet`.

    Raises:
        ValueError: unknown weights, an unreadable file, or options that contradict each other.
        RuntimeError: the checkpoint's names or shapes are not those of this network.

    Example:
        >>> model = resnet18(num_classes=10).eval()
    """
    return _build("resnet18", BasicBlock, [2, 2, 2, 2], weights, progress, **kwargs)


def resnet34(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-34; arguments as in `resnet18`."""
    return _build("resnet34", BasicBlock, [3, 4, 6, 3], weights, progress, **kwargs)


def resnet50(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-50; arguments as in `resnet18`."""
    return _build("resnet50", Bottleneck, [3, 4, 6, 3], weights, progress, **kwargs)


def resnet101(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-101; arguments as in `resnet18`."""
    return _build("resnet101", Bottleneck, [3, 4, 23, 3], weights, progress, **kwargs)


def resnet152(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-152; arguments as in `resnet18`."""
    return _build("resnet152", Bottleneck, [3, 8, 36, 3], weights, progress, **kwargs)


def wide_resnet50_2(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Wide ResNet-50-2, bottlenecks twice as wide inside; arguments as in `resnet18`."""
    kwargs.setdefault("width_per_group", 128)
    return _build("wide_resnet50_2", Bottleneck, [3, 4, 6, 3], weights, progress, **kwargs)


def wide_resnet101_2(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Wide ResNet-101-2, bottlenecks twice as wide inside; arguments as in `resnet18`."""
    kwargs.setdefault("width_per_group", 128)
    return _build("wide_resnet101_2", Bottleneck, [3, 4, 23, 3], weights, progress, **kwargs)


def resnext50_32x4d(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-50 32x4d, grouped 3x3 convolutions; arguments as in `resnet18`."""
    kwargs = {"groups": 32, "width_per_group": 4, **kwargs}
    return _build("resnext50_32x4d", Bottleneck, [3, 4, 6, 3], weights, progress, **kwargs)


def resnext101_32x8d(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-101 32x8d, grouped 3x3 convolutions; arguments as in `resnet18`."""
    kwargs = {"groups": 32, "width_per_group": 8, **kwargs}
    return _build("resnext101_32x8d", Bottleneck, [3, 4, 23, 3], weights, progress, **kwargs)


def resnext101_64x4d(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-101 64x4d, grouped 3x3 convolutions; arguments as in `resnet18`."""
    kwargs = {"groups": 64, "width_per_group": 4, **kwargs}
    return _build("resnext101_64x4d", Bottleneck, [3, 4, 23, 3], weights, progress, **kwargs)


def plain18(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-18 without its shortcuts, the paper's control; arguments as in `resnet18`."""
    kwargs.setdefault("shortcut", None)
    return _build("plain18", BasicBlock, [2, 2, 2, 2], weights, progress, **kwargs)


def plain34(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-34 without its shortcuts, the paper's control; arguments as in `resnet18`."""
    kwargs.setdefault("shortcut", None)
    return _build("plain34", BasicBlock, [3, 4, 6, 3], weights, progress, **kwargs)


def cifar_resnet(
    depth: int,
    shortcut: Shortcut = "A",
    *,
    weights: Weights = None,
    progress: bool = True,
    **kwargs: Any,
) -> ResNet:
    """The paper's network for 32x32 images: three stages of 16, 32 and 64 channels.

    Args:
        depth: 6 n + 2; the paper has 20, 32, 44, 56, 110 and 1202.
        shortcut: the paper's is ``"A"``; None gives the plain control.
        weights: the path of a checkpoint, or None.
        progress: show the progress of a download.
        **kwargs: see `ResNet`; ``num_classes`` is 10 by default.

    Raises:
        ValueError: for a depth that is not 6 n + 2.

    Example:
        >>> cifar_resnet(20).eval()(torch.randn(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest != 0 or blocks < 1:
        raise ValueError(f"depth must be 6 n + 2 (20, 32, 44, 56, 110, 1202), got {depth}")
    kwargs = {
        "num_classes": 10,
        "planes": (16, 32, 64),
        "small_input": True,
        "shortcut": shortcut,
        **kwargs,
    }
    return _build(f"cifar_resnet{depth}", BasicBlock, [blocks] * 3, weights, progress, **kwargs)


#: Builders by name, as the command line takes them.
BUILDERS = {
    f.__name__: f
    for f in (
        resnet18,
        resnet34,
        resnet50,
        resnet101,
        resnet152,
        wide_resnet50_2,
        wide_resnet101_2,
        resnext50_32x4d,
        resnext101_32x8d,
        resnext101_64x4d,
        plain18,
        plain34,
    )
}

__all__ = ["BUILDERS", "ResNet", "cifar_resnet", *BUILDERS]
