"""Plans: shapes and errors, threads and forks, other weights, files, memory, CUDA graphs."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import os
import pickle
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fused_resnet
from fused_resnet import backends, plan_file, planner
from fused_resnet._build import extension
from fused_resnet.backends import FusedResNetWarning
from fused_resnet.cuda_graph import CudaGraph
from fused_resnet.plan_file import PlanFileError
from tests.leaks import left_by, needs_mallinfo
from tests.plans import assert_right, blocks, small_resnet

X = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def _quick(tuned: Path, hurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose by the heuristic order: what is tested here is not the choice."""
    monkeypatch.setattr(planner._Planner, "measure_missing", lambda self: None)


def optimized(model: nn.Module, x: Tensor = X, **options: Any) -> fused_resnet.Plan:
    return fused_resnet.optimize(model, x, **options)


# ------------------------------------------------------------------------------------------- shapes


def test_batch_sizes_share_packed_weights() -> None:
    model = blocks()
    one = optimized(model)
    with fused_resnet.backend("torch"):  # Of which nothing depends on the shape.
        several = optimized(model, batch_sizes=(1, 3))
        alone = optimized(model)
    assert several.shapes == tuple(f"{n}x3x48x48 float32" for n in (2, 1, 3))
    assert several.memory.weights == alone.memory.weights
    for n in (1, 2, 3):
        x = torch.randn(n, 3, 48, 48)
        assert_right(several(x), model, x)
        assert_right(one(x), model, x)


def test_other_shapes_run_through_the_fused_model() -> None:
    model = blocks()
    plan = optimized(model)
    x = torch.randn(3, 3, 30, 34)
    with backends.observe() as choices:
        y = plan(x)
    assert choices
    assert_right(y, model, x)
    assert plan.shapes == ("2x3x48x48 float32",)
    assert plan(X[:0])["map"].shape == (0, 5, 48, 48)


def test_strict_shapes() -> None:
    plan = optimized(blocks(), strict_shapes=True)
    with pytest.raises(ValueError, match=r"made for 2x3x48x48 float32, not for 1x3x48x48 float32"):
        plan(X[:1])
    plan(X)


def test_dynamic_plans_are_bounded() -> None:
    model = blocks()
    plan = optimized(model, dynamic=True, max_plans=2)
    for n in (1, 3, 4, 3):
        x = torch.randn(n, 3, 48, 48)
        assert_right(plan(x), model, x)
    assert plan.shapes == tuple(f"{n}x3x48x48 float32" for n in (2, 4, 3))
    with backends.observe() as choices:
        plan(torch.randn(3, 3, 48, 48))
    assert not choices  # A program, not the fused model.


# ------------------------------------------------------------------------------------------- errors


def test_wrong_arguments_are_named() -> None:
    plan = optimized(blocks())
    with pytest.raises(TypeError, match=r"argument 0 must be torch.float32, .* got torch.float64"):
        plan(X.double())
    with pytest.raises(ValueError, match=r"argument 0 must be on cpu, .* got meta"):
        plan(X.to("meta"))
    with pytest.raises(RuntimeError, match="computes no gradients"):
        plan(X.clone().requires_grad_())
    with torch.no_grad():
        plan(X.clone().requires_grad_())


@pytest.mark.parametrize("wrong", ["text", 1, None, X.numpy(), [1.0, 2.0], {"x": "text"}])
def test_what_is_no_tensor_is_refused_with_what_is_expected(wrong: Any) -> None:
    for plan in (optimized(blocks()), optimized(blocks(), strict_shapes=True)):
        message = (
            r"^argument 0 must be a tensor: the plan of Blocks was made for 2x3x48x48 float32; "
            rf"got {type(wrong).__name__}$"
        )
        with pytest.raises(TypeError, match=message):
            plan(wrong)
    plan = fused_resnet.optimize(blocks(), {"x": X})
    with pytest.raises(TypeError, match=r"argument 'x' must be a tensor: .*; got"):
        plan(x=wrong)
    plan(x=X)


