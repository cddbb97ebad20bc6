"""`Plan`: a network specialised to its device, dtype and shapes; what `optimize` makes."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fused_resnet.backends.verify import is_out_of_memory
from fused_resnet.cuda_graph import CudaGraph
from fused_resnet.graph import Meta
from fused_resnet.judging import GraphJudge, Judge, Judging
from fused_resnet.memory_report import MemoryReport, memory_report
from fused_resnet.plan_report import PlanReport, report
from fused_resnet.planner import Decision, Settings, decide_again, decide_untimed
from fused_resnet.program import Program
from fused_resnet.source import Source, converted_state
from fused_resnet.stored import described
from fused_resnet.tracing import Untraceable
from fused_resnet.tuned_table import TunedTable
from fused_resnet.warn import FusedResNetWarning, warn
from fused_resnet.weights import Weights

#: Positional and keyword arguments of a call.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Specialisation:
    """A plan's program for one set of shapes.

    Attributes:
        arguments: positional and keyword arguments, with a `Meta` in the place of each tensor.
        program: what runs.
        decision: which kernels, and why.
        measured: the decision that was made by measurement; `Plan.refit` begins with it.
        run: the program, or a CUDA graph of it.
        pinned: whether it was asked for, rather than made on the way.
    """

    arguments: Arguments
    program: Program
    decision: Decision
    measured: Decision
    run: Any
    pinned: bool


@dataclass(frozen=True)
class Policy:
    """What a plan does with inputs that it was not made for.

    Attributes:
        strict: raise ValueError.
        dynamic: make a program for their shapes, choosing kernels without measuring; else they run
            through the fused model.
        most: programs kept that were made so.
        cuda_graph: whether programs on CUDA are captured.
    """

    strict: bool = False
    dynamic: bool = False
    most: int = 8
    cuda_graph: bool = True


@dataclass(frozen=True)
class Content:
    """What a plan consists of, as it is at one moment."""

    name: str
    device: torch.device
    weights: Weights
    like: Mapping[str, Tensor]
    settings: Settings
    policy: Policy
    specialisations: Mapping[Hashable, Specialisation]


def _hidden_from_compiler(function: Callable[..., Any]) -> Callable[..., Any]:
    """As ``torch.compiler.disable``, which would import the compiler: 73 MB, half a second."""
    hidden: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:  # Nobody compiles.
            return function(*args, **kwargs)
        if not hidden:
            hidden.append(torch.compiler.disable(function))
        return hidden[0](*args, **kwargs)

    return call


class Plan(nn.Module):
    """A network specialised to its device, dtype and shapes, for inference.

    Call it as the model it was made of: it takes the same arguments and returns the same structure.
    Calls from several threads at once are safe. A plan is a snapshot: training the model on does
    not change it, `refit` does. It has no parameters, no train mode and no gradients.

    Made by `fused_resnet.optimize` and `fused_resnet.load`.

    Example:
        >>> plan = fused_resnet.optimize(model, images)
        >>> logits = plan(images)
        >>> print(plan.explain())
    """

    def __init__(
        self,
        name: str,
        weights: Weights,
        like: Mapping[str, Tensor],
        settings: Settings,
        policy: Policy,
        table: TunedTable,
        source: Source | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self._name = name
        self._weights = weights
        self._like = {n: described(t) for n, t in like.items()}
        first = next((t.device for t in like.values()), torch.device("cpu"))
        self._device = first if device is None else device
        self._settings = settings
        self._policy = policy
        self._table = table
        self._source = source
        self._specialisations: OrderedDict[Hashable, Specialisation] = OrderedDict()
        self._reason: str | None = None
        self._lock = threading.RLock()
        self.training = False

    # ------------------------------------------------------------------------------------ execution

    @_hidden_from_compiler
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns for these arguments.

        Raises:
            RuntimeError: an argument requires a gradient.
            TypeError: a tensor has another dtype than the plan was made for, or something else
                stands in its place.
            ValueError: a tensor is on another device; or has a shape that the plan was not made
                for, with ``strict_shapes=True``.
        """
        key, tensors = _key(args, kwargs)
        if torch.is_grad_enabled():
            for t in tensors:
                if t.requires_grad:
                    raise RuntimeError(
                        "a plan computes no gradients, but an argument requires one: call it under "
                        "torch.no_grad(), or use fused_resnet.fuse(model) for training"
                    )
        try:
            found = self._specialisations.get(key)
        except TypeError:  # No program knows what cannot be part of a key: an array of numpy.
            self._check_tensors(args, kwargs)
            raise
        if found is None:
            self._check_tensors(args, kwargs)
            return self._unknown(key, tensors, args, kwargs)
        if not found.pinned:
            with contextlib.suppress(KeyError):  # Another thread may have dropped it by now.
                self._specialisations.move_to_end(key)
        try:
            with self._context():
                return found.run(*tensors)
        except Exception as e:
            if self._source is None or is_out_of_memory(e):
                raise
            self._give_up(key, e)
        return self._run_source(args, kwargs)

    def _context(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast off where it is on: the plan's dtypes are settled."""
        kind = self._device.type
        if torch.is_autocast_enabled(kind):
            return torch.autocast(kind, enabled=False)
        return contextlib.nullcontext()

    def _give_up(self, key: Hashable, e: Exception) -> None:
        with self._lock:
            self._specialisations.pop(key, None)
        warnings.warn(
            f"a plan of {self._name} no longer uses its program for {_described(key)}, which "
            f"raised {type(e).__name__}: {e}; the fused model runs instead",
            FusedResNetWarning,
            stacklevel=4,
        )

    def _unknown(self, key: Hashable, tensors: Sequence[Tensor], args: Any, kwargs: Any) -> Any:
        """Arguments that no program was made for."""
        if self._specialisations:
            self._check_dtypes(tensors)
        if self._policy.strict or self._source is None:
            self._refuse(key)
        if self._policy.dynamic and self._reason is None and all(t.numel() for t in tensors):
            with self._lock:
                if key not in self._specialisations:
                    self._specialise_untimed(args, kwargs)
                found = self._specialisations.get(key)
            if found is not None:
                with self._context():
                    return found.run(*tensors)
        return self._run_source(args, kwargs)

    def _check_tensors(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise TypeError where the plan was made for a tensor and got something else."""
        if not self._specialisations:
            return
        wanted_args, wanted_kwargs = next(iter(self._specialisations.values())).arguments
        pairs = zip(wanted_args, args, strict=False)
        places = [(f"argument {i}", *pair) for i, pair in enumerate(pairs)]
        alone = not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((args, kwargs)))
        places += [
            (f"argument {name!r}", wanted_kwargs[name], given)
            for name, given in kwargs.items()
            if name in wanted_kwargs
        ]
        for name, wanted, given in places:
            if given is None and not alone:
                continue  # It may stand for a tensor that the model can do without.
            leaves = pytree.tree_leaves(given)
            if isinstance(wanted, Meta) and not any(isinstance(leaf, Tensor) for leaf in leaves):
                raise TypeError(
                    f"{name} must be a tensor: the plan of {self._name} was made for "
                    f"{', '.join(self.shapes)}; got {type(given).__name__}"
                )

    def _check_dtypes(self, tensors: Sequence[Tensor]) -> None:
        known = next(iter(self._specialisations.values())).program.layers.graph
        metas = [known.meta[i] for i in known.inputs]
        for number, (t, meta) in enumerate(zip(tensors, metas, strict=False)):
            if t.dtype != meta.dtype:
                raise TypeError(
                    f"argument {number} must be {meta.dtype}, as the plan was made for; got "
                    f"{t.dtype}"
                )
            if t.device != meta.device:
                raise ValueError(
                    f"argument {number} must be on {meta.device}, as the plan was made for; got "
                    f"{t.device}"
                )

    def _refuse(self, key: Hashable) -> NoReturn:
        known = ", ".join(_described(k) for k in self._specialisations)
        hint = (
            "this plan is strict; see batch_sizes, dynamic and strict_shapes of optimize"
            if self._source is not None or self._policy.strict
            else "a loaded plan has no model to run other shapes with"
        )
        raise ValueError(
            f"the plan of {self._name} was made for {known}, not for {_described(key)} ({hint})"
        )

    def _run_source(self, args: Any, kwargs: Any) -> Any:
        assert self._source is not None
        if self._specialisations:
            # Or else inputs of one shape would meet other weights than those of another.
            self._source.check_unchanged()
        with torch.no_grad(), self._context():
            return self._source(*args, **kwargs)

    # ------------------------------------------------------------------------- how plans are filled

    def add(
        self, arguments: Arguments, program: Program, decision: Decision, pinned: bool = True
    ) -> None:
        """Take in the program for such arguments; each tensor may be a `Meta`."""
        described = pytree.tree_map_only(Tensor, Meta.of, arguments)
        key, _ = _key(*described)
        run: Any = program
        if self._device.type == "cuda" and self._policy.cuda_graph:
            run = CudaGraph.or_plain(program, [m.empty() for m in _metas(described)])
        with self._lock:
            self._specialisations[key] = Specialisation(
                described, program, decision, decision, run, pinned
            )
            loose = [k for k, s in self._specialisations.items() if not s.pinned]
            for old in loose[: max(0, len(loose) - self._policy.most)]:
                del self._specialisations[old]

    def knows(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether there is a program for arguments of these shapes."""
        return _key(args, kwargs)[0] in self._specialisations

    def give_up_specialising(self, reason: str) -> None:
        """Have the fused model run, whatever the shapes."""
        self._reason = reason
        self._specialisations.clear()

    def forget_source(self) -> None:
        """Keep nothing of the model and its weights but what the programs hold."""
        self._source = None
        self._weights.release()

    def content(self) -> Content:
        """What a file of this plan holds."""
        with self._lock:
            return Content(
                self._name,
                self._device,
                self._weights,
                self._like,
                self._settings,
                self._policy,
                dict(self._specialisations),
            )

    @property
    def weights(self) -> Weights:
        """What the programs of this plan share."""
        return self._weights

    @property
    def device(self) -> torch.device:
        """Where the programs run."""
        return self._device

    @property
    def policy(self) -> Policy:
        """What is done with inputs that there is no program for, and whether graphs are made."""
        return self._policy

    def _specialise_untimed(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        assert self._source is not None
        self._source.check_unchanged()
        try:
            layers = self._source.layers(args, kwargs)
        except Untraceable as e:
            self._reason = str(e)
            return
        decision = decide_untimed(layers, self._settings, self._table)
        program = decision.program(self._weights)
        self.add((args, dict(kwargs)), program, decision, pinned=False)

    # ----------------------------------------------------------------------------------- what is in

    @property
    def shapes(self) -> tuple[str, ...]:
        """The inputs that there are programs for, in words."""
        return tuple(_described(key) for key in self._specialisations)

    @property
    def memory(self) -> MemoryReport:
        """Bytes of weights and activations, beside those of stock torch."""
        return memory_report(
            [s.program for s in self._specialisations.values()], self._weights, self._like
        )

    def explain(self) -> PlanReport:
        """Which kernel computes each layer, how long it takes, how far it is off, and why it won.

        Returns:
            A report that prints as a table, with ``to_dict`` for everything.
        """
        with self._lock:
            parts = [(_described(k), s) for k, s in self._specialisations.items()]
        return report(self._name, parts, self._settings, self._table, self._reason, self.memory)

    def extra_repr(self) -> str:
        """The inputs that there are programs for."""
        return ", ".join(self.shapes) or f"not specialised: {self._reason}"

    # ------------------------------------------------------------------------- other weights, files

    def refit(self, state: Mapping[str, Tensor], example: Any = None) -> None:
        """Take new weights of the same architecture, packed anew; nothing is timed.

        Every layer is compared with float64 again, and so is the network where inexact kernels (see
        ``tolerance``) are part of it. Kernels that are wrong with the new weights are replaced by
        exact ones, with a warning; the others stay. Weights that were seen before are not proven
        twice.

        Calls that are under way finish with the old weights. The model that the plan was made of is
        left as it is.

        Args:
            state: as ``model.state_dict()`` gives it; converted to the plan's dtypes and device.
            example: what errors are measured on, as `fused_resnet.optimize` takes it: best some
                real data. For shapes of the plan other than its own, and by default, noise.

        Raises:
            ValueError: names or shapes are those of another architecture, or the plan was not made
                for the shapes of ``example``; it then keeps the weights that it had.
        """
        examples = {} if example is None else self._examples(example)
        with self._lock:
            like = {n: torch.empty_like(t, device=self._device) for n, t in self._like.items()}
            new = converted_state(state, like)
            del like
            weights = Weights(new)
            source = None if self._source is None else self._source.refitted(new)
            made = []
            for key, old in self._specialisations.items():
                decision = old.decision
                if old.pinned:
                    given = examples.get(key) or pytree.tree_map_only(
                        Meta, Meta.noise, old.arguments
                    )
                    decision = self._proven(old, source, new, given)
                made.append((key, old, decision.program(weights), decision))
            fresh: OrderedDict[Hashable, Specialisation] = OrderedDict()
            for key, old, program, decision in made:
                run = old.run.renewed(program) if isinstance(old.run, CudaGraph) else program
                fresh[key] = replace(old, program=program, decision=decision, run=run)
            if source is None:
                weights.release()
            self._source, self._weights, self._specialisations = source, weights, fresh
        self._table.save()

    def _examples(self, example: Any) -> dict[Hashable, Arguments]:
        """The arguments that users give as an example, by their key."""
        from fused_resnet.optimize import arguments

        args, kwargs = arguments(example)
        key, _ = _key(args, kwargs)
        if key not in self._specialisations:
            self._refuse(key)
        return {key: (args, kwargs)}

    def _proven(
        self,
        old: Specialisation,
        source: Source | None,
        state: Mapping[str, Tensor],
        given: Arguments,
    ) -> Decision:
        """The decision of a specialisation for other weights."""
        inputs = [t.detach() for t in pytree.tree_leaves(given) if isinstance(t, Tensor)]
        judge: Judging
        if source is None:
            judge = GraphJudge(old.measured.layers, state, inputs, _coarsest(old.measured))
        else:
            judge = Judge(source, *given)
        decision = decide_again(old.measured, state, inputs, self._settings, self._table, judge)
        changed = [
            f"{was.layer.name}: {was.kernel.full_name} -> {now.kernel.full_name}"
            for was, now in zip(old.measured.outcomes, decision.outcomes, strict=True)
            if was.kernel.full_name != now.kernel.full_name
        ]
        if changed:
            warn(
                f"with its new weights, the plan of {self._name} needs other kernels for "
                f"{len(changed)} of {len(decision.outcomes)} layers, and may be slower: "
                f"{'; '.join(changed[:5])}{' ...' if len(changed) > 5 else ''}; explain() says "
                "why, and optimize chooses anew",
                stacklevel=4,
            )
        return decision

    def save(self, path: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write the plan to a file that `fused_resnet.load` reads.

        The file holds the graph, the chosen kernels and the weights, as safetensors with a header
        of JSON: no code. Weights are packed anew when it is loaded.

        Args:
            path: of the file.
            state: the weights, needed where the plan keeps none: with ``strict_shapes=True``, and
                after `fused_resnet.load`. Those that the plan was made of or last refitted with.

        Raises:
            RuntimeError: the model's weights changed after the plan was made.
            ValueError: weights are needed; or are others than the plan's, which were not compared
                with float64 (`refit` does it); or the plan cannot be written down (it is not
                specialised, or returns objects of classes that a file cannot name).
        """
        from fused_resnet.plan_file import save

        if self._source is not None:
            self._source.check_unchanged()
        save(self, path, state)

    # -------------------------------------------------------------------- what a plan does not have

    def train(self, mode: bool = True) -> Plan:
        """A plan stays in eval mode; containers may set theirs."""
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> NoReturn:
        raise RuntimeError(
            "a plan is specialised to its dtype and device: convert the model and optimize it again"
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a plan is neither pickled nor copied: use plan.save and fused_resnet.load")


def _key(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Hashable, Sequence[Any]]:
    """What programs are found by, and the tensors (or their `Meta`) among the arguments."""
    if not kwargs and len(args) == 1 and isinstance(args[0], Tensor | Meta):
        x = args[0]
        return (x.shape, x.dtype, x.device), args
    leaves, structure = pytree.tree_flatten((args, dict(kwargs)))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor | Meta)]
    described = tuple(
        (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, Tensor | Meta) else leaf
        for leaf in leaves
    )
    return (described, structure), tensors


def _coarsest(decision: Decision) -> torch.dtype:
    """The least exact dtype of a network's layers."""
    dtypes = [o.layer.problem.dtype for o in decision.outcomes]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def _metas(described: Any) -> list[Meta]:
    return [leaf for leaf in pytree.tree_leaves(described) if isinstance(leaf, Meta)]


def _described(key: Any) -> str:
    """A key in words."""
    if len(key) == 3:
        shape, dtype, device = key
        where = "" if device.type == "cpu" else f" on {device}"
        return f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}{where}"
    parts = key[0]
    return "(" + ", ".join(_described(p) if isinstance(p, tuple) else repr(p) for p in parts) + ")"


__all__ = ["Plan", "Policy", "Specialisation"]
