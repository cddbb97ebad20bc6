"""The server over loopback: photos in parallel, and requests that are none."""

import io
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("litserve", reason="LitServe is not installed: pip install litserve")
httpx = pytest.importorskip("httpx", reason="httpx is not installed: pip install httpx")

import torch
import torchvision
from PIL import Image

from fused_resnet import images, zoo

HERE = Path(__file__).parent
MAX_BYTES = 3_000_000

#: Seconds for an answer: plans for new batch sizes are made meanwhile, on what machine ever.
_PATIENCE = 300


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=7).eval()
    zoo.calibrate(model, images.load().pixels)
    return model


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """The address that takes photos, and the process behind it."""
    folder = tmp_path_factory.mktemp("serve")
    torch.save(model.state_dict(), folder / "mine.pt")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, str(HERE / "server.py"), "--model", "resnet18", "--accelerator"]
    command += ["cpu", "--weights", str(folder / "mine.pt"), "--port", str(port), "--wait", "0.2"]
    command += ["--max-bytes", str(MAX_BYTES), "--max-batch", "4", "--budget", "0"]
    command += ["--timeout", str(_PATIENCE)]
    log = (folder / "log").open("w")
    env = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
    base = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, (folder / "log").read_text()
            try:
                if httpx.get(f"{base}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        yield f"{base}/predict", process
    finally:
        if _is_alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _is_alive(group):
    """Whether a process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def url(server):
    return server[0]


def _post(url, content):
    return httpx.post(url, files={"image": ("photo", content)}, timeout=_PATIENCE)


def _png(path):
    stream = io.BytesIO()
    Image.open(path).convert("RGB").resize((320, 240)).save(stream, "png")
    return stream.getvalue()


PHOTOS = [_png(path) for path in images.samples()]
BROKEN = [b"not a photo", PHOTOS[0][:3000], b"", b"\x89PNG\r\n\x1a\n" + b"\0" * 50]


def test_photos_in_parallel_get_their_classes_and_broken_ones_a_reason(url, model):
    """Both kinds at once, so that they meet in batches."""
    transform = images.standard_transform()
    exact_model = torchvision.models.resnet18(num_classes=7).eval().double()
    exact_model.load_state_dict(model.state_dict())
    requests = [content for pair in zip(PHOTOS * 2, BROKEN * 4, strict=False) for content in pair]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda content: _post(url, content), requests))
    batches = []
    for content, answer in zip(requests, answers, strict=True):
        if content in BROKEN:
            assert answer.status_code == 422, answer.text
            assert answer.json()["detail"]
            continue
        assert answer.status_code == 200, answer.text
        found = answer.json()
        batches.append(found["batch"])
        with torch.no_grad():
            x = images.prepare(io.BytesIO(content), transform)[None].double()
            exact = exact_model(x).softmax(1)[0].topk(5)
        assert [c["index"] for c in found["classes"]] == exact.indices.tolist()
        assert found["classes"][0]["probability"] == pytest.approx(exact.values[0].item(), rel=1e-4)
    assert max(batches) > 1, "no two photos shared a batch"


def test_requests_without_a_photo(url):
    assert httpx.post(url, json={"image": "x"}, timeout=_PATIENCE).status_code == 422
    answer = httpx.post(url, files={"picture": ("photo", PHOTOS[0])}, timeout=_PATIENCE)
    assert answer.status_code == 422
    assert "image" in answer.text
    assert httpx.post(url, content=b"\0\1", timeout=_PATIENCE).status_code == 422
    assert httpx.get(url, timeout=_PATIENCE).status_code == 405


def test_a_photo_that_is_too_large(url):
    assert _post(url, b"\0" * (MAX_BYTES + 1)).status_code == 413


def test_a_terminated_server_leaves_no_process_behind(server):
    _, process = server
    process.terminate()
    process.wait(_PATIENCE)
    for _ in range(100):
        if not _is_alive(process.pid):
            return
        time.sleep(0.1)
    raise AssertionError("processes of the server outlive it")
