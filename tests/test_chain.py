"""Finding chains of bottlenecks in models, and running them; on the CPU by stock operations."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

import fused_resnet
from fused_resnet import backends, chain, explain, find_chains, fuse
from fused_resnet.backends import triton_
from fused_resnet.backends.torch_ import AtenChain
from fused_resnet.chain import run_link
from fused_resnet.problem import ChainProblem
from tests.helpers import assert_within_rule

MODELS: dict[str, Callable[[], nn.Module]] = {
    "torchvision": torchvision.models.resnet50,
    "timm": lambda: timm.create_model("resnet50"),
    "own": fused_resnet.resnet50,
    "fused": lambda: fuse(torchvision.models.resnet50().eval()),
    "wide": torchvision.models.wide_resnet50_2,
}


def randomised(model: nn.Module) -> nn.Module:
    """Norms with statistics and parameters that are not the identity; in eval mode."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for t, low, high in (
                (module.weight, 0.5, 1.0), (module.bias, -0.2, 0.2),
                (module.running_mean, -0.2, 0.2), (module.running_var, 0.5, 2.0),
            ):  # fmt: skip
                t.data.uniform_(low, high, generator=generator)
    return model.eval()


class Net(nn.Module):
    """A small bottleneck network: two stages, average pool, classifier."""

    def __init__(self, block: type[nn.Module] = Bottleneck, **options: object) -> None:
        super().__init__()
        make = torchvision.models.ResNet._make_layer
        self._norm_layer, self.dilation = nn.BatchNorm2d, 1
        self.groups, self.base_width, self.inplanes = 1, 64, 8
        vars(self).update(options)
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.layer1 = make(self, block, 4, 2)
        self.layer2 = make(self, block, 8, 2, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.stem(x)))
        return self.fc(self.avgpool(x).flatten(1))


def small(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return randomised(Net(**options))


@pytest.mark.parametrize("name", MODELS)
def test_all_of_a_resnet_is_one_chain(name: str) -> None:
    (found,) = find_chains(MODELS[name]())
    assert found.reason is None
    assert len(found.links) == 16
    stores = {link.path: link.store for link in found.links if link.store != "all"}
    prefix = {"layer1.2": "even", "layer2.3": "even", "layer3.5": "even", "layer4.2": "pool"}
    assert stores == {f"{path}.conv2": store for path, store in prefix.items()}
    assert sum(link.projection is not None for link in found.links) == 4
    assert found.links[0].following == ("layer1.1.conv1", "layer1.1.bn1")
    assert found.links[-1].following is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [16, 17])
def test_the_chained_model_is_right(size: int, dtype: torch.dtype) -> None:
    model = small()
    chained = chain(copy.deepcopy(model).to(dtype))
    x = torch.randn(2, 3, size, size + 2).to(dtype)
    with torch.inference_mode(), backends.observe() as choices:
        result = chained(x)
    with torch.inference_mode():
        rounded = copy.deepcopy(model).to(dtype)
        reference = copy.deepcopy(rounded).double()(x.double())
        assert_within_rule(result, reference, rounded(x), dtype)
    assert [c.kernel.op for c in choices].count("bottleneck_chain") == 4
    assert [c.problem.store for c in choices if c.kernel.op == "bottleneck_chain"] == [
        "all", "even", "all", "pool",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_whole_networks(name: str) -> None:
    model = randomised(MODELS[name]())
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        stock = fused_resnet.unfuse(model)
        reference = copy.deepcopy(stock).double()(x.double())
        assert_within_rule(chain(model)(x), reference, stock(x), torch.float32)


def test_projections_of_pooled_pixels() -> None:
    """ResNet-D: an average pool comes before the strided projections."""
    model = randomised(timm.create_model("resnet26d"))
    (found,) = find_chains(model)
    assert len(found.links) == 8
    x = torch.randn(1, 3, 48, 64)
    with torch.inference_mode():
        reference = copy.deepcopy(model).double()(x.double())
        assert_within_rule(chain(model)(x), reference, model(x), torch.float32)


def test_parameters_are_shared_and_changes_followed() -> None:
    model = small()
    chained = chain(model)
    names = dict(model.named_parameters())
    mine = {id(p) for p in chained.parameters()}
    assert mine == {id(p) for p in names.values()}
    x = torch.randn(1, 3, 12, 12)
    with torch.no_grad():
        chained(x)
        names["layer1.0.conv2.weight"].mul_(2)
        torch.testing.assert_close(chained(x), model(x))


def test_the_model_itself_is_left_alone() -> None:
    model = fuse(small())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    chain(model)
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_features_keep_all_pixels_and_their_structure() -> None:
    model = randomised(timm.create_model("resnet26", features_only=True))
    (found,) = find_chains(model)
    assert all(link.store == "all" for link in found.links)
    assert "the model's output reads them" in str(found)
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        for result, right in zip(chain(model)(x), model(x), strict=True):
            torch.testing.assert_close(result, right, rtol=1e-3, atol=1e-3)


def reason_of(model: nn.Module, path: str) -> str:
    return next(str(c.reason) for c in find_chains(model) if c.path.startswith(path))


def test_what_cannot_be_chained_is_explained() -> None:
    resnext = torchvision.models.resnext50_32x4d()
    assert "32 groups" in reason_of(resnext, "layer1.0")
    dilated = torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True])
    assert "dilation (2, 2)" in reason_of(dilated, "layer4.1")
    assert "sum with the shortcut" in reason_of(timm.create_model("seresnet50"), "layer1.0")
    smoothed = timm.create_model("resnetaa50")
    assert "its 3x3 is read by layer2.0.aa" in reason_of(smoothed, "layer2.0")
    assert [len(c.links) for c in find_chains(smoothed)] == [3, 0, 3, 0, 5, 0, 2]
    first = fused_resnet.ResNet(fused_resnet.Bottleneck, [2, 2, 2, 2], stride_in_1x1=True)
    notes = [note for c in find_chains(first) for link in c.links for note in link.notes]
    assert "the next block's 1x1 has stride 2 (ResNet v1)" in notes
    assert find_chains(torchvision.models.resnet18()) == []
    with pytest.raises(ValueError, match="32 groups"):
        chain(resnext)
    with pytest.raises(ValueError, match="no bottlenecks"):
        chain(torchvision.models.resnet18())