def test_a_plan_is_no_ordinary_module() -> None:
    plan = optimized(blocks())
    assert list(plan.parameters()) == []
    assert plan.state_dict() == {}
    inside = nn.Sequential(plan).train()
    assert not plan.training
    assert torch.equal(inside(X)["map"], plan(X)["map"])
    for convert in (plan.half, plan.double, lambda: plan.to(torch.bfloat16)):
        with pytest.raises(RuntimeError, match="specialised to its dtype and device"):
            convert()
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"plan\.save"):
            copied(plan)
    assert "2x3x48x48" in repr(plan)


def test_modes_of_the_caller_change_nothing() -> None:
    plan = optimized(blocks())
    expected = plan(X)["map"]
    with torch.inference_mode():
        assert torch.equal(plan(X)["map"], expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plan(X)["map"], expected)
    assert not expected.requires_grad
    compiled = torch.compile(nn.Sequential(plan), backend="eager")
    assert torch.equal(compiled(X)["map"], expected)


def test_results_are_the_callers() -> None:
    plan = optimized(blocks())
    first = plan(X)["features"]
    kept = first.clone()
    plan(torch.zeros_like(X))
    assert torch.equal(first, kept)


def test_a_program_that_raises_is_given_up_once() -> None:
    model = blocks()
    plan = optimized(model)
    (specialisation,) = plan._specialisations.values()

    def fail(env: list[Any]) -> None:
        raise ArithmeticError("broken")

    specialisation.program.steps[0].action = fail
    with pytest.warns(FusedResNetWarning, match="raised ArithmeticError: broken; the fused model"):
        y = plan(X)
    assert_right(y, model, X)
    assert_right(plan(X), model, X)
    strict = optimized(model, strict_shapes=True)
    (specialisation,) = strict._specialisations.values()
    specialisation.program.steps[0].action = fail
    with pytest.raises(ArithmeticError):
        strict(X)


# -------------------------------------------------------------------------------- threads and forks


def test_two_threads_share_a_plan() -> None:
    model = small_resnet()
    plan = optimized(model)
    inputs = [torch.randn(2, 3, 48, 48) for _ in range(4)]
    expected = [plan(x) for x in inputs]
    wrong: list[int] = []

    def work(offset: int) -> None:
        for i in range(40):
            k = (i + offset) % len(inputs)
            if not torch.equal(plan(inputs[k]), expected[k]):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


#: CPU time of every thread of the process but the first, before and after calls with 1, 2 and 1
#: threads. Workers of OpenMP that wait must sleep, or else waiting would count.
THREADS = """
import os, torch
from tests.plans import small_resnet
import fused_resnet

def ticks():
    found = 0
    for task in os.listdir("/proc/self/task"):
        if int(task) != os.getpid():
            with open(f"/proc/self/task/{task}/stat") as stat:
                found += sum(map(int, stat.read().rpartition(")")[2].split()[11:13]))
    return found

torch.set_num_threads(1)
x = torch.randn(8, 3, 96, 96)
with fused_resnet.backend("cpu"):
    plan = fused_resnet.optimize(small_resnet(), x, budget=0.0)
(program,) = next(iter(plan._specialisations.values())).program.native
expected = plan(x)
for threads in (1, 2, 1):
    torch.set_num_threads(threads)
    before = ticks()
    for _ in range(200):
        y, = program(x)
    print(threads, ticks() - before, torch.allclose(y, expected, atol=1e-4))
"""


@pytest.mark.skipif(extension is None, reason="no compiled extension")
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="no /proc here")
def test_the_number_of_threads_is_torchs_at_each_call(tuned: Path) -> None:
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", THREADS],
        capture_output=True, text=True, check=False, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["1", "2", "1"]
    assert all(line[2] == "True" for line in lines)
    alone, two, again = (int(line[1]) for line in lines)
    assert alone <= 1, "with one thread, others worked too"
    assert two >= 5, "with two threads, the second one did nothing"
    assert again <= 1, "back at one thread, others still worked"


