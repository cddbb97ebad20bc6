"""explain: every layer is listed with what became of it, why, and which kernel ran."""

import json
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import fused_resnet
from fused_resnet import backend, explain, fuse
from fused_resnet.explain import Explanation, Row


class Net(nn.Module):
    """One of everything, fused or not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.conv3, self.norm3, self.act3 = nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.SiLU()
        self.conv4 = nn.Conv2d(4, 4, 1)
        self.unused = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        x = F.relu(x + self.bn2(self.conv2(x)))
        y = self.act3(self.norm3(self.conv3(x)))
        z = self.conv4(y)
        return F.relu(y + x) + z * torch.relu(z) + F.conv2d(z, self.conv4.weight)


X = torch.randn(2, 3, 8, 8)


def rows(explanation: Explanation, outcome: str) -> list[tuple[str, str]]:
    return [(r.path, r.type) for r in explanation.rows if r.outcome == outcome]


def row(explanation: Explanation, path: str, kind: str = "") -> Row:
    (found,) = {
        (r.path, r.kind): r for r in explanation.rows if r.path == path and kind in r.kind
    }.values()
    return found


FUSED = [
    ("conv1", "Conv2d"),
    ("bn1", "BatchNorm2d"),
    ("relu", "ReLU"),
    ("pool", "MaxPool2d"),
    ("conv2", "Conv2d"),
    ("bn2", "BatchNorm2d"),
    ("", "add"),
    ("", "relu"),
    ("", "add"),
    ("", "relu"),
]
STOCK = [
    ("conv3", "Conv2d"),
    ("norm3", "GroupNorm"),
    ("act3", "SiLU"),
    ("conv4", "Conv2d"),
    ("", "relu"),
    ("", "add"),
    ("", "conv2d"),
    ("", "add"),
    ("unused", "Conv2d"),
]


def test_a_fused_model_row_by_row() -> None:
    found = explain(fuse(Net().eval()))
    assert rows(found, "fused") == FUSED
    assert rows(found, "stock") == STOCK
    assert found.counts() == {
        "conv": (2, 6),
        "norm": (2, 3),
        "act": (3, 5),
        "add": (2, 4),
        "maxpool": (1, 1),
    }
    assert row(found, "bn1").op == "conv_bn_act_maxpool"
    assert row(found, "bn1").parts == ("conv1", "bn1", "relu", "pool")
    assert row(found, "conv2").parts == ("conv2", "bn2", "add", "relu")
    assert all(r.reason for r in found.rows if r.outcome == "stock")


@pytest.mark.parametrize(
    ("path", "kind", "reason"),
    [
        ("conv3", "", "GroupNorm is not a batch norm"),
        ("norm3", "", "GroupNorm is not a batch norm"),
        ("act3", "", "SiLU is no ReLU"),
        ("conv4", "", "used 3 times"),
        ("unused", "", "not called"),
        ("", "conv", "only modules are fused"),
    ],
)
def test_reasons(path: str, kind: str, reason: str) -> None:
    assert reason in (row(explain(Net().eval()), path, kind).reason or "")


def test_a_stock_model_is_left_alone_and_told_what_fuse_would_do() -> None:
    model = Net().eval()
    found = explain(model)
    assert rows(found, "fusable") == FUSED
    assert "would be fused" in str(found)
    assert type(model) is Net
    assert explain(fuse(model)).counts() == found.counts()


def test_kernels_and_refusals_on_an_example() -> None:
    fused = fuse(Net().eval())
    with backend("library", "torch"):
        found = explain(fused, X)
    conv = row(found, "conv2")
    assert conv.kernel is not None
    assert conv.kernel.startswith("library/")
    assert row(found, "bn2").kernel == conv.kernel
    (last,) = [r for r in found.rows if r.op == "add_relu" and r.kind == "add"]
    assert last.kernel is not None
    double = explain(fused.double(), X.double())
    conv = row(double, "conv1")
    assert conv.kernel == "torch/aten"
    assert "float64" in dict(conv.rejected)["library/onednn"]
    assert row(explain(fuse(Net()).eval()), "conv1").kernel is None


def test_an_example_may_be_all_arguments() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return (self.conv(a) + b).relu()

    found = explain(Two(), (X, X))
    assert row(found, "conv").outcome == "fusable"
    assert row(found, "conv").kernel is not None


def test_a_convolution_called_twice_has_a_row_for_each_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(torch.relu(self.conv(x))))

    with backend("torch"):
        found = explain(fuse(Twice().eval()), X)
    calls = [r for r in found.rows if r.path == "conv"]
    assert [r.parts for r in calls] == [("conv", "relu"), ("conv", "bn")]
    assert all(r.kernel == "torch/aten" for r in calls)


def test_what_runs_stock_at_present() -> None:
    fused = fuse(Net())
    assert "train mode" in (row(explain(fused), "conv1").reason or "")
    fused.eval()
    assert row(explain(fused), "conv1").reason is None
    fused.conv1.register_forward_hook(lambda m, x, y: None)
    assert "hook" in (row(explain(fused), "conv1").reason or "")
    changed = fuse(Net().eval())
    changed.extra = nn.ReLU()
    assert "children were added" in (row(explain(changed), "conv1").reason or "")


def test_running_in_train_mode_leaves_statistics_and_random_state_alone() -> None:
    model = nn.Sequential(Net(), nn.Dropout(0.5)).train()
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    random = torch.get_rng_state()
    explain(model, X)
    explain(fuse(model), X)
    assert torch.equal(torch.get_rng_state(), random)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name])
    assert model.training


def test_a_forward_that_cannot_be_traced() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.body = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            while x.sum() < 0:
                x = self.conv(x) + 1
            return self.body(x)

    found = explain(Loop(), X)
    assert "control flow" in found.untraceable[""]
    assert "cannot be traced" in (row(found, "conv").reason or "")
    assert row(found, "body.0").outcome == "fusable"
    assert row(found, "body.0").kernel is not None
    assert "part by part" in str(found)


def test_parts_of_a_module_that_is_not_looked_into() -> None:
    class NormAct(nn.BatchNorm2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(super().forward(x))

    found = explain(nn.Sequential(nn.Conv2d(3, 4, 1), NormAct(4)))
    assert "overrides the forward" in (row(found, "1").reason or "")
    assert row(found, "1.act").reason == "part of NormAct 1"


def test_own_networks_are_fused_by_construction() -> None:
    found = explain(fused_resnet.resnet50().eval(), torch.randn(1, 3, 32, 32))
    assert found.counts() == {
        "conv": (53, 53),
        "norm": (53, 53),
        "act": (49, 49),
        "add": (16, 16),
        "maxpool": (1, 1),
    }
    for r in found.rows:
        assert (r.outcome, r.reason) == ("fused", "fused by construction")
        assert r.kernel is not None


def test_the_table() -> None:
    model = torchvision.models.resnet18().eval()
    text = str(explain(fuse(model), torch.randn(1, 3, 32, 32)))
    first, header, *lines = text.splitlines()
    assert first == (
        "ResNet: 20 of 20 convolutions, 20 of 20 norms, 17 of 17 activations, 8 of 8 sums, "
        "1 of 1 max-poolings fused"
    )
    assert header.split() == ["path", "type", "outcome", "op", "kernel"]
    assert len(lines) == 20 + 20 + 17 + 8 + 1
    assert "conv_bn_act_maxpool: conv1 + bn1 + relu + maxpool" in lines[0]
    (line,) = [line for line in lines if line.startswith("layer1.0.conv2 ")]
    assert "conv_bn_act: conv2 + bn2 + iadd + relu" in line
    column = header.index("outcome")
    assert all(line[column - 2 : column] == "  " for line in lines)


def test_as_data() -> None:
    found = explain(Net().eval(), X)
    data: Any = json.loads(json.dumps(found.to_dict()))
    assert data["model"] == "Net"
    assert data["counts"]["conv"] == [2, 6]
    assert len(data["rows"]) == len(found.rows)
    assert data["rows"][0]["path"] == found.rows[0].path
    assert data["rows"][0]["parts"] == list(found.rows[0].parts)


def test_nothing_to_fuse() -> None:
    assert "nothing to fuse" in str(explain(nn.Sequential(nn.Linear(2, 2))))
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        explain("resnet18")  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explain(nn.Sequential(nn.Linear(2, 2)), torch.ones(2))
