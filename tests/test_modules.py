"""The drop-in modules: the same result as their stock parts, in every mode."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_resnet import BasicBlock, Bottleneck, ConvBNAct, Stem, backends, functional
from fused_resnet.modules import PadShortcut
from fused_resnet.numerics import error


def randomise(model: nn.Module) -> nn.Module:
    """Batch norms as after training: no statistic, weight or bias is trivial."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight, 1.0, 0.5)
            nn.init.normal_(m.bias, 0.0, 0.5)
            nn.init.normal_(m.running_mean, 0.0, 0.5)
            nn.init.uniform_(m.running_var, 0.25, 4.0)
    return model


def stock_forward(m: nn.Module, x: torch.Tensor, residual: torch.Tensor | None = None):
    """What each module computes, written with its stock children and nothing else."""
    if isinstance(m, ConvBNAct):
        y = m.conv(x) if m.bn is None else m.bn(m.conv(x))
        y = y if residual is None else y + residual
        return y if m.act is None else m.act(y)
    if isinstance(m, Stem):
        return m.maxpool(F.relu(m.bn1(m.conv1(x))))
    identity = x if m.downsample is None else m.downsample(x)
    y = F.relu(m.bn1(m.conv1(x)))
    y = m.bn2(m.conv2(y))
    if isinstance(m, Bottleneck):
        y = m.bn3(m.conv3(F.relu(y)))
    return F.relu(y + identity) if m.residual else F.relu(y)


def projection(c: int, k: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c, k, 1, stride, bias=False), nn.BatchNorm2d(k))


MODULES = {
    "conv": (lambda: ConvBNAct(6, 8, 3), (2, 6, 9, 11)),
    "conv stride, dilation, groups": (
        lambda: ConvBNAct(8, 12, (3, 5), (2, 1), dilation=2, groups=4),
        (2, 8, 13, 17),
    ),
    "conv with bias": (lambda: ConvBNAct(6, 8, 3, bias=True), (1, 6, 7, 7)),
    "conv without norm": (lambda: ConvBNAct(6, 8, 3, norm_layer=None), (2, 6, 7, 7)),
    "conv without act": (lambda: ConvBNAct(6, 8, 3, act=None), (2, 6, 7, 7)),
    "conv with SiLU": (lambda: ConvBNAct(6, 8, 3, act=nn.SiLU()), (2, 6, 7, 7)),
    "conv with group norm": (
        lambda: ConvBNAct(6, 8, 3, norm_layer=lambda k: nn.GroupNorm(2, k)),
        (2, 6, 7, 7),
    ),
    "conv same, even kernel": (lambda: ConvBNAct(6, 8, 4, padding="same"), (2, 6, 9, 8)),
    "conv valid": (lambda: ConvBNAct(6, 8, 3, padding="valid"), (2, 6, 9, 8)),
    "conv reflect": (lambda: ConvBNAct(6, 8, 3, padding_mode="reflect"), (2, 6, 9, 8)),
    "stem": (lambda: Stem(3, 16), (2, 3, 33, 35)),
    "basic": (lambda: BasicBlock(8, 8), (2, 8, 9, 9)),
    "basic, projection": (lambda: BasicBlock(8, 16, 2, projection(8, 16, 2)), (2, 8, 9, 9)),
    "basic, zero-padded": (lambda: BasicBlock(8, 16, 2, PadShortcut(8, 16, 2)), (2, 8, 9, 9)),
    "basic, plain": (lambda: BasicBlock(8, 8, residual=False), (2, 8, 9, 9)),
    "bottleneck": (lambda: Bottleneck(32, 8), (2, 32, 9, 9)),
    "bottleneck, projection": (
        lambda: Bottleneck(16, 8, 2, projection(16, 32, 2)),
        (2, 16, 9, 9),
    ),
    "bottleneck, v1": (
        lambda: Bottleneck(16, 8, 2, projection(16, 32, 2), stride_in_1x1=True),
        (2, 16, 9, 9),
    ),
    "bottleneck, grouped and dilated": (
        lambda: Bottleneck(32, 8, groups=2, base_width=64, dilation=2),
        (2, 32, 9, 9),
    ),
}


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODULES)
def test_eval_obeys_the_rule(name: str, dtype: torch.dtype) -> None:
    build, shape = MODULES[name]
    module = randomise(build()).to(dtype).eval()
    x = torch.randn(shape).to(dtype)
    with torch.no_grad():
        reference = stock_forward(copy.deepcopy(module).double(), x.double())
        stock = stock_forward(module, x)
        with backends.observe() as choices:
            result = module(x)
    assert result.dtype == dtype
    fused = "group norm" not in name
    assert bool(choices) == fused, "eval mode must run the fused op wherever it can"
    assert error(result, reference).within(error(stock, reference), dtype)


@pytest.mark.parametrize("name", MODULES)
def test_train_is_stock(name: str) -> None:
    """Outputs, gradients and running statistics equal the stock modules', bit for bit."""
    build, shape = MODULES[name]
    ours = randomise(build()).train()
    theirs = copy.deepcopy(ours)
    x = torch.randn(shape)
    for _ in range(2):
        xs = [x.clone().requires_grad_() for _ in range(2)]
        results = [ours(xs[0]), stock_forward(theirs, xs[1])]
        if "without norm" not in name:  # without a norm the op runs in train mode too
            assert torch.equal(*results)
        for y in results:
            y.square().sum().backward()
        torch.testing.assert_close(xs[0].grad, xs[1].grad)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    for key, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key]), key


