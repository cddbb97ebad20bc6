"""`optimize`: from a model and an example to a `Plan`, by measurement."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fused_resnet.chain import ChainedModel
from fused_resnet.console import err
from fused_resnet.cuda_graph import CudaGraph
from fused_resnet.footprint import give_back
from fused_resnet.in_place import tune_in_place
from fused_resnet.judging import Judge
from fused_resnet.plan import Plan, Policy
from fused_resnet.planner import Progress, Settings, decide
from fused_resnet.program import Program
from fused_resnet.source import Source
from fused_resnet.tracing import Untraceable, stock_class
from fused_resnet.tuned_table import TunedTable, table
from fused_resnet.tuning import EFFORTS
from fused_resnet.weights import Weights


def optimize(
    model: nn.Module,
    example: Any,
    *,
    dtype: torch.dtype | None = None,
    mode: str = "balanced",
    tolerance: float | None = None,
    cache: bool = True,
    budget: float | None = None,
    batch_sizes: Sequence[int] = (),
    strict_shapes: bool = False,
    dynamic: bool = False,
    max_plans: int = 8,
    compact: bool | None = None,
    cuda_graph: bool = True,
    progress: bool | Callable[[str, float], None] | None = None,
) -> Plan:
    """Specialise a model to its device, a dtype and the shapes of an example, for inference.

    The model is fused if it is not; every kernel that supports a layer is verified against float64
    on the layer's real input and weights and timed, stock torch among them; the fastest of the
    right ones computes it. Where kernels for chained bottlenecks exist (see
    `fused_resnet.chain_planner`), each bottleneck is chained if that is right, and faster than its
    layers are by themselves. Weights are packed, and as much as possible of the network becomes one
    native call (CPU) or one CUDA graph. What was measured is kept, see `fused_resnet.tuned_table`,
    so that a second time takes moments: the model is traced and its weights are packed anew,
    nothing is measured. Where weights differ from those that were seen, layers are compared with
    float64 again.

    A model whose forward cannot be written down as a graph (it looks at values, as detectors do)
    still gets tuned kernels: the plan then runs its fused form. ``explain`` says so.

    Args:
        model: in eval mode; left as it is, and its weights are shared, not copied, as far as the
            plan needs them. Of what `chain` made the model behind it: what is chained is measured.
        example: an input, or a tuple of all arguments, or a dict of keyword arguments. What is in
            it matters little, but errors are measured on it: real data is best.
        dtype: to compute in; None for the model's own. Arguments and results keep theirs: a plan in
            bfloat16 of a float32 model takes and returns float32.
        mode: ``"balanced"``; ``"max"``: every configuration of every kernel, for longer;
            ``"strict"``: no inexact kernels, such as Winograd's, so that every layer satisfies the
            rule of ``check``.
        tolerance: the largest error of a layer (relative, by norm) that an inexact kernel may have;
            None for 2e-6 in float32, 6e-3 in bfloat16, 1e-3 in float16. The network as a whole
            satisfies the rule of ``check`` on the example in any case.
        cache: whether to use and to write the table of measurements.
        budget: seconds for measuring; None for 60, or 600 with ``mode="max"``. The costliest layers
            are measured first; Ctrl-C ends measuring and keeps what is known. Comparing layers with
            float64 comes on top: it is never left out.
        batch_sizes: also make programs for these, of the example's other extents. They share packed
            weights where layouts agree.
        strict_shapes: raise ValueError at inputs of other shapes, and keep nothing of the model.
            Otherwise those run through the fused model.
        dynamic: make programs for other shapes as they come, with kernels chosen by what is known.
        max_plans: programs kept that were made so; the least recently used goes first.
        compact: whether to leave out kernels whose packed weights take more memory than the weights
            do, such as Winograd's that keep them transformed (1.8 to 4 times the bytes of a 3x3).
            None leaves out as many as it takes for the weights and activations of a plan for these
            shapes to need no more memory than stock torch's, those first that gain the least time
            for a byte (all, where workspaces alone need more, as in tiny networks); False leaves
            out none.
        cuda_graph: on CUDA, capture the program into a graph.
        progress: whether to show a progress bar, by default if standard error is a terminal; or a
            function that is told what is going on and the share that is done.

    Raises:
        TypeError: ``model`` is no module, or of a kind that `fuse` refuses.
        ValueError: it is in train mode; an argument is none of the above; with ``strict_shapes``,
            the model cannot be specialised.

    Example:
        >>> plan = fused_resnet.optimize(model, torch.randn(1, 3, 224, 224))
        >>> logits = plan(images)
        >>> print(plan.explain())
    """
    if isinstance(model, ChainedModel):
        model = model.unchained()
    settings = _settings(mode, tolerance, budget, compact)
    policy = Policy(strict_shapes, dynamic, max_plans, cuda_graph)
    args, kwargs = arguments(example)
    source = Source(model, dtype)
    known = table() if cache else TunedTable(None)
    with _reporting(progress) as tell:
        plan = Plan(
            stock_class(model).__name__,
            Weights(source.state),
            source.state,
            settings,
            policy,
            known,
            source,
        )
        try:
            for given in [args, *(_with_batch(args, size) for size in batch_sizes)]:
                _specialise(plan, source, given, kwargs, settings, known, tell)
        except Untraceable as e:
            if strict_shapes:
                raise ValueError(
                    f"{stock_class(model).__name__} cannot be specialised to its shapes: {e}"
                ) from e
            plan.give_up_specialising(str(e))
            tune_in_place(source, args, kwargs, settings, known, tell)
        finally:
            known.save()
    if strict_shapes:
        plan.forget_source()
    gc.collect()  # Traces are full of cycles.
    give_back()
    return plan


def _settings(
    mode: str, tolerance: float | None, budget: float | None, compact: bool | None
) -> Settings:
    if mode not in EFFORTS:
        raise ValueError(f"unknown mode {mode!r}; one of {', '.join(EFFORTS)}")
    if tolerance is not None and not 0.0 <= tolerance < 1.0:
        raise ValueError(f"tolerance is a relative error, at least 0 and below 1; got {tolerance}")
    if budget is None:
        budget = 600.0 if mode == "max" else 60.0
    if not budget >= 0.0:
        raise ValueError(f"budget must not be negative, got {budget}")
    if compact is not None and not isinstance(compact, bool):
        raise ValueError(f"compact must be None, True or False, got {compact!r}")
    return Settings(mode, tolerance, budget, compact)


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call, from what users give as an example."""
    if isinstance(example, dict):
        args, kwargs = (), dict(example)
    else:
        args, kwargs = example if isinstance(example, tuple) else (example,), {}
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if not tensors:
        raise ValueError(
            f"the example must contain a tensor; got {type(example).__name__}. Give an input, a "
            "tuple of all arguments, or a dict of keyword arguments"
        )
    if any(t.numel() == 0 for t in tensors):
        raise ValueError("the example must not be empty: kernels are measured on it")
    return args, kwargs


