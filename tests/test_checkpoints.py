"""Weights by name and by path: torchvision's loading code, files of tensors, nothing else."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import ResNet18_Weights, ResNet50_Weights

import fused_resnet
from fused_resnet.checkpoints import load_file, torchvision_entry

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(3)
    return fused_resnet.resnet18(num_classes=4)


def same(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = model.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("nested", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_torch_files(tmp_path: Path, model, nested: str | None, prefix: str) -> None:
    state = {prefix + k: v for k, v in model.state_dict().items()}
    path = tmp_path / "weights.pth"
    torch.save(state if nested is None else {nested: state, "epoch": 3}, path)
    assert same(fused_resnet.resnet18(num_classes=4, weights=path), model)
    assert same(fused_resnet.resnet18(num_classes=4, weights=str(path)), model)


def test_safetensors_files(tmp_path: Path, model) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    assert same(fused_resnet.resnet18(num_classes=4, weights=path), model)


def test_features_only_leaves_the_classifier_out(tmp_path: Path, model) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    features = fused_resnet.resnet18(weights=path, features_only=True)
    assert torch.equal(features.layer4[1].conv2.weight, model.layer4[1].conv2.weight)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_malicious_pickles_are_refused(tmp_path: Path, suffix: str) -> None:
    trace = tmp_path / "executed"
    for name, save in (("new", torch.save), ("raw", pickle.dump)):
        path = tmp_path / f"{name}{suffix}"
        with path.open("wb") as f:
            save({"state_dict": Malicious(trace)}, f)
        with pytest.raises(ValueError, match="refused: it holds more than tensors"):
            fused_resnet.resnet18(weights=path)
    assert not trace.exists()


def test_damaged_files(tmp_path: Path, model) -> None:
    whole = tmp_path / "whole.pth"
    torch.save(model.state_dict(), whole)
    cut = tmp_path / "cut.pth"
    cut.write_bytes(whole.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cut\.pth"):
        load_file(cut)
    empty = tmp_path / "empty.safetensors"
    empty.write_bytes(b"")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_file(empty)
    torch.save([1, 2, 3], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"holds no state_dict.*found list"):
        load_file(tmp_path / "list.pth")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*absent\.pth"):
        fused_resnet.resnet18(weights=tmp_path / "absent.pth")


def test_another_networks_weights(tmp_path: Path, model) -> None:
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    with pytest.raises(RuntimeError, match=r"fc\.weight"):
        fused_resnet.resnet18(num_classes=5, weights=path)


def test_torchvision_names() -> None:
    entry = ResNet50_Weights.IMAGENET1K_V2
    for name in (entry, "IMAGENET1K_V2", "ResNet50_Weights.IMAGENET1K_V2", "DEFAULT"):
        assert torchvision_entry("resnet50", name) is entry
    with pytest.raises(ValueError, match="available: IMAGENET1K_V1, IMAGENET1K_V2"):
        torchvision_entry("resnet50", "IMAGENET21K")
    with pytest.raises(ValueError, match="are not weights of resnet50"):
        torchvision_entry("resnet50", ResNet18_Weights.DEFAULT)
    with pytest.raises(ValueError, match="no weights for plain18"):
        fused_resnet.plain18(weights="DEFAULT")


def test_torchvision_weights_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real download code is called, and its state_dict is loaded strictly."""
    torch.manual_seed(5)
    zoo = fused_resnet.resnet18()
    asked = []

    def download(url: str, *args, **kwargs):
        asked.append((url, kwargs))
        return zoo.state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    loaded = fused_resnet.resnet18(weights="IMAGENET1K_V1", progress=False)
    assert same(loaded, zoo)
    ((url, kwargs),) = asked
    assert url == ResNet18_Weights.IMAGENET1K_V1.url
    assert kwargs["check_hash"] is True
    assert kwargs["progress"] is False
    with pytest.raises(ValueError, match="1000 classes, but num_classes=10"):
        fused_resnet.resnet18(weights="IMAGENET1K_V1", num_classes=10)
