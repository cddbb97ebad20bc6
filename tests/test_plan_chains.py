"""Chained bottlenecks in plans: what is found and offered, verified, timed, kept, and explained.

No chain kernel of the package runs on a CPU. Kernels of the tests' own stand in for one; a clock
of the tests' own says how long they take.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fused_resnet
from fused_resnet import backends, planner, tuning
from fused_resnet.backends import FusedResNetWarning, Kernel, torch_
from fused_resnet.backends.kernel import PackedChainKernel
from fused_resnet.chain_planner import UNCHAINED, ChainOutcome
from fused_resnet.chaining import chained, find
from fused_resnet.layers import Chained, Span
from fused_resnet.plan_report import Part
from fused_resnet.problem import ChainProblem, Problem
from fused_resnet.source import Source
from tests.helpers import CPU
from tests.plans import assert_right
from tests.test_chain import Net, randomised, small

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
DTYPES = (torch.float32, torch.bfloat16)

Results = tuple[Tensor, Tensor]
Behaviour = Callable[..., Results]


def right(p: ChainProblem, *args: Any) -> Results:
    return torch_.AtenChain().run(p, *args)


class FakeChain(Kernel):
    """A chained bottleneck that does as it is told."""

    backend, op, name = "library", "bottleneck_chain", "fake"

    def __init__(
        self, behave: Behaviour = right, refuse: Callable[[ChainProblem], str | None] | None = None
    ) -> None:
        self.behave, self.refuse = behave, refuse
        self.ran: list[ChainProblem] = []

    def supports(self, problem: ChainProblem, device: torch.device) -> str | None:
        return None if self.refuse is None else self.refuse(problem)

    def run(self, problem: ChainProblem, *args: Any) -> Results:
        self.ran.append(problem)
        return self.behave(problem, *args)


@pytest.fixture
def install(fresh_registry: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Have one chain kernel, past its entrance test, and stock torch as everything else."""

    def put(kernel: Kernel) -> Kernel:
        monkeypatch.setattr(backends, "KERNELS", (kernel, *torch_.KERNELS))
        for dtype in DTYPES:
            backends._verdicts[kernel, CPU, dtype] = None
        return kernel

    return put


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a chained call takes, in the time of the layers that it replaces; and a whole network.

    ``"chain"`` is a number, or a function of the problem.
    """
    said: dict[str, Any] = {"chain": 0.5, "whole": lambda layers: len(layers.layers)}

    def instant(found: Any, task: Any, effort: Any) -> None:
        for c in found:
            c.samples = [1.0]
            if c.kernel.name == "fake":
                chain = said["chain"]
                c.samples = [chain(task.problem) if callable(chain) else chain]

    monkeypatch.setattr(tuning, "_time", instant)
    monkeypatch.setattr(planner, "_seconds", lambda p, inputs: float(said["whole"](p.layers)))
    return said


def part(plan: fused_resnet.Plan) -> Part:
    return plan.explain().parts[0]


def chains(plan: fused_resnet.Plan) -> list[str]:
    """The problems that are chained, in order."""
    return [row.problem for row in part(plan).rows if row.problem.startswith("chain")]


def outcome(plan: fused_resnet.Plan, name: str) -> ChainOutcome:
    (found,) = [o for o in part(plan).chains if name in o.name.split(", ")]
    return found


def network() -> nn.Module:
    """The same one each time."""
    return small()


pytestmark = pytest.mark.usefixtures("tuned", "hurried")

# ------------------------------------------------------------------------ right, quick, or left out


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_and_fast_chain_is_taken(install: Callable[..., Any], dtype: torch.dtype) -> None:
    kernel = install(FakeChain())
    model, x = network().to(dtype), X.to(dtype)
    plan = fused_resnet.optimize(model, x)
    name = str(dtype).removeprefix("torch.")
    # Projections inside, even pixels between the stages, the mean at the end: all that there is.
    assert chains(plan) == [
        f"chain 4->16->4 project 8 2x16x16 {name}",
        f"chain 4->16->8 2x16x16 {name} even",
        f"chain 8->32->8 project 16 stride 2 2x16x16 {name}",
        f"chain 8->32 2x8x8 {name} pool",
    ]
    kernel.ran.clear()
    assert_right(plan(x), model, x)
    assert len(kernel.ran) == 4
    rows = [row for row in part(plan).rows if row.problem.startswith("chain")]
    for row in rows:
        assert row.kernel == "library/fake"
        assert row.seconds == 0.5
        assert row.error is not None
        assert row.stock_error is not None
        (rival,) = row.rivals
        assert rival.kernel.startswith(f"{UNCHAINED}: torch/aten + torch/aten")
        assert rival.why == "2.00 times as slow"
    assert rows[0].name.startswith("layer1.0.conv2 + layer1.0.downsample.0 + layer1.0.conv3 + ")
    first = outcome(plan, "layer1.0.conv2")
    assert first.chosen == "3x3 and 1x1 + projection + next 1x1"
    assert "library/fake takes 500 ms, 0.50 of the 1e+03 ms unchained" in first.why
    assert [what for what, _ in first.alternatives] == [
        "3x3 and 1x1 + next 1x1", "3x3 and 1x1 + projection", "3x3 and 1x1",
    ]  # fmt: skip
    text = str(plan.explain())
    assert "layer1.1.conv2: chained, 3x3 and 1x1 + next 1x1, even pixels stored" in text
    assert "layer2.1.conv2: chained, 3x3 and 1x1, output pooled" in text
    assert plan.explain().to_dict()["parts"][0]["chains"][0]["name"] == "layer1.0.conv2"


def wrong_out(p: ChainProblem, *args: Any) -> Results:
    out, mid_next = right(p, *args)
    return out * 1.001, mid_next


def wrong_next(p: ChainProblem, *args: Any) -> Results:
    out, mid_next = right(p, *args)
    return out, mid_next * 1.001


def wrong_last_image(p: ChainProblem, *args: Any) -> Results:
    out, mid_next = right(p, *args)
    out[-1] *= 1.1
    return out, mid_next


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("behave", [wrong_out, wrong_last_image])
def test_a_wrong_chain_is_rejected(install: Callable[..., Any], behave: Behaviour) -> None:
    kernel = install(FakeChain(behave))
    model = network()
    plan = fused_resnet.optimize(model, X)
    assert chains(plan) == []
    assert kernel.ran
    found = outcome(plan, "layer1.0.conv2")
    assert found.chosen is None
    assert "library/fake: its error is " in found.why
    assert_right(plan(X), model, X)


@pytest.mark.usefixtures("clock")
def test_both_results_are_judged(install: Callable[..., Any]) -> None:
    """A wrong activation of the next block leaves the calls that do not compute any."""
    install(FakeChain(wrong_next))
    model = network()
    plan = fused_resnet.optimize(model, X)
    assert chains(plan) == [
        "chain 4->16 project 8 2x16x16 float32",
        "chain 4->16 2x16x16 float32",
        "chain 8->32 project 16/2 stride 2 2x16x16 float32",
        "chain 8->32 2x8x8 float32 pool",
    ]
    assert_right(plan(X), model, X)


@pytest.mark.usefixtures("clock")
def test_a_chain_that_raises_is_skipped_with_one_warning(install: Callable[..., Any]) -> None:
    def fail(p: ChainProblem, *args: Any) -> Results:
        raise ArithmeticError("no")

    install(FakeChain(fail, lambda p: None if p.next == 8 and p.store == "all" and not p.proj
                      and p.m == 4 else "it is for one problem"))  # fmt: skip
    model = network()
    skipped = "library/fake is skipped .* ArithmeticError: no"
    with pytest.warns(FusedResNetWarning, match=skipped) as caught:
        plan = fused_resnet.optimize(model, X)
    assert len(caught) == 1
    assert chains(plan) == []
    assert "raised ArithmeticError: no" in outcome(plan, "layer1.1.conv2").why
    assert "it is for one problem" in outcome(plan, "layer1.0.conv2").why
    assert_right(plan(X), model, X)


@pytest.mark.parametrize("chain", [0.98, 1.0, 3.0])
def test_a_slow_chain_and_a_near_tie_lose(
    install: Callable[..., Any], clock: dict[str, Any], chain: float
) -> None:
    kernel = install(FakeChain())
    clock["chain"] = chain
    plan = fused_resnet.optimize(network(), X)
    assert chains(plan) == []
    found = outcome(plan, "layer2.0.conv2")
    assert found.chosen is None
    assert f"{chain:.2f} of the" in found.why
    kernel.ran.clear()
    plan(X)
    assert kernel.ran == []


def test_a_chain_is_timed_against_what_it_replaces(install: Callable[..., Any]) -> None:
    """By the real clock: both run in turns, and one that dawdles loses."""

    def slow(p: ChainProblem, *args: Any) -> Results:
        time.sleep(0.02)
        return right(p, *args)

    install(FakeChain(slow))
    plan = fused_resnet.optimize(network(), X)
    assert chains(plan) == []
    assert "library/fake takes 2" in outcome(plan, "layer1.0.conv2").why


def test_a_chain_wrong_for_one_blocks_weights_stays_unchained_there(
    install: Callable[..., Any], clock: dict[str, Any]
) -> None:
    """Blocks 1 and 2 of a stage have one problem, which is measured on the first of them."""
    model = Net()
    make = torchvision.models.ResNet._make_layer
    model.inplanes = 8
    model.layer1 = make(model, torchvision.models.resnet.Bottleneck, 4, 4)
    randomised(model)
    marked = model.layer1[2].conv2.weight

    def off(p: ChainProblem, *args: Any) -> Results:
        out, mid_next = right(p, *args)
        return (out * 1.01 if torch.equal(args[2], marked) else out), mid_next

    install(FakeChain(off))
    plan = fused_resnet.optimize(model, X)
    assert len(chains(plan)) == 5
    assert outcome(plan, "layer1.2.conv2").chosen is None
    assert outcome(plan, "layer1.1.conv2").chosen is not None
    assert any("layer1.2.conv2" in n and "is not used: its error" in n for n in part(plan).notes)
    assert_right(plan(X), model, X)
    again = fused_resnet.optimize(model, X)
    assert chains(again) == chains(plan)


def test_chains_that_slow_the_whole_down_are_dropped(
    install: Callable[..., Any], clock: dict[str, Any]
) -> None:
    install(FakeChain())
    clock["whole"] = lambda layers: 2.0 if layers.spans else 1.9
    model = network()
    plan = fused_resnet.optimize(model, X)
    assert chains(plan) == []
    assert "nothing is chained: as a whole" in str(plan.explain())
    assert_right(plan(X), model, X)
    assert chains(fused_resnet.optimize(model, X)) == []


# --------------------------------------------------------------------------------- where chains end


def test_a_chain_can_end_at_any_block(install: Callable[..., Any], clock: dict[str, Any]) -> None:
    install(FakeChain())
    # Without the next 1x1 in the first stage; stage 2 is not worth it, its last block is.
    costs = {(4, True): 0.9, (4, False): 0.4, (8, True): 1.2, (8, False): 1.1}
    clock["chain"] = lambda p: 0.3 if p.store == "pool" else costs[p.m, p.next > 0]
    model = network()
    plan = fused_resnet.optimize(model, X)
    assert chains(plan) == [
        "chain 4->16 project 8 2x16x16 float32",
        "chain 4->16 2x16x16 float32",
        "chain 8->32 2x8x8 float32 pool",
    ]
    assert_right(plan(X), model, X)


@pytest.mark.parametrize(("thin_gains", "store"), [(0.6, "even"), (0.1, "all")])
def test_even_pixels_are_stored_where_both_blocks_gain_most(
    install: Callable[..., Any], clock: dict[str, Any], thin_gains: float, store: str
) -> None:
    """By itself storing all pixels is quicker here; what the next block gains decides."""
    install(FakeChain())

    def cost(p: ChainProblem) -> float:
        if p.stride == 2:
            return 1 - thin_gains if p.proj and p.step == 1 else 0.8
        return {"even": 0.6, "all": 0.5, "pool": 0.5}[p.store]

    clock["chain"] = cost
    plan = fused_resnet.optimize(network(), X)
    (last,) = [text for text in chains(plan) if text.startswith("chain 4->16->8 ")]
    assert last.endswith("even") == (store == "even")
    (first,) = [text for text in chains(plan) if "stride 2" in text]
    assert ("project 16 " in first) == (store == "even")


def test_a_projection_outside_reads_the_even_pixels(
    install: Callable[..., Any], clock: dict[str, Any]
) -> None:
    install(FakeChain(refuse=lambda p: "no projections" if p.proj else None))
    model = network()
    plan = fused_resnet.optimize(model, X)
    assert chains(plan)[1].endswith("even")
    (row,) = [row for row in part(plan).rows if row.name == "layer2.0.downsample.0"]
    assert row.problem == "conv 1x1 16->32 2x8x8 float32"
    assert_right(plan(X), model, X)
    assert "library/fake: no projections" not in str(outcome(plan, "layer2.0.conv2"))


@pytest.mark.parametrize("size", [16, 15, 13])
@pytest.mark.usefixtures("clock")
def test_odd_sizes(install: Callable[..., Any], size: int) -> None:
    install(FakeChain())
    model, x = network(), torch.randn(3, 3, size, size - 2)
    plan = fused_resnet.optimize(model, x)
    assert len(chains(plan)) == 4
    assert_right(plan(x), model, x)


# ------------------------------------------------------------------------------ once and ever after


@pytest.mark.usefixtures("clock")
def test_a_second_time_nothing_is_measured(
    install: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(FakeChain())
    model = network()
    first = fused_resnet.optimize(model, X)

    def never(*args: Any) -> None:
        raise AssertionError("measured or proven again")

    monkeypatch.setattr(planner, "measure", never)
    monkeypatch.setattr(planner._Planner, "prove", never)
    second = fused_resnet.optimize(model, X)
    assert chains(second) == chains(first) != []
    assert part(second).chains == part(first).chains
    assert torch.equal(second(X), first(X))


@pytest.mark.usefixtures("clock")
def test_a_chain_is_measured_anew_beside_other_layers(
    install: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a call is compared with is named in the table; quicker layers make it out of date."""
    kernel = install(FakeChain())
    model = network()
    fused_resnet.optimize(model, X)

    class Quick(torch_.AtenConv):
        backend, name = "library", "quick"

    quick = Quick()
    monkeypatch.setattr(backends, "KERNELS", (kernel, quick, *torch_.KERNELS))
    backends._verdicts[quick, CPU, torch.float32] = None
    monkeypatch.setattr(
        tuning, "_time",
        lambda found, task, effort: [
            setattr(c, "samples", [0.1 if "quick" in c.kernel.full_name else 0.5]) for c in found
        ],
    )  # fmt: skip
    plan = fused_resnet.optimize(model, X)
    assert chains(plan) == []
    assert "unchained: library/quick + library/quick" in outcome(plan, "layer1.1.conv2").why


