"""Small networks for tests of plans, and the rule by which a whole network is judged."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import fused_resnet
from fused_resnet.numerics import error
from fused_resnet.zoo import calibrate


class Small(nn.Module):
    """A ResNet of two blocks: a real stem, a projection, a mean and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = fused_resnet.Stem(3, 16)
        down = nn.Sequential(nn.Conv2d(16, 32, 1, stride=2, bias=False), nn.BatchNorm2d(32))
        self.layer1 = fused_resnet.BasicBlock(16, 16)
        self.layer2 = fused_resnet.BasicBlock(16, 32, 2, down)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.avgpool(self.layer2(self.layer1(self.stem(x)))), 1))


def small_resnet() -> nn.Module:
    """In eval mode, statistics taken from noise."""
    torch.manual_seed(1)
    model = Small().eval()
    calibrate(model, torch.randn(4, 3, 48, 48))
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
