"""Models written by hand, and models in whatever state they are found."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torchvision.models import quantization

import fused_resnet
from fused_resnet import check, explain, fuse, unfuse
from fused_resnet.numerics import error
from tests.families import conv_norm_pairs, freeze, state, tensors
from tests.helpers import randomise
from tests.unet import PlainUNet


class HandWritten(nn.Module):
    """What style guides warn of: functional calls, shared modules, branches, dropout, a bias."""

    def __init__(self, channels: int = 8, classes: int = 4) -> None:
        super().__init__()
        c = channels
        self.stem = nn.Conv2d(3, c, 3, padding=1)  # With a bias, in front of a norm.
        self.shared = nn.Conv2d(c, c, 3, padding=1, bias=False)  # Called twice.
        self.norm = nn.BatchNorm2d(c)  # Behind three convolutions.
        self.relu = nn.ReLU(inplace=True)  # Everywhere.
        self.wide = nn.Conv2d(c, c, (1, 5), padding="same", padding_mode="reflect")
        self.dropout = nn.Dropout2d(0.5)
        self.kernel = nn.Parameter(torch.randn(c, c, 1, 1) / c**0.5)
        self.classes = nn.Conv2d(c, classes, 1)
        self.deep = True

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        y = F.relu(self.norm(self.shared(x)))
        y = self.norm(self.shared(y)) + x
        y = F.dropout(torch.relu(y), 0.1, self.training)
        if self.deep:
            y = self.dropout(self.relu(self.wide(y)))
        y = F.conv2d(y, self.kernel)
        y = F.relu(y * scale)
        return F.adaptive_avg_pool2d(self.classes(y), 1).flatten(1)


class NormAct(nn.Module):
    """timm's norms with an activation of their own wherever a site can have a norm."""

    def __init__(self, act: type[nn.Module] = nn.ReLU, drop: type[nn.Module] | None = None) -> None:
        super().__init__()

        def norm(**options: Any) -> nn.Module:
            return BatchNormAct2d(8, act_layer=act, drop_layer=drop, **options)

        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), norm()
        self.pool = nn.MaxPool2d(2)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), norm(apply_act=False)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 3, padding=1, bias=False), norm()
        self.conv4, self.bn4 = nn.Conv2d(8, 8, 1), norm()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.bn1(self.conv1(x)))  # The norm's ReLU, then a pooling.
        x = self.relu(self.bn2(self.conv2(x)) + x)  # No activation of its own.
        x = self.relu(self.bn3(self.conv3(x)) + x)  # One before the sum and one behind it.
        return self.bn4(self.conv4(x)) + x  # One before a sum that nothing follows.


MODELS = {
    "hand-written": HandWritten,
    "U-Net": lambda: PlainUNet(3, 4, 8),
    "norms with ReLU": NormAct,
    "norms with SiLU": lambda: NormAct(nn.SiLU),
    "norms with dropout": lambda: NormAct(nn.ReLU, nn.Dropout),
    "frozen norms with ReLU": lambda: freeze_batch_norm_2d(NormAct()),
    "synchronised norms with ReLU": lambda: convert_sync_batchnorm(NormAct()),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return randomise(request.param())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 16, 16)


def step(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    """Everything that a training step computes."""
    torch.manual_seed(3)
    out = tensors(model(x))
    torch.stack([o.square().mean() for o in out]).sum().backward()
    return [*out, *(p.grad for p in model.parameters()), *model.buffers()]


def test_models_are_right_and_left_alone(model: nn.Module, x: Tensor) -> None:
    before = state(model.eval())
    fused = fuse(model)
    report = check(fused, model, x)
    assert report.passed, report
    assert state(model) == before
    assert all(row.reason for row in explain(fused).rows if row.outcome == "stock")
    assert [*map(id, fused.parameters())] == [*map(id, model.parameters())]


@pytest.mark.parametrize("training", [True, False])
def test_a_training_step_is_stock_torchs(model: nn.Module, x: Tensor, training: bool) -> None:
    if training and any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
        pytest.skip("SyncBatchNorm trains on GPUs only")
    model = model.double().train(training)
    results = [step(make(copy.deepcopy(model)), x.double()) for make in (fuse, lambda m: m)]
    for actual, wanted in zip(*results, strict=True):
        assert (actual is None) == (wanted is None)
        if actual is not None:
            torch.testing.assert_close(actual, wanted)


def test_a_model_in_train_mode_stays_so_and_can_be_evaluated(model: nn.Module, x: Tensor) -> None:
    fused = fuse(model.train())
    assert all(m.training for m in (*fused.modules(), *model.modules()))
    report = check(fused.eval(), model.eval(), x)
    assert report.passed, report


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_half_precision_and_both_layouts(
    model: nn.Module, x: Tensor, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    model = model.eval().to(dtype).to(memory_format=layout)
    x = x.to(dtype).to(memory_format=layout)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        actual, stock = fuse(model)(x), model(x)
    assert actual.dtype == stock.dtype == dtype
    assert error(actual, exact).within(error(stock, exact), dtype)


def outcomes(model: nn.Module) -> dict[str, str]:
    """What became of each call, by path; several calls of one module are separated by commas."""
    found: dict[str, str] = {}
    for row in explain(model).rows:
        before = f"{found[row.path]}, " if row.path in found else ""
        found[row.path] = before + (row.op or row.reason or "")
    return found


def test_what_is_fused_of_a_hand_written_model() -> None:
    model = HandWritten().eval()
    fused = fuse(model)
    assert explain(fused).counts()["conv"] == (4, 6)
    assert explain(fused).counts()["norm"] == (3, 3)
    assert explain(fused).counts()["add"] == (1, 1)
    found = outcomes(fused)
    assert found["shared"] == "conv_bn_act, conv_bn_act"
    assert found["wide"] == "conv_bn_act"
    assert found["classes"] == "alone: followed by adaptive_avg_pool2d"
    pairs = conv_norm_pairs(model, torch.randn(1, 3, 8, 8))
    assert pairs == {("stem", "norm"), ("shared", "norm")}


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU])
def test_what_is_fused_of_norms_with_activations(act: type[nn.Module]) -> None:
    fused = fuse(NormAct(act).eval())
    counts, found = explain(fused).counts(), outcomes(fused)
    assert counts["conv"] == counts["norm"] == (4, 4)
    assert found["bn2"] == "conv_bn_act"
    if act is nn.ReLU:
        assert counts["act"] == (5, 5)
        assert counts["add"] == (2, 3)
        assert found["bn1.act"] == found["pool"] == "conv_bn_act_maxpool"
        assert explain(fused, torch.randn(1, 3, 8, 8)).rows[4].kernel is not None
    else:
        assert found["bn1.act"] == "SiLU is no ReLU; it runs behind the fused rest"
        assert found["pool"].startswith("not behind a fused ReLU")