@pytest.mark.usefixtures("clock")
def test_a_spent_budget_leaves_bottlenecks_unchained(install: Callable[..., Any]) -> None:
    install(FakeChain())
    model = network()
    with pytest.warns(FusedResNetWarning, match="budget of 0 s was spent"):
        plan = fused_resnet.optimize(model, X, budget=0.0)
    assert chains(plan) == []
    assert outcome(plan, "layer1.0.conv2").why.startswith("not measured")
    assert_right(plan(X), model, X)
    assert len(chains(fused_resnet.optimize(model, X))) == 4


@pytest.mark.usefixtures("clock")
def test_other_shapes_and_batches(install: Callable[..., Any]) -> None:
    install(FakeChain())
    model = network()
    plan = fused_resnet.optimize(model, X, batch_sizes=(1,))
    assert [len([r for r in p.rows if r.problem.startswith("chain")])
            for p in plan.explain().parts] == [4, 4]  # fmt: skip
    other = torch.randn(3, 3, 12, 20)
    for x in (X, X[:1], other):
        assert_right(plan(x), model, x)
    dynamic = fused_resnet.optimize(model, X, dynamic=True)
    # Of these shapes nothing is known, so nothing is chained; of those it made, everything is.
    for x in (other, X[:1]):
        assert_right(dynamic(x), model, x)
    counts = [sum(r.problem.startswith("chain") for r in p.rows) for p in dynamic.explain().parts]
    assert counts == [4, 0, 4]
    strict = fused_resnet.optimize(model, X, strict_shapes=True)
    assert_right(strict(X), model, X)
    with pytest.raises(ValueError, match="was made for"):
        strict(other)


