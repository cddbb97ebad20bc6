"""fuse: every pattern, however written, computes what the stock model does and keeps its state."""

import collections
import copy
import io
import operator
import pickle
import warnings
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torchvision.ops import FrozenBatchNorm2d

import fused_resnet
from fused_resnet import FusedResNetWarning, explain, fuse, nodes, unfuse
from fused_resnet.fuse import plan_of, why_stale
from fused_resnet.numerics import error
from tests.helpers import randomise


def sites(model: nn.Module) -> list[str]:
    """The fused calls in the forwards of a fused model, by their parts."""
    found = []
    for module in model.modules():
        plan = plan_of(module)
        for node in () if plan is None else plan.graph.nodes:
            if node.target is nodes.add_relu:
                found.append("add relu")
            elif node.target in nodes.FUNCTIONS:
                _, _, bn, act, *rest = node.args
                parts = ["conv", "bn" if bn is not None else ""]
                parts.append("relu" if "first_act" in node.kwargs else "")
                if node.target is nodes.conv_bn_act:
                    parts += ["add" if rest else "", "relu" if act is not None else ""]
                else:
                    parts += ["relu" if act is not None else "", "pool"]
                found.append(" ".join(p for p in parts if p))
    return found


def leaves(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def assert_close(actual: Any, wanted: Any) -> None:
    """Equal up to rounding in float64, and of the same types."""
    assert pytree.tree_structure(actual) == pytree.tree_structure(wanted)
    assert type(actual) is type(wanted)
    for a, w in zip(leaves(actual), leaves(wanted), strict=True):
        assert a.dtype == w.dtype
        torch.testing.assert_close(a, w, rtol=1e-11, atol=1e-11)


def state(model: nn.Module) -> list[tuple[Any, ...]]:
    """What fuse must not change: names, classes, modes, tensors and their versions."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [
        *[(n, type(m), m.training, len(vars(m))) for n, m in model.named_modules()],
        *[(n, id(t), t._version, t.requires_grad) for n, t in tensors],
    ]


def check(model: nn.Module, *args: Any, train: bool = True) -> nn.Module:
    """Fuse ``model`` (made float64) and compare it with itself in eval and train mode."""
    torch.manual_seed(0)
    model = randomise(model).double().eval()
    args = tuple(a.double() if isinstance(a, Tensor) else a for a in args)
    before = state(model)
    fused = fuse(model)
    assert state(model) == before
    assert list(fused.state_dict()) == list(model.state_dict())
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in model.named_modules()]
    for (_, a), (_, b) in zip(fused.named_parameters(), model.named_parameters(), strict=True):
        assert a is b
    for a, b in zip(fused.modules(), model.modules(), strict=True):
        assert isinstance(a, type(b))
        assert type(a).__name__ == type(b).__name__
    given, wanted_given = copy.deepcopy(args), copy.deepcopy(args)
    with torch.no_grad():
        assert_close(fused(*given), model(*wanted_given))
    # What forward did to its arguments is part of what it does.
    assert_close(given, wanted_given)
    if train:
        check_training(model, *args)
    return fused


def check_training(model: nn.Module, *args: Any) -> None:
    """Outputs, gradients and running statistics of two steps, to the last bit, and frozen norms."""
    results = []
    for make in (lambda m: m, fuse):
        m = make(copy.deepcopy(model).train())
        torch.manual_seed(1)
        outputs = []
        for _ in range(2):
            inputs = copy.deepcopy(args)
            out = leaves(m(*inputs))
            torch.stack([o.square().mean() for o in out if o.requires_grad]).sum().backward()
            outputs += out
        results.append((outputs, [p.grad for p in m.parameters()], list(m.buffers())))
    # Convolutions without a norm are fused in train mode too, and their gradients round otherwise.
    exact = all("bn" in site for site in sites(fuse(model)))
    for a, b in zip(leaves(results[0]), leaves(results[1]), strict=True):
        assert torch.equal(a, b) if exact else a.allclose(b, rtol=1e-10, atol=1e-12)


class Parts(nn.Module):
    """Modules for the forwards below."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 1)
        self.bn2 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.relu_ = nn.ReLU(inplace=True)
        self.identity = nn.Identity()
        self.dropout = nn.Dropout(0.5)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


def net(forward: Any) -> nn.Module:
    return type("Net", (Parts,), {"forward": forward})()


X = torch.randn(2, 4, 9, 7, generator=torch.Generator().manual_seed(0))

RELUS = {
    "module": lambda m, y: m.relu(y),
    "inplace module": lambda m, y: m.relu_(y),
    "F.relu": lambda m, y: F.relu(y),
    "F.relu inplace": lambda m, y: F.relu(y, inplace=True),
    "F.relu positional": lambda m, y: F.relu(y, True),
    "F.relu_": lambda m, y: F.relu_(y),
    "torch.relu": lambda m, y: torch.relu(y),
    "torch.relu_": lambda m, y: torch.relu_(y),
    "method": lambda m, y: y.relu(),
    "inplace method": lambda m, y: y.relu_(),
}


@pytest.mark.parametrize("relu", RELUS.values(), ids=RELUS)
def test_every_way_to_write_relu(relu: Any) -> None:
    fused = check(net(lambda m, x: relu(m, m.bn1(m.conv1(x)))), X)
    assert sites(fused) == ["conv bn relu", "conv bn"]
    fused = check(net(lambda m, x: relu(m, m.bn1(m.conv1(x)) + x)), X)
    assert sites(fused)[0] == "conv bn add relu"


ADDS = {
    "y + x": lambda y, x: y + x,
    "x + y": lambda y, x: x + y,
    "y += x": lambda y, x: operator.iadd(y, x),
    "torch.add": torch.add,
    "torch.add reversed": lambda y, x: torch.add(x, y, alpha=1),
    "add": lambda y, x: y.add(x),
    "add reversed": lambda y, x: x.add(y),
    "add_": lambda y, x: y.add_(x),
    "operator.add": operator.add,
}


@pytest.mark.parametrize("add", ADDS.values(), ids=ADDS)
def test_every_way_to_write_a_sum(add: Any) -> None:
    fused = check(net(lambda m, x: m.relu_(add(m.bn1(m.conv1(x)), x))), X)
    assert sites(fused)[0] == "conv bn add relu"
    fused = check(net(lambda m, x: add(m.conv2(x), x)), X)
    assert sites(fused)[0] == "conv add"
    fused = check(net(lambda m, x: F.relu(add(x.sigmoid(), x))), X, train=False)
    assert sites(fused)[0] == "add relu"


class Case(NamedTuple):
    forward: Any
    sites: list[str]
    # Autograd refuses some in-place writes, in stock code as in ours.
    differentiable: bool = True


def _two_users(m: Any, x: Tensor) -> Tensor:
    y = m.bn1(m.conv1(x))
    return m.relu(y) * y


def _conv_two_users(m: Any, x: Tensor) -> Tensor:
    y = m.conv1(x)
    return m.relu(m.bn1(y)) * y


def _both_convs(m: Any, x: Tensor) -> Tensor:
    return m.relu(m.bn1(m.conv1(x)) + m.bn2(m.conv2(x)))


def _conv_and_branch(m: Any, x: Tensor) -> Tensor:
    y = m.bn1(m.conv1(x))
    y += m.branch(x)
    return m.relu_(y)


def _writes_argument(m: Any, x: Tensor) -> Tensor:
    x += m.bn1(m.conv1(x))
    return m.relu(x)


def _writes_argument_by_relu(m: Any, x: Tensor) -> Tensor:
    return m.bn1(m.conv1(m.relu_(x)))


def _value_read_after_inplace_relu(m: Any, x: Tensor) -> Tensor:
    y = m.bn1(m.conv1(x))
    m.relu_(y)
    return y * 2


def _value_read_after_inplace_add(m: Any, x: Tensor) -> Tensor:
    r = m.relu(x)
    view = r.flatten(1)
    r += m.bn1(m.conv1(x))
    return m.relu(r).flatten(1) + view


def _input_written_in_between(m: Any, x: Tensor) -> Tensor:
    r = m.relu(x)
    y = m.bn1(m.conv1(r))
    r.mul_(2)
    return m.relu(y + r)


def _input_written_by_a_child(m: Any, x: Tensor) -> Tensor:
    r = m.bn2(m.conv2(x))
    y = m.bn1(m.conv1(r))
    return m.relu(y + m.branch(m.relu_(r)))


def _norm_called_in_between(m: Any, x: Tensor) -> Tensor:
    y = m.conv1(x)
    z = m.bn1(m.conv2(x))
    return m.relu(m.bn1(y)) + z


def _norm_called_twice(m: Any, x: Tensor) -> Tensor:
    return m.relu(m.bn1(m.conv2(m.relu(m.bn1(m.conv1(x))))))


def _conv_called_twice(m: Any, x: Tensor) -> Tensor:
    return m.relu(m.bn2(m.conv1(m.relu(m.bn1(m.conv1(x))))))


CASES = {
    "no relu": Case(lambda m, x: m.bn1(m.conv1(x)) * 2, ["conv bn"]),
    "no norm": Case(lambda m, x: m.relu(m.conv2(x)), ["conv relu"]),
    "no norm, sum": Case(lambda m, x: F.relu(m.conv2(x) + x), ["conv add relu"]),
    "norm output used twice": Case(_two_users, ["conv bn"]),
    "conv output used twice": Case(_conv_two_users, []),
    "identity in between": Case(
        lambda m, x: m.relu(m.identity(m.bn1(m.identity(m.conv1(x)))) + x), ["conv bn add relu"]
    ),
    "dropout before norm": Case(lambda m, x: m.relu(m.bn1(m.dropout(m.conv1(x)))), []),
    "dropout before relu": Case(lambda m, x: m.relu(m.dropout(m.bn1(m.conv1(x)))), ["conv bn"]),
    "other activation": Case(lambda m, x: F.relu6(m.bn1(m.conv1(x))), ["conv bn"]),
    "two relus": Case(
        lambda m, x: m.relu(m.relu_(m.bn1(m.conv1(x))) + x), ["conv bn relu add relu"]
    ),
    "relu before sum": Case(lambda m, x: m.relu(m.bn1(m.conv1(x))) + x, ["conv bn relu"]),
    "two convolutions": Case(_both_convs, ["conv bn", "conv bn add relu"]),
    "convolution and branch": Case(_conv_and_branch, ["conv bn add relu"]),
    "branch alone": Case(lambda m, x: m.relu(x + m.branch(x)), ["conv bn add relu"]),
    "sum with itself": Case(lambda m, x: (lambda y: m.relu(y + y))(m.bn1(m.conv1(x))), ["conv bn"]),
    "sum with a number": Case(lambda m, x: m.relu(m.bn1(m.conv1(x)) + 1), ["conv bn"]),
    "scaled sum": Case(lambda m, x: m.relu(torch.add(m.bn1(m.conv1(x)), x, alpha=2)), ["conv bn"]),
    "writes its argument": Case(_writes_argument, ["conv bn"], False),
    "relu writes its argument": Case(_writes_argument_by_relu, ["conv bn"], False),
    "read after inplace relu": Case(_value_read_after_inplace_relu, ["conv bn"]),
    "read after inplace sum": Case(_value_read_after_inplace_add, ["conv bn"], False),
    "input written in between": Case(_input_written_in_between, ["conv bn", "add relu"], False),
    "input written by a child": Case(
        _input_written_by_a_child, ["conv bn", "conv bn", "conv bn add relu"], False
    ),
    "norm called in between": Case(_norm_called_in_between, ["conv bn"]),
    "norm called twice": Case(_norm_called_twice, ["conv bn relu", "conv bn relu"]),
    "conv called twice": Case(_conv_called_twice, ["conv bn relu", "conv bn relu"]),
    "pool": Case(lambda m, x: m.pool(m.relu(m.bn1(m.conv1(x)))), ["conv bn relu pool"]),
    "F.max_pool2d": Case(
        lambda m, x: F.max_pool2d(F.relu(m.bn1(m.conv1(x))), 2, padding=1), ["conv bn relu pool"]
    ),
    "torch.max_pool2d": Case(
        lambda m, x: torch.max_pool2d(F.relu(m.conv2(x)), (3, 2), (2, 1)), ["conv relu pool"]
    ),
    "ceil_mode pool": Case(
        lambda m, x: F.max_pool2d(m.relu(m.conv1(x)), 2, ceil_mode=True), ["conv relu"]
    ),
    "pool with indices": Case(
        lambda m, x: F.max_pool2d(m.relu(m.conv1(x)), 2, return_indices=True)[0], ["conv relu"]
    ),
    "pool without relu": Case(lambda m, x: m.pool(m.bn1(m.conv1(x))), ["conv bn"]),
    "inplace sum and relu of an argument": Case(
        lambda m, x: m.relu_(operator.iadd(x, 1.5 * x)), ["add relu"], False
    ),
    "functional": Case(
        lambda m, x: F.relu(
            F.batch_norm(
                F.conv2d(x, m.conv1.weight, None, 1, 1),
                m.bn1.running_mean,
                m.bn1.running_var,
                m.bn1.weight,
                m.bn1.bias,
                m.training,
            )
        ),
        [],
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_patterns(case: Case) -> None:
    model = net(case.forward)
    fused = check(model, X, train=case.differentiable)
    found = sites(fused)
    if found and found[-1] == "conv bn" and plan_of(fused.branch) is not None:
        found = found[:-1]  # The branch has a forward of its own.
    assert found == case.sites


class TorchvisionLike(nn.Sequential):
    def __init__(self, norm: nn.Module, conv: nn.Conv2d | None = None) -> None:
        super().__init__(conv or nn.Conv2d(4, 4, 3, padding=1), norm, nn.ReLU(inplace=True))


class OtherFrozen(nn.Module):
    """The shape of detectron2's FrozenBatchNorm2d: buffers, and a forward that folds by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = 1e-5
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            self.register_buffer(name, torch.full((4,), float(value)))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


OtherFrozen.__name__ = "FrozenBatchNorm2d"


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, lambda c: OtherFrozen()], ids=["tv", "d2"])
def test_frozen_batch_norm_is_fused_in_eval_and_in_train_mode(norm: Any) -> None:
    model = randomise(TorchvisionLike(norm(4))).double()
    fused = check(model, X, train=False)
    assert sites(fused) == ["conv bn relu"]
    fused.train()
    with fused_resnet.backends.observe() as choices:
        actual = fused(X.double())
    assert len(choices) == 1
    assert_close(actual, model.train()(X.double()))


@pytest.mark.parametrize(
    ("norm", "wanted"),
    [
        (nn.BatchNorm2d(4, affine=False), ["conv bn relu"]),
        (nn.SyncBatchNorm(4), ["conv bn relu"]),
        (nn.BatchNorm2d(4, track_running_stats=False), []),
        (nn.GroupNorm(2, 4), []),
        (nn.InstanceNorm2d(4), []),
        (nn.Identity(), ["conv relu"]),
    ],
    ids=lambda v: type(v).__name__,
)
def test_norms(norm: nn.Module, wanted: list[str]) -> None:
    model = TorchvisionLike(norm)
    if wanted:
        assert sites(check(model, X, train=not isinstance(norm, nn.SyncBatchNorm))) == wanted
    else:
        with pytest.warns(FusedResNetWarning, match="nothing to fuse"):
            fuse(model)


def test_a_model_made_in_inference_mode_is_right_and_warned_of() -> None:
    with torch.inference_mode():
        model = TorchvisionLike(nn.BatchNorm2d(4)).double().eval()
    with pytest.warns(FusedResNetWarning, match="made in torch.inference_mode.*Make and load"):
        fused = fuse(model)
    x = X.double()
    with torch.inference_mode():
        assert_close(fused(x), model(x))
        model[0].weight.mul_(2)
        assert_close(fused(x), model(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fuse(TorchvisionLike(nn.BatchNorm2d(4)).eval())


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect"),
        nn.Conv2d(4, 4, 2, padding="same"),
        nn.Conv2d(4, 4, 3, padding=(2, 1), padding_mode="circular", stride=2),
        nn.Conv2d(4, 4, (1, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2), groups=2),
    ],
    ids=["reflect", "same", "circular", "grouped"],
)
def test_convolutions(conv: nn.Conv2d) -> None:
    assert sites(check(TorchvisionLike(nn.BatchNorm2d(4), conv), X)) == ["conv bn relu"]


def test_another_kind_of_convolution_stays() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight / self.weight.norm(), self.bias, padding=1)

    model = TorchvisionLike(nn.BatchNorm2d(4), Standardised(4, 4, 3))
    with pytest.warns(FusedResNetWarning):
        assert not sites(fuse(model))


# -------------------------------------------------------------------- what stock operators forgive


class Residual(nn.Module):
    def __init__(self, add: str = "add", bn: bool = True) -> None:
        super().__init__()
        self.add = add
        self.conv = nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4) if bn else nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor, r: Any) -> Tensor:
        y = self.bn(self.conv(x))
        if self.add == "iadd":
            y += r
            return self.relu(y)
        return self.relu(y + r)


@pytest.mark.parametrize("add", ["add", "iadd"])
@pytest.mark.parametrize(
    "residual",
    [torch.randn(4, 1, 1), torch.randn(1, 1, 9, 7), torch.randn(2, 4, 9, 7).float(), 0.5, 2],
    ids=["channels", "image", "fp32", "float", "int"],
)
def test_a_residual_of_another_shape_or_dtype(add: str, residual: Any) -> None:
    model = randomise(Residual(add)).double().eval()
    fused = fuse(model)
    assert sites(fused) == ["conv bn add relu"]
    with torch.no_grad():
        assert_close(fused(X.double(), residual), model(X.double(), residual))


def test_type_promotion_by_the_residual() -> None:
    model = randomise(Residual()).eval()
    wide = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    assert fuse(model)(X, wide).dtype == model(X, wide).dtype == torch.float64
    grown = torch.randn(3, 2, 4, 9, 7)
    assert fuse(model)(X, grown).shape == model(X, grown).shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_the_dtype_that_stock_gives(dtype: torch.dtype) -> None:
    model = randomise(Residual()).eval()
    residual = torch.randn(X.shape).to(dtype)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        wanted, actual = model(X, residual), fuse(model)(X, residual)
    assert actual.dtype == wanted.dtype
    torch.testing.assert_close(actual, wanted, rtol=0.05, atol=0.05)


def test_input_without_batch_dimension() -> None:
    model = Residual(bn=False).double()
    x, r = X[0].double(), X[1].double()
    fused = fuse(model)
    assert sites(fused) == ["conv add relu"]
    assert torch.equal(fused(x, r), model(x, r))
    pooled = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.MaxPool2d(2)).double()
    assert torch.equal(fuse(pooled)(x), pooled(x))


def test_empty_batch() -> None:
    model = TorchvisionLike(nn.BatchNorm2d(4)).eval()
    assert fuse(model)(X[:0]).shape == (0, 4, 9, 7)

    # --------------------------------------------------------- forwards that a graph cannot express


class WithForward(nn.Module):
    """A fusable child below a forward that is the subject of the test."""

    def __init__(self) -> None:
        super().__init__()
        self.body = TorchvisionLike(nn.BatchNorm2d(4))
        self.conv = nn.Conv2d(4, 4, 1)
        self.scale = 2.0
        self.calls = 0


class DataDependent(WithForward):
    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.conv(x).relu() if x.sum() > 0 else self.conv(-x).relu()


class KeepsState(WithForward):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = x
        return self.conv(self.body(x)).relu()


class UnderNoGrad(WithForward):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.body(x)
        return self.conv(y).relu()


class TakesList(WithForward):
    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [self.conv(self.body(x)).relu() for x in xs]


class ManyArguments(WithForward):
    def forward(self, *xs: Tensor) -> Tensor:
        return self.conv(self.body(sum(xs))).relu()


class Unregistered(WithForward):
    def __init__(self) -> None:
        super().__init__()
        self.others = [nn.Conv2d(4, 4, 1).double()]

    def forward(self, x: Tensor) -> Tensor:
        return self.others[0](self.body(x)).relu()


@pytest.mark.parametrize(
    "cls", [DataDependent, KeepsState, UnderNoGrad, TakesList, ManyArguments, Unregistered]
)
def test_children_of_an_untraceable_forward_are_fused(cls: type[WithForward]) -> None:
    model = randomise(cls()).double().eval()
    x: Any = [X.double(), X.double() * 2] if cls is TakesList else X.double()
    before = state(model)
    fused = fuse(model)
    assert state(model) == before
    assert sites(fused) == ["conv bn relu"]
    assert "" in explain(fused).untraceable
    assert_close(fused(x), model(x))
    for out, wanted in zip(leaves(fused(x)), leaves(model(x)), strict=True):
        assert out.requires_grad == wanted.requires_grad
    assert fused.calls == model.calls


class Defaults(WithForward):
    def forward(self, x: Tensor, residual: Tensor | None = None, twice: bool = False) -> Tensor:
        y = self.conv(x)
        if residual is not None:
            y = y + residual
        return y.relu() * (2 if twice else 1)


def test_arguments_with_defaults() -> None:
    model = Defaults().double()
    fused = fuse(model)
    x = X.double()
    assert plan_of(fused) is not None
    for args, kwargs in (
        ((x,), {}),
        ((), {"x": x}),
        ((x, x), {}),
        ((x,), {"twice": True}),
        ((x, None, True), {}),
    ):
        assert_close(fused(*args, **kwargs), model(*args, **kwargs))


class AsksForType(WithForward):
    def forward(self, x: Any) -> Tensor:
        if isinstance(x, Tensor):
            return self.conv(x).relu()
        return self.conv(torch.cat(x)).relu() * 3


def test_isinstance_of_an_argument() -> None:
    model = AsksForType().double()
    fused = fuse(model)
    assert "conv relu" in sites(fused)
    assert_close(fused(X.double()), model(X.double()))
    assert_close(fused([X.double()]), model([X.double()]))
    assert "isinstance" not in vars(__import__(__name__, fromlist=["x"]))


class MayBeNone(WithForward):
    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.conv(x).relu()
        return y if mask is None else y * mask


def test_an_argument_that_is_none() -> None:
    model = MayBeNone().double()
    fused = fuse(model)
    assert_close(fused(X.double(), None), model(X.double(), None))
    assert_close(fused(X.double(), X.double()), model(X.double(), X.double()))


class Random(WithForward):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu() + torch.rand(1, dtype=torch.float64)


def test_random_numbers_are_drawn_at_every_call() -> None:
    model = Random().double()
    fused = fuse(model)
    assert "conv relu" in sites(fused)
    torch.manual_seed(3)
    wanted = [model(X.double()) for _ in range(2)]
    torch.manual_seed(3)
    assert_close([fused(X.double()) for _ in range(2)], wanted)


class Output(NamedTuple):
    a: Tensor
    b: Any


RETURNS = {
    "tuple": lambda y: (y, y + 1),
    "list": lambda y: [y, None, 3],
    "dict": lambda y: {"a": y, "b": [y]},
    "OrderedDict": lambda y: collections.OrderedDict(b=y, a=(y, "text")),
    "namedtuple": lambda y: Output(y, {"c": y}),
}


@pytest.mark.parametrize("make", RETURNS.values(), ids=RETURNS)
def test_structured_results_keep_their_types(make: Any) -> None:
    fused = check(net(lambda m, x: make(m.relu(m.bn1(m.conv1(x))))), X)
    assert plan_of(fused) is not None


class TrainModeDiffers(WithForward):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.conv(self.body(x)).relu(), 0.5, self.training)


def test_a_forward_that_differs_in_train_mode() -> None:
    fused = check(TrainModeDiffers(), X)
    assert "conv relu" in sites(fused)
    assert why_stale(fused) is None
    fused.train()
    assert "train mode" in (why_stale(fused) or "")

    # ------------------------------------------------------------------------- changes after fusing


class Scaled(nn.Sequential):
    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(*modules)
        self.gain = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.gain)


class Block(nn.Module):
    """The sum's convolution stands in a submodule, which the block's graph goes through."""

    def __init__(self) -> None:
        super().__init__()
        self.f = Scaled(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.more = nn.ModuleList([nn.Conv2d(4, 4, 1)])
        self.drop = nn.Identity()
        self.relu = nn.ReLU()
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(x + self.drop(self.f(x)))
        for conv in self.more:
            y = conv(y).relu()
        return y * self.scale


def _set(name: str, value: Any) -> Any:
    def change(m: nn.Module) -> None:
        path, _, attribute = name.rpartition(".")
        setattr(m.get_submodule(path), attribute, value)

    return change


EXTRA = nn.Conv2d(4, 4, 1).double()

# Each change, and whether the graph still holds.
CHANGES = {
    "another convolution": (_set("f.0", nn.Conv2d(4, 4, 3, padding=1).double()), True),
    "another norm": (_set("f.3", nn.GroupNorm(2, 4).double()), True),
    "another activation": (_set("relu", nn.Tanh()), True),
    "dropout instead of identity": (_set("drop", nn.Threshold(0.1, 7.0)), False),
    "another submodule": (_set("f", nn.Conv2d(4, 4, 1).double()), False),
    "a longer submodule": (lambda m: m.f.append(nn.Tanh()), False),
    "a longer list": (lambda m: m.more.append(EXTRA), False),
    "an attribute": (_set("scale", 3.0), False),
    "an attribute of the submodule": (_set("f.gain", 2.0), False),
    "the same attribute": (_set("scale", 1.0), True),
    "a new attribute": (_set("note", "x"), True),
    "a hook on the submodule": (
        lambda m: m.f.register_forward_hook(lambda m, x, y: y * 2) and None,
        False,
    ),
    "a hook on the convolution": (
        lambda m: m.f[2].register_forward_hook(lambda m, x, y: y * 2) and None,
        True,
    ),
    "a hook on the relu": (
        lambda m: m.relu.register_forward_hook(lambda m, x, y: y * 2) and None,
        True,
    ),
    "a frozen norm": (lambda m: m.f[3].train() and None, True),
}


@pytest.mark.parametrize(("change", "holds"), CHANGES.values(), ids=CHANGES)
def test_changes_after_fusing_take_effect(change: Any, holds: bool) -> None:
    torch.manual_seed(0)
    model = randomise(Block()).double().eval()
    fused = fuse(model)
    assert sites(fused) == ["conv relu", "conv bn add relu", "conv relu", "conv relu", "conv bn"]
    change(fused)
    change(model)
    assert (why_stale(fused) is None) == holds
    with torch.no_grad():
        assert_close(fused(X.double()), model(X.double()))
    assert_close(copy.deepcopy(fused)(X.double()), model(X.double()))


def test_removing_an_optional_child() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(4, 4, 1), nn.MaxPool2d(2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x).relu()
            return x if self.pool is None else self.pool(x)

    model = Optional().double()
    fused = fuse(model)
    fused.pool = None
    model.pool = None
    assert_close(fused(X.double()), model(X.double()))


def test_hooks_on_inner_modules_fire() -> None:
    model = torchvision.models.resnet18().eval()
    seen: list[str] = []
    model.layer1.register_forward_hook(lambda m, x, y: seen.append("before fusing"))
    fused = fuse(model)
    fused.layer4[1].register_forward_hook(lambda m, x, y: seen.append("layer4.1"))
    fused.avgpool.register_forward_hook(lambda m, x, y: seen.append("avgpool"))
    fused(torch.randn(1, 3, 32, 32))
    assert seen == ["before fusing", "layer4.1", "avgpool"]
    assert not model.avgpool._forward_hooks


def test_submodules_are_fused_on_their_own() -> None:
    model = randomise(torchvision.models.resnet18()).double().eval()
    fused = fuse(model)
    x = torch.randn(1, 64, 8, 8, dtype=torch.float64)
    with torch.no_grad(), fused_resnet.backends.observe() as choices:
        actual = fused.layer2(x)
    assert len(choices) == 5
    assert_close(actual, model.layer2(x))

    # ------------------------------------------------------------------------ life of a fused model


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return randomise(torchvision.models.resnet18(num_classes=10)).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32)


def test_deepcopy_is_fused_and_independent(resnet: nn.Module, images: Tensor) -> None:
    fused = fuse(resnet)
    twin = copy.deepcopy(fused)
    assert sites(twin) == sites(fused)
    with torch.no_grad():
        wanted = fused(images)
        assert torch.equal(twin(images), wanted)
        twin.conv1.weight.zero_()
        assert torch.equal(fused(images), wanted)
        assert not torch.equal(twin(images), wanted)
    shallow = copy.copy(fused)
    assert shallow.conv1 is fused.conv1
    assert torch.equal(shallow(images), wanted)


def test_pickle_and_save_store_the_stock_class(resnet: nn.Module, images: Tensor) -> None:
    fused = fuse(resnet)
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    for loaded in (
        pickle.loads(pickle.dumps(fused)),
        torch.load(buffer, weights_only=False),
        pickle.loads(pickle.dumps(nn.Sequential(fused)))[0],
    ):
        assert isinstance(loaded, torchvision.models.ResNet)
        assert sites(loaded) == sites(fused)
        assert torch.equal(loaded(images), fused(images))
    block = Block().eval()
    again = pickle.loads(pickle.dumps(fuse(block)))
    assert sites(again) == sites(fuse(block))
    assert type(unfuse(again)) is Block


def test_unfuse_gives_the_model_back(resnet: nn.Module, images: Tensor) -> None:
    fused = fuse(resnet)
    stock = unfuse(fused)
    assert [type(m) for m in stock.modules()] == [type(m) for m in resnet.modules()]
    assert [vars(m).keys() for m in stock.modules()] == [vars(m).keys() for m in resnet.modules()]
    assert all(a is b for a, b in zip(stock.parameters(), resnet.parameters(), strict=True))
    assert torch.equal(stock(images), resnet(images))
    assert sites(fused)
    fused.fc = nn.Linear(512, 3)
    assert unfuse(fused)(images).shape == (2, 3)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        unfuse("model")  # type: ignore[type-var]


def test_fusing_twice_changes_nothing(resnet: nn.Module, images: Tensor) -> None:
    fused = fuse(resnet)
    twice = fuse(fused)
    assert sites(twice) == sites(fused)
    assert torch.equal(twice(images), fused(images))
    inside = fuse(nn.Sequential(fused, nn.ReLU()))
    assert sites(inside) == sites(fused)


def test_conversions_leave_the_original_alone(resnet: nn.Module, images: Tensor) -> None:
    wanted = resnet(images)
    before = state(resnet)
    fused = fuse(resnet)
    fused.bfloat16()
    assert all(t.dtype in (torch.bfloat16, torch.int64) for t in fused.state_dict().values())
    assert fused(images.bfloat16()).dtype == torch.bfloat16
    fused.double().to(memory_format=torch.channels_last)
    assert fused(images.double()).dtype == torch.float64
    assert state(resnet) == before
    assert torch.equal(resnet(images), wanted)


def test_conversions_that_change_nothing_keep_the_parameters(resnet: nn.Module) -> None:
    fused = fuse(resnet)
    fused.float().cpu().to(torch.float32)
    assert all(a is b for a, b in zip(fused.parameters(), resnet.parameters(), strict=True))


def test_converted_parameters_stay_tied_and_are_replaced_once() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU())
    model[2].weight = model[0].weight
    model[0].weight.grad = torch.ones(4, 4, 1, 1)
    fused = fuse(model).double()
    assert fused[0].weight is fused[2].weight
    assert fused[0].weight.grad.dtype == torch.float64
    assert model[0].weight.grad.dtype == model[0].weight.dtype == torch.float32
    own = fused[0].weight
    fused.float()
    assert fused[0].weight is own


def test_loading_and_training_reach_both_models(resnet: nn.Module, images: Tensor) -> None:
    model = copy.deepcopy(resnet)
    fused = fuse(model)
    other = randomise(torchvision.models.resnet18(num_classes=10)).eval()
    fused.load_state_dict(other.state_dict())
    torch.testing.assert_close(fused(images), other(images), rtol=1e-4, atol=1e-4)
    optimizer = torch.optim.SGD(fused.parameters(), 1e-3)
    fused.train()(images).square().mean().backward()
    optimizer.step()
    fused.eval()
    assert all(torch.equal(a, b) for a, b in zip(fused.buffers(), model.buffers(), strict=True))
    torch.testing.assert_close(fused(images), model(images), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(images), other(images), rtol=1e-4, atol=1e-4)


def test_fx_traces_a_fused_model_again(images: Tensor) -> None:
    model = randomise(torchvision.models.mobilenet_v2(num_classes=4)).double().eval()
    fused = fuse(model)
    traced = fx.symbolic_trace(fused)
    called = [n for n in traced.graph.nodes if n.target in nodes.FUNCTIONS]
    assert len(called) == len(sites(fused)) - 10  # The inner sequences of ten residual blocks.
    assert_close(traced(images.double()), model(images.double()))


def test_torch_compile_takes_the_whole_graph(images: Tensor) -> None:
    model = randomise(nn.Sequential(Block(), Block())).eval()
    fused = fuse(model)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), model(X))
        torch.testing.assert_close(compiled(X[:1]), model(X[:1]))
    for training in (False, True):
        compiled.train(training)
        model.train(training)
        torch.testing.assert_close(compiled(X), model(X))


def test_torch_compile_takes_a_pooling_that_was_written_as_a_function() -> None:
    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x: Tensor, flag: bool = False) -> Tensor:
            return F.max_pool2d(F.relu(self.bn(self.conv(x))), 2)

    model = randomise(Stem()).eval()
    compiled = torch.compile(fuse(model), fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(compiled(X), model(X))


def test_torch_export(resnet: nn.Module, images: Tensor) -> None:
    fused = fuse(resnet)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(fused, (images,), dynamic_shapes={"x": {0: batch}})
    ops = [n for n in program.graph.nodes if "fused_resnet" in str(n.target)]
    assert len(ops) == 20
    more = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(more), resnet(more), rtol=1e-4, atol=1e-4)


def test_half_precision_and_channels_last(resnet: nn.Module, images: Tensor) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = copy.deepcopy(resnet).to(dtype).to(memory_format=torch.channels_last)
        x = images.to(dtype).to(memory_format=torch.channels_last)
        with torch.no_grad():
            reference = copy.deepcopy(model).double()(x.double())
            stock, actual = error(model(x), reference), error(fuse(model)(x), reference)
        assert actual.within(stock, dtype), (actual, stock)


def test_parametrized_and_weight_normed_convolutions_run_stock() -> None:
    model = TorchvisionLike(nn.BatchNorm2d(4)).double()
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.warns(FusedResNetWarning, match="nothing to fuse"):
        assert sites(check(model, X)) == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old = nn.utils.weight_norm(nn.Conv2d(4, 4, 1))
    model = TorchvisionLike(nn.BatchNorm2d(4), old).double().eval()
    assert_close(fuse(model)(X.double()), model(X.double()))

    # ----------------------------------------------------------------------------- models of others


def test_own_networks_are_fused_by_construction(images: Tensor) -> None:
    model = randomise(fused_resnet.resnet18(num_classes=4)).double().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused = fuse(model)
    assert sites(fused) == []
    assert_close(fused(images.double()), model(images.double()))


def all_fused(model: nn.Module, *kinds: str) -> bool:
    counts = explain(model).counts()
    return all(counts[k][0] == counts[k][1] > 0 for k in kinds)  # type: ignore[index]


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_torchvision_resnets(name: str, images: Tensor) -> None:
    model = getattr(torchvision.models, name)(num_classes=5)
    fused = check(model, images, train=name == "resnet18")
    assert all_fused(fused, "conv", "norm", "act", "add", "maxpool")


def test_segmentation_with_dilated_backbone(images: Tensor) -> None:
    model = torchvision.models.segmentation.deeplabv3_resnet50(
        weights=None, weights_backbone=None, num_classes=3
    )
    fused = check(model, images, train=False)
    assert all_fused(fused, "norm", "act", "add", "maxpool")


@pytest.mark.parametrize("name", ["resnet18", "resnet50d"])
def test_timm(name: str, images: Tensor) -> None:
    model = timm.create_model(name, num_classes=5)
    fused = check(model, images, train=False)
    assert all_fused(fused, "conv", "norm", "act", "add", "maxpool")
    features = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    assert_close(fused.forward_features(features), model.forward_features(features))

    # ------------------------------------------------------------------------------- refused models


@pytest.mark.parametrize("value", [None, "resnet18", torch.ones(1), lambda x: x, nn.ReLU])
def test_what_is_no_module(value: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        fuse(value)


def test_wrapped_scripted_quantised_and_lazy_models_are_refused() -> None:
    model = TorchvisionLike(nn.BatchNorm2d(4))
    with pytest.raises(TypeError, match=r"model\._orig_mod"):
        fuse(torch.compile(model))
    with pytest.raises(TypeError, match=r"model\.module"):
        fuse(nn.DataParallel(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(model)
        quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match="scripted"):
        fuse(scripted)
    with pytest.raises(ValueError, match="quantis"):
        fuse(quantised)
    with pytest.raises(ValueError, match="prepared for quantisation"):
        fuse(torchvision.models.quantization.resnet18())
    with pytest.raises(ValueError, match="run the model once"):
        fuse(nn.Sequential(nn.LazyConv2d(4, 1), nn.ReLU()))


def test_scripted_parts_of_a_model_stay() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        part = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()))
    model = nn.Sequential(part, nn.Conv2d(4, 4, 1), nn.ReLU()).double()
    fused = fuse(model)
    assert sites(fused) == ["conv relu"]
    assert_close(fused(X.double()), model(X.double()))

    # --------------------------------------------------------------------------- programs at random


class Program(nn.Module):
    """Runs a list of instructions on numbered values; in-place ones write to what others read."""

    def __init__(self, code: list[tuple[str, int, int]], results: list[int]) -> None:
        super().__init__()
        self.code, self.results = code, results
        self.convs = nn.ModuleList([nn.Conv2d(3, 3, 1, bias=i == 0) for i in range(2)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(3) for _ in range(2)])
        self.relu = nn.ReLU()
        self.relu_ = nn.ReLU(inplace=True)
        self.identity = nn.Identity()
        self.child = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.writer = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        values = [x]
        for op, i, j in self.code:
            a, b = values[i % len(values)], values[j % len(values)]
            if op == "conv":
                values.append(self.convs[j % 2](a))
            elif op == "norm":
                values.append(self.norms[j % 2](a))
            elif op in ("relu", "relu_", "identity", "child", "writer"):
                values.append(getattr(self, op)(a))
            elif op == "add":
                values.append(a + b)
            elif op == "add_":
                values.append(a.add_(b))
            elif op == "scale_":
                a.mul_(1.5)
            else:
                values.append(a[:, :, :])
        return [values[i % len(values)] for i in self.results]


OPS = (
    *("conv", "norm", "relu", "relu_", "identity", "child", "writer"),
    *("add", "add_", "scale_", "view"),
)
# Most instructions read the latest value, as most code does.
INDEX = st.one_of(st.just(-1), st.just(-1), st.integers(-3, 3))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.sampled_from(OPS), INDEX, INDEX), min_size=2, max_size=10),
    st.lists(INDEX, min_size=1, max_size=2),
)
def test_random_programs(code: list[tuple[str, int, int]], results: list[int]) -> None:
    torch.manual_seed(0)
    model = randomise(Program(code, results)).double().eval()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FusedResNetWarning)
            fused, twin = fuse(model), copy.deepcopy(model)
        for training in (False, True):
            a, b = x.clone(), x.clone()
            model.train(training)
            twin.train(training)
            fused.train(training)
            assert_close(fused(a), twin(b))
            assert_close(a, b)
        for actual, wanted in zip(fused.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(actual, wanted)
