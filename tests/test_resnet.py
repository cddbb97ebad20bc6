"""Every builder against torchvision: names, initialisation, results in eval, and training."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import fused_resnet
from fused_resnet import backends
from fused_resnet.modules import PadShortcut
from fused_resnet.numerics import error, largest
from fused_resnet.resnet import BUILDERS, ResNet, cifar_resnet

FAMILY = [name for name in BUILDERS if not name.startswith("plain")]
LIGHT = {"resnet18", "resnet50", "resnext50_32x4d"}
EACH = [n if n in LIGHT else pytest.param(n, marks=pytest.mark.slow) for n in FAMILY]


def pair(name: str, **kwargs) -> tuple[nn.Module, nn.Module]:
    """Torchvision's network and ours, from the same seed."""
    built = []
    for builder in (torchvision.models.get_model_builder(name), BUILDERS[name]):
        torch.manual_seed(0)
        built.append(builder(**kwargs))
    return built[0], built[1]


def settle(model: nn.Module, *images: torch.Tensor) -> None:
    """Give the batch norms statistics of real activations, so that eval mode means something."""
    model.train()
    with torch.no_grad():
        for x in images:
            model(x)


@pytest.mark.parametrize("name", EACH)
def test_equals_torchvision(name: str) -> None:
    stock, ours = pair(name, num_classes=10)
    assert list(stock.state_dict()) == list(ours.state_dict())
    for a, b in zip(stock.state_dict().values(), ours.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    x = torch.randn(2, 3, 64, 64)
    settle(stock, x, x + 0.1)
    ours.load_state_dict(stock.state_dict())
    stock.load_state_dict(ours.state_dict())
    stock.eval()
    ours.eval()
    for dtype in (torch.float32, torch.bfloat16):
        stock.to(dtype)
        ours.to(dtype)
        xd = x.to(dtype)
        with torch.no_grad():
            reference = copy.deepcopy(stock).double()(xd.double())
            with backends.observe() as choices:
                result = ours(xd)
            layouts = xd, xd.contiguous(memory_format=torch.channels_last)
            allowed = largest(*(error(stock(image), reference) for image in layouts))
            assert error(result, reference).within(allowed, dtype)
        convolutions = sum(isinstance(m, nn.Conv2d) for m in ours.modules())
        assert len(choices) == convolutions, "one fused op a convolution, and nothing besides"


@pytest.mark.parametrize("name", EACH)
def test_trains_like_torchvision(name: str) -> None:
    """Loss, gradients, parameters and running statistics over several steps of SGD."""
    stock, ours = pair(name, num_classes=10)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (stock, ours)]
    torch.manual_seed(1)
    for _ in range(3):
        x, target = torch.randn(2, 3, 64, 64), torch.randint(10, (2,))
        losses = []
        for model, optimizer in zip((stock, ours), optimizers, strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        assert torch.equal(*losses)
        for (key, p), q in zip(stock.named_parameters(), ours.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), key
    for (key, a), b in zip(stock.state_dict().items(), ours.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.quick
def test_eval_follows_training() -> None:
    """What was derived from the weights before a step is not used after it."""
    _, model = pair("resnet18", num_classes=10)
    stock, _ = pair("resnet18", num_classes=10)
    x = torch.randn(2, 3, 64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for _ in range(2):
        with torch.no_grad():
            model.eval()(x)
        optimizer.zero_grad()
        model.train()(x).square().sum().backward()
        optimizer.step()
        stock.load_state_dict(model.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(x), stock.eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shortcut", ["A", "B", "C", None])
@pytest.mark.parametrize("depth", [20, 32])
def test_cifar_family(depth: int, shortcut: str | None) -> None:
    """The paper's counts: 6n + 2 weighted layers, 0.27 M and 0.46 M parameters with shortcut A."""
    model = cifar_resnet(depth, shortcut).eval()
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    assert len(convs) + 1 == depth
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    projections = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m not in convs]
    assert len(projections) == {"A": 0, None: 0, "B": 2, "C": len(convs) // 2}[shortcut]
    if shortcut in ("A", None):
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        assert round(millions, 2) == {20: 0.27, 32: 0.46}[depth]


@pytest.mark.parametrize(("depth", "millions"), [(44, 0.66), (56, 0.85), (110, 1.7), (1202, 19.4)])
def test_deep_cifar_networks(depth: int, millions: float) -> None:
    """Table 6 of the paper: parameters in millions."""
    with torch.device("meta"):
        model = cifar_resnet(depth)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert abs(count - millions) < 0.06


@pytest.mark.parametrize("shortcut", ["A", "B", "C", None])
def test_shortcuts_obey_the_rule(shortcut: str | None) -> None:
    """Fused networks of every kind against float64, and against their own train-mode arithmetic."""
    torch.manual_seed(0)
    model = ResNet(
        fused_resnet.Bottleneck,
        [2, 1, 1, 1],
        num_classes=7,
        shortcut=shortcut,
        stride_in_1x1=shortcut == "C",
        planes=(8, 16, 24, 32),
    )
    x = torch.randn(2, 3, 64, 64)
    settle(model, x)
    model.eval()
    with torch.no_grad():
        with backends.backend("torch"):
            reference, stock = copy.deepcopy(model).double()(x.double()), model(x)
        assert error(model(x), reference).within(error(stock, reference), torch.float32)


def test_v1_differs_from_v15() -> None:
    """The stride's place changes the result and no parameter: loading cannot tell them apart."""
    torch.manual_seed(0)
    v15 = fused_resnet.resnet50(num_classes=4).eval()
    v1 = fused_resnet.resnet50(num_classes=4, stride_in_1x1=True).eval()
    v1.load_state_dict(v15.state_dict())
    assert v1.layer2[0].conv1.stride == (2, 2)
    assert v1.layer2[0].conv2.stride == (1, 1)
    assert v15.layer2[0].conv2.stride == (2, 2)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert not torch.allclose(v1(x), v15(x), rtol=1e-2)


def test_dilation_is_torchvisions() -> None:
    kwargs = {"replace_stride_with_dilation": [False, True, True], "num_classes": 5}
    stock, ours = pair("resnet50", **kwargs)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), stock.eval()(x), rtol=1e-4, atol=1e-5)


def test_features_only() -> None:
    stock, _ = pair("resnet18")
    model = fused_resnet.resnet18(features_only=True).eval()
    state = {k: v for k, v in stock.state_dict().items() if not k.startswith("fc.")}
    model.load_state_dict(state)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        features = model(x)
        y = stock.eval().maxpool(F.relu(stock.bn1(stock.conv1(x))))
        for i, f in enumerate(features):
            y = getattr(stock, f"layer{i + 1}")(y)
            torch.testing.assert_close(f, y, rtol=1e-4, atol=1e-4)
    assert [f.shape[1] for f in features] == [64, 128, 256, 512]


def test_common_surgery() -> None:
    """What people do to a ResNet: another head, no pooling for small images, another norm."""
    model = fused_resnet.resnet18()
    model.fc = nn.Linear(512, 3)
    model.maxpool = nn.Identity()
    model.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
    assert model.eval()(torch.randn(2, 1, 32, 32)).shape == (2, 3)
    grouped = fused_resnet.resnet18(norm_layer=lambda c: nn.GroupNorm(8, c), num_classes=3)
    assert grouped.eval()(torch.randn(2, 3, 64, 64)).shape == (2, 3)
    zero = fused_resnet.resnet18(zero_init_residual=True)
    assert all(not m.bn2.weight.any() for m in zero.modules() if hasattr(m, "bn2"))


def test_empty_batch() -> None:
    model = fused_resnet.resnet18(num_classes=3).eval()
    with torch.no_grad():
        assert model(torch.randn(0, 3, 64, 64)).shape == (0, 3)


def test_export_with_dynamic_batch() -> None:
    model = fused_resnet.resnet18(num_classes=3).eval()
    x = torch.randn(2, 3, 64, 64)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}})
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert targets.count("fused_resnet.conv_affine_act.default") == 19
    assert targets.count("fused_resnet.conv_affine_relu_maxpool.default") == 1
    with torch.no_grad():
        for n in (1, 5):
            x = torch.randn(n, 3, 64, 64)
            torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.quick
def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="shortcut must be 'A', 'B', 'C' or None, got 'D'"):
        ResNet(fused_resnet.BasicBlock, [1, 1, 1, 1], shortcut="D")
    with pytest.raises(ValueError, match="one entry a stage"):
        ResNet(fused_resnet.BasicBlock, [1, 1, 1])
    with pytest.raises(ValueError, match="each stage but the"):
        fused_resnet.resnet50(replace_stride_with_dilation=[True])
    with pytest.raises(ValueError, match=r"6 n \+ 2 .*got 21"):
        cifar_resnet(21)
    with pytest.raises(ValueError, match="groups=1"):
        fused_resnet.resnet18(groups=2)


def test_pad_shortcut_is_the_papers() -> None:
    x = torch.randn(2, 3, 5, 5)
    y = PadShortcut(3, 8, 2)(x)
    assert y.shape == (2, 8, 3, 3)
    assert torch.equal(y[:, 2:5], x[:, :, ::2, ::2])
    assert not y[:, :2].any()
    assert not y[:, 5:].any()
