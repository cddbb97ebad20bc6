"""Photos: torchvision's preprocessing, rotation, unreadable files, and what is missing."""

import importlib.util
import sys

import pytest
import torch
from PIL import Image
from torchvision.models import ResNet50_Weights

from fused_resnet import images
from fused_resnet.console import UserError


@pytest.fixture
def folder(tmp_path):
    """Two photos (one grey, one below), a truncated one, one that is text, and a file of notes."""
    (tmp_path / "below").mkdir()
    Image.effect_noise((70, 90), 50).save(tmp_path / "below" / "grey.PNG")
    Image.linear_gradient("L").convert("RGB").resize((120, 80)).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "notes.txt").write_text("to be left alone")
    return tmp_path


def test_samples_need_no_download():
    found = images.samples()
    assert len(found) >= 4
    assert all(path.is_file() for path in found)


def test_preprocessing_is_that_of_torchvisions_weights():
    with Image.open(images.samples()[0]) as photo:
        photo = photo.convert("RGB")
        expected = ResNet50_Weights.IMAGENET1K_V1.transforms()(photo)
        torch.testing.assert_close(images.standard_transform()(photo), expected)


def test_photos_of_a_folder(folder):
    photos = images.load(folder, transform=images.standard_transform(32))
    assert photos.names == ("a.jpg", "grey.PNG")
    assert photos.pixels.shape == (2, 3, 32, 32)
    assert photos.pixels.dtype == torch.float32


def test_unreadable_files_are_reported_and_skipped(folder):
    photos = images.load(folder, transform=images.standard_transform(32))
    reasons = dict(photos.skipped)
    assert reasons.keys() == {"broken.jpg", "text.png"}
    assert "truncated" in reasons["broken.jpg"].lower()
    assert "cannot identify" in reasons["text.png"]


def test_the_limit_counts_files(folder):
    photos = images.load(folder, transform=images.standard_transform(32), limit=1)
    assert photos.names == ("a.jpg",)
    assert photos.skipped == ()


def test_batches_go_round_and_every_second_round_is_mirrored(folder):
    photos = images.load(folder, transform=images.standard_transform(32))
    a, b = photos.pixels
    assert torch.equal(photos.batch(5), torch.stack([a, b, a.flip(-1), b.flip(-1), a]))
    assert torch.equal(photos.batch(2, first=3), torch.stack([b.flip(-1), a]))


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        images.load(tmp_path / "nowhere")


def test_a_folder_without_photos(tmp_path):
    with pytest.raises(UserError, match="no photos in"):
        images.load(tmp_path)


def test_a_folder_with_nothing_readable(tmp_path):
    (tmp_path / "x.png").write_text("no")
    with pytest.raises(UserError, match=r"none of the 1 .* x\.png: cannot identify"):
        images.load(tmp_path)


def test_missing_scikit_image_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r'pip install "fused-resnet\[bench\]"'):
        images.samples()


def test_missing_torchvision_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    with pytest.raises(UserError, match=r'pip install "fused-resnet\[bench\]"'):
        images.standard_transform()