# ------------------------------------------------------------------------------------ files, refits


@dataclass
class Wrapped:
    """A weight as a descriptor of its memory, as some kernels want it."""

    base: Tensor


class Packing(PackedChainKernel):
    """Wants weights wrapped, so that no other kernel could run on them."""

    backend, op, name = "library", "bottleneck_chain", "fake"

    def __init__(self) -> None:
        super().__init__()
        self.prepared_count = 0

    def supports(self, problem: Problem, device: torch.device) -> str | None:
        return None

    def layouts(self, problem: ChainProblem, device: torch.device) -> tuple[Any, ...]:
        p = problem
        return (p.m, p.m, 3), (p.k, p.m, 1), (p.k, p.proj, 1), (p.next, p.k, 1)

    def pack_key(self, problem: Any) -> Any:
        return problem

    def prepare(self, problem: Any, weight: Tensor, scale: Tensor, shift: Tensor) -> Any:
        k, c, r = problem
        assert weight.shape == (k, c, r, r)
        self.prepared_count += 1
        return Wrapped(weight.detach()), scale, shift

    def run(self, problem: ChainProblem, *args: Any) -> Results:
        mid, shortcut, *convs = args
        given: list[Any] = []
        for i, layout in enumerate(self.layouts(problem, mid.device)):
            weight, scale, shift = convs[3 * i : 3 * i + 3]
            if weight is None:
                given += (None, None, None)
                continue
            packed, scale, shift = self.packed(layout, weight, scale, shift)
            given += (packed.base, scale, shift)
        return right(problem, mid, shortcut, *given)


