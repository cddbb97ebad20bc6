"""optimize: what competes, what is rejected, what is measured twice, and what models it takes."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_resnet
from fused_resnet import backends, planner, tuned_table, tuning
from fused_resnet._build import extension
from fused_resnet.backends import FusedResNetWarning, Kernel
from fused_resnet.judging import Judge
from fused_resnet.plan_report import PlanReport, Row
from fused_resnet.problem import ConvProblem
from fused_resnet.tuned_table import TunedTable
from tests.helpers import CPU, Args, conv_problem, draw, stock
from tests.plans import Blocks, assert_right, blocks, small_resnet

X = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(3))


pytestmark = pytest.mark.usefixtures("hurried")


@pytest.fixture
def by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer gets the kernel that was fastest on it; whole networks are not timed."""
    monkeypatch.setattr(planner._Planner, "contest", lambda self, proven: (0, None))


@pytest.fixture
def fake_is_fastest(by_layer: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock says that the kernel named "fake" is the fastest."""

    def instant(found: Any, task: Any, effort: Any) -> None:
        for c in found:
            c.samples = [1e-6 if c.kernel.name == "fake" else 1.0]

    monkeypatch.setattr(tuning, "_time", instant)


@pytest.fixture
def winograd_is_fastest(by_layer: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock says that Winograd with tiles of 4x4 is the fastest."""

    def instant(found: Any, task: Any, effort: Any) -> None:
        for c in found:
            c.samples = [1e-6 if c.kernel.name == "winograd4" else 1.0]

    monkeypatch.setattr(tuning, "_time", instant)


def rows(plan: fused_resnet.Plan) -> list[Row]:
    (part,) = plan.explain().parts
    return [row for row in part.rows if row.kernel != "torch"]


class Fake(Kernel):
    """A convolution that does as it is told."""

    backend, op, name = "library", "conv_affine_act", "fake"

    def __init__(self, behave: Callable[[ConvProblem, Args], Tensor], exact: bool = True) -> None:
        self.behave = behave
        self.exact = exact  # type: ignore[misc]
        self.calls = 0

    def supports(self, problem: ConvProblem, device: torch.device) -> str | None:
        return None

    def run(self, problem: ConvProblem, *args: Any) -> Tensor:
        self.calls += 1
        return self.behave(problem, Args(*args))


@pytest.fixture
def install(fresh_registry: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[Fake], Fake]:
    """Put a kernel before all others, past its entrance test."""

    def put(kernel: Fake) -> Fake:
        monkeypatch.setattr(backends, "KERNELS", (kernel, *backends.KERNELS))
        for dtype in (torch.float32, torch.bfloat16):
            backends._verdicts[kernel, CPU, dtype] = None
        return kernel

    return put


# ---------------------------------------------------------------------------- right, quick, or out


@pytest.mark.usefixtures("tuned")
def test_a_wrong_kernel_is_rejected_with_its_error(install: Callable[[Fake], Fake]) -> None:
    wrong = install(Fake(lambda p, args: stock(p, args) * 1.001))
    plan = fused_resnet.optimize(blocks(), X)
    for row in rows(plan):
        assert row.kernel != "library/fake"
        if row.problem.startswith("conv"):
            (why,) = [r.why for r in row.rivals if r.kernel == "library/fake"]
            assert "its error is 1.0" in why
            assert "e-03, stock torch's is" in why
    assert wrong.calls > 0
    assert_right(plan(X), blocks(), X)


@pytest.mark.usefixtures("tuned")
def test_a_kernel_that_raises_is_skipped_with_one_warning(
    install: Callable[[Fake], Fake],
) -> None:
    def fail(p: ConvProblem, args: Args) -> Tensor:
        raise ArithmeticError("no")

    install(Fake(fail))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    with pytest.warns(FusedResNetWarning, match="skipped .* ArithmeticError: no") as caught:
        plan = fused_resnet.optimize(model, X)
    assert len(caught) == 1
    (row,) = rows(plan)
    (why,) = [r.why for r in row.rivals if r.kernel == "library/fake"]
    assert "raised ArithmeticError: no" in why
    assert_right(plan(X), model, X)


@pytest.mark.usefixtures("tuned")
def test_a_slow_kernel_loses(install: Callable[[Fake], Fake]) -> None:
    def slow(p: ConvProblem, args: Args) -> Tensor:
        time.sleep(0.02)
        return stock(p, args)

    install(Fake(slow))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    (row,) = rows(fused_resnet.optimize(model, X[:1, :, :8, :8]))
    assert row.kernel != "library/fake"
    assert row.seconds is not None
    assert row.seconds < 0.02
    (why,) = [r.why for r in row.rivals if r.kernel == "library/fake"]
    assert "times as slow" in why


@pytest.mark.usefixtures("tuned", "fake_is_fastest")
def test_a_kernel_wrong_for_one_layers_weights_only_is_replaced_there(
    install: Callable[[Fake], Fake],
) -> None:
    # Two layers of one problem: measured on the first, proven on both.
    model = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()
    ).eval()
    second = model[2].weight

    def picky(p: ConvProblem, args: Args) -> Tensor:
        y = stock(p, args)
        return y * 1.01 if torch.equal(args.weight, second) else y

    install(Fake(picky))
    plan = fused_resnet.optimize(model, X)
    first, last = rows(plan)
    assert first.kernel == "library/fake"
    assert last.kernel != "library/fake"
    assert "2: library/fake is not used: its error is" in str(plan.explain())
    (why,) = (rival.why for rival in last.rivals if rival.kernel == "library/fake")
    assert why.startswith("its error is")
    assert_right(plan(X), model, X)


