"""All of ResNet-50 with its bottlenecks in chains, in the interpreter, against float64."""

import copy

import pytest
import torch
import torchvision

import fused_resnet
from fused_resnet import backends
from fused_resnet.numerics import error, largest


def network():
    torch.manual_seed(0)
    model = torchvision.models.resnet50().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.0)
            module.bias.data.uniform_(-0.2, 0.2)
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2.0)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_resnet50_through_chained_kernels(dtype):
    model = network().to(dtype)
    x = torch.randn(2, 3, 64, 64).to(dtype)
    chained = fused_resnet.chain(model)
    with torch.inference_mode():
        reference = copy.deepcopy(model).double()(x.double())
        stock = largest(
            *(error(model(x.contiguous(memory_format=f)), reference)
              for f in (torch.contiguous_format, torch.channels_last))
        )  # fmt: skip
        with backends.backend("triton", "torch"), backends.observe() as choices:
            result = chained(x)
    links = [c.kernel.full_name for c in choices if c.kernel.op == "bottleneck_chain"]
    # The interpreter takes the configurations of an A100; those of 512 channels are torch's.
    assert links == ["triton/chain"] * 13 + ["torch/aten"] * 3
    found = error(result, reference)
    assert found.within(stock, dtype), f"{found!r}, stock {stock!r}"