@pytest.mark.skipif(extension is None, reason="no compiled extension")
def test_other_threads_of_python_run_while_a_plan_computes() -> None:
    x = torch.randn(48, 3, 96, 96)
    with fused_resnet.backend("cpu"):
        plan = optimized(small_resnet(), x)
    (program,) = next(iter(plan._specialisations.values())).program.native
    program(x)
    done = threading.Event()

    def compute() -> None:
        for _ in range(3):
            program(x)
        done.set()

    worker = threading.Thread(target=compute)
    turns = 0
    worker.start()
    while not done.is_set():
        turns += 1
        time.sleep(1e-4)
    worker.join()
    # Were the interpreter's lock kept, there would be a turn before each of the calls.
    assert turns > 10


def test_a_forked_child_runs_the_plan() -> None:
    plan = optimized(small_resnet())
    expected = plan(X)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if torch.equal(plan(X), expected) else 1)
    assert os.waitpid(pid, 0)[1] == 0


@needs_mallinfo
def test_a_call_leaves_nothing_allocated() -> None:
    plan = optimized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), X[:1, :, :8, :8])
    x = X[:1, :, :8, :8].clone()
    assert left_by(lambda: plan(x)) < 16


# ----------------------------------------------------------------------------------------- weights


def changed(model: nn.Module) -> nn.Module:
    """The same architecture with other weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for t in other.state_dict().values():
            if t.is_floating_point():
                t.add_(0.1 * torch.rand_like(t))
    return other


@pytest.mark.parametrize("strict", [False, True])
def test_refit(strict: bool) -> None:
    model = blocks()
    plan = optimized(model, strict_shapes=strict)
    before = plan(X)["map"].clone()
    other = changed(model)
    plan.refit(other.state_dict())
    assert_right(plan(X), other, X)
    if not strict:
        assert_right(plan(X[:1]), other, X[:1])
    assert_right(optimized(model)(X), model, X)  # The user's model keeps its weights.
    plan.refit(model.state_dict())
    assert torch.equal(plan(X)["map"], before)


def test_refit_refuses_another_architecture() -> None:
    plan = optimized(blocks())
    state = blocks().state_dict()
    missing = {n: t for n, t in state.items() if n != "head.bias"}
    with pytest.raises(ValueError, match=r"another architecture: missing head\.bias"):
        plan.refit(missing)
    with pytest.raises(ValueError, match=r"unknown head\.scale"):
        plan.refit({**state, "head.scale": torch.ones(1)})
    with pytest.raises(ValueError, match=r"head\.bias must be \[5\], got \[6\]"):
        plan.refit({**state, "head.bias": torch.ones(6)})


@pytest.mark.parametrize("backend", ["cpu", "library", "torch"])
def test_training_on_changes_no_plan(backend: str) -> None:
    model = blocks()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FusedResNetWarning)  # No backend has a kernel for all.
        with fused_resnet.backend(backend):
            plan, original = optimized(model), copy.deepcopy(model)
    expected = {k: v.clone() for k, v in plan(X).items()}
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    for name, y in plan(X).items():
        assert torch.equal(y, expected[name])
    # Other shapes would need the old weights, which are gone.
    with pytest.raises(RuntimeError, match=r"plan\.refit"):
        plan(X[:1])
    plan.refit(model.state_dict())
    assert_right(plan(X), model, X)
    assert_right(plan(X[:1]), model, X[:1])
    plan.refit(original.state_dict())
    assert_right(plan(X), original, X)


def test_refit_of_a_dtype_of_its_own() -> None:
    model = small_resnet()
    plan = optimized(model, dtype=torch.bfloat16)
    other = changed(model)
    plan.refit(other.state_dict())
    with torch.no_grad():
        assert torch.equal(plan(X), optimized(other, dtype=torch.bfloat16)(X))


# ------------------------------------------------------------------------------------------- memory


def profiled_peak(model: nn.Module, x: Tensor) -> int:
    """The most bytes that eager torch holds at once, by its profiler, beside the input."""
    model = model.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        model(x)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            model(x)
    events = recorded.profiler.kineto_results.events()
    live = list(itertools.accumulate(e.nbytes() for e in events if e.name() == "[memory]"))
    return max(live)


def test_memory_is_counted() -> None:
    model = small_resnet()
    memory = optimized(model, strict_shapes=True).memory
    state = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert memory.stock_weights == state
    assert memory.weights > 0
    # The stem: its input is not counted; the results of its convolution and its batch norm are.
    assert memory.stock_activations == 2 * (2 * 16 * 24 * 24 * 4)
    stem = nn.Conv2d(3, 16, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(16)
    stock = nn.Sequential(*stem, nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)).eval()
    assert memory.stock_activations == pytest.approx(profiled_peak(stock, X), abs=1024)
    assert 0 < memory.arena + memory.activations < memory.stock_activations


def test_stock_memory_counts_the_weight_that_onednn_copies_at_every_call() -> None:
    model = nn.Sequential(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()).eval()
    x = torch.randn(2, 256, 4, 4)
    y = x.nbytes  # The convolution's result; the weight is larger than a second one.
    assert optimized(model, x).memory.stock_activations == y + 256 * 256 * 9 * 4
    # One small image is left to ATen's own convolution.
    assert optimized(model, x[:1]).memory.stock_activations == y
    assert optimized(model.double(), x.double()).memory.stock_activations == 2 * (2 * y)


def test_a_strict_plan_lets_go_of_the_model() -> None:
    model = small_resnet()
    plan = optimized(model, strict_shapes=True)
    tensors = [id(t) for t in model.parameters()]
    del model
    gc.collect()
    assert not [t for t in gc.get_objects() if isinstance(t, nn.Parameter) and id(t) in tensors]
    assert plan(X).shape == (2, 10)


# -------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("build", [blocks, small_resnet])
def test_save_and_load(
    tmp_path: Path, build: Callable[[], nn.Module], dtype: torch.dtype | None
) -> None:
    plan = optimized(build(), dtype=dtype, batch_sizes=(1,))
    plan.save(tmp_path / "p.plan")
    loaded = fused_resnet.load(tmp_path / "p.plan")
    assert loaded.shapes == plan.shapes
    for x in (X, X[:1]):
        ours = torch.utils._pytree.tree_leaves(loaded(x))
        theirs = torch.utils._pytree.tree_leaves(plan(x))
        assert type(loaded(x)) is type(plan(x))
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)
    mine = [(r.name, r.kernel, r.error) for p in plan.explain().parts for r in p.rows]
    assert mine == [(r.name, r.kernel, r.error) for p in loaded.explain().parts for r in p.rows]
    with pytest.raises(ValueError, match="made for"):
        loaded(torch.randn(5, 3, 48, 48))
    other = changed(build())
    loaded.refit(other.state_dict())
    plan.refit(other.state_dict())
    for a, b in zip(
        torch.utils._pytree.tree_leaves(loaded(X)),
        torch.utils._pytree.tree_leaves(plan(X)),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_saving_needs_weights(tmp_path: Path) -> None:
    model = blocks()
    plan = optimized(model, strict_shapes=True)
    with pytest.raises(ValueError, match=r"keeps no weights but packed ones"):
        plan.save(tmp_path / "p.plan")
    plan.save(tmp_path / "p.plan", model.state_dict())
    loaded = fused_resnet.load(tmp_path / "p.plan")
    assert_right(loaded(X), model, X)
    loaded.save(tmp_path / "q.plan", model.state_dict())
    assert_right(fused_resnet.load(tmp_path / "q.plan")(X), model, X)


def nudged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights but for the last bit of one."""
    other = {name: t.clone() for name, t in state.items()}
    name = next(n for n, t in other.items() if t.dim() == 4)
    other[name].view(-1)[0] = torch.nextafter(other[name].view(-1)[0], torch.tensor(torch.inf))
    return other