@pytest.mark.parametrize("part", ["layer1.0.conv2", "layer1.0.bn3", "layer1.0.relu", "layer1.0"])
def test_hooks_are_kept_and_explained(part: str) -> None:
    model = small()
    seen = []
    handle = model.get_submodule(part).register_forward_hook(lambda *args: seen.append(args[2]))
    chains = find_chains(model)
    assert "hook" in next(str(c.reason) for c in chains if c.path.startswith("layer1.0"))
    assert sum(len(c.links) for c in chains) == 3
    x = torch.randn(1, 3, 12, 12)
    with torch.inference_mode():
        result = chain(model)(x)
        assert seen
        torch.testing.assert_close(result, model(x))
    handle.remove()
    assert sum(len(c.links) for c in find_chains(model)) == 4


def test_inference_only() -> None:
    chained = chain(small())
    x = torch.randn(1, 3, 12, 12)
    with pytest.raises(RuntimeError, match="no gradient"):
        chained(x)
    chained.train()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"call .eval\(\) first"):
        chained(x)
    with pytest.raises(TypeError, match="takes x, got 2 inputs"):
        chained(x, x)


def test_compile_and_export() -> None:
    chained = chain(small())
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        expected = chained(x)
        compiled = torch.compile(chained, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
        exported = torch.export.export(chained, (x,)).module()
        torch.testing.assert_close(exported(x), expected)


def test_explain_shows_chains() -> None:
    text = str(explain(small()))
    assert "layer1.0.conv2 to layer2.1.conv2: 4 bottlenecks" in text
    text = str(explain(torchvision.models.resnext50_32x4d()))
    assert "layer1.0.conv2 and 15 more: not chained, its 3x3 has 32 groups" in text
    assert explain(small()).to_dict()["chains"][0]["links"][1]["store"] == "even"


def test_only_what_has_a_kernel_is_chained_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if triton_.UNAVAILABLE is not None:
        pytest.skip(triton_.UNAVAILABLE)
    from fused_resnet.backends.triton_ import chain_kernel
    from fused_resnet.backends.triton_.config import ARCHS

    monkeypatch.setattr(chain_kernel, "refusal", lambda dtype, device: None)
    cuda = torch.device("cuda", 0)
    # Whether the projections of 64, 256 and 512 channels are computed within the kernel.
    for arch, inside in ((ARCHS[0], [True, True, True]), (ARCHS[3], [True, True, False])):
        monkeypatch.setattr(chain_kernel, "arch_of", lambda device, arch=arch: arch)
        chained = chain(torchvision.models.resnet50().half().eval(), device=cuda)
        chained_links = [link for found in chained.chains for link in found.links]
        assert len(chained_links) == 13  # Those of 512 channels are not.
        assert chained_links[-1].following is None
        refused = [c.reason for c in chained.chains if c.reason is not None]
        assert len(refused) == 3
        assert "not of 512" in refused[0]
        calls = [n for n in chained.body.graph.nodes if n.target is run_link]
        assert [n.args[-2] for n in calls if n.args[6] is not None] == inside
    with pytest.raises(ValueError, match=r"not torch.float32"):
        chain(torchvision.models.resnet50().eval(), device=cuda)


def test_a_chained_model_can_be_copied() -> None:
    chained = chain(small())
    x = torch.randn(1, 3, 12, 12)
    with torch.no_grad():
        for other in (copy.deepcopy(chained), pickle.loads(pickle.dumps(chained))):
            torch.testing.assert_close(other(x), chained(x))


# ------------------------------------------------------------------------------- beside other tools


def test_check_judges_every_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = randomised(Net()), torch.randn(2, 3, 16, 16)
    chained = chain(model)
    report = fused_resnet.check(chained, model, x)
    assert report.passed
    assert sum("chain" in row.problem for row in report.layers) == len(chained.chains[0].links)

    right = AtenChain.run

    def wrong(self: AtenChain, problem: ChainProblem, *args: Tensor) -> tuple[Tensor, Tensor]:
        out, following = right(self, problem, *args)
        return out, following * 1.001

    monkeypatch.setattr(AtenChain, "run", wrong)
    report = fused_resnet.check(chained, model, x)
    assert not report.passed
    assert any(not row.passed for row in report.layers if "chain" in row.problem)
