"""Two workers on a local cluster of two nodes; one is killed, and some photos are broken."""

import csv
import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray", reason='Ray is not installed: pip install "ray[data]"')
if importlib.util.find_spec("pyarrow") is None:
    pytest.skip('Ray Data is not installed: pip install "ray[data]"', allow_module_level=True)

import ray
import torch
import torchvision
from PIL import Image
from ray.cluster_utils import Cluster

from fused_resnet import images, zoo

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from classify import Classifier, classify


def killed_once(marker):
    """A kind of worker that is killed at the end of a batch, once on this machine."""

    class KilledOnce(Classifier):
        def __call__(self, batch):
            found = super().__call__(batch)
            # The batch went through the plan, not through the fused model.
            assert any(s.startswith(f"{len(batch['image'])}x3x224x224") for s in self.plan.shapes)
            if not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return found

    return KilledOnce


@pytest.fixture(scope="module")
def cluster():
    paths = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    nodes.add_node(num_cpus=2)
    ray.init(nodes.address, runtime_env={"env_vars": {"PYTHONPATH": paths}}, logging_level="error")
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=7).eval()
    zoo.calibrate(model, images.load().pixels)
    path = tmp_path_factory.mktemp("weights") / "mine.pt"
    torch.save(model.state_dict(), path)
    return model, path


@pytest.fixture
def photos(tmp_path):
    """Twenty photos, crops of real ones, and two files that cannot be read."""
    for i, path in enumerate(images.samples() * 4):
        if i < 20:
            photo = Image.open(path).convert("RGB")
            w, h = photo.size
            photo.crop((8 * i, 4 * i, w, h)).save(tmp_path / f"{i:02}.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "00.png").read_bytes()[:2000])
    (tmp_path / "text.jpg").write_text("not a photo")
    return sorted(tmp_path.iterdir())


@pytest.mark.usefixtures("cluster")
def test_nothing_is_lost_or_doubled_when_a_worker_dies(photos, checkpoint, tmp_path):
    model, weights = checkpoint
    marker = tmp_path.parent / f"{tmp_path.name}-killed"
    output = tmp_path.parent / f"{tmp_path.name}.csv"
    failed = classify(
        photos,
        output,
        model="resnet18",
        weights=str(weights),
        batch=4,
        budget=0.0,
        classifier=killed_once(marker),
    )
    assert marker.exists()
    assert failed == 2
    with output.open() as stream:
        rows = {row["image"]: row for row in csv.DictReader(stream)}
    assert sorted(rows) == [str(p) for p in photos]
    assert len(output.read_text().splitlines()) == 1 + len(photos)
    transform = images.standard_transform()
    model.double()
    for path in photos:
        row = rows[str(path)]
        if path.name in ("broken.png", "text.jpg"):
            assert row["error"]
            assert row["index"] == "-1"
            continue
        with torch.no_grad():
            exact = model(images.prepare(path, transform)[None].double()).softmax(1)[0]
        assert int(row["index"]) == exact.argmax().item()
        assert float(row["probability"]) == pytest.approx(exact.max().item(), rel=1e-4)
