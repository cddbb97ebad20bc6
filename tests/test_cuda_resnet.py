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
        self.chained = chained  # Whether stages 1 and 2 are computed in chains of bottlenecks.
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

    def chain(self, blocks: list[nn.Module], after: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """Bottlenecks cut before each 3x3: the last one's output, and ``after``'s first activation.

        Where the next block has stride 2, only the pixels that its projection reads are stored.
        """
        mid = self.conv(x, blocks[0].conv1, blocks[0].bn1, "relu", None)
        for block, following in zip(blocks, [*blocks[1:], after], strict=True):
            layers = [(block.conv2, block.bn2), (block.conv3, block.bn3), block.downsample]
            args: list[Tensor | None] = []
            for layer in (*layers, (following.conv1, following.bn1)):
                args += (None,) * 3 if layer is None else (layer[0].weight, *affine_of(*layer))
            n, m, h, w = mid.shape
            proj = 0 if block.downsample is None else x.shape[1]
            store = "even" if following.conv2.stride == (2, 2) else "all"
            shape = n, m, h, w, 4 * m, following.conv1.out_channels, proj
            problem = ChainProblem(*shape, block.conv2.stride[0], 1, store, mid.dtype)
            way = "resident" if m == 64 else "streamed"
            x, mid = emulated.bottleneck_chain(
                self.run, problem, way, MULTIPROCESSORS, mid, x, *args
            )
            self.chains += 1
        return x, mid

    def chained_stages(self, model: nn.Module, x: Tensor) -> Tensor:
        """Stages 1 and 2 as one chain, and the rest of the block that it leads to."""
        after = model.layer3[0]
        x, mid = self.chain([*model.layer1, *model.layer2], after, x)
        y = self.conv(mid, after.conv2, after.bn2, "relu", None)
        # Only every second pixel of x has been stored.
        projection, norm = copy.copy(after.downsample[0]), after.downsample[1]
        projection.stride = (1, 1)
        identity = self.conv(x, projection, norm, "none", None)
        return self.conv(y, after.conv3, after.bn3, "add_relu", identity)

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        pool = MaxPool((3, 3), (2, 2), (1, 1))
        problem = self.problem(x, model.conv1, "relu", pool)
        affine = affine_of(model.conv1, model.bn1)
        x = emulated.stem(self.run, problem, self.arithmetic, x, model.conv1.weight, *affine)
        blocks = [*model.layer1, *model.layer2, *model.layer3, *model.layer4]
        if self.chained:
            x = self.chained_stages(model, x)
            blocks = [*model.layer3[1:], *model.layer4]
        for block in blocks:
            x = self.block(block, x)
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
    """All three blocks of the first stage and all four of the second."""
    assert compare("resnet50", dtype, chained=True).chains == 7
