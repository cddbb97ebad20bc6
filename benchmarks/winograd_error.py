"""How far the native Winograd convolutions are from float64: 3x3 layers of ResNet, whole networks.

    python benchmarks/winograd_error.py [resnet18 resnet34 ...]

Each line gives, for stock torch and for every kernel, the error by norm and, in brackets, that of
the worst element relative to the largest. In the networks (torchvision's, random weights, images of
224x224) Winograd computes all 3x3 convolutions of stride 1, and stock torch the rest.
"""

from __future__ import annotations

import copy
import functools
import sys

import torch
import torchvision
from torch import Tensor, nn

from fused_resnet import _build
from fused_resnet.backends.cpu import native_conv
from fused_resnet.numerics import Error, error
from fused_resnet.problem import ConvProblem

NAMES = ("winograd2", "winograd4", "winograd4_compact")


def winograd(name: str, conv: nn.Conv2d, x: Tensor) -> Tensor:
    """``conv(x)`` by the native kernel ``name``."""
    assert _build.extension is not None
    n, c, h, w = x.shape
    p = ConvProblem(
        n, c, h, w, conv.out_channels, 3, 3, (1, 1), (1, 1), (1, 1), 1, "none", x.dtype
    )  # fmt: skip
    native = native_conv(name, _build.extension.isa(), p)
    result: Tensor = native.run(
        x.contiguous(memory_format=torch.channels_last), native.pack(conv.weight),
        torch.ones(p.k), torch.zeros(p.k), None,
    )  # fmt: skip
    return result


def report(label: str, found: dict[str, Error]) -> None:
    """One line of the table."""
    errors = (f"{name} {e.l2:.1e} ({e.worst:.1e})" for name, e in found.items())
    print(label, " | ".join(errors), flush=True)


def layer(c: int, size: int, dtype: torch.dtype) -> None:
    """A layer of c channels with the inputs and weights of a network in training: ReLU, He's."""
    conv = nn.Conv2d(c, c, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight)
    conv, x = conv.to(dtype), torch.randn(1, c, size, size).relu().to(dtype)
    exact = copy.deepcopy(conv).double()(x.double())
    found = {"stock": error(conv(x), exact)}
    for name in NAMES:
        found[name] = error(winograd(name, conv, x), exact)
    report(f"{dtype} {c} channels {size}x{size}:", found)


def network(arch: str, dtype: torch.dtype) -> None:
    """A whole network with statistics that differ from channel to channel."""
    model = getattr(torchvision.models, arch)(weights=None).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.uniform_(0.5, 1.0)
            module.bias.normal_(0.0, 0.1)
    model, x = model.to(dtype), torch.rand(1, 3, 224, 224).to(dtype)
    exact = copy.deepcopy(model).double()(x.double())
    found = {"stock": error(model(x), exact)}
    for name in NAMES:
        changed = copy.deepcopy(model)
        for conv in changed.modules():
            if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) and conv.stride == (1, 1):
                conv.forward = functools.partial(winograd, name, conv)
        found[name] = error(changed(x), exact)
    report(f"{dtype} {arch}:", found)


def main() -> None:
    """See the module."""
    torch.manual_seed(0)
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            for c, size in ((64, 56), (128, 28), (256, 14), (512, 7)):
                layer(c, size, dtype)
            for arch in sys.argv[1:] or ("resnet18", "resnet34", "resnet50"):
                network(arch, dtype)


if __name__ == "__main__":
    main()
