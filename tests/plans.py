"""Small networks for tests of plans, and the rule by which a whole network is judged."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import fused_resnet
from fused_resnet.numerics import error
from fused_resnet.zoo import calibrate


def small_resnet(**kwargs: Any) -> nn.Module:
    """A ResNet of four blocks with a real stem, in eval mode, statistics taken from noise."""
    torch.manual_seed(1)
    model = fused_resnet.ResNet(
        fused_resnet.BasicBlock, [1, 1, 1, 1], num_classes=10, **kwargs
    ).eval()
    calibrate(model, torch.randn(4, 3, 64, 64))
    return model


class Blocks(nn.Module):
    """Convolutions of every kind that plans meet; several outputs, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.bn2 = nn.BatchNorm2d(16)
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.head = nn.Conv2d(16, 5, 1)
        for bn in (self.bn1, self.bn2):
            nn.init.uniform_(bn.weight, 0.5, 1.5)
            nn.init.normal_(bn.bias)
            nn.init.normal_(bn.running_mean)
            nn.init.uniform_(bn.running_var, 0.5, 2.0)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a = torch.relu(self.bn1(self.conv1(x)))
        b = torch.relu(self.bn2(self.conv2(a)) + a)
        up = self.up(nn.functional.max_pool2d(b, 2))
        return {"map": self.head(torch.relu(up + b)), "features": b}


def blocks() -> nn.Module:
    torch.manual_seed(2)
    return Blocks().eval()


def assert_right(actual: Any, model: nn.Module, *args: Tensor) -> None:
    """Every tensor that ``model`` returns: within twice stock torch's error, by float64."""
    stock = copy.deepcopy(fused_resnet.unfuse(model))
    with torch.no_grad(), fused_resnet.backend("torch"):
        found = [_leaves(m(*args)) for m in (stock, stock.to(memory_format=torch.channels_last))]
        dtype = found[0][0].dtype
        exact = _leaves(stock.double()(*(a.double() for a in args)))
        stock.to(dtype)
    ours = _leaves(actual)
    assert len(ours) == len(exact)
    for i, (a, e) in enumerate(zip(ours, exact, strict=True)):
        assert a.dtype == dtype
        allowed = fused_resnet.numerics.largest(*(error(f[i], e) for f in found))
        assert error(a, e).within(allowed, dtype), f"{error(a, e)} where stock has {allowed}"


def _leaves(value: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor)]
