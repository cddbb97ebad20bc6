"""From layers to programs: which problems are measured, which kernel each layer gets, and why.

1. Problems that the tuned table does not know are measured, the costliest first, until the budget
   is spent or the user interrupts; what was measured by then counts.
2. Each layer takes the best kernel of its problem that mode and tolerance admit; problems that
   were not measured take the heuristic choice.
3. All layers are proven with their own weights (see `fused_resnet.proving`); a kernel that is off
   on a layer is replaced there by the next one. With inexact kernels the network is judged as a
   whole, too (see `fused_resnet.judging`).
4. The network is timed as a whole: with these kernels, with native ones wherever there is one
   (native layers in a row are one call), and with the heuristic choice. The fastest is the plan.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fused_resnet import backends
from fused_resnet.backends.kernel import Kernel
from fused_resnet.judging import Judging
from fused_resnet.layers import Conv, Layers, Tunable
from fused_resnet.numerics import TOLERANCE, Error, error
from fused_resnet.ops import channels_last
from fused_resnet.program import Program
from fused_resnet.proving import digest, errors_of, stock_kernel, stock_result, tunable, walk
from fused_resnet.tuned_table import Entry, Proof, TunedTable
from fused_resnet.tuning import EFFORTS, Task, call_of, is_current, measure
from fused_resnet.warn import warn
from fused_resnet.weights import Weights

#: Told what is going on and the share of the whole that is done.
Progress = Callable[[str, float], None]

#: Share of the budget for timing whole networks, and rounds at least and at most.
_CONTEST_SHARE, _CONTEST_ROUNDS = 0.2, (5, 50)
#: The first assignment stays unless another is faster by more than this.
_CONTEST_TIE = 0.02
#: A program's result may differ from that of its layers one by one by so much: the order of sums in
#: poolings and linear layers, no more. What reads or writes where it should not is off by far.
_AGREEMENT = {torch.float32: 1e-4, torch.float64: 1e-10, torch.float16: 2e-2, torch.bfloat16: 0.1}
#: An inexact kernel's worst element may be off by so many times the tolerance on the norm.
_WORST = 8.0


@dataclass(frozen=True)
class Settings:
    """How plans are made.

    Attributes:
        mode: ``balanced``, ``max`` or ``strict``.
        tolerance: for inexact kernels; None for the dtype's own.
        budget: seconds for measuring.
    """

    mode: str = "balanced"
    tolerance: float | None = None
    budget: float = 60.0

    def tolerance_of(self, dtype: torch.dtype) -> float | None:
        """The error by norm up to which inexact kernels are admitted; None if they are not."""
        if self.mode == "strict":
            return None
        return TOLERANCE.get(dtype) if self.tolerance is None else self.tolerance


@dataclass(frozen=True)
class Outcome:
    """What a layer got, and why.

    Attributes:
        layer: the layer.
        kernel: what computes it.
        entry: what was measured of its problem; None if nothing was.
        error: of the layer on its real input, by norm; None if it was not proven.
        stock_error: stock torch's.
        note: why the kernel is another than the measurement says.
    """

    layer: Tunable
    kernel: Kernel
    entry: Entry | None
    error: float | None = None
    stock_error: float | None = None
    note: str = ""


@dataclass
class Decision:
    """The outcome for all layers of one set of shapes.

    Attributes:
        outcomes: in order.
        notes: about the whole: what ended early, which assignment won.
        seconds: of one call of the program; None if it was not timed.
        join: whether native layers in a row become one call.
    """

    outcomes: list[Outcome]
    notes: list[str] = field(default_factory=list)
    seconds: float | None = None
    join: bool = True

    @property
    def kernels(self) -> dict[int, Kernel]:
        """The kernel of each layer, by its result."""
        return {o.layer.result: o.kernel for o in self.outcomes}


def decide(
    layers: Layers,
    state: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    settings: Settings,
    table: TunedTable,
    progress: Progress,
    judge: Judging | None = None,
) -> Decision:
    """Measure what is not known, and choose a kernel for every layer; see the module.

    Args:
        layers: of the network.
        state: its parameters and buffers.
        inputs: example inputs of the graph.
        settings: what to admit and how long to measure.
        table: what is known, and where what is measured goes.
        progress: told what is going on.
        judge: of the network as a whole, asked where inexact kernels are part of it.
    """
    return _Planner(layers, state, inputs, settings, table, progress, judge).decide()


def decide_again(
    layers: Layers,
    decision: Decision,
    state: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    settings: Settings,
    table: TunedTable,
    judge: Judging,
) -> Decision:
    """Prove a decision anew for other weights: kernels that are wrong with them are replaced.

    Args:
        layers: of the network.
        decision: what was decided for other weights.
        state: the new parameters and buffers.
        inputs: example inputs of the graph.
        settings: what to admit.
        table: what is known of the kernels to replace others with, and of proofs.
        judge: of the network as a whole, asked where inexact kernels are part of it.
    """
    silent: Progress = lambda _text, _share: None  # noqa: E731
    return _Planner(layers, state, inputs, settings, table, silent, judge).decide_again(decision)


def decide_untimed(layers: Layers, settings: Settings, table: TunedTable) -> Decision:
    """Choose by what the table knows, and by the heuristic order, without running anything."""
    planner = _Planner(layers, {}, (), settings, table, lambda _text, _share: None)
    exact = {layer.result: planner.ranked(layer, exact_only=True) for layer in planner.layers}
    return planner.decision({result: kernels[0] for result, kernels in exact.items()})


def measure_all(
    tasks: Sequence[Task], settings: Settings, table: TunedTable, progress: Progress
) -> list[str]:
    """Measure tasks into the table, the costliest first, within the budget; returns notes."""
    notes: list[str] = []
    tasks = sorted(tasks, key=lambda task: -task.cost)
    deadline = time.monotonic() + settings.budget * (1 - _CONTEST_SHARE)
    for i, task in enumerate(tasks):
        left = f"{len(tasks) - i} of {len(tasks)} problems, the least costly ones, not measured"
        if time.monotonic() > deadline:
            notes.append(f"the budget of {settings.budget:g} s was spent: {left}")
            break
        progress(f"measuring {task.problem}", i / (len(tasks) + 1))
        try:
            entry = measure(task, EFFORTS[settings.mode])
        except KeyboardInterrupt:
            notes.append(f"interrupted: {left}")
            break
        table.put(task.op, task.problem, task.device, entry)
    backends.forget_choices()
    for note in notes:
        warn(note, stacklevel=4)
    return notes


class _Planner:
    def __init__(
        self,
        layers: Layers,
        state: Mapping[str, Tensor],
        inputs: Sequence[Tensor],
        settings: Settings,
        table: TunedTable,
        progress: Progress,
        judge: Judging | None = None,
    ) -> None:
        self.judge = judge
        self.whole = layers
        self.layers = tunable(layers)
        self.state = state
        self.inputs = inputs
        self.settings = settings
        self.effort = EFFORTS[settings.mode]
        self.table = table
        self.progress = progress
        self.notes: list[str] = []
        self.device = layers.graph.meta[layers.graph.inputs[0]].device
        self.dtype = max(
            (layer.problem.dtype for layer in self.layers),
            key=lambda dtype: torch.finfo(dtype).eps,
            default=torch.float32,
        )

    def decide(self) -> Decision:
        self.measure_missing()
        first = {layer.result: self.ranked(layer)[0] for layer in self.layers}
        number = digest(self.whole, first, self.state, self.settings.tolerance)
        known = self.from_proof(self.table.proof(self.device, number))
        if known is not None:
            return known
        assignments = self.assignments(first)
        proven, errors = self.prove(assignments)
        proven = [self.judged(a, errors) for a in proven]
        best, seconds = self.contest(proven)
        decision = self.decision(proven[best], errors, seconds)
        decision.join = self.joins_rightly(proven[best])
        self.keep_proof(number, decision)
        return decision

    def decide_again(self, old: Decision) -> Decision:
        number = digest(self.whole, old.kernels, self.state, self.settings.tolerance)
        known = self.from_proof(self.table.proof(self.device, number))
        if known is not None:
            return known
        (kernels,), errors = self.prove([old.kernels])
        kernels = self.judged(kernels, errors)
        same = kernels == old.kernels
        decision = self.decision(kernels, errors, old.seconds if same else None)
        decision.join = old.join and self.joins_rightly(kernels)
        self.keep_proof(number, decision)
        return decision

    def keep_proof(self, number: str, decision: Decision) -> None:
        self.table.put_proof(
            self.device,
            number,
            Proof(
                tuple(o.kernel.full_name for o in decision.outcomes),
                tuple((o.error or 0.0, o.stock_error or 0.0) for o in decision.outcomes),
                tuple(self.notes),
                decision.join,
                decision.seconds,
                time.time(),
            ),
        )

    # ------------------------------------------------------------------------------------ measuring

    def measure_missing(self) -> None:
        """Measure the problems that the table does not know."""
        wanted: dict[tuple[str, object], Task] = {}
        with torch.inference_mode(False):
            metas = {layer.result: self._bare_task(layer) for layer in self.layers}
        for layer in self.layers:
            task = metas[layer.result]
            entry = self.table.entry(layer.op, layer.problem, self.device)
            if entry is None or not is_current(entry, task, self.effort):
                wanted.setdefault((layer.op, layer.problem), task)
        if not wanted:
            return
        self.progress("running the model layer by layer", 0.0)
        tasks: dict[tuple[str, object], Task] = {}

        def collect(layer: Tunable, task: Task) -> Tensor:
            key = (layer.op, layer.problem)
            if key in wanted:
                tasks.setdefault(key, task)
            return stock_result(layer, task)

        walk(self.whole, self.state, self.inputs, collect)
        self.notes += measure_all(tuple(tasks.values()), self.settings, self.table, self.progress)

    def _bare_task(self, layer: Tunable) -> Task:
        return Task(layer.op, layer.problem, self.device, ())

    # ------------------------------------------------------------------------------------- choosing

    def ranked(self, layer: Tunable, exact_only: bool = False) -> list[Kernel]:
        """Kernels for a layer, best first: the measured ones, then the heuristic choice."""
        found: list[Kernel] = []
        entry = self.table.entry(layer.op, layer.problem, self.device)
        if entry is not None:
            tolerance = None if exact_only else self.settings.tolerance_of(layer.problem.dtype)
            for timing in entry.ranked(tolerance):
                kernel = backends.named(layer.op, timing.kernel, layer.problem, self.device)
                if kernel is not None:
                    found.append(kernel)
        heuristic = backends.choose(layer.op, layer.problem, self.device).kernel
        return list(dict.fromkeys((*found, heuristic)))

    def assignments(self, first: dict[int, Kernel]) -> list[dict[int, Kernel]]:
        """Ways to give kernels to layers that may be the fastest as a whole; ``first`` leads."""
        native, heuristic = dict(first), dict(first)
        for layer in self.layers:
            ours = [k for k in self.ranked(layer) if k.backend == "cpu"]
            if ours and isinstance(layer, Conv):
                native[layer.result] = ours[0]
            heuristic[layer.result] = backends.heuristic(layer.op, layer.problem, self.device)
        found = [first]
        for other in (native, heuristic):
            if other not in found:
                found.append(other)
        return found

    # -------------------------------------------------------------------------------------- proving

    def prove(
        self, assignments: Sequence[dict[int, Kernel]]
    ) -> tuple[list[dict[int, Kernel]], dict[tuple[int, Kernel], tuple[float, float]]]:
        """The assignments without wrong kernels, and the error of each kernel on each layer."""
        proven = [dict(a) for a in assignments]
        errors: dict[tuple[int, Kernel], tuple[float, float]] = {}
        done = 0

        def visit(layer: Tunable, task: Task) -> Tensor:
            nonlocal done
            self.progress("comparing every layer with float64", done / max(1, len(self.layers)))
            done += 1
            wanted = list(dict.fromkeys(a[layer.result] for a in proven))
            tried: set[Kernel] = set()
            result: Tensor | None = None
            while wanted:
                found, allowed, first = errors_of(layer, task, wanted)
                result = first if result is None else result
                tried.update(wanted)
                wanted = []
                for kernel, outcome in found.items():
                    why = self.fault(kernel, outcome, allowed, layer)
                    if isinstance(outcome, Error):
                        errors[layer.result, kernel] = (outcome.l2, allowed.l2)
                    if why is None:
                        continue
                    self.notes.append(f"{layer.name}: {kernel.full_name} is not used: {why}")
                    result = None
                    instead = next((k for k in self.ranked(layer) if k not in tried), None)
                    instead = instead or stock_kernel(layer.op)
                    if instead not in tried:
                        wanted.append(instead)
                    for a in proven:
                        if a[layer.result] is kernel:
                            a[layer.result] = instead
                wanted = list(dict.fromkeys(wanted))
            return stock_result(layer, task) if result is None else result

        walk(self.whole, self.state, self.inputs, visit)
        return proven, errors

    def fault(
        self, kernel: Kernel, found: Error | str, allowed: Error, layer: Tunable
    ) -> str | None:
        """None if a kernel with that error may compute the layer, else why not."""
        if isinstance(found, str):
            return found
        dtype = layer.problem.dtype
        if kernel.backend == "torch" or found.within(allowed, dtype):
            return None
        tolerance = self.settings.tolerance_of(dtype)
        if not kernel.exact and tolerance is not None and found.finite:
            if found.l2 <= tolerance and found.worst <= _WORST * tolerance:
                return None
            return f"its error is {found}, the tolerance {tolerance:.1e}"
        return f"its error is {found}, stock torch's is {allowed}"

    def judged(
        self,
        kernels: dict[int, Kernel],
        errors: dict[tuple[int, Kernel], tuple[float, float]],
    ) -> dict[int, Kernel]:
        """The assignment, with as many inexact kernels replaced as the network's error asks for."""
        for share in (0.5, 1.0):
            inexact = [layer for layer in self.layers if not kernels[layer.result].exact]
            if self.judge is None or not inexact:
                return kernels
            with torch.inference_mode():
                result = Program(self.whole, kernels, Weights(self.state))(*self.inputs)
            wrong = self.judge.fault(result)
            if wrong is None:
                return kernels
            inexact.sort(key=lambda layer: -errors[layer.result, kernels[layer.result]][0])
            count = math.ceil(share * len(inexact))
            self.notes.append(f"{count} of {len(inexact)} inexact kernels are not used: {wrong}")
            instead = {
                layer.result: self.ranked(layer, exact_only=True)[0] for layer in inexact[:count]
            }
            (kernels,), found = self.prove([{**kernels, **instead}])
            errors.update(found)
        return kernels

    # -------------------------------------------------------------------------------------- contest

    def contest(self, proven: list[dict[int, Kernel]]) -> tuple[int, float | None]:
        """The position of the fastest assignment, and its time."""
        distinct = [a for i, a in enumerate(proven) if a not in proven[:i]]
        if len(distinct) == 1:
            return 0, None
        self.progress("timing the whole network", 0.9)
        budget = self.settings.budget * _CONTEST_SHARE
        weights = Weights(self.state)
        programs = [Program(self.whole, a, weights) for a in distinct]
        samples: list[list[float]] = [[] for _ in programs]
        start = time.monotonic()
        try:
            with torch.inference_mode():
                for program in programs:
                    program(*self.inputs)
                for round_ in range(_CONTEST_ROUNDS[1]):
                    if round_ >= _CONTEST_ROUNDS[0] and time.monotonic() - start > budget:
                        break
                    order = [(round_ + i) % len(programs) for i in range(len(programs))]
                    for i in order:
                        samples[i].append(_seconds(programs[i], self.inputs))
        except KeyboardInterrupt:
            self.notes.append("interrupted while the whole network was timed")
        if not all(samples):
            return 0, None
        medians = [statistics.median(s) for s in samples]
        best = min(range(len(medians)), key=medians.__getitem__)
        if medians[best] > medians[0] * (1 - _CONTEST_TIE):
            best = 0
        else:
            self.notes.append(
                f"as a whole, another assignment than the fastest kernel of each layer is faster: "
                f"{medians[best] * 1e3:.2f} ms rather than {medians[0] * 1e3:.2f} ms"
            )
        return proven.index(distinct[best]), medians[best]

    def joins_rightly(self, kernels: Mapping[int, Kernel]) -> bool:
        """Whether the program returns what its layers return one by one."""
        program = Program(self.whole, kernels, Weights(self.state))
        if not program.native:
            return True

        def visit(layer: Tunable, task: Task) -> Tensor:
            result = call_of(kernels[layer.result], task)()
            return channels_last(result) if isinstance(layer, Conv) else result

        with torch.inference_mode():
            found = pytree.tree_leaves(program(*self.inputs))
        one_by_one = walk(self.whole, self.state, self.inputs, visit)
        for ours, theirs in zip(found, one_by_one, strict=True):
            if not isinstance(ours, Tensor) or not ours.is_floating_point() or not ours.numel():
                continue
            allowed = _AGREEMENT[self.dtype]
            off = error(ours, theirs.double())
            if not off.finite or off.l2 > allowed or off.worst > allowed:
                note = f"layers in a row are not joined: as one call they are off by {off}"
                self.notes.append(note)
                warn(note, stacklevel=5)
                return False
        return True

    # -------------------------------------------------------------------------------------- results

    def decision(
        self,
        kernels: Mapping[int, Kernel],
        errors: Mapping[tuple[int, Kernel], tuple[float, float]] | None = None,
        seconds: float | None = None,
    ) -> Decision:
        outcomes = []
        for layer in self.layers:
            kernel = kernels[layer.result]
            entry = self.table.entry(layer.op, layer.problem, self.device)
            found = (errors or {}).get((layer.result, kernel), (None, None))
            outcomes.append(Outcome(layer, kernel, entry, *found))
        return Decision(outcomes, self.notes, seconds)

    def from_proof(self, proof: Proof | None) -> Decision | None:
        """The decision that was proven before, if all of its kernels are there."""
        if proof is None or not len(proof.kernels) == len(proof.errors) == len(self.layers):
            return None
        outcomes = []
        for layer, name, errors in zip(self.layers, proof.kernels, proof.errors, strict=True):
            kernel = backends.named(layer.op, name, layer.problem, self.device)
            if kernel is None:
                return None
            entry = self.table.entry(layer.op, layer.problem, self.device)
            outcomes.append(Outcome(layer, kernel, entry, *errors))
        return Decision(outcomes, [*self.notes, *proof.notes], proof.seconds, proof.join)


def _seconds(program: Program, inputs: Sequence[Tensor]) -> float:
    on_gpu = inputs[0].device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(inputs[0].device)
    start = time.perf_counter_ns()
    program(*inputs)
    if on_gpu:
        torch.cuda.synchronize(inputs[0].device)
    return (time.perf_counter_ns() - start) / 1e9


__all__ = [
    "Decision",
    "Outcome",
    "Progress",
    "Settings",
    "decide",
    "decide_again",
    "decide_untimed",
    "measure_all",
]
