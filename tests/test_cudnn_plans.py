"""What the real cuDNN says to our graphs, asked without a device: see ``cudnn_stub``.

Graphs are validated and lowered, plans are proposed, and (slow) compiled; nothing is executed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fused_resnet.backends import cudnn_graph
from tests import cudnn_stub

pytest.importorskip(
    "triton", reason="this torch comes without Triton, whose list of layers is used"
)
pytestmark = [
    pytest.mark.skipif(cudnn_graph.missing() is not None, reason=str(cudnn_graph.missing())),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler for the stub driver"),
    pytest.mark.skipif(not cudnn_stub.cudnn_libraries(), reason="cuDNN did not come with torch"),
]

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cudnn_stub.build(tmp_path_factory.mktemp("driver"))


def planned(stub: Path, *arguments: object) -> list[dict[str, Any]]:
    environment = dict(os.environ, LD_LIBRARY_PATH=str(stub.parent), PYTHONPATH=str(ROOT))
    command = [sys.executable, "-m", "tests.cudnn_planner", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(("capability", "dtype"), [(80, "bfloat16"), (90, "float32")])
def test_every_epilogue_has_several_plans(capability: int, dtype: str, stub: Path) -> None:
    found = planned(stub, capability, dtype, 32, "--few")
    assert len(found) == 7
    for layer in found:
        assert len(layer["plans"]) >= 2, layer
    assert found[0]["workspace"] == 0


#: Distinct layers but the stem that is pooled: those of ResNet-18, and ResNet-50's that it lacks.
LAYERS = 15 + 19


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 32])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_layer_compiles_without_a_workspace(
    capability: int, dtype: str, n: int, stub: Path
) -> None:
    found = planned(stub, capability, dtype, n)
    assert len({layer["problem"] for layer in found}) == len(found) == LAYERS
    for layer in found:
        assert len(layer["plans"]) >= 2, layer
        assert layer["built"] in layer["plans"]
        assert layer["workspace"] == 0, layer
