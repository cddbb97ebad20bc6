"""Whole networks through the op and the Triton kernels, in the interpreter, against float64."""

import copy

import pytest
import torch

import fused_resnet
from fused_resnet.backends import backend, observe
from fused_resnet.modules import Bottleneck
from fused_resnet.numerics import error
from fused_resnet.resnet import ResNet, resnet18


def randomised(model):
    """Running statistics and affine parameters as a trained network might have them."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
                (module.weight.data, 0.5, 1.0),
                (module.bias.data, -0.2, 0.2),
            ):
                tensor.uniform_(low, high, generator=generator)
    return model.eval()


NETWORKS = {
    "resnet18": lambda: resnet18(num_classes=10),
    "resnet26": lambda: ResNet(Bottleneck, [2, 2, 2, 2], num_classes=10),
}


@pytest.mark.parametrize(
    ("network", "dtype"),
    [
        pytest.param("resnet18", torch.float32, marks=pytest.mark.slow),
        ("resnet18", torch.float16),
        ("resnet26", torch.bfloat16),
        pytest.param("resnet26", torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
@torch.no_grad()
def test_network(network, dtype):
    torch.manual_seed(0)
    model = randomised(NETWORKS[network]()).to(dtype)
    x = torch.randn(2, 3, 33, 33).to(dtype)
    with backend("torch"):
        stock = model(x)
        reference = copy.deepcopy(model).double()(x.double())
    model = model.to(memory_format=torch.channels_last)
    with backend("triton"), observe() as choices:
        result = model(x)
    names = {choice.kernel.full_name for choice in choices}
    assert names <= {"triton/conv", "triton/stem_pool", "triton/add_relu"}, choices
    assert "triton/conv" in names
    assert len(choices) >= {"resnet18": 20, "resnet26": 29}[network] - 1
    found, allowed = error(result, reference), error(stock, reference)
    assert found.within(allowed, dtype), f"error {found}, stock torch's {allowed}"


@torch.no_grad()
def test_an_empty_batch_needs_no_kernel():
    block = randomised(Bottleneck(64, 16))
    with backend("triton"):
        assert block(torch.zeros(0, 64, 7, 7)).shape == (0, 64, 7, 7)


def test_the_interpreter_is_taken_only_by_force():
    conv, bn = torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.BatchNorm2d(8).eval()
    with torch.no_grad(), observe() as choices:
        fused_resnet.functional.conv_bn_act(torch.randn(1, 8, 5, 5), conv, bn, torch.nn.ReLU())
    assert choices
    assert all(choice.kernel.backend != "triton" for choice in choices)
