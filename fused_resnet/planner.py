"""From layers to programs: which problems are measured, which kernel each layer gets, and why.

1. Problems that the tuned table does not know are measured, the costliest first, until the budget
   is spent or the user interrupts; what was measured by then counts.
2. Each layer takes the best kernel of its problem that mode and tolerance admit; problems that
   were not measured take the heuristic choice. A backend that the user forces is taken unmeasured.
3. Where a kernel for chained bottlenecks exists, those are chained that gain by it (see
   `fused_resnet.chain_planner`).
4. All layers are proven with their own weights (see `fused_resnet.proving`); a kernel that is off
   on a layer is replaced there by the next one. With inexact kernels the network is judged as a
   whole, too (see `fused_resnet.judging`).
5. The network is timed as a whole: with these kernels, without chains, with native ones wherever
   there is one (native layers in a row are one call), and with the heuristic choice. The fastest is
   the plan; chains stay only if the whole is faster with them.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fused_resnet import backends, room
from fused_resnet.backends.kernel import Kernel
from fused_resnet.chain_planner import Chaining, ChainOutcome
from fused_resnet.judging import Judging
from fused_resnet.layers import Chained, Conv, Layers, Span, Tunable, lower
from fused_resnet.memory_report import memory_report
from fused_resnet.numerics import TOLERANCE, Error, error, largest
from fused_resnet.program import Program
from fused_resnet.proving import (
    digest,
    errors_of,
    laid_out,
    stock_kernel,
    stock_result,
    tunable,
    walk,
)
from fused_resnet.tuned_table import Entry, Proof, TunedTable
from fused_resnet.tuning import (
    EFFORTS,
    Results,
    Task,
    call_of,
    is_current,
    lower_quartile,
    measure,
)
from fused_resnet.warn import warn
from fused_resnet.weights import Weights

#: Told what is going on and the share of the whole that is done.
Progress = Callable[[str, float], None]

#: Errors by norm of kernels on layers, by the layer's result: ours, stock torch's.
Errors = dict[tuple[int, Kernel], tuple[float, float]]

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
        compact: whether kernels that expand their weights are left out; None for as many of them as
            it takes for the plan to need no more memory than stock torch.
    """

    mode: str = "balanced"
    tolerance: float | None = None
    budget: float = 60.0
    compact: bool | None = None

    @property
    def rule(self) -> tuple[object, ...]:
        """What decides, beside weights and measurements, which kernels a plan may have."""
        return self.tolerance, self.compact

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
        error: of the layer on its real input, by norm; None if it was not proven.
        stock_error: stock torch's.
        note: why the kernel is another than the measurement says.
        entry: what was measured of its problem by then; None if nothing was, or if it is not held
            here: of a plan that was read from a file.
    """

    layer: Tunable
    kernel: Kernel
    error: float | None = None
    stock_error: float | None = None
    note: str = ""
    entry: Entry | None = None


@dataclass(frozen=True)
class Assignment:
    """A kernel for each layer of a network, by the layer's result."""

    layers: Layers
    kernels: Mapping[int, Kernel]

    def program(self, weights: Weights) -> Program:
        """What runs it."""
        return Program(self.layers, self.kernels, weights)


@dataclass
class Decision:
    """The outcome for all layers of one set of shapes.

    Attributes:
        layers: of the network, chained where that won.
        outcomes: in order.
        notes: about the whole: what ended early, which assignment won.
        seconds: of one call of the program; None if it was not timed.
        join: whether native layers in a row become one call.
        chains: what became of each bottleneck.
    """

    layers: Layers
    outcomes: list[Outcome]
    notes: list[str] = field(default_factory=list)
    seconds: float | None = None
    join: bool = True
    chains: tuple[ChainOutcome, ...] = ()

    @property
    def kernels(self) -> dict[int, Kernel]:
        """The kernel of each layer, by its result."""
        return {o.layer.result: o.kernel for o in self.outcomes}

    def program(self, weights: Weights) -> Program:
        """What runs it."""
        return Program(self.layers, self.kernels, weights, self.join)


