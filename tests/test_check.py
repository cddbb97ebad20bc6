"""`check` finds what is wrong, names where, and lets pass what is right."""

import importlib
import json

import pytest
import torch
from torch import nn

from fused_resnet import backends, ops, zoo
from fused_resnet.backends.torch_ import AtenConv
from fused_resnet.check import agreement, check, compare
from fused_resnet.modules import Bottleneck
from fused_resnet.resnet import ResNet

#: The module, whose name in the package is the function's.
check_module = importlib.import_module("fused_resnet.check")


@pytest.fixture(scope="module")
def x():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pair(x):
    """A fused network and its stock reference, with parameters of their own."""
    reference = zoo.load("cifar_resnet8").model
    zoo.calibrate(reference, x)
    model = zoo.fused("cifar_resnet8", zoo.load("cifar_resnet8").model)
    model.load_state_dict(reference.state_dict())
    return model, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_right_passes(pair, x, dtype):
    report = check(*pair, x, dtype=dtype)
    assert report.passed, str(report)
    assert report.dtype == str(dtype).removeprefix("torch.")
    assert [o.name for o in report.outputs] == ["output"]
    assert report.agreement.images == 3
    assert report.same_function.passed


def test_every_fused_op_has_a_row_with_its_own_and_its_accumulated_error(pair, x):
    report = check(*pair, x)
    convolutions = [n for n, m in pair[0].named_modules() if isinstance(m, nn.Conv2d)]
    assert [row.name for row in report.layers] == convolutions
    last = report.layers[-1]
    assert last.kernel.count("/") == 1
    assert "add_relu" in last.problem
    assert 0 < last.fused.l2 < last.total_fused.l2 < 1e-5
    assert 0 < last.stock.l2 < last.total_stock.l2 < 1e-5


def test_without_layers(pair, x):
    report = check(*pair, x, layers=False)
    assert report.passed
    assert report.layers == ()
    assert report.same_function is None


def test_models_in_another_dtype_are_copies(pair, x):
    check(*pair, x, dtype=torch.bfloat16)
    assert all(next(m.parameters()).dtype == torch.float32 for m in pair)


def test_a_wrong_eps_is_found_even_where_bf16_would_hide_it(pair, x):
    model, reference = pair
    model.layer2[0].bn1.eps = 1.2e-5
    report = check(model, reference, x, dtype=torch.bfloat16)
    assert all(o.passed for o in report.outputs)
    assert all(row.passed for row in report.layers)
    assert not report.same_function.passed
    assert not report.passed
    assert "another input is layer2.0.conv2" in " ".join(report.notes)


def test_a_stride_in_the_wrong_place_is_found(x):
    def network(stride_in_1x1):
        torch.manual_seed(0)
        return ResNet(
            Bottleneck, [1, 1], 10, planes=(8, 16), small_input=True, stride_in_1x1=stride_in_1x1
        ).eval()

    report = check(network(True), network(False), x)
    assert not report.passed
    assert not report.outputs[0].passed
    assert "another input is layer2.0.conv2" in " ".join(report.notes)
    assert "FAILED" in str(report)


class _Wrong(AtenConv):
    """Correct on the small problems it is verified with, off by 1e-3 on this network's."""

    backend, name = "library", "wrong"

    def supports(self, problem, device):
        return None if (problem.h, problem.k) == (16, 32) else "not the problem to spoil"

    def run(self, problem, *args):
        return super().run(problem, *args) * 1.001


@pytest.fixture
def wrong_kernel(monkeypatch):
    monkeypatch.setattr(backends, "KERNELS", (_Wrong(), *backends.KERNELS))
    ops._remembered.clear()
    yield
    ops._remembered.clear()


@pytest.mark.usefixtures("wrong_kernel")
def test_a_wrong_kernel_is_named_and_only_it(pair, x):
    report = check(*pair, x)
    assert not report.passed
    wrong = [row for row in report.layers if not row.passed]
    assert wrong
    assert {row.kernel for row in wrong} == {"library/wrong"}
    assert all(5e-4 < row.fused.l2 < 2e-3 for row in wrong)
    # The graph itself is right, and what stock ATen makes of it too.
    assert report.same_function.passed
    assert report.layers[-1].total_stock.l2 < 1e-5 < report.layers[-1].total_fused.l2
    assert "layer2.0.conv2" in str(report)


class _Around(nn.Module):
    """A model and what is done to its output."""

    def __init__(self, model, then):
        super().__init__()
        self.model = model
        self.then = then
        self.eval()

    def forward(self, x):
        return self.then(self.model(x))


