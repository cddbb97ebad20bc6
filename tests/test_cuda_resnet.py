"""Whole networks through the emulated CUDA kernels: logits against float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fused_resnet.backends.cuda import bundled, gathers
from fused_resnet.backends.cuda_schedule import choose
from fused_resnet.fold import affine_of
from fused_resnet.numerics import error
from fused_resnet.problem import ChainProblem, ConvProblem, MaxPool
from tests import cuda_emulated as emulated

torchvision = pytest.importorskip("torchvision")

#: Multiprocessors of the GPU that schedules are chosen for: an A100.
MULTIPROCESSORS = 108


def calibrated(name: str, x: Tensor) -> nn.Module:
    """A network of random weights whose batch norms know the statistics of ``x``."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    with torch.no_grad():
        model.train()(x)
    return model.eval()


class EmulatedNetwork:
    """torchvision's forward with every layer on an emulated kernel."""

    def __init__(self, arithmetic: str, chained: bool = False) -> None:
        self.arithmetic = arithmetic
        self.chained = (
            chained  # bottlenecks of 64 and 128 channels from their 3x3 on, as one kernel
        )
        self.chains = 0
        self.run = emulated.Run()

    def conv(
        self, x: Tensor, conv: nn.Conv2d, bn: nn.Module, epilogue: str, residual: Tensor | None
    ) -> Tensor:
        problem = self.problem(x, conv, epilogue)
        schedule = choose(bundled(problem), MULTIPROCESSORS, gathers(problem))
        scale, shift = affine_of(conv, bn)
        return emulated.conv(
            self.run, problem, self.arithmetic, schedule, x, conv.weight, scale, shift, residual
        )

    @staticmethod
    def problem(
        x: Tensor, conv: nn.Conv2d, epilogue: str, pool: MaxPool | None = None
    ) -> ConvProblem:
        n, c, h, w = x.shape
        k, _, r, s = conv.weight.shape
        geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
        return ConvProblem(n, c, h, w, k, r, s, *geometry, epilogue, x.dtype, True, pool)

    def block(self, block: nn.Module, x: Tensor) -> Tensor:
        identity = x
        if block.downsample is not None:
            identity = self.conv(x, *block.downsample, "none", None)
        y = self.conv(x, block.conv1, block.bn1, "relu", None)
        if not hasattr(block, "conv3"):
            return self.conv(y, block.conv2, block.bn2, "add_relu", identity)
        y = self.conv(y, block.conv2, block.bn2, "relu", None)
        return self.conv(y, block.conv3, block.bn3, "add_relu", identity)

    def stage(self, blocks: nn.Sequential, x: Tensor) -> Tensor:
        """All blocks of a stage: after the first one chained, if they can be."""
        first, *rest = blocks
        x = self.block(first, x)
        if not self.chained or first.conv2.in_channels > 128:
            for block in rest:
                x = self.block(block, x)
            return x
        mid = self.conv(x, rest[0].conv1, rest[0].bn1, "relu", None)
        for block, following in zip(rest, [*rest[1:], None], strict=True):
            convs = [(block.conv2, block.bn2), (block.conv3, block.bn3)]
            args = [t for conv, bn in convs for t in (conv.weight, *affine_of(conv, bn))]
            args += [None] * 6
            if following is not None:
                conv, bn = following.conv1, following.bn1
                args[9:] = [conv.weight, *affine_of(conv, bn)]
            n, m, h, w = mid.shape
            width = 0 if following is None else m
            problem = ChainProblem(n, m, h, w, 4 * m, width, 0, 1, 1, "all", mid.dtype)
            x, mid = emulated.bottleneck_chain(
                self.run, problem, m == 64, MULTIPROCESSORS, mid, x, *args
            )
            self.chains += 1
        return x

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        pool = MaxPool((3, 3), (2, 2), (1, 1))
        problem = self.problem(x, model.conv1, "relu", pool)
        affine = affine_of(model.conv1, model.bn1)
        x = emulated.stem(self.run, problem, self.arithmetic, x, model.conv1.weight, *affine)
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            x = self.stage(stage, x)
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2).contiguous()
        pooled = emulated.global_average_pool(self.run, pixels)
        classifier = model.fc
        return self.linear(pooled[..., None, None], classifier).flatten(1)

    def linear(self, x: Tensor, classifier: nn.Linear) -> Tensor:
        """The classifier: a 1x1 convolution of one pixel whose shift is the bias."""
        k, c = classifier.weight.shape
        geometry = ((1, 1), (0, 0), (1, 1), 1)
        problem = ConvProblem(x.shape[0], c, 1, 1, k, 1, 1, *geometry, "none", x.dtype)
        schedule = choose(problem, MULTIPROCESSORS)
        weight, bias = classifier.weight[..., None, None], classifier.bias.float()
        return emulated.conv(
            self.run, problem, self.arithmetic, schedule, x, weight, torch.ones(k), bias, None
        )


def compare(
    name: str, dtype: torch.dtype, size: int = 224, chained: bool = False
) -> EmulatedNetwork:
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)
    # Statistics of two images: where a layer ends in one pixel, one image has no variance.
    model = calibrated(name, torch.stack([x[0].float(), x[0].float().flip(-1)])).to(dtype)
    with torch.no_grad():
        reference = copy.deepcopy(model).double()(x.double())
        stock = model(x)
        network = EmulatedNetwork(str(dtype).removeprefix("torch."), chained)
        logits = network(model, x)
    assert network.run.findings == []
    found, allowed = error(logits, reference), error(stock, reference)
    assert found.within(allowed, dtype), f"{name} {dtype}: {found}, stock {allowed}"
    return network


def test_resnet18() -> None:
    compare("resnet18", torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_resnet18_in_other_dtypes(dtype: torch.dtype) -> None:
    compare("resnet18", dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d"])
def test_deeper_networks(name: str) -> None:
    compare(name, torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_resnet50_with_chained_bottlenecks(dtype: torch.dtype) -> None:
    """Two blocks of the first stage and three of the second."""
    assert compare("resnet50", dtype, chained=True).chains == 5
