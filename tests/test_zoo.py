"""Models by name: where they come from, what is said when they don't, and their fused twins."""

import sys
import urllib.error

import pytest
import torch
import torchvision
from torch import nn

import fused_resnet
from fused_resnet import backends, zoo
from fused_resnet.console import UserError


def _counted(model, x):
    with backends.observe() as choices, torch.inference_mode():
        y = model(x)
    return y, len(choices)


def test_unfused_is_torchvisions_network():
    ours = fused_resnet.resnet18().eval()
    theirs = torchvision.models.resnet18().eval()
    theirs.load_state_dict(ours.state_dict())
    stock = zoo.unfused(ours)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    y, fused_ops = _counted(stock, x)
    assert fused_ops == 0
    assert torch.equal(y, theirs(x))
    assert stock.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize("name", ["cifar_resnet8", "resnet18"])
def test_the_fused_twin_shares_parameters_and_fuses(name):
    stock = zoo.load(name).model
    twin = zoo.fused(name, stock)
    theirs = dict(stock.named_parameters())
    assert all(theirs[k].data_ptr() == p.data_ptr() for k, p in twin.named_parameters())
    assert twin.state_dict().keys() == stock.state_dict().keys()
    x = torch.randn(2, 3, 32, 32)
    y, fused_ops = _counted(twin, x)
    assert fused_ops == sum(isinstance(m, nn.Conv2d) for m in stock.modules())
    with torch.inference_mode():
        torch.testing.assert_close(y, stock(x), rtol=1e-4, atol=1e-4)


def test_random_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    a = zoo.load("cifar_resnet8", seed=3)
    assert torch.equal(torch.rand(1), expected)
    b, c = zoo.load("cifar_resnet8", seed=3), zoo.load("cifar_resnet8", seed=4)
    assert torch.equal(a.model.conv1.weight, b.model.conv1.weight)
    assert not torch.equal(a.model.conv1.weight, c.model.conv1.weight)
    assert a.random
    assert a.size == 32
    assert not a.model.training


def test_calibration_takes_the_statistics_of_the_batch():
    model = zoo.load("cifar_resnet8").model
    x = 3 * torch.randn(4, 3, 32, 32) + 1
    zoo.calibrate(model, x)
    y = model.conv1(x)
    torch.testing.assert_close(model.bn1.running_mean, y.mean((0, 2, 3)))
    torch.testing.assert_close(model.bn1.running_var, y.var((0, 2, 3)))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(m.momentum == 0.1 and not m.training for m in norms)


def test_a_checkpoint_by_path(tmp_path):
    saved = zoo.load("cifar_resnet8", seed=5).model
    path = tmp_path / "w.pt"
    torch.save(saved.state_dict(), path)
    network = zoo.load("cifar_resnet8", weights=str(path))
    assert torch.equal(network.model.conv1.weight, saved.conv1.weight)
    assert network.weights == str(path)
    assert not network.random


def test_a_checkpoint_that_does_not_fit(tmp_path):
    path = tmp_path / "w.pt"
    torch.save({"conv1.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="do not fit cifar_resnet8"):
        zoo.load("cifar_resnet8", weights=str(path))


def test_a_checkpoint_that_is_not_there():
    with pytest.raises(UserError, match="no checkpoint at"):
        zoo.load("cifar_resnet8", weights="nowhere.pt")


def test_unknown_weights_name_the_known_ones():
    with pytest.raises(UserError, match="IMAGENET1K_V2"):
        zoo.load("resnet50", weights="IMAGENET22K")


def test_a_download_that_fails_says_what_else_there_is(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(UserError, match=r"cannot download .*no route.*path of a checkpoint"):
        zoo.load("resnet18", weights="DEFAULT")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("resnet5", "resnet50"), ("timm:resnet5", "timm:resnet50"), ("cifar_resnet22", "6 n \\+ 2")],
)
def test_an_unknown_model_gets_a_hint(name, hint):
    with pytest.raises(UserError, match=hint):
        zoo.load(name)


def test_segmentation_models_download_nothing():
    model = zoo.load("fcn_resnet50").model
    assert isinstance(model, torchvision.models.segmentation.FCN)


def test_timm():
    network = zoo.load("timm:resnet10t")
    assert network.size == 176
    assert network.random


def test_missing_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm"):
        zoo.load("timm:resnet18")


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n"
        "def tiny():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())\n"
        "def wide(width):\n    return tiny()\n"
        "def wrong():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("my_nets", None)


@pytest.mark.usefixtures("user_module")
def test_a_callable_of_the_user():
    network = zoo.load("my_nets:tiny", size=40)
    assert isinstance(network.model, nn.Sequential)
    assert network.size == 40
    assert not network.random


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "cannot import no_such_module"),
        ("my_nets:missing", "my_nets has no missing"),
        ("my_nets:wide", "callable without arguments"),
        ("my_nets:wrong", "must return an nn.Module, it returned int"),
    ],
)
def test_a_callable_that_cannot_be_used(name, message):
    with pytest.raises(UserError, match=message):
        zoo.load(name)


@pytest.mark.usefixtures("user_module")
def test_a_network_that_does_not_take_photos():
    network = zoo.load("my_nets:tiny")
    with pytest.raises(UserError, match="my_nets:tiny does not run on photos"):
        zoo.settle(network, torch.zeros(1, 4, 8, 8))