def _inexact(p: ConvProblem, args: Args) -> Tensor:
    """One element is off by 5e-6: more than the rule allows in fp32, and lost in a mean of all."""
    y = stock(p, args)
    y[0, 0, 0, 0] += 5e-6 * y.max()
    return y


@pytest.mark.usefixtures("tuned", "fake_is_fastest")
@pytest.mark.parametrize(
    ("options", "used"),
    [
        ({}, True),
        ({"mode": "strict"}, False),
        ({"tolerance": 1e-7}, False),
        ({"tolerance": 0.0}, False),
        ({"tolerance": 1e-3}, True),
    ],
)
def test_an_inexact_kernel_needs_tolerance(
    install: Callable[[Fake], Fake], options: dict[str, Any], used: bool
) -> None:
    kernel = install(Fake(_inexact, exact=False))
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    ).eval()
    plan = fused_resnet.optimize(model, X, **options)
    (row,) = rows(plan)
    assert (row.kernel == "library/fake") is used
    before = kernel.calls
    plan(X)
    assert (kernel.calls > before) is used
    # Never by the fused model alone, whatever the table says: nobody has seen its weights there.
    fused = fused_resnet.fuse(model)
    before = kernel.calls
    with torch.no_grad():
        fused(X)
    assert kernel.calls == before


@pytest.mark.usefixtures("tuned", "fake_is_fastest")
def test_inexact_kernels_that_add_up_to_too_much_are_replaced(
    install: Callable[[Fake], Fake],
) -> None:
    # Each layer is within the tolerance, the network is not within the rule.
    install(Fake(lambda p, args: stock(p, args) * (1 + 1e-5), exact=False))
    model = blocks()
    plan = fused_resnet.optimize(model, X, tolerance=1e-4)
    assert "library/fake" not in [row.kernel for row in rows(plan)]
    assert "inexact kernels are not used: the network's error is" in str(plan.explain())
    assert_right(plan(X), model, X)


def test_stock_torch_always_competes(tuned: Path) -> None:
    plan = fused_resnet.optimize(small_resnet(), X)
    for row in rows(plan):
        assert "torch/aten" in (row.kernel, *(r.kernel for r in row.rivals))