def changed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for t in model.state_dict().values():
            if t.is_floating_point():
                t.mul_(1.1)
    return model


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("kernel", [FakeChain, Packing])
def test_save_load_and_refit(
    install: Callable[..., Any], tmp_path: Path, kernel: Callable[[], Kernel]
) -> None:
    installed = install(kernel())
    model = network()
    plan = fused_resnet.optimize(model, X, batch_sizes=(1,))
    assert len(chains(plan)) == 4
    plan.save(tmp_path / "p.plan")
    loaded = fused_resnet.load(tmp_path / "p.plan")
    assert chains(loaded) == chains(plan)
    assert [p.chains for p in loaded.explain().parts] == [p.chains for p in plan.explain().parts]
    if isinstance(installed, Packing):
        installed.prepared_count = 0
    for x in (X, X[:1]):
        assert torch.equal(loaded(x), plan(x))
    if isinstance(installed, Packing):
        assert installed.prepared_count == 0  # Packed when loaded, not when called.
    other = changed(network())
    for p in (plan, loaded):
        p.refit(other.state_dict())
        assert_right(p(X), other, X)
    loaded.save(tmp_path / "q.plan", other.state_dict())
    assert_right(fused_resnet.load(tmp_path / "q.plan")(X), other, X)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("kernel", [FakeChain, Packing])
