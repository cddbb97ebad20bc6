"""One block and one network in every contender, timed by pytest-benchmark.

    pytest benchmarks --benchmark-group-by=func,param:dtype,param:batch

pytest-benchmark times one contender after another, so use it to compare a contender with its own
past (``--benchmark-autosave``, ``--benchmark-compare``); to compare contenders, use
``fused-resnet bench``, which lets them take turns.
"""

import pytest
import torch
from torchvision.models.resnet import Bottleneck

from fused_resnet import images, zoo
from fused_resnet.check import compare, exact_outputs, outputs_of


def _time(benchmark, contender, network, batch, dtype):
    """Check one contender against float64, then time it."""
    device = torch.device("cpu")
    missing = contender.why_missing(device, dtype)
    if missing is not None:
        pytest.skip(missing)
    stock = contender.stock(network, dtype, device)
    x = contender.input(batch, dtype, device)
    run = contender.make(network.name, stock, x)
    with torch.inference_mode():
        rows = compare(outputs_of(run, x), [outputs_of(stock, x)], exact_outputs(stock, x))
        assert contender.role != "ours" or all(row.passed for row in rows), rows
        benchmark(run, x)


@pytest.mark.parametrize("batch", [1, 16])
def test_bottleneck(benchmark, contender, dtype, batch):
    """A bottleneck of ResNet-50's second stage: [N, 512, 28, 28] to the same."""
    torch.manual_seed(0)
    x = torch.randn(batch, 512, 28, 28)
    block = Bottleneck(512, 128).eval()
    zoo.calibrate(block, torch.randn(4, 512, 28, 28))
    transform = images.standard_transform()
    network = zoo.Network("bottleneck", block, "random weights", True, 28, transform)
    _time(benchmark, contender, network, x, dtype)


@pytest.mark.parametrize("batch", [1, 16])
def test_resnet50(benchmark, contender, dtype, batch):
    """ResNet-50 on photos: [N, 3, 224, 224] to [N, 1000]."""
    photos = images.load()
    network = zoo.load("resnet50")
    zoo.settle(network, photos.batch(16))
    _time(benchmark, contender, network, photos.batch(batch), dtype)