# ------------------------------------------------------------------------------- measured only once


def test_a_second_time_nothing_is_measured(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_resnet()
    first = fused_resnet.optimize(model, X)
    assert tuned.exists()

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(planner, "measure", never)
    monkeypatch.setattr(planner, "walk", never)
    # As another process would see it.
    monkeypatch.setattr(tuned_table, "_tables", {})
    second = fused_resnet.optimize(model, X)
    assert [r.kernel for r in rows(first)] == [r.kernel for r in rows(second)]
    assert [r.error for r in rows(first)] == pytest.approx([r.error for r in rows(second)])
    assert torch.equal(first(X), second(X))


def test_other_weights_are_proven_but_not_measured(
    tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_resnet()
    fused_resnet.optimize(model, X)
    with torch.no_grad():
        model.layer1.conv1.weight.mul_(2.0)

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(planner, "measure", never)
    walked = []
    walk = planner.walk
    monkeypatch.setattr(planner, "walk", lambda *args: walked.append(1) or walk(*args))
    plan = fused_resnet.optimize(model, X)
    assert walked
    assert_right(plan(X), model, X)


def test_a_new_kernel_is_measured(tuned: Path, install: Callable[[Fake], Fake]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    fused_resnet.optimize(model, X)
    kernel = install(Fake(stock))
    fused_resnet.optimize(model, X)
    assert kernel.calls > 0


@pytest.mark.slow
def test_the_second_time_is_ten_times_quicker(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv(tuned_table.ENV, str(tuned))
    model, x = fused_resnet.resnet18().eval(), torch.randn(4, 3, 224, 224)
    times = []
    for _ in range(2):
        start = time.perf_counter()
        fused_resnet.optimize(model, x, budget=600.0)  # On a busy machine 60 s are not enough.
        times.append(time.perf_counter() - start)
    assert times[1] * 10 <= times[0]


def test_without_cache_nothing_is_kept(tuned: Path) -> None:
    fused_resnet.optimize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval(), X, cache=False)
    assert not tuned.exists()


def test_the_fused_model_follows_the_table(tuned: Path, by_layer: None) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    fused = fused_resnet.fuse(model)
    with torch.no_grad():
        fused(X)
    plan = fused_resnet.optimize(model, X, compact=False)  # The table knows no limit of memory.
    (row,) = rows(plan)
    with backends.observe() as choices, torch.no_grad():
        fused(X)
    entry = tuned_table.table().entry("conv_affine_act", choices[0].problem, CPU)
    assert entry is not None
    assert choices[0].kernel.full_name == entry.ranked(None)[0].kernel == row.kernel


# ----------------------------------------------------------------------------- budget, interruption


def test_a_spent_budget_is_told(tuned: Path) -> None:
    model = small_resnet()
    with pytest.warns(FusedResNetWarning, match=r"budget of 0 s was spent: \d+ of \d+ problems"):
        plan = fused_resnet.optimize(model, X, budget=0.0)
    assert "budget of 0 s was spent" in str(plan.explain())
    assert_right(plan(X), model, X)


def test_an_interruption_keeps_what_is_known(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuning.Task] = []
    measure = tuning.measure

    def interrupted(task: tuning.Task, effort: tuning.Effort) -> tuned_table.Entry:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(task)
        return measure(task, effort)

    monkeypatch.setattr(planner, "measure", interrupted)
    model = small_resnet()
    with pytest.warns(FusedResNetWarning, match="interrupted"):
        plan = fused_resnet.optimize(model, X)
    assert_right(plan(X), model, X)
    assert measured[0].cost >= measured[1].cost
    (count,) = tuned_table.TunedTable(tuned).counts().values()
    assert count == 2


def test_progress_is_told(tuned: Path) -> None:
    told: list[tuple[str, float]] = []
    fused_resnet.optimize(blocks(), X, progress=lambda text, share: told.append((text, share)))
    assert any("measuring conv 3x3" in text for text, _ in told)
    assert all(0.0 <= share <= 1.0 for _, share in told)


# ------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_networks_in_every_dtype(tuned: Path, dtype: torch.dtype) -> None:
    model = small_resnet().to(dtype)
    plan = fused_resnet.optimize(model, X.to(dtype))
    assert_right(plan(X.to(dtype)), model, X.to(dtype))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_several_outputs_and_what_no_kernel_computes(
    tuned: Path, layout: torch.memory_format
) -> None:
    model, x = blocks(), X.contiguous(memory_format=layout)
    plan = fused_resnet.optimize(model, x)
    result = plan(x)
    assert list(result) == ["map", "features"]
    assert_right(result, model, x)
    other = torch.channels_last if layout == torch.contiguous_format else torch.contiguous_format
    assert_right(plan(x.contiguous(memory_format=other)), model, x)


def test_features_of_all_stages(tuned: Path) -> None:
    torch.manual_seed(1)
    model = fused_resnet.ResNet(fused_resnet.BasicBlock, [1, 1, 1, 1], features_only=True).eval()
    plan = fused_resnet.optimize(model, X)
    assert type(plan(X)) is type(model(X))
    assert_right(plan(X), model, X)


def test_a_dtype_of_its_own(tuned: Path) -> None:
    model = small_resnet()
    plan = fused_resnet.optimize(model, X, dtype=torch.bfloat16)
    y = plan(X)
    assert y.dtype == torch.float32
    assert all("bfloat16" in row.problem for row in rows(plan))
    with torch.no_grad():
        exact = model.double()(X.double())
        half = model.bfloat16()(X.bfloat16())
    theirs = (half.double() - exact).norm()
    assert (y.double() - exact).norm() <= 2 * theirs
    assert next(model.parameters()).dtype == torch.bfloat16  # The user's, as converted just now.


class Batchwise(nn.Module):
    """Looks at values: no graph can stand for it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Blocks()

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)["map"]
        return y if float(y.sum()) > 1e9 else -y


def test_a_model_that_cannot_be_traced_is_tuned_all_the_same(tuned: Path) -> None:
    torch.manual_seed(2)
    model = Batchwise().eval()
    plan = fused_resnet.optimize(model, X)
    assert_right(plan(X), model, X)
    assert_right(plan(X[:1]), model, X[:1])
    told = str(plan.explain())
    assert "Batchwise is not specialised: " in told
    assert "no part of it is one native call" in " ".join(told.split())
    (count,) = tuned_table.TunedTable(tuned).counts().values()
    assert count >= 2
    with pytest.raises(ValueError, match="cannot be specialised"):
        fused_resnet.optimize(model, X, strict_shapes=True)


def test_a_part_of_it_is_specialised_by_itself(tuned: Path) -> None:
    # As the report of such a model advises.
    torch.manual_seed(2)
    model = Batchwise().eval()
    whole = copy.deepcopy(model)
    model.inner = fused_resnet.optimize(model.inner, X)
    assert_right(model(X), whole, X)
    assert model.inner.shapes == ("2x3x48x48 float32",)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return torch.relu(self.conv(x))


def test_a_model_that_changes_itself_is_not_specialised(tuned: Path) -> None:
    model = Counting().eval()
    plan = fused_resnet.optimize(model, X)
    before = float(model.seen)
    plan(X)
    assert float(model.seen) == before + 1
    assert "not specialised" in repr(plan)


def test_a_hook_is_not_forgotten(tuned: Path) -> None:
    model = blocks()
    seen: list[Any] = []
    model.head.register_forward_hook(lambda *args: seen.append(args))
    plan = fused_resnet.optimize(model, X)
    seen.clear()
    plan(X)
    assert len(seen) == 1
    assert "a hook is registered on head" in str(plan.explain())


class Masked(nn.Module):
    """Takes more than an image: keyword arguments, a flag, constants computed from parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect")
        self.gain = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x: Tensor, mask: Tensor | None = None, flip: bool = False) -> Tensor:
        y = self.conv(x) * torch.exp(self.gain).clamp(max=2.0)
        y = y.flip(-1) if flip else y
        return y if mask is None else y * mask


def test_arguments_of_every_kind(tuned: Path) -> None:
    torch.manual_seed(4)
    model, mask = Masked().eval(), (torch.rand(2, 1, 48, 48) > 0.5).float()
    plan = fused_resnet.optimize(model, {"x": X, "mask": mask, "flip": True})
    with torch.no_grad():
        assert torch.allclose(plan(x=X, mask=mask, flip=True), model(X, mask, True), atol=1e-6)
        # Other flags are other programs: these run through the fused model.
        assert torch.allclose(plan(x=X, mask=mask, flip=False), model(X, mask), atol=1e-6)


@pytest.mark.usefixtures("tuned")
def test_explain_tells_what_was_measured_whatever_the_threads_are_now() -> None:
    plan = fused_resnet.optimize(blocks(), X)
    told = plan.explain().parts
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert plan.explain().parts == told
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("tuned")
def test_a_loaded_plan_reads_the_table_only_to_explain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = fused_resnet.optimize(blocks(), X)
    plan.save(tmp_path / "plan")
    read: list[object] = []
    entry = TunedTable.entry
    monkeypatch.setattr(TunedTable, "entry", lambda *args: read.append(args) or entry(*args))
    loaded = fused_resnet.load(tmp_path / "plan")
    loaded(X)
    assert not read
    times = [r.seconds for part in loaded.explain().parts for r in part.rows]
    assert read
    assert times == [r.seconds for part in plan.explain().parts for r in part.rows]
    assert any(times)


# ------------------------------------------------------------------------------------------ errors


def test_bad_arguments() -> None:
    model = blocks()
    with pytest.raises(ValueError, match=r"train mode: call \.eval\(\)"):
        fused_resnet.optimize(blocks().train(), X)
    partly = blocks()
    partly.bn1.train()
    with pytest.raises(ValueError, match="'bn1' is in train mode"):
        fused_resnet.optimize(partly, X)
    with pytest.raises(ValueError, match="unknown mode 'fast'; one of balanced"):
        fused_resnet.optimize(model, X, mode="fast")
    with pytest.raises(ValueError, match="tolerance is a relative error"):
        fused_resnet.optimize(model, X, tolerance=-1.0)
    with pytest.raises(ValueError, match="compact must be None, True or False, got 'yes'"):
        fused_resnet.optimize(model, X, compact="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="budget must not be negative"):
        fused_resnet.optimize(model, X, budget=-1.0)
    with pytest.raises(ValueError, match="must contain a tensor"):
        fused_resnet.optimize(model, "image.png")
    with pytest.raises(ValueError, match="must not be empty"):
        fused_resnet.optimize(model, X[:0])
    with pytest.raises(ValueError, match="floating-point"):
        fused_resnet.optimize(model, X, dtype=torch.int8)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        fused_resnet.optimize("resnet50", X)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------- measuring


def test_measure_compares_whole_batches(fresh_registry: None) -> None:
    p = conv_problem(n=9)
    args = draw(p)

    def last_image_wrong(problem: ConvProblem, given: Args) -> Tensor:
        y = stock(problem, given)
        y[-1] *= 1.1
        return y

    kernel = Fake(last_image_wrong)
    backends._verdicts[kernel, CPU, p.dtype] = None
    task = tuning.Task("conv_affine_act", p, CPU, tuple(args))
    exact = tuning.reference(task)
    assert [e.shape for e in exact] == [p.out_shape]
    outcome = tuning._verified(kernel, task, exact, tuning.error_of_stock(task, exact))
    assert isinstance(outcome, str)
    assert "its error is" in outcome


@pytest.mark.skipif(extension is None, reason="no compiled extension")
def test_a_place_for_results_proves_nothing(fresh_registry: None) -> None:
    class Idle(Fake):
        takes_out = True

        def run_into(self, problem: ConvProblem, out: Tensor, *args: Any) -> Tensor:
            return out

    p = conv_problem()
    kernel, native = Idle(stock), backends.named("conv_affine_act", "cpu/direct", p, CPU)
    assert native is not None
    backends._verdicts[kernel, CPU, p.dtype] = None
    task = tuning.Task("conv_affine_act", p, CPU, tuple(draw(p)))
    exact = tuning.reference(task)
    place = tuning._place(task)
    assert place is not None
    arguments = (task, exact, tuning.error_of_stock(task, exact), place)
    right = tuning._verified(native, *arguments)
    assert not isinstance(right, str)
    assert right.call() is place
    assert isinstance(tuning._verified(kernel, *arguments), str)  # The right result was there.


def test_every_variant_competes_in_max_mode(fresh_registry: None) -> None:
    class Tiled(Fake):
        def variants(self, problem: ConvProblem, device: torch.device) -> tuple[Kernel, ...]:
            return tuple(Named(size) for size in (8, 16))

    class Named(Fake):
        def __init__(self, size: int) -> None:
            super().__init__(stock)
            self.name = f"fake[{size}]"

    task = tuning.Task("conv_affine_act", conv_problem(), CPU, ())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "KERNELS", (Tiled(stock), *backends.KERNELS))
        names = [k.full_name for k in tuning.contenders(task, tuning.EFFORTS["max"])]
        assert names[:2] == ["library/fake[8]", "library/fake[16]"]
        names = [k.full_name for k in tuning.contenders(task, tuning.EFFORTS["balanced"])]
        assert names[0] == "library/fake"
        found = backends.named("conv_affine_act", "library/fake[16]", conv_problem(), CPU)
        assert isinstance(found, Named)


@pytest.fixture(autouse=True)
def _no_stray_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FusedResNetWarning)
        yield


def test_report_holds_everything(tuned: Path) -> None:
    report: PlanReport = fused_resnet.optimize(small_resnet(), X).explain()
    data = report.to_dict()
    (part,) = data["parts"]
    assert part["inputs"] == "2x3x48x48 float32"
    shares = [row["share"] for row in part["rows"] if row["share"] is not None]
    assert sum(shares) == pytest.approx(1.0)
    assert data["memory"]["stock_weights"] > 0
    text = str(report)
    for word in ("layer2.conv2", "time", "share", "error", "next best"):
        assert word in text


@pytest.mark.usefixtures("tuned")
def test_a_forced_backend_is_what_a_plan_takes() -> None:
    """However fast others were measured to be, and whatever was proven before."""
    free = fused_resnet.optimize(blocks(), X)
    assert {row.kernel.partition("/")[0] for row in rows(free)} != {"library", "torch"}
    with fused_resnet.backend("torch"):
        plan = fused_resnet.optimize(blocks(), X)
    (part,) = plan.explain().parts
    assert {row.kernel.partition("/")[0] for row in part.rows} == {"torch"}
    assert "backend torch was forced: nothing was measured" in str(plan.explain())
    assert_right(plan(X), blocks(), X)


@pytest.mark.usefixtures("tuned")
def test_a_forced_kernel_that_is_wrong_is_not_taken(install: Callable[[Fake], Fake]) -> None:
    install(Fake(lambda p, args: stock(p, args) * 1.001))
    with fused_resnet.backend("library", "torch"):
        plan = fused_resnet.optimize(blocks(), X)
    assert "library/fake" not in {row.kernel for row in rows(plan)}
    assert_right(plan(X), blocks(), X)


# ------------------------------------------------------------------------------------ other weights


def _inexact_where_large(p: ConvProblem, args: Args) -> Tensor:
    """Off by more than the tolerance where weights are large, as Winograd's transforms can be."""
    y = stock(p, args)
    return y * (1 + 1e-4) if args.weight.abs().max() > 50 else y


@pytest.mark.usefixtures("tuned", "fake_is_fastest")
@pytest.mark.parametrize("kept", ["source", "nothing", "file"])
def test_refit_proves_inexact_kernels_with_the_new_weights(
    install: Callable[[Fake], Fake], kept: str, tmp_path: Path
) -> None:
    install(Fake(_inexact_where_large, exact=False))
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU()
    ).eval()
    plan = fused_resnet.optimize(model, X, strict_shapes=kept == "nothing")
    assert [row.kernel for row in rows(plan)] == ["library/fake"] * 2
    if kept == "file":
        plan.save(tmp_path / "plan")
        plan = fused_resnet.load(tmp_path / "plan")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[3].weight.mul_(1000)
    with pytest.warns(FusedResNetWarning, match=r"needs other kernels for 1 of 2 layers.*fake ->"):
        plan.refit(other.state_dict())
    first, last = rows(plan)
    assert first.kernel == "library/fake"
    assert last.kernel != "library/fake"
    assert "library/fake is not used: its error is" in str(plan.explain())
    assert_right(plan(X), other, X)
    # The kernel comes back with weights that it is right for.
    plan.refit(model.state_dict(), X)
    assert [row.kernel for row in rows(plan)] == ["library/fake"] * 2
    assert_right(plan(X), model, X)