def test_training_on_changes_no_plan(
    install: Callable[..., Any], kernel: Callable[[], Kernel]
) -> None:
    install(kernel())
    model = network()
    plan = fused_resnet.optimize(model, X)
    assert len(chains(plan)) == 4
    before = plan(X)
    changed(model)
    assert torch.equal(plan(X), before)


@pytest.mark.usefixtures("clock")
def test_a_file_whose_chain_kernel_is_not_here(
    install: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(FakeChain())
    model = network()
    plan = fused_resnet.optimize(model, X)
    plan.save(tmp_path / "p.plan")
    install(FakeChain(refuse=lambda p: "not this one" if p.store == "even" else None))
    with pytest.warns(FusedResNetWarning, match="replaced .* library/fake"):
        some = fused_resnet.load(tmp_path / "p.plan")
    assert [text.split()[1] for text in chains(some)] == ["4->16->4", "8->32->8", "8->32"]
    assert_right(some(X), model, X)
    monkeypatch.setattr(backends, "KERNELS", torch_.KERNELS)
    with pytest.warns(FusedResNetWarning, match="replaced .* library/fake"):
        none = fused_resnet.load(tmp_path / "p.plan")
    assert chains(none) == []
    assert_right(none(X), model, X)


@pytest.mark.usefixtures("clock")
def test_spans_that_fit_nothing_are_refused(install: Callable[..., Any]) -> None:
    layers = Source(network(), None).layers((X,), {})
    blocks = find(layers).blocks
    (first, *_) = blocks[0].spans()
    for spans in (
        [replace(first, block=-1)],
        [replace(first, store="even")],
        [first, first],
        [Span(blocks[1].conv2.result, True, True, "all")],
    ):
        with pytest.raises(ValueError, match="does not describe a bottleneck"):
            chained(layers, blocks, spans)
    found = chained(layers, blocks, [first])
    assert sum(isinstance(layer, Chained) for layer in found.layers) == 1
    assert len(found.layers) == len(layers.layers) - 3


@pytest.mark.usefixtures("clock")
def test_memory_counts_what_chains_keep(install: Callable[..., Any]) -> None:
    install(FakeChain())
    model = network()
    plan = fused_resnet.optimize(model, X, strict_shapes=True)
    install(FakeChain(refuse=lambda p: "no"))
    unchained = fused_resnet.optimize(model, X, strict_shapes=True)
    assert chains(plan) != []
    assert chains(unchained) == []
    assert plan.memory.stock_activations == unchained.memory.stock_activations
    assert plan.memory.activations <= unchained.memory.activations
    assert plan.memory.weights == unchained.memory.weights


# --------------------------------------------------------------------------- what prevents chaining


class Taps(Net):
    """Returns a tensor from inside a block, beside the result."""

    def __init__(self, tap: str) -> None:
        super().__init__()
        self.tap = tap

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.layer1(self.stem(x))
        first, second = self.layer2
        mid = first.relu(first.bn2(first.conv2(first.relu(first.bn1(first.conv1(x))))))
        y = first.relu(first.bn3(first.conv3(mid)) + first.downsample(x))
        y = second(y)
        kept = {"mid": mid, "stage": x, "last": y}[self.tap]
        return {"logits": self.fc(self.avgpool(y).flatten(1)), "tap": kept}


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("tap", ["mid", "stage", "last"])
def test_returned_tensors_are_made(install: Callable[..., Any], tap: str) -> None:
    install(FakeChain())
    model = randomised(Taps(tap))
    plan = fused_resnet.optimize(model, X)
    assert_right(plan(X), model, X)
    stored = [text.split()[-1] for text in chains(plan)]
    if tap == "mid":
        assert len(stored) == 3
        reason = outcome(plan, "layer2.0.conv2")
        assert reason.chosen is None
        assert reason.why == "the model returns the result of its 3x3"
    elif tap == "stage":
        assert stored == ["float32", "float32", "float32", "pool"]
        why = outcome(plan, "layer1.1.conv2").why
        assert "all pixels of its output are stored, since the model returns it" in why
    else:
        assert stored == ["float32", "even", "float32", "float32"]


class Squeezed(torchvision.models.resnet.Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        y = y * y.mean((2, 3), keepdim=True)
        return self.relu(self.bn3(self.conv3(y)) + (self.downsample(x) if self.downsample else x))


class ChangedInPlace(torchvision.models.resnet.Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        mid = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn3(self.conv3(self.relu(self.bn2(self.conv2(mid))))) + x)
        return y + mid.mul_(2).mean()


class V1(torchvision.models.resnet.Bottleneck):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conv1.stride, self.conv2.stride = self.conv2.stride, self.conv1.stride


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("options", "name", "reason"),
    [
        ({"groups": 2, "base_width": 64}, "layer1.0.conv2", "its 3x3 has 2 groups"),
        ({"dilation": 2}, "layer1.0.conv2", "its 3x3 has dilation 2"),
        ({"block": Squeezed}, "layer1.0.conv2", "aten.mul.Tensor"),
    ],
)
def test_what_cannot_be_chained_is_explained(
    install: Callable[..., Any], options: dict[str, Any], name: str, reason: str
) -> None:
    install(FakeChain())
    model = small(**options)
    plan = fused_resnet.optimize(model, X)
    found = part(plan).chains
    assert any(reason in o.why and o.chosen is None for o in found), found
    assert any("4 bottlenecks" in o.name or name in o.name for o in found)
    assert_right(plan(X), model, X)


@pytest.mark.usefixtures("clock")
def test_resnet_v1_keeps_its_strided_1x1_apart(install: Callable[..., Any]) -> None:
    install(FakeChain())
    model = small(block=V1)
    plan = fused_resnet.optimize(model, X)
    assert len(chains(plan)) == 4
    assert "the next 1x1, layer2.0.conv1, has stride (2, 2)" in outcome(plan, "layer1.1.conv2").why
    assert_right(plan(X), model, X)


@pytest.mark.usefixtures("clock")
def test_what_is_changed_in_place_is_not_chained(install: Callable[..., Any]) -> None:
    install(FakeChain())

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 1)
            self.block = ChangedInPlace(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.stem(x))

    model = randomised(One())
    plan = fused_resnet.optimize(model, X)
    assert chains(plan) == []
    assert_right(plan(X), model, X)