def _with_batch(args: tuple[Any, ...], size: int) -> tuple[Any, ...]:
    """The arguments with another number of images, repeated or cut."""
    if size < 1:
        raise ValueError(f"batch_sizes must be positive, got {size}")
    count = next(t.shape[0] for t in pytree.tree_leaves(args) if isinstance(t, Tensor))

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != count:
            return leaf
        picked = torch.arange(size, device=leaf.device) % count
        last = leaf.dim() == 4 and leaf.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        return leaf.index_select(0, picked).contiguous(memory_format=layout)

    resized: tuple[Any, ...] = pytree.tree_map(resize, args)
    return resized


def _specialise(
    plan: Plan,
    source: Source,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    settings: Settings,
    known: TunedTable,
    tell: Progress,
) -> None:
    if plan.knows(args, kwargs):
        return
    tell("tracing the model", 0.0)
    layers = source.layers(args, kwargs)
    inputs = [t.detach() for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    judge = Judge(source, args, kwargs)

    def ready(program: Program) -> Any:
        graph = plan.device.type == "cuda" and plan.policy.cuda_graph
        return CudaGraph.or_plain(program, inputs) if graph else program

    decision = decide(layers, source.state, inputs, settings, known, tell, judge, ready)
    plan.add((args, kwargs), decision.program(plan.weights), decision)


@contextlib.contextmanager
def _reporting(progress: bool | Callable[[str, float], None] | None) -> Iterator[Progress]:
    if callable(progress):
        yield progress
        return
    shown = err.is_terminal if progress is None else progress
    columns = (BarColumn(20), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Bar(*columns, console=err, transient=True, disable=not shown) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda text, share: bar.update(task, description=text, completed=share)


__all__ = ["arguments", "optimize"]
