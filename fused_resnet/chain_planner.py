"""Which bottlenecks of a network are chained: by measurement, each against what it would replace.

1. Every bottleneck that `chaining.find` finds is offered in every way (`layers.Span`) that a
   verified kernel of some backend computes on this device. Stock torch's composition is none of
   them: its operations compete unchained already. Without such a kernel nothing is measured.
2. Each distinct problem is measured once, on the real input and weights of the first bottleneck
   that has it: its kernels, and in turn with them the best kernels of the layers that it would
   replace, run one after another. Near-ties go to those.
3. Calls overlap in nothing, so that what is gained in one place is gained whatever is chosen in
   others, and the best choice is the best one for each bottleneck; only a call that stores the even
   pixels changes what the next projection reads. Along such pairs a dynamic programme with one bit
   of state, whether pixels were left out, finds the largest sum of gains.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fused_resnet import backends, ops
from fused_resnet.backends.kernel import Kernel
from fused_resnet.chaining import Bottleneck, chained, find, thinned
from fused_resnet.graph import substitute
from fused_resnet.layers import Chained, Conv, Layers, Plain, Span
from fused_resnet.problem import ChainProblem
from fused_resnet.proving import stock_result, walk
from fused_resnet.tuned_table import Entry, Timing, TunedTable
from fused_resnet.tuning import Effort, Instead, Task, call_of, is_current

#: How the table and reports call the layers that a chained call would replace.
UNCHAINED = "unchained"


@dataclass(frozen=True)
class ChainOutcome:
    """What became of a bottleneck, and why.

    Attributes:
        name: path of its 3x3; of several, separated by commas, if all have one reason.
        chosen: what is chained, in words; None if it is not.
        why: times, or the reason why it cannot be chained.
        alternatives: (what else could be chained, why it is not).
    """

    name: str
    chosen: str | None
    why: str
    alternatives: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        verdict = "not chained" if self.chosen is None else f"chained, {self.chosen}"
        return f"{self.name}: {verdict}: {self.why}"


@dataclass(frozen=True, eq=False)
class _Offer:
    """One way to chain a bottleneck, in one state of what it reads."""

    block: Bottleneck
    span: Span
    thin: bool

    @cached_property
    def call(self) -> Chained:
        return self.block.call(self.span, self.thin)

    @property
    def words(self) -> str:
        parts = ["3x3 and 1x1"]
        parts += ["projection"] if self.span.projection else []
        parts += ["next 1x1"] if self.span.following else []
        text = " + ".join(parts)
        kept = {"even": ", even pixels stored", "pool": ", output pooled"}
        text += kept.get(self.span.store, "")
        return text + (", even pixels read" if self.thin and self.span.projection else "")


class Chaining:
    """The chains of one network on one device.

    Args:
        layers: none of which are chained.
        device: where.
        table: what is known.
        effort: how long is measured.
        best: gives the best kernel of a layer that is not chained, as far as is known.
    """

    def __init__(
        self,
        layers: Layers,
        device: torch.device,
        table: TunedTable,
        effort: Effort,
        best: Callable[[Conv], Kernel],
    ) -> None:
        self.layers, self.device, self.table = layers, device, table
        self.effort, self.best = effort, best
        self.found = find(layers)
        self.blocks = {block.conv2.result: block for block in self.found.blocks}
        reads = {b.projection.result: b for b in self.found.blocks if b.projection is not None}
        #: The bottleneck whose projection reads what one may thin out, by the one's 3x3.
        self.after = {
            b.conv2.result: reads[b.thinning.result]
            for b in self.found.blocks
            if b.thinning is not None and b.thinning.result in reads
        }
        self.before = {after.conv2.result for after in self.after.values()}
        self.offers = {b.conv2.result: tuple(self._offers(b)) for b in self.found.blocks}

    # ------------------------------------------------------------------------------ what is offered

    def _offers(self, block: Bottleneck) -> Iterator[_Offer]:
        states = (False, True) if block.conv2.result in self.before else (False,)
        for thin in states:
            for span in block.spans():
                offer = _Offer(block, span, thin)
                if thin and not span.projection:
                    continue  # What it reads is the same.
                if any(reason is None for _, reason in self.refusals(offer.call.problem)):
                    yield offer

    def refusals(self, problem: ChainProblem) -> list[tuple[str, str | None]]:
        """Each chain kernel by name, with the reason why it does not compute a problem."""
        found: list[tuple[str, str | None]] = []
        for kernel in backends.KERNELS:
            if kernel.op != "bottleneck_chain" or kernel.backend == "torch":
                continue
            reason = kernel.supports(problem, self.device)
            if reason is None:
                reason = backends.verdict(kernel, self.device, problem.dtype)
            found.append((kernel.full_name, reason))
        return found

    def offers_in(self, block: Bottleneck, thin: bool) -> list[_Offer]:
        """What a bottleneck offers in that state."""
        inside = [o for o in self.offers[block.conv2.result] if o.span.projection]
        outside = [o for o in self.offers[block.conv2.result] if not o.span.projection]
        return [o for o in inside if o.thin == thin] + outside

    # ------------------------------------------------------------------------------------ measuring

    def tasks_of_others(self, state: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> list[Task]:
        """Projections that are not chained, where all that is left to read are the even pixels."""
        convs: dict[int, Conv] = {}
        for value, offers in self.offers.items():
            strided = self.blocks[value].thinning
            if strided is None or not any(offer.span.store == "even" for offer in offers):
                continue
            conv = thinned(strided)
            entry = self.table.entry(conv.op, conv.problem, self.device)
            bare = Task(conv.op, conv.problem, self.device, ())
            if entry is None or not is_current(entry, bare, self.effort):
                convs[conv.result] = conv
        tasks: dict[object, Task] = {}

        def collect(result: int, values: Mapping[int, Tensor]) -> None:
            conv = convs[result]
            x = values[conv.x][:, :, ::2, ::2].contiguous(memory_format=torch.channels_last)
            args = (x, *(values[i] for i in conv.constants), None)
            tasks.setdefault(conv.problem, Task(conv.op, conv.problem, self.device, args))

        if convs:
            wanted = {r: (conv.x, *conv.constants) for r, conv in convs.items()}
            walk(self.layers, state, inputs, stock_result, wanted, collect)
        return list(tasks.values())

    def tasks(self, state: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> list[Task]:
        """Calls that the table does not know, one for each problem."""
        calls: dict[object, Chained] = {}
        for offers in self.offers.values():
            for offer in offers:
                if offer.call.problem not in calls and self.entry(offer.call) is None:
                    calls[offer.call.problem] = offer.call
        by_end: dict[int, list[Chained]] = {}
        for call in calls.values():
            by_end.setdefault(call.ends, []).append(call)
        tasks: list[Task] = []

        def collect(result: int, values: Mapping[int, Tensor]) -> None:
            tasks.extend(self.task(call, values) for call in by_end[result])

        if calls:
            wanted = {
                end: tuple({i for call in group for i in (*call.reads, *call.constants)})
                for end, group in by_end.items()
            }
            walk(self.layers, state, inputs, stock_result, wanted, collect)
        return tasks

    def entry(self, call: Chained) -> Entry | None:
        """What was measured of a call, beside the layers that are best as of now; None if not."""
        entry = self.table.entry(call.op, call.problem, self.device)
        bare = Task(call.op, call.problem, self.device, (), self.instead(call))
        return entry if entry is not None and is_current(entry, bare, self.effort) else None

    def task(self, call: Chained, values: Mapping[int, Tensor]) -> Task:
        """The task of a call.

        Args:
            call: what is measured.
            values: what it reads, as the network makes it without any chains.
        """
        p = call.problem
        args = [None if i is None else values[i] for i in call.operands]
        shortcut = args[1]
        assert shortcut is not None
        if p.proj and p.step == 1 and tuple(shortcut.shape[2:]) != p.size:
            shortcut = shortcut[:, :, ::2, ::2]
        args[1] = shortcut.contiguous(memory_format=torch.channels_last)
        given = dict(zip(call.operands, args, strict=True))
        known = {i: t for i, t in given.items() if i is not None and t is not None}
        return Task(call.op, p, self.device, tuple(args), self.instead(call, known))

    def instead(self, call: Chained, values: Mapping[int, Tensor] | None = None) -> Instead:
        """The layers that a call would replace, by their best kernels.

        Args:
            call: what would replace them.
            values: what it reads; None if nothing is going to be run.
        """
        kernels = {part.result: self.best(part) for part in call.parts if isinstance(part, Conv)}
        names = " + ".join(kernel.full_name for kernel in kernels.values())
        steps: list[Callable[[], Tensor]] = []
        env = dict(values or {})
        for part in call.parts if values is not None else ():
            step = self._step(part, kernels.get(part.result), env)
            env[part.result] = step()
            steps.append(step)

        def run() -> None:
            for step in steps:
                step()

        return Instead(f"{UNCHAINED}: {names}", run)

    def _step(
        self, part: Conv | Plain, kernel: Kernel | None, env: Mapping[int, Tensor]
    ) -> Callable[[], Tensor]:
        if isinstance(part, Plain):
            args, kwargs = substitute((part.call.args, part.call.kwargs), env.__getitem__)
            return lambda: part.call.op(*args, **kwargs)
        assert kernel is not None
        operands = [None if i is None else env[i] for i in part.operands]
        if operands[4] is not None:
            operands[4] = operands[4].contiguous(memory_format=torch.channels_last)
        call = call_of(kernel, Task(part.op, part.problem, self.device, tuple(operands)))
        return lambda: ops.channels_last(call())

    # ------------------------------------------------------------------------------------- choosing

    def kernels(self, call: Chained) -> list[Kernel]:
        """Kernels that are quicker than what the call replaces, best first."""
        found = (
            backends.named(call.op, t.kernel, call.problem, self.device) for t in self.quicker(call)
        )
        return [kernel for kernel in found if kernel is not None]

    def quicker(self, call: Chained) -> list[Timing]:
        """Timings of such kernels; none where the call was not measured."""
        entry = self.entry(call)
        if entry is None:
            return []
        ranked = entry.ranked(tolerance=None)
        names = [t.kernel for t in ranked]
        return ranked[: next(i for i, name in enumerate(names) if name.startswith(UNCHAINED))]

    def choose(self, banned: Collection[int] = ()) -> tuple[Span, ...]:
        """The spans that gain most.

        Args:
            banned: bottlenecks, by their 3x3's result, that are to stay unchained.
        """
        spans: list[Span] = []
        for block in self.found.blocks:
            if block.conv2.result not in self.before:
                spans += self._best(block, False, banned)[1]
        return tuple(spans)

    def _best(
        self, block: Bottleneck, thin: bool, banned: Collection[int]
    ) -> tuple[float, list[Span]]:
        """The largest gain from a bottleneck on, along those that it may leave even pixels to."""
        after = self.after.get(block.conv2.result)

        def behind(stored_even: bool) -> tuple[float, list[Span]]:
            return (0.0, []) if after is None else self._best(after, stored_even, banned)

        best = behind(False)
        if block.conv2.result in banned:
            return best
        for offer in self.offers_in(block, thin):
            call = offer.call
            if not self.kernels(call):
                continue
            gain, spans = behind(offer.span.store == "even")
            gain += self._gain(call)
            if gain > best[0]:
                best = gain, [offer.span, *spans]
        return best

    def _gain(self, call: Chained) -> float:
        """Seconds that the call takes less than what it replaces."""
        entry = self.entry(call)
        assert entry is not None
        return entry.timings[0].seconds - self.quicker(call)[0].seconds

    def layers_of(self, spans: tuple[Span, ...]) -> Layers:
        """The network with these spans chained."""
        return chained(self.layers, self.found.blocks, spans)

    # ------------------------------------------------------------------------------------ reporting

    def outcomes(self, layers: Layers) -> tuple[ChainOutcome, ...]:
        """What became of each bottleneck in the layers that were chosen in the end."""
        calls = {call.block: call for call in layers.layers if isinstance(call, Chained)}
        offered = [b for b in self.found.blocks if self.offers[b.conv2.result]]
        unable = [b for b in self.found.blocks if not self.offers[b.conv2.result]]
        reasons: dict[str, list[str]] = {}
        for block in unable:
            reasons.setdefault(self._no_kernel(block), []).append(block.name)
        if offered or any(why is None for _, why in self.refusals(self._usual())):
            for name, reason in self.found.refused:
                reasons.setdefault(reason, []).append(name)
        count = len(self.found.blocks) + len(self.found.refused)
        refused = [
            ChainOutcome(
                f"all {count} bottlenecks" if len(names) == count > 1 else ", ".join(names),
                None,
                why,
            )
            for why, names in reasons.items()
        ]
        return *(self._outcome(b, calls.get(b.conv2.result)) for b in offered), *refused

    def _usual(self) -> ChainProblem:
        """A problem that every backend with chain kernels computes in the dtypes that it has."""
        metas = (
            self.layers.graph.meta[c.result] for c in self.layers.layers if isinstance(c, Conv)
        )
        dtype = next((m.dtype for m in metas), torch.float32)
        return ChainProblem(1, 64, 16, 16, 256, 64, 0, 1, 1, "all", dtype)

    def _outcome(self, block: Bottleneck, call: Chained | None) -> ChainOutcome:
        offers = self.offers[block.conv2.result]
        mine = [o for o in offers if call is not None and o.call.problem == call.problem]
        texts = {o: self._times(o.call) for o in offers}
        others = tuple((o.words, texts[o]) for o in offers if o not in mine)
        notes = "".join(f"; {note}" for note in block.notes)
        if mine:
            return ChainOutcome(block.name, mine[0].words, texts[mine[0]] + notes, others)
        return ChainOutcome(block.name, None, texts[offers[0]] + notes, others)

    def _no_kernel(self, block: Bottleneck) -> str:
        """Why no kernel computes any span of a bottleneck: the reasons for the smallest."""
        problem = block.call(block.spans()[-1], False).problem
        reasons = [f"{name}: {reason}" for name, reason in self.refusals(problem)]
        if not reasons:
            return f"no backend chains bottlenecks on {self.device.type}"
        return "; ".join(reasons)

    def _times(self, call: Chained) -> str:
        """A call's time beside that of what it replaces, or why it has none."""
        entry = self.entry(call)
        if entry is None:
            return "not measured"
        unchained, *timings = entry.timings
        if not timings:
            return "; ".join(f"{name}: {why}" for name, why in entry.rejected) or "not measured"
        best = min(timings, key=lambda t: t.seconds)
        ratio = best.seconds / unchained.seconds
        return (
            f"{best.kernel} takes {best.seconds * 1e3:.3g} ms, {ratio:.2f} of the "
            f"{unchained.seconds * 1e3:.3g} ms {unchained.kernel}"
        )


__all__ = ["UNCHAINED", "ChainOutcome", "Chaining"]