@pytest.mark.usefixtures("clock")
def test_hooks_prevent_chains_and_are_called(install: Callable[..., Any]) -> None:
    install(FakeChain())
    model = network()
    seen: list[Tensor] = []
    model.layer1[0].conv2.register_forward_hook(lambda m, a, out: seen.append(out))
    plan = fused_resnet.optimize(model, X)
    seen.clear()
    assert_right(plan(X), network(), X)
    assert len(seen) == 1
    text = str(plan.explain())
    assert "no part of it is one native call, one graph or chained" in " ".join(text.split())
    assert "a hook is registered on layer1.0.conv2" in " ".join(text.split())


# -------------------------------------------------------------------------- CPUs, and other callers


def test_on_a_cpu_nothing_is_offered_and_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("a chain was run")

    monkeypatch.setattr(torch_.AtenChain, "run", never)
    model = network()
    plan = fused_resnet.optimize(model, X)
    assert chains(plan) == []
    (only,) = part(plan).chains
    assert only.name == "all 4 bottlenecks"
    assert only.chosen is None
    assert "triton/chain: " in only.why
    assert "cuda/chain: " in only.why
    assert_right(plan(X), model, X)
    basic = fused_resnet.optimize(fused_resnet.cifar_resnet(8).eval(), X)
    assert part(basic).chains == ()