@pytest.mark.parametrize("kept", ["source", "nothing", "file"])
def test_weights_that_nothing_was_compared_on_are_not_saved(tmp_path: Path, kept: str) -> None:
    model = blocks()
    plan = optimized(model, strict_shapes=kept == "nothing")
    if kept == "file":
        plan.save(tmp_path / "p.plan")
        plan = fused_resnet.load(tmp_path / "p.plan")
    other = nudged(model.state_dict())
    with pytest.raises(ValueError, match=r"not the weights .* call plan.refit\(state\) first"):
        plan.save(tmp_path / "q.plan", other)
    assert not (tmp_path / "q.plan").exists()
    plan.refit(other)
    plan.save(tmp_path / "q.plan", other)
    assert torch.equal(
        torch.utils._pytree.tree_leaves(fused_resnet.load(tmp_path / "q.plan")(X))[0],
        torch.utils._pytree.tree_leaves(plan(X))[0],
    )
    with pytest.raises(ValueError, match="not the weights"):
        plan.save(tmp_path / "q.plan", model.state_dict())


@pytest.mark.parametrize("strict", [False, True])
def test_a_plan_without_any_weights_is_saved(tmp_path: Path, strict: bool) -> None:
    x = X[:1, :, :8, :8]
    plan = optimized(nn.MaxPool2d(2).eval(), x, strict_shapes=strict)
    plan.save(tmp_path / "a.plan")
    again = fused_resnet.load(tmp_path / "a.plan")
    assert torch.equal(again(x), nn.MaxPool2d(2)(x))
    again.save(tmp_path / "b.plan", {})


