"""What plans keep in memory: bytes counted from what they hold, and modules they do not import."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fused_resnet
from fused_resnet import footprint, numerics, planner, tuning
from fused_resnet.problem import ConvProblem
from fused_resnet.stored import Renamed, StoredTensors
from tests.plans import assert_right, small_resnet

X = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def _quick(tuned: Path, hurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose by the heuristic order: what is tested here is not the choice."""
    monkeypatch.setattr(planner._Planner, "measure_missing", lambda self: None)


_LOADED = """
import sys, torch, fused_resnet
plan = fused_resnet.load(sys.argv[1])
plan(torch.zeros(2, 3, 48, 48))
heavy = ("triton", "torch._dynamo", "torch._inductor", "sympy", "onnx", "torchvision", "matplotlib")
print(*(name for name in heavy if name in sys.modules))
"""


def test_a_loaded_plan_imports_neither_compilers_nor_algebra(tmp_path: Path) -> None:
    path = tmp_path / "small.plan"
    fused_resnet.optimize(small_resnet(), X).save(path)
    command = [sys.executable, "-c", _LOADED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_loading_holds_one_weight_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = small_resnet(), tmp_path / "small.plan"
    fused_resnet.optimize(model, X, batch_sizes=(1,)).save(path)
    living: weakref.WeakValueDictionary[str, torch.Tensor] = weakref.WeakValueDictionary()
    together: list[set[str]] = []
    read = StoredTensors.__getitem__

    def watched(self: StoredTensors, name: str) -> torch.Tensor:
        tensor = read(self, name)
        if tensor.dim() == 4:
            living[name] = tensor
            together.append(set(living))
        return tensor

    monkeypatch.setattr(StoredTensors, "__getitem__", watched)
    plan = fused_resnet.load(path)
    assert_right(plan(X), model, X)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(set().union(*together)) == len(convolutions)
    assert max(map(len, together)) == 1
    assert not living
    assert plan.weights.state == {}


@pytest.mark.skipif(footprint.resident() is None, reason="the system tells of no pages of files")
def test_what_a_process_holds_leaves_out_files(tmp_path: Path) -> None:
    path, size = tmp_path / "file", 64 << 20
    path.write_bytes(bytes(size))
    footprint.give_back()  # What earlier tests freed is counted until then, and would serve `own`.
    before = footprint.resident()
    assert before is not None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[::4096]) == 0  # All of it is in memory.
        held = footprint.resident()
        assert held is not None
        assert held - before < size // 4
        if not footprint.reset_peak():
            pytest.skip("the system does not let the peak begin anew")
        own = torch.ones(size, dtype=torch.uint8)
        peak = footprint.peak()
        del own
        footprint.give_back()
        now = footprint.resident()
        assert peak is not None
        assert now is not None
        assert size * 0.9 < peak - before < size * 1.25
        assert now - before < size // 4
        assert footprint.peak() == pytest.approx(peak, rel=0.05)


def test_a_truncated_weight_is_told(tmp_path: Path) -> None:
    path = tmp_path / "small.plan"
    fused_resnet.optimize(small_resnet(), X).save(path)
    with StoredTensors(path) as stored:
        os.truncate(path, path.stat().st_size - 8)
        with pytest.raises(ValueError, match="it ends within"):
            dict(stored)


def test_stored_tensors_are_those_of_the_format(tmp_path: Path) -> None:
    tensors = {
        "a.scalar": torch.tensor(3),
        "a.flags": torch.tensor([True, False]),
        "a.none": torch.empty(0, 4),
        "b.half": torch.randn(3, 5, dtype=torch.bfloat16),
        "b.wide": torch.randn(2, 2, dtype=torch.float64),
    }
    path = tmp_path / "tensors"
    save_file(tensors, str(path), metadata={"of": "test"})
    with StoredTensors(path) as stored:
        assert stored.metadata == {"of": "test"}
        assert set(stored) == set(tensors)
        for name, expected in tensors.items():
            assert stored.like[name].shape == expected.shape
            assert stored[name].dtype == expected.dtype
            assert torch.equal(stored[name], expected)
        assert set(Renamed(stored, "b.")) == {"half", "wide"}
        assert torch.equal(Renamed(stored, "b.")["half"], tensors["b.half"])


@pytest.mark.parametrize("shape", [(), (5,), (3, 7, 5, 2), (40, 3)])
def test_errors_are_taken_piece_by_piece(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = torch.randn(shape, dtype=torch.float64)
    off = exact + 1e-3 * torch.randn(shape, dtype=torch.float64)
    expected = (off - exact).norm() / exact.norm(), (off - exact).abs().max() / exact.abs().max()
    monkeypatch.setattr(numerics, "_PIECE", 8)
    found = numerics.error(off, exact)
    assert (found.l2, found.worst) == pytest.approx(tuple(map(float, expected)))
    if shape:
        off.flatten()[-1] = torch.nan
        assert not numerics.error(off, exact).finite


@pytest.mark.parametrize("n", [1, 16])
def test_references_are_computed_within_bounds(n: int) -> None:
    geometry = (1, 1), (1, 1), (1, 1), 1, "relu", torch.float32
    for c, h in ((64, 56), (128, 28), (256, 14), (512, 7)):
        problem = ConvProblem(n, c, h, h, c, 3, 3, *geometry)
        x = torch.randn(n, c, h, h)
        weight, vector = torch.empty(c, c, 3, 3), torch.empty(c)
        task = tuning.Task("conv_affine_act", problem, x.device, (x, weight, vector, vector, None))
        pieces = tuning._pieces(task)
        assert torch.equal(torch.cat([piece[0] for piece in pieces]), x)
        for piece in pieces:
            count = len(piece[0])
            words = count * h * h * (9 * c + 3 * c)
            assert count == 1 or 8 * words <= 32 * 2**20
        assert len(pieces) < n or n == 1 or h == 56