@pytest.mark.usefixtures("tuned", "fake_is_fastest")
@pytest.mark.parametrize("strict", [False, True])
def test_refit_judges_the_network_as_a_whole(install: Callable[[Fake], Fake], strict: bool) -> None:
    def off(p: ConvProblem, args: Args) -> Tensor:
        """Within the tolerance of each layer; with large weights not within the network's rule."""
        return stock(p, args) * (1 + (1e-5 if args.weight.abs().max() > 50 else 0))

    install(Fake(off, exact=False))
    model = blocks()
    plan = fused_resnet.optimize(model, X, tolerance=1e-4, strict_shapes=strict)
    assert "library/fake" in [row.kernel for row in rows(plan)]
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.Conv2d):
                m.weight.mul_(1000)
    with pytest.warns(FusedResNetWarning, match="needs other kernels"):
        plan.refit(model.state_dict())
    assert "inexact kernels are not used: the network's error is" in str(plan.explain())
    assert_right(plan(X), model, X)


@pytest.mark.skipif(extension is None, reason="no compiled extension")
@pytest.mark.usefixtures("tuned", "winograd_is_fastest")
def test_refit_with_weights_that_break_winograd() -> None:
    # All sums of two large weights cancel: the transforms round what is left of them away.
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()).eval()
    x = torch.ones(1, 32, 24, 24)
    plan = fused_resnet.optimize(model, x, compact=False)
    assert rows(plan)[0].kernel == "cpu/winograd4"
    state = model.state_dict()
    large = torch.randn(32, 1, 3, 3).expand(32, 16, 3, 3) * 1e4
    state["0.weight"] = torch.cat((large, -large), 1) + state["0.weight"]
    with pytest.warns(FusedResNetWarning, match="cpu/winograd4 -> "):
        plan.refit(state, x)
    (row,) = rows(plan)
    assert row.kernel != "cpu/winograd4"
    model.load_state_dict(state)
    assert_right(plan(x), model, x)


