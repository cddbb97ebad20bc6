"""`predict`: the classes that float64 finds, in order, whatever fails between."""

import csv
import io
import json
import threading

import pytest
import torch
import torchvision
from PIL import Image
from torchvision.models import ResNet18_Weights
from typer.testing import CliRunner

import fused_resnet
from fused_resnet import cli, images, zoo
from fused_resnet.cli import app
from fused_resnet.console import UserError
from fused_resnet.predict import expand, predict, read_categories

runner = CliRunner()
PHOTOS = images.samples()[:3]


def _run(*args):
    return runner.invoke(app, ["predict", *(str(a) for a in args)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A ResNet-18 of 7 classes that are far apart for the photos, and its file."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=7).eval()
    x = torch.stack([_prepared(p) for p in PHOTOS])
    zoo.calibrate(model, x)
    path = tmp_path_factory.mktemp("weights") / "mine.pt"
    torch.save({"state_dict": model.state_dict()}, path)
    return model, path


def _prepared(path):
    with Image.open(path) as photo:
        return ResNet18_Weights.DEFAULT.transforms()(photo.convert("RGB"))


def _exact(model, path):
    with torch.no_grad():
        return model.double()(_prepared(path)[None].double()).softmax(1)[0]


@pytest.fixture
def folder(tmp_path):
    """Two photos, one of them below, and two files that cannot be read."""
    (tmp_path / "b").mkdir()
    for photo, name in zip(PHOTOS, ("a.png", "b/c.png"), strict=False):
        Image.open(photo).convert("RGB").save(tmp_path / name)
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("not a photo")
    return tmp_path


def test_classes_and_probabilities_are_those_of_float64(checkpoint, tmp_path):
    model, path = checkpoint
    file = tmp_path / "p.json"
    result = _run(*PHOTOS, "--model", "resnet18", "--checkpoint", path, "--json", file, "-b", 2)
    assert result.exit_code == 0, result.output
    data = json.loads(file.read_text())
    assert data["weights"] == str(path)
    assert [p["image"] for p in data["predictions"]] == [str(p) for p in PHOTOS]
    for photo, found in zip(PHOTOS, data["predictions"], strict=True):
        expected = _exact(model, photo).topk(5)
        assert [c["index"] for c in found["classes"]] == expected.indices.tolist()
        probabilities = torch.tensor([c["probability"] for c in found["classes"]])
        torch.testing.assert_close(probabilities.double(), expected.values, rtol=1e-4, atol=1e-6)
    lines = result.stdout.splitlines()
    assert lines[0] == str(PHOTOS[0])
    assert lines[1].split()[1:] == ["class", str(data["predictions"][0]["classes"][0]["index"])]


@pytest.mark.filterwarnings("default:the budget of")
def test_a_plan_finds_the_same_classes(checkpoint, tmp_path, monkeypatch):
    model, path = checkpoint
    planned = []

    def optimize(*args, **kwargs):
        planned.append(fused_resnet.optimize(*args, **{**kwargs, "budget": 1.0, "cache": False}))
        return planned[-1]

    monkeypatch.setattr(cli, "optimize", optimize)
    file = tmp_path / "p.json"
    arguments = (*PHOTOS, "-m", "resnet18", "--checkpoint", path, "--json", file, "-b", 2)
    assert _run(*arguments).exit_code == 0
    assert planned == []  # Not for a few photos, unless asked for.
    result = _run(*arguments, "--plan")
    assert result.exit_code == 0, result.output
    assert len(planned) == 1
    for photo, found in zip(PHOTOS, json.loads(file.read_text())["predictions"], strict=True):
        expected = _exact(model, photo).topk(5)
        assert [c["index"] for c in found["classes"]] == expected.indices.tolist()


def test_unreadable_files_are_reported_and_the_rest_is_classified(checkpoint, folder):
    _, path = checkpoint
    arguments = (folder, folder / "missing.jpg", "--model", "resnet18", "--checkpoint", path)
    result = _run(*arguments, "--csv", "-")
    assert result.exit_code == 1
    assert "3 of 5 images could not be read" in result.stderr
    for name in ("broken.png", "text.jpg", "missing.jpg"):
        assert f"{name}: " in result.stderr
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    by_image = {}
    for row in rows:
        by_image.setdefault(row["image"], []).append(row)
    assert [len(by_image[str(folder / n)]) for n in ("a.png", "b/c.png")] == [5, 5]
    assert [r["rank"] for r in by_image[str(folder / "a.png")]] == list("12345")
    [broken] = by_image[str(folder / "broken.png")]
    assert broken["error"]
    assert broken["rank"] == ""


def test_names_of_classes(checkpoint, tmp_path):
    _, path = checkpoint
    labels = tmp_path / "names.json"
    labels.write_text(json.dumps([f"animal {i}" for i in range(7)]))
    result = _run(
        *(PHOTOS[0], "-m", "resnet18", "--checkpoint", path, "--labels", labels),
        *("--top", 2, "--json", "-"),
    )
    assert result.exit_code == 0, result.output
    [found] = json.loads(result.stdout)["predictions"]
    assert len(found["classes"]) == 2
    for c in found["classes"]:
        assert c["name"] == f"animal {c['index']}"


def test_random_weights_are_said_to_be_random():
    result = _run(PHOTOS[0], "-m", "cifar_resnet8", "--weights", "random", "--top", 1)
    assert result.exit_code == 0, result.output
    assert "the weights are random" in result.stderr


def test_the_zoos_names_and_transforms_are_used(monkeypatch):
    entry = ResNet18_Weights.IMAGENET1K_V1
    state = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(type(entry), "get_state_dict", lambda *_args, **_kwargs: state)
    network = zoo.load("resnet18", weights="IMAGENET1K_V1")
    assert network.categories[207] == "golden retriever"
    with Image.open(PHOTOS[0]) as photo:
        torch.testing.assert_close(network.transform(photo), entry.transforms()(photo))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("nowhere.pt", "--checkpoint", "nowhere.pt"), "no checkpoint at nowhere.pt"),
        (("a.jpg", "--weights", "V9"), "unknown weights 'V9'"),
        (("a.jpg", "--weights", "random", "--checkpoint", "x.pt"), "exclude each other"),
        (("a.jpg", "--weights", "random", "--labels", "nowhere.txt"), "cannot read the names"),
        (("a.jpg", "--weights", "random", "--csv", "no/folder.csv"), "there is no folder no"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(args, message):
    result = _run(*args)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stdout == ""


def test_a_network_that_classifies_nothing(tmp_path):
    with pytest.raises(UserError, match=r"this network returns a tensor \[1, 3, 224, 224\]"):
        list(predict(lambda x: x, PHOTOS[:1], images.standard_transform()))


def test_a_checkpoint_that_runs_code_is_refused(tmp_path):
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "code.pt")
    result = _run(PHOTOS[0], "-m", "resnet18", "--checkpoint", tmp_path / "code.pt")
    assert result.exit_code == 2
    assert "refused" in result.stderr


def test_a_few_batches_are_decoded_ahead_and_no_more():
    """However many files there are, what waits is bounded; and their order is kept."""
    begun, lock = [], threading.Lock()

    def transform(_image):
        with lock:
            begun.append(1)
        return torch.zeros(3, 4, 4)

    seen = []

    def classifier(x):
        seen.append(len(begun))
        return torch.zeros(len(x), 2)

    paths = [PHOTOS[0]] * 40
    assert len(list(predict(classifier, paths, transform, batch=4, workers=2))) == 40
    assert len(seen) == 10
    assert all(count <= 4 * (i + 1) + 2 * 4 for i, count in enumerate(seen))


def test_photos_are_turned_upright(tmp_path):
    """The orientation that cameras write beside the pixels is applied."""
    photo = Image.open(PHOTOS[0]).convert("RGB").resize((120, 90))
    exif = Image.Exif()
    exif[0x0112] = 6  # Shown after a quarter turn clockwise.
    photo.save(tmp_path / "turned.png", exif=exif)
    photo.rotate(-90, expand=True).save(tmp_path / "upright.png")
    transform = images.standard_transform()
    a, b = (images.prepare(tmp_path / n, transform) for n in ("turned.png", "upright.png"))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_strip_is_refused_before_it_is_enlarged(tmp_path):
    Image.new("RGB", (10_000, 2)).save(tmp_path / "strip.png")
    found = images.prepare(tmp_path / "strip.png", images.standard_transform())
    assert found == "10000 x 2 pixels are too narrow for a photo"


def test_folders_are_searched_and_files_taken_as_they_are(folder):
    found = expand([folder, folder / "a.png", "as.it.is"])
    names = ["a.png", "b/c.png", "broken.png", "text.jpg"]
    assert [str(p) for p in found] == [*(str(folder / n) for n in names), "as.it.is"]


def test_names_that_are_no_names(tmp_path):
    (tmp_path / "n.json").write_text('{"0": "a"}')
    with pytest.raises(UserError, match="must hold a list of names"):
        read_categories(tmp_path / "n.json")
    (tmp_path / "n.txt").write_text("cat\ndog\n")
    assert read_categories(tmp_path / "n.txt") == ("cat", "dog")