def test_a_model_trained_on_is_not_saved_as_its_plan(tmp_path: Path) -> None:
    model = blocks()
    plan = optimized(model)
    with torch.no_grad():
        next(model.parameters()).add_(0.1)
    with pytest.raises(RuntimeError, match="weights changed after its plan was made"):
        plan.save(tmp_path / "p.plan")


def rewritten(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a plan's file whose description is changed."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    description = json.loads(header["__metadata__"]["fused_resnet"])
    change(description)
    header["__metadata__"]["fused_resnet"] = json.dumps(description)
    text = json.dumps(header).encode()
    other = path.with_name("changed.plan")
    other.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return other


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "p.plan"
    optimized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten()).eval()).save(path)
    return path


def test_files_that_are_no_plans(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        fused_resnet.load(tmp_path / "none")
    other = tmp_path / "other"
    other.write_bytes(b"hello")
    with pytest.raises(PlanFileError, match="is no plan"):
        fused_resnet.load(other)
    torch.save({"a": 1}, other)
    with pytest.raises(PlanFileError, match="is no plan"):
        fused_resnet.load(other)
    other.write_bytes(saved.read_bytes()[:-10])
    with pytest.raises(PlanFileError, match="is no plan"):
        fused_resnet.load(other)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, other)
    with pytest.raises(PlanFileError, match="holds tensors, but no plan"):
        fused_resnet.load(other)