@pytest.mark.usefixtures("clock")
def test_a_chained_model_is_optimized_as_what_it_was_made_of(install: Callable[..., Any]) -> None:
    install(FakeChain(refuse=lambda p: "stage 2 only" if p.m == 4 else None))
    model = network()
    chained_model = fused_resnet.chain(model)
    plan = fused_resnet.optimize(chained_model, X)
    assert len(chains(plan)) == 2
    assert "Net" in str(plan.explain())
    assert_right(plan(X), model, X)
    with pytest.raises(ValueError, match="train mode"):
        fused_resnet.optimize(fused_resnet.chain(model).train(), X)
    chained_model.register_forward_hook(lambda *args: None)
    with pytest.raises(RuntimeError, match="hooks"):
        fused_resnet.optimize(chained_model, X)


@pytest.mark.usefixtures("clock")
def test_check_judges_a_plan_with_chains(install: Callable[..., Any]) -> None:
    kernel = install(FakeChain())
    model = network()
    plan = fused_resnet.optimize(model, X)
    assert fused_resnet.check(plan, model, X).passed
    kernel.behave = wrong_out
    assert not fused_resnet.check(plan, model, X).passed


@pytest.mark.usefixtures("clock")
def test_a_chain_that_starts_to_raise_is_left_for_the_fused_model(
    install: Callable[..., Any],
) -> None:
    kernel = install(FakeChain())
    model = network()
    plan = fused_resnet.optimize(model, X)

    def fail(p: ChainProblem, *args: Any) -> Results:
        raise ArithmeticError("no more")

    kernel.behave = fail
    with pytest.warns(FusedResNetWarning, match="no longer uses its program .* no more"):
        assert_right(plan(X), model, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_right(plan(X), model, X)


# ----------------------------------------------------------------------------------- whole networks


def torchvision_resnet50() -> nn.Module:
    return torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [3, 4, 6, 3], num_classes=10, width_per_group=4
    )