@pytest.mark.usefixtures("tuned", "winograd_is_fastest")
def test_a_compact_plan_keeps_no_weights_in_a_larger_form() -> None:
    # Behind a mean, in which errors of single elements are lost.
    conv = nn.Conv2d(64, 64, 3, padding=1, bias=False)
    model = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1)).eval()
    x = torch.randn(1, 64, 16, 16)
    plain = fused_resnet.optimize(model, x, compact=False)
    assert rows(plain)[0].kernel == "cpu/winograd4"
    # 36 numbers of the transformed weights in the place of 9.
    assert plain.memory.expansion == 64 * 64 * 27 * 4
    assert "compact=True" in str(plain.explain())
    for _ in range(2):  # Measured, and known.
        compact = fused_resnet.optimize(model, x, compact=True)
        assert rows(compact)[0].kernel not in ("cpu/winograd4", "cpu/winograd2")
        assert compact.memory.expansion == 0
        whys = {rival.kernel: rival.why for rival in rows(compact)[0].rivals}
        assert "the plan is compact" in whys["cpu/winograd4"]
        vectors = 2 * 64 * 4
        assert compact.memory.weights <= compact.memory.stock_weights + vectors
        assert "compact=True" not in str(compact.explain())
    again = fused_resnet.optimize(model, x, compact=False)
    assert rows(again)[0].kernel == "cpu/winograd4"
    # The mode comes first: no memory would bring them back.
    strict = fused_resnet.optimize(model, x, mode="strict")
    whys = {rival.kernel: rival.why for rival in rows(strict)[0].rivals}
    assert "which the mode excludes" in whys["cpu/winograd4"]