def test_a_file_with_other_weights_is_refused(saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    data[-1] ^= 1  # The last bit of some weight.
    saved.write_bytes(data)
    with pytest.raises(PlanFileError, match="its weights are not those"):
        fused_resnet.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema="fused_resnet.plan/0"), "format 'fused_resnet.plan/0'"),
        (lambda d: d.pop("schema"), "is damaged"),
        (lambda d: d.update(device="cuda"), "finds no GPU here|made for cuda"),
        (lambda d: d["parts"][0].pop("graph"), "is damaged"),
        (lambda d: d["parts"][0]["layers"].pop(), "is damaged"),
        (lambda d: d["parts"][0]["graph"]["calls"][0].update(op="aten.new_one"), "no operator"),
        (lambda d: d["parts"][0]["graph"]["calls"][0].update(op="os.system"), "no operator"),
        (lambda d: d["parts"][0]["graph"]["calls"][0].update(op="aten.__dict__"), "no operator"),
        (lambda d: d["parts"][0]["graph"]["calls"][0].update(op="aten.from_file"), "may not use"),
    ],
)
def test_incompatible_files(
    saved: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    if torch.cuda.is_available() and "GPU" in message:
        pytest.skip("there is a GPU here")
    with pytest.raises(PlanFileError, match=message):
        fused_resnet.load(rewritten(saved, change))


def test_a_kernel_that_is_not_here_is_replaced(saved: Path) -> None:
    def change(description: dict[str, Any]) -> None:
        description["parts"][0]["layers"][0]["kernel"] = "library/of_tomorrow"

    with pytest.warns(FusedResNetWarning, match="replaced .* library/of_tomorrow"):
        plan = fused_resnet.load(rewritten(saved, change))
    assert torch.allclose(plan(X), fused_resnet.load(saved)(X), atol=1e-5)


def test_a_plan_of_another_machine_says_so(saved: Path) -> None:
    def change(description: dict[str, Any]) -> None:
        description["environment"] = "a faster machine"

    with pytest.warns(FusedResNetWarning, match="measured elsewhere \\(a faster machine\\)"):
        fused_resnet.load(rewritten(saved, change))


def test_what_cannot_be_written_down_is_refused(tmp_path: Path) -> None:
    class Unspecialised(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    plan = optimized(Unspecialised().eval())
    with pytest.raises(ValueError, match="nothing to save"):
        plan.save(tmp_path / "p.plan")
    assert plan_file.SCHEMA.startswith("fused_resnet.plan/")


# -------------------------------------------------------------------------------------- CUDA graphs


class FakeRuntime:
    """Stands in for torch.cuda: a replay repeats the captured call on its static tensors."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def warm_up(self, call: Callable[[], Any]) -> None:
        self.events.append("warm up")
        call()

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.events.append("capture")
        result = call()

        def replay() -> None:
            self.events.append("replay")
            new = torch.utils._pytree.tree_leaves(call())
            for old, value in zip(torch.utils._pytree.tree_leaves(result), new, strict=True):
                if isinstance(old, Tensor):
                    old.copy_(value)

        return replay, result

    def wait(self, mark: Any) -> None:
        self.events.append(f"wait {mark}")

    def mark(self) -> int:
        self.events.append("mark")
        return self.events.count("mark")


def test_a_graph_replays_on_copies() -> None:
    runtime = FakeRuntime()

    def program(a: Tensor, b: Tensor) -> dict[str, Any]:
        return {"sum": a + b, "name": "x"}

    a, b = torch.randn(3), torch.randn(3)
    graph = CudaGraph(program, (a, b), runtime)
    assert runtime.events == ["warm up"] * 3 + ["capture", "mark"]
    runtime.events.clear()
    first = graph(a, b)
    assert runtime.events == ["wait 1", "replay", "mark"]
    second = graph(b, b)
    assert torch.equal(first["sum"], a + b)  # Not overwritten by the second call.
    assert torch.equal(second["sum"], b + b)
    assert second["name"] == "x"
    renewed = graph.renewed(lambda a, b: a * b)
    assert torch.equal(renewed(a, b), a * b)


def test_graphs_of_threads_take_turns() -> None:
    graph = CudaGraph(lambda a: a * 2, (torch.zeros(1000),), FakeRuntime())
    wrong: list[float] = []

    def work(value: float) -> None:
        right = [bool((graph(torch.full((1000,), value)) == 2 * value).all()) for _ in range(200)]
        wrong.extend(value for ok in right if not ok)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


def test_what_cannot_be_captured_runs_plainly() -> None:
    class Refusing(FakeRuntime):
        def capture(self, call: Callable[[], Any]) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing")

    def program(a: Tensor) -> Tensor:
        return a + 1

    with pytest.warns(FusedResNetWarning, match="without a CUDA graph, .* not permitted"):
        run = CudaGraph.or_plain(program, (torch.zeros(2),), Refusing())
    assert run is program


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_plans_on_a_gpu() -> None:
    model, x = small_resnet().cuda(), X.cuda()
    plan = optimized(model, x, batch_sizes=(1,))
    assert all(isinstance(s.run, CudaGraph) for s in plan._specialisations.values())
    assert_right(plan(x), model, x)
    kept = plan(x)
    expected = kept.clone()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for i in range(20):
        with torch.cuda.stream(streams[i % 2]):
            y = plan(x + i)
            torch.cuda.current_stream().synchronize()
            assert_right(y, model, x + i)
    assert torch.equal(kept, expected)
    other = changed(model)
    plan.refit(other.state_dict())
    assert_right(plan(x), other, x)