@pytest.mark.parametrize("name", ["conv", "stem", "basic, projection", "bottleneck"])
def test_gradients_in_eval(name: str) -> None:
    """A frozen batch norm's network is trained through the fused op: gradients as stock torch's."""
    build, shape = MODULES[name]
    ours = randomise(build()).double().eval()
    theirs = copy.deepcopy(ours)
    x = torch.randn(shape, dtype=torch.double)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    with backends.observe() as choices:
        ours(xs[0]).square().sum().backward()
    assert choices
    stock_forward(theirs, xs[1]).square().sum().backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad)
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert p.grad is not None, key
        torch.testing.assert_close(p.grad, q.grad)


def test_residual_of_conv_bn_act() -> None:
    module = randomise(ConvBNAct(6, 8, 3)).eval()
    x, r = torch.randn(2, 6, 9, 9), torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(module(x, r), stock_forward(module, x, r))


def test_textbook_block() -> None:
    """Two 3x3 convolutions with bias: y1 = relu(W1 x), y2 = relu(W2 y1), out = relu(y2 + x)."""
    torch.manual_seed(0)
    conv1, conv2 = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
    relu = nn.ReLU()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        y1 = functional.conv_bn_act(x, conv1, None, relu)
        with backends.observe() as choices:
            out = functional.conv_bn_act(y1, conv2, None, relu, x, act_before_add=True)
        assert [c.problem.epilogue for c in choices] == ["relu_add_relu"]
        xd = x.double()
        c1, c2 = copy.deepcopy(conv1).double(), copy.deepcopy(conv2).double()
        expected = F.relu(F.relu(c2(F.relu(c1(xd)))) + xd)
        stock = F.relu(F.relu(conv2(F.relu(conv1(x)))) + x)
    assert out.shape == (1, 3, 64, 64)
    assert error(out, expected).within(error(stock, expected), torch.float32)


def test_state_dict_copies_and_pickles() -> None:
    """Caches are in no state_dict, copy or pickle, and a copy does not follow its original."""
    module = randomise(Bottleneck(16, 8, 2, projection(16, 32, 2))).eval()
    keys = list(module.state_dict())
    attributes = {m: set(vars(m)) for m in module.modules()}
    x = torch.randn(2, 16, 9, 9)
    with torch.no_grad():
        expected = module(x)
        assert list(module.state_dict()) == keys
        assert {m: set(vars(m)) for m in module.modules()} == attributes
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        copies = [
            copy.deepcopy(module),
            pickle.loads(pickle.dumps(module)),
            torch.load(file, weights_only=False),
        ]
        for other in copies:
            assert torch.equal(other(x), expected)
        module.conv1.weight.mul_(2.0)
        module.bn1.running_var.mul_(3.0)
        changed = module(x)
        assert error(changed, stock_forward(module, x).double()).l2 < 1e-5
        assert not torch.equal(changed, expected)
        for other in copies:
            assert torch.equal(other(x), expected)


def test_replaced_children_are_used() -> None:
    block = randomise(BasicBlock(8, 8)).eval()
    x = torch.randn(1, 8, 7, 7)
    with torch.no_grad():
        block(x)
        block.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        block.bn2 = nn.Identity()
        block.relu = nn.LeakyReLU(0.2)
        y = block.relu(block.bn1(block.conv1(x)))
        expected = block.relu(block.conv2(y) + x)
        torch.testing.assert_close(block(x), expected)


def test_hooks_run() -> None:
    """A hook on a stock child sees what it would see without fusion."""
    block = randomise(BasicBlock(8, 8)).eval()
    x = torch.randn(1, 8, 7, 7)
    seen = []
    handle = block.bn1.register_forward_hook(lambda m, args, y: seen.append(y.clone()))
    with torch.no_grad():
        y = block(x)
        torch.testing.assert_close(seen[0], block.bn1(block.conv1(x)))
        handle.remove()
        torch.testing.assert_close(block(x), y)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic: bool) -> None:
    module = randomise(BasicBlock(8, 16, 2, projection(8, 16, 2))).eval()
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for n in (2, 3):
            x = torch.randn(n, 8, 9, 9)
            torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-5)
        module.bn1.bias.add_(1.0)
        torch.testing.assert_close(compiled(x), stock_forward(module, x), rtol=1e-5, atol=1e-5)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="cannot drop any: 8 to 4"):
        PadShortcut(8, 4, 1)
    with pytest.raises(ValueError, match="groups=1 and base_width=64, got groups=2"):
        BasicBlock(8, 8, groups=2)
    with pytest.raises(NotImplementedError, match="does not support dilation, got 2"):
        BasicBlock(8, 8, dilation=2)
    with pytest.raises(ValueError, match=r"x has 3 channels but weight .* takes 8"):
        BasicBlock(8, 8).eval()(torch.randn(1, 3, 8, 8))