def test_the_activation_of_a_norm_can_be_exchanged_later(x: Tensor) -> None:
    model = randomise(NormAct()).eval()
    fused = fuse(model)
    for act in (nn.SiLU().eval(), nn.Identity().eval(), nn.ReLU().eval()):
        for m in (model, fused):
            for norm in (m.bn1, m.bn2, m.bn3, m.bn4):
                norm.act = act
        report = check(fused, model, x)
        assert report.passed, (act, report)


def test_hooks_on_the_activation_of_a_norm_fire(x: Tensor) -> None:
    model = randomise(NormAct()).eval()
    fused = fuse(model)
    seen: list[Tensor] = []
    fused.bn1.act.register_forward_hook(lambda m, args, out: seen.append(out.clone()))
    fused.bn3.act.register_forward_hook(lambda m, args, out: out + 1)
    unfused = unfuse(fused)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), unfused(x))
    assert len(seen) == 2


def test_a_norm_that_derives_from_timms_stays_stock(x: Tensor) -> None:
    class Doubled(BatchNormAct2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), Doubled(8))).eval()
    with pytest.warns(fused_resnet.FusedResNetWarning, match="nothing to fuse"):
        fused = fuse(model)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))
    assert "overrides the forward" in (explain(fused).rows[1].reason or "")


@pytest.mark.parametrize("frozen", [True, False])
def test_autocast_gives_the_dtypes_that_stock_gives(frozen: bool, x: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
    model = (freeze(randomise(model)) if frozen else randomise(model)).eval()
    for part in (model, model[:3]):
        exact = copy.deepcopy(part).double()(x.double())
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            actual, stock = fuse(part)(x), part(x)
        assert actual.dtype == stock.dtype
        assert error(actual, exact).within(error(stock, exact), stock.dtype)


def test_norms_with_activations_compile(x: Tensor) -> None:
    model = randomise(NormAct()).eval()
    torch._dynamo.reset()
    compiled = torch.compile(fuse(model), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


# --------------------------------------------------------------------------------------------------
# What is refused, and how it is said.
# --------------------------------------------------------------------------------------------------


def _quiet(function: Any, *args: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args)


REFUSED = {
    "quantizable": (lambda: quantization.resnet18(), ValueError, "prepared for quantisation"),
    "quantised": (
        lambda: _quiet(torch.ao.quantization.quantize_dynamic, nn.Sequential(nn.Linear(2, 2))),
        ValueError,
        "quantised models",
    ),
    "scripted": (lambda: _quiet(torch.jit.script, PlainUNet(3, 2, 4)), TypeError, "scripted"),
    "traced": (
        lambda: _quiet(torch.jit.trace, PlainUNet(3, 2, 4).eval(), torch.ones(1, 3, 8, 8)),
        TypeError,
        "scripted or traced",
    ),
    "compiled": (lambda: torch.compile(PlainUNet(3, 2, 4)), TypeError, r"model\._orig_mod"),
    "data parallel": (lambda: nn.DataParallel(PlainUNet(3, 2, 4)), TypeError, r"model\.module"),
}


@pytest.mark.parametrize(("make", "kind", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("function", [fuse, explain])
def test_refused_with_a_clear_error(make: Any, kind: Any, message: str, function: Any) -> None:
    with pytest.raises(kind, match=message):
        function(make())


@pytest.mark.parametrize(
    "name", ["googlenet", "inception_v3", "mobilenet_v2", "shufflenet_v2_x1_0"]
)
@pytest.mark.slow
def test_every_quantizable_network_is_refused(name: str) -> None:
    options = {} if "net_v2" in name else {"init_weights": False}
    with pytest.raises(ValueError, match="float variant"):
        fuse(getattr(quantization, name)(**options))


def test_a_wrapped_model_is_fused_inside(x: Tensor) -> None:
    model = randomise(torchvision.models.resnet18(num_classes=3)).eval()
    wrapped = nn.DataParallel(model)
    wrapped.module = fuse(wrapped.module)
    with torch.no_grad():
        torch.testing.assert_close(wrapped(x), model(x), rtol=1e-4, atol=1e-4)
    # A model compiled in place (module.compile()) keeps no trace of it in what it computes.
    in_place = copy.deepcopy(model)
    in_place.compile(backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(fuse(in_place)(x), model(x), rtol=1e-4, atol=1e-4)


def test_features_of_a_timm_model() -> None:
    model = randomise(timm.create_model("regnety_002", features_only=True)).eval()
    report = check(fuse(model), model, torch.randn(2, 3, 64, 64))
    assert len(report.outputs) == 5
    assert report.passed, report