def own_resnet50() -> nn.Module:
    return fused_resnet.ResNet(
        fused_resnet.Bottleneck, [3, 4, 6, 3], num_classes=10, width_per_group=4
    )


def timm_resnet(**options: Any) -> nn.Module:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    return timm.create_model("resnet26", pretrained=False, **options)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("build", "count"),
    [(torchvision_resnet50, 16), (own_resnet50, 16), (timm_resnet, 8)],
    ids=["torchvision", "own", "timm"],
)
def test_whole_networks(
    install: Callable[..., Any], build: Callable[[], nn.Module], count: int
) -> None:
    install(FakeChain())
    torch.manual_seed(0)
    model, x = randomised(build()), torch.randn(1, 3, 32, 32)
    plan = fused_resnet.optimize(model, x)
    texts = chains(plan)
    assert len(texts) == count
    assert sum("even" in text for text in texts) == 3
    assert sum("project" in text for text in texts) == 4
    assert texts[-1].endswith("pool")
    assert all(o.chosen for o in part(plan).chains)
    assert_right(plan(x), model, x)


@pytest.mark.usefixtures("clock")
def test_features_of_all_stages(install: Callable[..., Any]) -> None:
    install(FakeChain())
    torch.manual_seed(0)
    model = randomised(timm_resnet(features_only=True))
    x = torch.randn(1, 3, 32, 32)
    plan = fused_resnet.optimize(model, x)
    texts = chains(plan)
    assert len(texts) == 8
    assert not any("even" in text or "pool" in text for text in texts)
    notes = [o.why for o in part(plan).chains if "since the model returns it" in o.why]
    assert len(notes) == 3
    assert_right(plan(x), model, x)
