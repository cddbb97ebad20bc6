"""The backend cudnn without a device: a stand-in for the library computes its graphs on the CPU."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from fused_resnet import backends, doctor
from fused_resnet.backends import cudnn, cudnn_graph
from fused_resnet.backends.cudnn import MAX_VARIANTS, CudnnGraph
from fused_resnet.backends.cudnn_graph import MAX_WORKSPACE, Numerics, PlannedGraph, Session
from fused_resnet.problem import EPILOGUES, MaxPool
from tests.cudnn_fake import FakeCudnn
from tests.helpers import (
    CPU,
    GEOMETRIES,
    assert_within_rule,
    conv_problem,
    draw,
    reference,
    short,
    stock,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNEL = CudnnGraph()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCudnn]:
    """The stand-in, behind a device that is the CPU; it multiplies in fp32, so tf32 is off."""
    fake = FakeCudnn()
    monkeypatch.setattr(cudnn, "allows_tf32", lambda: False)
    monkeypatch.setattr(cudnn_graph, "frontend", lambda: fake)
    monkeypatch.setattr(cudnn, "unavailable", lambda device: None)
    monkeypatch.setattr(cudnn, "_indexed", lambda device: device)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    cudnn.session.cache_clear()
    cudnn_graph.missing.cache_clear()
    yield fake
    cudnn.session.cache_clear()
    cudnn_graph.missing.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_graph_says_what_the_op_means(
    geometry: str, epilogue: str, dtype: torch.dtype, library: FakeCudnn
) -> None:
    problem = conv_problem(**GEOMETRIES[geometry], epilogue=epilogue, dtype=dtype)
    args = draw(problem)
    assert KERNEL.supports(problem, CPU) is None
    result = KERNEL.run(problem, *args)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert_within_rule(result, reference(problem, args), stock(problem, args), dtype)


def test_tensors_of_any_layout_and_address(library: FakeCudnn) -> None:
    problem = conv_problem(c=6, k=5, epilogue="add_relu", x_channels_last=False)
    args = draw(problem)
    odd = torch.empty(args.x.numel() + 1)[1:].view(args.x.shape).copy_(args.x)
    vectors = [torch.empty(6)[1:].copy_(v) for v in (args.scale, args.shift)]
    residual = args.residual.contiguous()
    weight = args.weight.requires_grad_()
    result = KERNEL.run(problem, odd, weight, *vectors, residual)
    assert_within_rule(result, reference(problem, args), stock(problem, args), torch.float32)


def test_the_first_plan_that_builds_runs_on_the_current_stream(library: FakeCudnn) -> None:
    library.broken = frozenset({"eng4_k24=3"})
    problem = conv_problem(dtype=torch.float16)
    KERNEL.run(problem, *draw(problem))
    ((_, plan, stream),) = library.executed
    assert (plan, stream) == ("eng7_k24=21", 7)


def test_variants_are_the_plans_that_build(library: FakeCudnn) -> None:
    library.plans = ("eng4_k24=3", "eng4_k24=3", "sdpa_python_engine", "eng7_k24=21", "eng8")
    library.broken = frozenset({"eng7_k24=21"})
    problem = conv_problem(dtype=torch.float16)
    variants = KERNEL.variants(problem, CPU)
    names = ["cudnn/graph:eng4_k24=3", "cudnn/graph:eng8"]
    assert [v.full_name for v in variants] == names
    args = draw(problem)
    for variant in variants:
        assert variant.op == KERNEL.op
        assert variant.supports(problem, CPU) is None
        result = variant.run(problem, *args)
        assert_within_rule(result, reference(problem, args), stock(problem, args), torch.float16)
    assert [plan for _, plan, _ in library.executed] == ["eng4_k24=3", "eng8"]
    assert KERNEL.variants(problem, CPU) == variants
    assert len(library.graphs) == 1
    library.plans = ("eng4_k24=3",)
    other = conv_problem(n=3, dtype=torch.float16)
    assert "no plan eng8" in (variants[1].supports(other, CPU) or "")
    with pytest.raises(RuntimeError, match="no plan eng8"):
        variants[1].run(other, *draw(other))


def test_variants_are_bounded(library: FakeCudnn) -> None:
    library.plans = tuple(f"eng7_k24={i}" for i in range(3 * MAX_VARIANTS))
    assert len(KERNEL.variants(conv_problem(dtype=torch.bfloat16), CPU)) == MAX_VARIANTS


@pytest.mark.parametrize(("allowed", "plan"), [(True, "eng4_k24=3"), (False, "eng8")])
def test_tf32_follows_torch(
    allowed: bool, plan: str, library: FakeCudnn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cudnn, "allows_tf32", lambda: allowed)
    problem = conv_problem()
    args = draw(problem)
    KERNEL.run(problem, *args)
    assert [name for _, name, _ in library.executed] == [plan]
    weight = KERNEL.prepare(problem, args.weight, args.scale, args.shift)[0]
    assert torch.equal(weight, args.weight) == (not allowed)


def test_numerics_follow_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert cudnn.numerics_now(torch.float32) == Numerics(tf32=True, deterministic=False)
    assert cudnn.numerics_now(torch.float16) == Numerics(tf32=False, deterministic=False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert not cudnn.numerics_now(torch.float32).tf32
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    assert cudnn.numerics_now(torch.float32).deterministic


def test_graphs_are_kept_up_to_a_bound(library: FakeCudnn) -> None:
    numerics = Numerics(tf32=False, deterministic=False)
    keeper = Session(CPU, limit=2)
    one, two, three = (conv_problem(n=n) for n in (1, 2, 3))
    first = keeper.graph(one, numerics)
    keeper.graph(two, numerics)
    assert keeper.graph(one, numerics) is first
    keeper.graph(three, numerics)  # Two was not used for longest.
    assert keeper.graph(one, numerics) is first
    assert not keeper.holds(two, numerics)
    assert len(library.graphs) == 3


def test_a_workspace_is_given_where_one_is_needed(
    library: FakeCudnn, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.workspace = 4096
    seen = []
    run = PlannedGraph.execute

    def execute(self, plan, tensors, workspace, handle):
        seen.append(workspace not in tensors.values())
        run(self, plan, tensors, workspace, handle)

    monkeypatch.setattr(PlannedGraph, "execute", execute)
    problem = conv_problem(dtype=torch.float16)
    KERNEL.run(problem, *draw(problem))
    assert seen == [True]
    library.workspace = MAX_WORKSPACE + 1
    assert "workspace" in (KERNEL.supports(conv_problem(n=5, dtype=torch.float16), CPU) or "")


def test_threads_take_turns(library: FakeCudnn) -> None:
    problem = conv_problem(n=1, c=64, k=64, h=24, w=24, dtype=torch.float16)
    args = draw(problem)
    expected = KERNEL.run(problem, *args)
    wrong = []

    def work() -> None:
        results = [KERNEL.run(problem, *args) for _ in range(10)]
        wrong.extend(r for r in results if not torch.equal(r, expected))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(library.executed) == 41
    assert not wrong


def test_nothing_is_planned_while_a_graph_is_captured(
    library: FakeCudnn, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = conv_problem(dtype=torch.float16)
    monkeypatch.setattr(cudnn, "capturing", lambda device: True)
    assert "captured" in (KERNEL.supports(problem, CPU) or "")
    monkeypatch.setattr(cudnn, "capturing", lambda device: False)
    assert KERNEL.supports(problem, CPU) is None
    monkeypatch.setattr(cudnn, "capturing", lambda device: True)
    assert KERNEL.supports(problem, CPU) is None


def test_what_cudnn_refuses_is_a_reason_and_no_exception(library: FakeCudnn) -> None:
    library.plans = ()
    assert "No engine configs" in (KERNEL.supports(conv_problem(), CPU) or "")
    assert KERNEL.variants(conv_problem(), CPU) == (KERNEL,)
    library.plans, library.broken = ("eng1",), frozenset({"eng1"})
    assert "Deselecting" in (KERNEL.supports(conv_problem(n=4), CPU) or "")
    pooled = conv_problem(pool=MaxPool((3, 3), (2, 2), (1, 1)))
    assert "pooling" in (KERNEL.supports(pooled, CPU) or "")
    assert "float64" in (KERNEL.supports(conv_problem(dtype=torch.float64), CPU) or "")


def test_the_flag_of_torch_switches_it_off(library: FakeCudnn) -> None:
    with torch.backends.cudnn.flags(enabled=False):
        assert "switched off" in (KERNEL.supports(conv_problem(), CPU) or "")


@pytest.mark.parametrize(
    ("version", "backend", "reason"),
    [
        ("1.13.0", 92400, "nvidia-cudnn-frontend 1.13.0 is older than 1.14"),
        ("1.14.0", 90000, None),
        ("2.0.0", 92400, None),
        ("1.32.0", 8907, "cuDNN 8907 is older than 9"),
    ],
)
def test_old_versions(version: str, backend: int, reason: str | None, library: FakeCudnn) -> None:
    library.__version__, library.version = version, backend
    assert cudnn_graph.missing() == reason


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Importing the library fails, and every device is an A100."""

    def absent_module(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent_module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    caches = (cudnn_graph.missing, cudnn.unavailable)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_a_missing_library_is_a_reason(absent: None) -> None:
    reason = KERNEL.supports(conv_problem(), torch.device("cuda", 0))
    assert reason == "No module named 'cudnn': pip install \"fused-resnet[cudnn]\""


def test_the_doctor_tells_of_a_missing_library(
    absent: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = [f for f in doctor._versions() if f.name == "nvidia-cudnn-frontend"]
    assert any(f.status == "note" and "fused-resnet[cudnn]" in f.value for f in found)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert all(f.status == "ok" for f in doctor._versions() if f.name == "nvidia-cudnn-frontend")


def test_old_gpus_and_other_devices_are_refused(
    library: FakeCudnn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert "NVIDIA GPUs, not on cpu" in (KERNEL.supports(conv_problem(), CPU) or "")
    monkeypatch.setattr(cudnn, "missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    cudnn.unavailable.cache_clear()
    assert "not sm_75" in (KERNEL.supports(conv_problem(), torch.device("cuda", 0)) or "")
    cudnn.unavailable.cache_clear()


def test_the_untuned_choice_takes_it_last_before_torch() -> None:
    order = list(backends.NAMES)
    assert order[-2:] == ["cudnn", "torch"]
    assert order.index("triton") < order.index("cuda") < order.index("cudnn")


def test_a_forced_backend_that_cannot_run_is_told_and_torch_runs(fresh_registry: None) -> None:
    problem = conv_problem()
    args = draw(problem)
    with (
        backends.backend("cudnn"),
        backends.observe() as choices,
        pytest.warns(backends.FusedResNetWarning, match="cuDNN runs on NVIDIA GPUs"),
    ):
        torch.ops.fused_resnet.conv_affine_act(
            *args, problem.stride, problem.padding, problem.dilation, 1, "relu"
        )
    (choice,) = choices
    assert choice.kernel.full_name == "torch/aten"
    assert choice.rejected == (("cudnn/graph", "cuDNN runs on NVIDIA GPUs, not on cpu"),)