@pytest.mark.usefixtures("tuned", "winograd_is_fastest")
def test_a_plan_takes_no_more_memory_than_stock_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    # So many in a row are off by more than the rule allows the network; not the matter here.
    monkeypatch.setattr(Judge, "fault", lambda _judge, _result: None)

    # Stock torch holds three large maps at the second convolution, a plan two and its workspace:
    # there is room for 0.1, 0.1 and 0.4 MB of transformed weights, not for 4 MB more.
    def conv(channels: int, following: int, window: int = 3, stride: int = 1) -> nn.Sequential:
        c = nn.Conv2d(channels, following, window, stride, padding=window // 2)
        return nn.Sequential(c, nn.ReLU())

    model = nn.Sequential(
        *(conv(32, 32), conv(32, 32), conv(32, 64, 1, 2), conv(64, 64)),
        *(conv(64, 192, 1, 2), conv(192, 192), nn.AdaptiveAvgPool2d(1)),
    ).eval()
    x = torch.randn(1, 32, 160, 160)
    whole = fused_resnet.optimize(model, x, compact=False)
    threes = (0, 1, 3, 5)
    assert {rows(whole)[i].kernel for i in threes} == {"cpu/winograd4"}
    assert whole.memory.total > whole.memory.stock_total
    for _ in range(2):  # Measured, and known.
        plan = fused_resnet.optimize(model, x)
        memory = plan.memory
        assert memory.total <= memory.stock_total
        *others, last = (rows(plan)[i] for i in threes)
        # The clock gives all the same gain: the largest goes.
        assert {row.kernel for row in others} == {"cpu/winograd4"}
        assert last.kernel != "cpu/winograd4"
        assert 0 < memory.expansion < whole.memory.expansion
        whys = {rival.kernel: rival.why for rival in last.rivals}
        assert "take 4 MB more: see compact" in whys["cpu/winograd4"]
        torch.testing.assert_close(plan(x), model(x), rtol=1e-5, atol=1e-6)
    # New weights do not bring it back.
    plan.refit({name: 2 * t for name, t in model.state_dict().items()})
    assert rows(plan)[5].kernel == last.kernel
    plan.refit(model.state_dict())
    assert plan.memory == memory


@pytest.mark.usefixtures("tuned")
def test_refit_refuses_an_example_of_other_shapes() -> None:
    model = blocks()
    plan = fused_resnet.optimize(model, X)
    before = plan(X)["map"]
    with pytest.raises(ValueError, match="not for 1x3x48x48"):
        plan.refit({n: t * 2 for n, t in model.state_dict().items()}, X[:1])
    assert torch.equal(plan(X)["map"], before)