def decide(
    layers: Layers,
    state: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    settings: Settings,
    table: TunedTable,
    progress: Progress,
    judge: Judging | None = None,
    ready: Callable[[Program], Callable[..., Any]] = lambda program: program,
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
        ready: what the plan makes of a program before it runs, such as a CUDA graph.
    """
    return _Planner(layers, state, inputs, settings, table, progress, judge, ready).decide()


def decide_again(
    decision: Decision,
    state: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    settings: Settings,
    table: TunedTable,
    judge: Judging,
) -> Decision:
    """Prove a decision anew for other weights: kernels that are wrong with them are replaced.

    Args:
        decision: what was decided for other weights.
        state: the new parameters and buffers.
        inputs: example inputs of the graph.
        settings: what to admit.
        table: what is known of the kernels to replace others with, and of proofs.
        judge: of the network as a whole, asked where inexact kernels are part of it.
    """
    silent: Progress = lambda _text, _share: None  # noqa: E731
    layers = lower(decision.layers.source)  # None of them chained.
    return _Planner(layers, state, inputs, settings, table, silent, judge).decide_again(decision)


def decide_untimed(layers: Layers, settings: Settings, table: TunedTable) -> Decision:
    """Choose by what the table knows, and by the heuristic order, without running anything."""
    return _Planner(layers, {}, (), settings, table, lambda _text, _share: None).by_knowledge()


def measure_all(
    tasks: Sequence[Task],
    settings: Settings,
    table: TunedTable,
    progress: Progress,
    started: float | None = None,
) -> list[str]:
    """Measure tasks into the table, the costliest first, within the budget; returns notes.

    Args:
        tasks: what to measure.
        settings: the budget, among others.
        table: where entries go.
        progress: told what is going on.
        started: since when the budget is spent, by the monotonic clock; None for now.
    """
    notes: list[str] = []
    tasks = sorted(tasks, key=lambda task: -task.cost)
    started = time.monotonic() if started is None else started
    deadline = started + settings.budget * (1 - _CONTEST_SHARE)
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
        ready: Callable[[Program], Callable[..., Any]] = lambda program: program,
    ) -> None:
        self.judge = judge
        self.ready = ready
        self.plain = layers
        self.state = state
        self.inputs = inputs
        self.settings = settings
        self.effort = EFFORTS[settings.mode]
        self.table = table
        self.progress = progress
        self.notes: list[str] = []
        self.stock_faults: dict[str, str] = {}  # of layers on which stock torch itself is wrong
        self.forced = backends.forced()
        self.device = layers.graph.meta[layers.graph.inputs[0]].device
        self.dtype = max(
            (layer.problem.dtype for layer in tunable(layers)),
            key=lambda dtype: torch.finfo(dtype).eps,
            default=torch.float32,
        )
        self.started = time.monotonic()
        self.chaining = Chaining(
            layers, self.device, table, self.effort, lambda layer: self.ranked(layer)[0]
        )

    def decide(self) -> Decision:
        if self.forced:
            return self.decide_forced()
        self.measure_missing()
        self.measure_chains()
        chained = self.chaining.layers_of(self.chaining.choose())
        best = self.best(chained)
        number = digest(chained, best.kernels, self.state, *self.settings.rule)
        known = self.from_proof(self.table.proof(self.device, number))
        if known is not None:
            return known
        errors: Errors = {}
        found = [self.judged(a, errors) for a in self.proven_chains(chained, errors)]
        assignments = self.assignments(self.best(self.plain).kernels)
        found += [self.judged(a, errors) for a in self.prove(self.plain, assignments, errors)]
        winner, seconds = self.contest(found)
        decision = self.decision(found[winner], errors, seconds)
        decision.join = self.joins_rightly(found[winner])
        self.keep_proof(number, decision)
        return decision

    def decide_again(self, old: Decision) -> Decision:
        layers = self.chaining.layers_of(old.layers.spans)
        number = digest(layers, old.kernels, self.state, *self.settings.rule)
        known = self.from_proof(self.table.proof(self.device, number))
        if known is not None:
            return known
        errors: Errors = {}
        (proven,) = self.prove(layers, [old.kernels], errors)
        proven = self.judged(proven, errors)
        same = proven.kernels == old.kernels
        decision = self.decision(proven, errors, old.seconds if same else None)
        decision.join = old.join and self.joins_rightly(proven)
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
                tuple(dataclasses.astuple(span) for span in decision.layers.spans),
            ),
        )

    def decide_forced(self) -> Decision:
        """The kernels of the backends that the user forces, as far as they are right."""
        self.notes.append(f"backend {','.join(self.forced or ())} was forced: nothing was measured")
        errors: Errors = {}
        (proven,) = self.prove(self.plain, [self.best(self.plain).kernels], errors)
        decision = self.decision(proven, errors)
        decision.join = self.joins_rightly(proven)
        return decision

    def by_knowledge(self) -> Decision:
        """The decision without running anything."""
        layers = self.chaining.layers_of(self.chaining.choose())
        kernels = {ly.result: self.ranked(ly, exact_only=True)[0] for ly in tunable(layers)}
        return self.decision(Assignment(layers, kernels))

    def best(self, layers: Layers) -> Assignment:
        """Each layer with the kernel that is fastest by itself."""
        return Assignment(layers, {ly.result: self.ranked(ly)[0] for ly in tunable(layers)})

    # ------------------------------------------------------------------------------------ measuring

    def measure_missing(self) -> None:
        """Measure the problems that the table does not know."""
        wanted: dict[tuple[str, object], Task] = {}
        for layer in tunable(self.plain):
            task = self._bare_task(layer)
            entry = self.table.entry(layer.op, layer.problem, self.device)
            if entry is None or not is_current(entry, task, self.effort):
                wanted.setdefault((layer.op, layer.problem), task)
        if not wanted:
            return
        self.progress("running the model layer by layer", 0.0)
        tasks: dict[tuple[str, object], Task] = {}

        def collect(layer: Tunable, task: Task) -> Results:
            key = (layer.op, layer.problem)
            if key in wanted:
                tasks.setdefault(key, task)
            return stock_result(layer, task)

        walk(self.plain, self.state, self.inputs, collect)
        self.measure(tuple(tasks.values()))

    def measure(self, tasks: Sequence[Task]) -> None:
        """Measure within what is left of the budget."""
        if not tasks:
            return
        self.notes += measure_all(
            tasks, self.settings, self.table, self.progress, started=self.started
        )

    def measure_chains(self) -> None:
        """Measure chained calls, and what they leave to others, that the table does not know."""
        for tasks in (self.chaining.tasks_of_others, self.chaining.tasks):
            if not self.notes:  # Or else there is no time left.
                self.measure(tasks(self.state, self.inputs))

    def _bare_task(self, layer: Tunable) -> Task:
        return Task(layer.op, layer.problem, self.device, ())

    # ------------------------------------------------------------------------------------- choosing

    def ranked(self, layer: Tunable, exact_only: bool = False) -> list[Kernel]:
        """Kernels for a layer, best first: the measured ones, then the heuristic choice."""
        if isinstance(layer, Chained):
            return self.chaining.kernels(layer) or [stock_kernel(layer.op)]
        found: list[Kernel] = []
        entry = self.table.entry(layer.op, layer.problem, self.device)
        if entry is not None and self.forced is None:
            tolerance = None if exact_only else self.settings.tolerance_of(layer.problem.dtype)
            for timing in entry.ranked(tolerance):
                kernel = backends.named(layer.op, timing.kernel, layer.problem, self.device)
                if kernel is None or (self.settings.compact and kernel.expansion(layer.problem)):
                    continue
                found.append(kernel)
        heuristic = backends.choose(layer.op, layer.problem, self.device).kernel
        return list(dict.fromkeys((*found, heuristic)))

    def assignments(self, first: Mapping[int, Kernel]) -> list[dict[int, Kernel]]:
        """Ways to give kernels to layers that may be the fastest as a whole; ``first`` leads."""
        native, heuristic = dict(first), dict(first)
        for layer in tunable(self.plain):
            ours = [k for k in self.ranked(layer) if k.backend == "cpu"]
            if ours and isinstance(layer, Conv):
                native[layer.result] = ours[0]
            heuristic[layer.result] = backends.heuristic(layer.op, layer.problem, self.device)
        found = [dict(first)]
        for other in (native, heuristic):
            if other not in found:
                found.append(other)
        return [self.fitting(kernels) for kernels in found]

    def fitting(self, kernels: dict[int, Kernel]) -> dict[int, Kernel]:
        """The same, but no larger than stock torch, unless the plan may be.

        Kernels that expand their weights give way, those first that gain the least time for a byte,
        to others of their backend: native layers in a row remain one call.
        """
        expands = any(_expansion(kernels[ly.result], ly) for ly in tunable(self.plain))
        if self.settings.compact is not None or not expands:
            return kernels
        weights = Weights(self.state)
        program = Assignment(self.plain, kernels).program(weights)
        memory = memory_report([program], weights, self.state)
        least = memory.weights - memory.expansion  # of all packed weights
        while True:
            layers = [ly for ly in tunable(self.plain) if _expansion(kernels[ly.result], ly)]
            rivals = [self.rivals(layer, kernels[layer.result]) for layer in layers]
            options = [
                [room.Option(seconds, _expansion(kernel, layer)) for kernel, seconds in found]
                for layer, found in zip(layers, rivals, strict=True)
            ]
            larger = sum(own.bytes for own, *_ in options)
            needed = program.memory  # Workspaces, too, depend on the kernels.
            total = least + larger + needed.arena + needed.activations
            step = room.cheapest_step(options)
            if total <= memory.stock_total or step is None:
                return kernels
            number, i = step
            kernels = kernels | {layers[number].result: rivals[number][i][0]}
            program = Assignment(self.plain, kernels).program(weights)

    def rivals(self, layer: Tunable, kernel: Kernel) -> list[tuple[Kernel, float]]:
        """A layer's kernel, then others of its backend, each with its measured time."""
        entry = self.table.entry(layer.op, layer.problem, self.device)
        seconds = {} if entry is None else {t.kernel: t.seconds for t in entry.timings}
        others = [k for k in self.ranked(layer) if k is not kernel and k.backend == kernel.backend]
        return [(k, seconds[k.full_name]) for k in (kernel, *others) if k.full_name in seconds]

    # -------------------------------------------------------------------------------------- proving

    def proven_chains(self, layers: Layers, errors: Errors) -> list[Assignment]:
        """The chained network without wrong kernels, in a list; empty if nothing stays chained.

        A bottleneck whose chain kernels are all wrong on its own weights is not chained.
        """
        banned: set[int] = set()
        while layers.spans:
            (proven,) = self.prove(layers, [self.best(layers).kernels], errors)
            broken = {
                layer.block
                for layer in tunable(layers)
                if isinstance(layer, Chained) and proven.kernels[layer.result].backend == "torch"
            }
            if not broken:
                return [proven]
            banned |= broken
            layers = self.chaining.layers_of(self.chaining.choose(banned))
        return []

    def prove(
        self, layers: Layers, assignments: Sequence[Mapping[int, Kernel]], errors: Errors
    ) -> list[Assignment]:
        """The assignments without wrong kernels; ``errors`` gets those of each kernel and layer."""
        proven = [dict(a) for a in assignments]
        count = len(tunable(layers))
        done = 0

        def visit(layer: Tunable, task: Task) -> Results:
            nonlocal done
            self.progress("comparing every layer with float64", done / max(1, count))
            done += 1
            wanted = list(dict.fromkeys(a[layer.result] for a in proven))
            tried: set[Kernel] = set()
            result: Results | None = None
            while wanted:
                found, allowed, first = errors_of(layer, task, wanted)
                if any(e.rounding is not None for e in allowed):
                    self.stock_faults[layer.name] = str(largest(*allowed))
                result = first if result is None else result
                tried.update(wanted)
                wanted = []
                for kernel, outcome in found.items():
                    why = self.fault(kernel, outcome, allowed, layer)
                    if not isinstance(outcome, str):
                        errors[layer.result, kernel] = largest(*outcome).l2, largest(*allowed).l2
                    if why is None:
                        continue
                    result = None
                    others = (*self.ranked(layer), stock_kernel(layer.op))
                    if self.settings.compact is None:
                        limit = _expansion(kernel, layer)
                        others = tuple(k for k in others if _expansion(k, layer) <= limit)
                    instead = next((k for k in others if k not in tried), kernel)
                    if instead is kernel:
                        note = (
                            f"{layer.name}: no kernel is right, {kernel.full_name} is used: {why}"
                        )
                        warn(note, stacklevel=6)
                    else:
                        note = f"{not_used(layer.name, kernel.full_name)}{why}"
                        wanted.append(instead)
                    self.notes.append(note)
                    for a in proven:
                        if a[layer.result] is kernel:
                            a[layer.result] = instead
                wanted = list(dict.fromkeys(wanted))
            return stock_result(layer, task) if result is None else result

        told = len(self.stock_faults)
        walk(layers, self.state, self.inputs, visit)
        if len(self.stock_faults) > told:
            self._tell_of_stock()
        return [Assignment(layers, kernels) for kernels in proven]

    def _tell_of_stock(self) -> None:
        name, what = next(iter(self.stock_faults.items()))
        note = (
            f"stock torch itself is wrong on {len(self.stock_faults)} layers: on {name} its error "
            f"is {what}; kernels are held against what rounding explains"
        )
        self.notes.append(note)
        warn(note, stacklevel=6)

    def fault(
        self,
        kernel: Kernel,
        found: Sequence[Error] | str,
        allowed: Sequence[Error],
        layer: Tunable,
    ) -> str | None:
        """None if a kernel with these errors may compute the layer, else why not."""
        if isinstance(found, str):
            return found
        pairs = zip(found, allowed, strict=True)
        reasons = (self.fault_of_one(kernel, *pair, layer) for pair in pairs)
        return next((reason for reason in reasons if reason is not None), None)

    def fault_of_one(
        self, kernel: Kernel, found: Error, allowed: Error, layer: Tunable
    ) -> str | None:
        """The same for one result of the layer."""
        dtype = layer.problem.dtype
        # Stock torch is its own measure, unless it is wrong.
        if (kernel.backend == "torch" and allowed.rounding is None) or found.within(allowed, dtype):
            return None
        tolerance = self.settings.tolerance_of(dtype)
        if not kernel.exact and tolerance is not None and found.finite:
            if found.l2 <= tolerance and found.worst <= _WORST * tolerance:
                return None
            return f"its error is {found}, the tolerance {tolerance:.1e}"
        return f"its error is {found}, stock torch's is {allowed}"

    def judged(self, assignment: Assignment, errors: Errors) -> Assignment:
        """The assignment, with as many inexact kernels replaced as the network's error asks for."""
        for share in (0.5, 1.0):
            layers, kernels = assignment.layers, assignment.kernels
            inexact = [layer for layer in tunable(layers) if not kernels[layer.result].exact]
            if self.judge is None or not inexact:
                return assignment
            with torch.inference_mode():
                result = assignment.program(Weights(self.state))(*self.inputs)
            wrong = self.judge.fault(result)
            if self.stock_faults:
                wrong = "stock torch itself is wrong on some layers, so the network has no measure"
            if wrong is None:
                return assignment
            inexact.sort(key=lambda layer: -errors[layer.result, kernels[layer.result]][0])
            count = math.ceil(share * len(inexact))
            self.notes.append(f"{count} of {len(inexact)} inexact kernels are not used: {wrong}")
            instead = {
                layer.result: self.ranked(layer, exact_only=True)[0] for layer in inexact[:count]
            }
            (assignment,) = self.prove(layers, [{**kernels, **instead}], errors)
        return assignment

    # -------------------------------------------------------------------------------------- contest

    def contest(self, proven: list[Assignment]) -> tuple[int, float | None]:
        """The position of the fastest assignment, and its time."""
        keys = [(a.layers.spans, a.kernels) for a in proven]
        distinct = [a for i, a in enumerate(proven) if keys[i] not in keys[:i]]
        if len(distinct) == 1:
            return 0, None
        self.progress("timing the whole network", 0.9)
        budget = self.settings.budget * _CONTEST_SHARE
        weights = Weights(self.state)
        programs = [self.ready(a.program(weights)) for a in distinct]
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
        seconds = [lower_quartile(s) for s in samples]
        first = 0
        if distinct[0].layers.spans and min(seconds[1:]) <= seconds[0]:
            self.notes.append(
                f"nothing is chained: as a whole the network takes {seconds[0] * 1e3:.2f} ms with "
                f"chains, and {min(seconds[1:]) * 1e3:.2f} ms without"
            )
            first = 1
        best = min(range(first, len(seconds)), key=seconds.__getitem__)
        if seconds[best] > seconds[first] * (1 - _CONTEST_TIE):
            best = first
        else:
            self.notes.append(
                f"as a whole, another assignment than the fastest kernel of each layer is faster: "
                f"{seconds[best] * 1e3:.2f} ms rather than {seconds[first] * 1e3:.2f} ms"
            )
        return next(i for i, a in enumerate(proven) if a is distinct[best]), seconds[best]

    def joins_rightly(self, assignment: Assignment) -> bool:
        """Whether the program returns what its layers return one by one."""
        program = assignment.program(Weights(self.state))
        if not program.native:
            return True

        def visit(layer: Tunable, task: Task) -> Results:
            return laid_out(layer, call_of(assignment.kernels[layer.result], task)())

        with torch.inference_mode():
            found = pytree.tree_leaves(program(*self.inputs))
        one_by_one = walk(assignment.layers, self.state, self.inputs, visit)
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
        assignment: Assignment,
        errors: Errors | None = None,
        seconds: float | None = None,
    ) -> Decision:
        outcomes = []
        layers = assignment.layers
        for layer in tunable(layers):
            kernel = assignment.kernels[layer.result]
            entry = self.table.entry(layer.op, layer.problem, self.device)
            ours, theirs = (errors or {}).get((layer.result, kernel), (None, None))
            outcomes.append(Outcome(layer, kernel, ours, theirs, entry=entry))
        chains = self.chaining.outcomes(layers)
        return Decision(layers, outcomes, self.notes, seconds, chains=chains)

    def from_proof(self, proof: Proof | None) -> Decision | None:
        """The decision that was proven before, if all of its kernels are there."""
        if proof is None:
            return None
        try:
            layers = self.chaining.layers_of(tuple(Span(*span) for span in proof.spans))
        except ValueError:
            return None
        if not len(proof.kernels) == len(proof.errors) == len(tunable(layers)):
            return None
        outcomes = []
        proven = zip(tunable(layers), proof.kernels, proof.errors, strict=True)
        for layer, name, (ours, theirs) in proven:
            kernel = backends.named(layer.op, name, layer.problem, self.device)
            if kernel is None:
                return None
            entry = self.table.entry(layer.op, layer.problem, self.device)
            outcomes.append(Outcome(layer, kernel, ours, theirs, entry=entry))
        chains = self.chaining.outcomes(layers)
        notes = [*self.notes, *proof.notes]
        return Decision(layers, outcomes, notes, proof.seconds, proof.join, chains)


def not_used(layer: str, kernel: str) -> str:
    """What a note begins with that says why a kernel does not compute a layer."""
    return f"{layer}: {kernel} is not used: "


def _expansion(kernel: Kernel, layer: Tunable) -> int:
    """Bytes that a kernel adds to the layer's weights, see `Kernel.expansion`."""
    return kernel.expansion(layer.problem)


def _seconds(program: Callable[..., Any], inputs: Sequence[Tensor]) -> float:
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
    "not_used",
]