@pytest.mark.usefixtures("wrong_kernel")
def test_an_op_is_judged_by_stock_torch_in_its_own_layout(monkeypatch, pair, x):
    """What stock torch makes of the op in NCHW, be it far off, excuses nothing."""
    stock_conv = check_module.stock_conv

    def off_in_nchw(problem, x, *rest):
        is_last = x.is_contiguous(memory_format=torch.channels_last)
        return stock_conv(problem, x, *rest) * (1.0 if is_last else 1.1)

    monkeypatch.setattr(check_module, "stock_conv", off_in_nchw)
    failed = [row.name for row in check(*pair, x).layers if not row.passed]
    assert failed == ["layer2.0.conv2"]


def test_nan_is_found(pair, x):
    model, reference = pair
    report = check(_Around(model, lambda y: y / 0 * 0), reference, x)
    assert not report.outputs[0].passed
    assert "NaN" in report.outputs[0].note


def test_another_dtype_is_found(pair, x):
    model, reference = pair
    report = check(_Around(model, lambda y: y.double()), reference, x)
    assert "float64, stock torch.float32" in report.outputs[0].note


def test_another_shape_is_found(pair, x):
    model, reference = pair
    report = check(_Around(model, lambda y: y[:, :-1]), reference, x)
    assert "shapes" in report.outputs[0].note
    assert not report.passed


def test_outputs_of_a_structure_are_judged_one_by_one(pair, x):
    def split(y):
        return {"left": y[:, :3], "rest": [y[:, 3:], y.argmax(1)]}

    def spoilt(y):
        return {"left": y[:, :3], "rest": [y[:, 3:] * 1.01, y.argmax(1)]}

    model, reference = pair
    report = check(_Around(model, spoilt), _Around(reference, split), x)
    assert {o.name: o.passed for o in report.outputs} == {"['left']": True, "['rest'][0]": False}
    assert "not judged: ['rest'][1]" in " ".join(report.notes)
    assert report.agreement is None


def test_missing_and_surplus_outputs_are_found():
    t, e = torch.ones(2), torch.ones(2, dtype=torch.float64)
    rows = compare({"a": t, "c": t}, [{"a": t, "b": t}], {"a": e, "b": e})
    assert {r.name: r.passed for r in rows} == {"a": True, "b": False, "c": False}


def test_stock_torchs_error_is_its_largest():
    exact = {"y": torch.ones(8, dtype=torch.float64)}
    lucky, usual, ours = ({"y": torch.ones(8) + k * 1e-5} for k in (0, 1, 2))
    assert not compare(ours, [lucky], exact)[0].passed
    assert compare(ours, [lucky, usual], exact)[0].passed


def test_several_calls_are_judged_together(pair, x):
    report = check(*pair, [x[:1], x[1:], x])
    assert report.passed
    assert report.agreement.images == 6


def test_a_model_that_writes_to_its_input(x):
    torch.manual_seed(0)
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3)).eval()
    given = x.clone()
    assert check(model, model, given).passed
    assert torch.equal(given, x)


def test_a_model_without_fused_ops_is_judged_as_a_whole(x):
    model = nn.Conv2d(3, 4, 3).eval()
    report = check(model, model, x)
    assert report.passed
    assert "no fused op ran" in " ".join(report.notes)


def test_a_model_that_refuses_float64(pair, x):
    def narrow(y):
        if y.dtype == torch.float64:
            raise NotImplementedError("no doubles")
        return y

    model, reference = pair
    report = check(_Around(model, narrow), reference, x)
    assert report.passed
    assert report.same_function is None
    assert "no doubles" in " ".join(report.notes)


def test_agreement_counts_classes():
    exact = torch.eye(8)[:4].double() * 10 + torch.arange(8.0)
    exact = exact.double()
    ours = exact.clone()
    ours[0] = exact[0].flip(0)  # Another best class; of {0, 4..7} only 4 stays among {0..3, 7}.
    found = agreement({"y": ours}, {"y": exact}, {"y": exact})
    assert found.images == 4
    assert (found.fused_top1, found.stock_top1) == (0.75, 1.0)
    assert found.stock_top5 == 1.0
    best, flipped = {0, 7, 6, 5, 4}, {7, 0, 1, 2, 3}
    assert found.fused_top5 == pytest.approx((3 + len(best & flipped) / 5) / 4)


@pytest.mark.parametrize("broken", ["model", "reference"])
def test_train_mode_is_refused(pair, x, broken):
    pair[broken == "reference"].bn1.train()
    with pytest.raises(ValueError, match=f"{broken} is .* train mode"):
        check(*pair, x)


def test_no_inputs(pair):
    with pytest.raises(ValueError, match="at least one input"):
        check(*pair, [])


def test_the_report_is_data(pair, x):
    data = json.loads(json.dumps(check(*pair, x).to_dict()))
    assert data["passed"] is True
    assert data["layers"][0]["name"] == "conv1"
    assert data["outputs"][0]["fused"]["l2"] < 1e-5
