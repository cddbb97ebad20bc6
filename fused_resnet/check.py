"""`check`: how far a fused model and its stock reference are from float64, as a whole and op by op.

Three questions are answered, each by the rule of ``fused_resnet.numerics``:

- Is every output at most twice as far from float64 as stock torch's is, in the same dtype?
- Is every fused op right by itself, given the very input it meets in this model?
- Does the fused model compute the reference's function at all? Both run in float64, where roundings
  cannot hide a wrong connection, a stride in the wrong place or another eps.

Beside them stand the errors accumulated up to each op, and how often the classes agree.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.markup import escape
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

from fused_resnet import backends
from fused_resnet.console import plain, table
from fused_resnet.numerics import (
    Error,
    error,
    largest,
    reference_chain,
    reference_conv,
    stock_chain,
    stock_conv,
)
from fused_resnet.op_watcher import Operands, OpWatcher
from fused_resnet.problem import (
    AddReluProblem,
    ChainProblem,
    Convolution,
    channels_last_format,
)
from fused_resnet.stock import Compute, Results, errors_of, fault_of_network, marked

#: One call's arguments, or several calls'.
Inputs = Tensor | tuple[Any, ...] | Sequence[Tensor | tuple[Any, ...]]
Outputs = dict[str, Tensor]

#: Two float64 runs of one function differ by less, after any number of layers; another function
#: (a stride elsewhere, another eps) differs by more.
_SAME_FUNCTION = 1e-9


@dataclass(frozen=True)
class OutputCheck:
    """One output of the model.

    Attributes:
        name: its place in what the model returns; ``output`` where that is a single tensor.
        fused: the fused model's error against float64; None if it could not be compared.
        stock: stock torch's, the larger of those of both memory layouts.
        passed: whether the rule is met.
        note: what is wrong, empty if nothing is.
    """

    name: str
    fused: Error | None
    stock: Error | None
    passed: bool
    note: str = ""


@dataclass(frozen=True)
class LayerCheck:
    """One fused op of the model.

    Attributes:
        name: path of its convolution.
        problem: shapes, dtype and epilogue.
        kernel: what computed it.
        fused: error of this op alone, given its actual input.
        stock: error of stock torch's modules given the same input, in channels_last, the op's own
            layout.
        passed: whether the rule is met.
        total_fused: error accumulated from the model's input up to here, on the first image.
        total_stock: the same where stock ATen computes every op.
    """

    name: str
    problem: str
    kernel: str
    fused: Error
    stock: Error
    passed: bool
    total_fused: Error | None = None
    total_stock: Error | None = None


@dataclass(frozen=True)
class Agreement:
    """How often the classes are those that float64 finds, as shares from 0 to 1.

    Attributes:
        images: number of images.
        fused_top1: images whose best class is float64's.
        stock_top1: the same for stock torch.
        fused_top5: share of float64's five best classes that are among the fused model's five best;
            None with fewer than six classes.
        stock_top5: the same for stock torch.
    """

    images: int
    fused_top1: float
    stock_top1: float
    fused_top5: float | None
    stock_top5: float | None


@dataclass(frozen=True)
class CheckReport:
    """What `check` found. Print it, ask ``passed``, or take the data by `to_dict`.

    Attributes:
        dtype: of the stock model's first parameter.
        device: of the same.
        outputs: each output of the model.
        layers: each fused op, in order of execution; empty if not asked for or none ran.
        agreement: of the classes, where the output is a batch of logits.
        same_function: error of the fused model in float64 against the reference in float64, and
            whether it is small enough; None if that could not be run.
        notes: what a reader should know beyond the figures.
    """

    dtype: str
    device: str
    outputs: tuple[OutputCheck, ...]
    layers: tuple[LayerCheck, ...] = ()
    agreement: Agreement | None = None
    same_function: OutputCheck | None = None
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether everything that was judged is right, and stock torch fit to judge by."""
        fit = all(layer.stock.rounding is None for layer in self.layers)
        same = self.same_function is None or self.same_function.passed
        judged: tuple[OutputCheck | LayerCheck, ...] = (*self.outputs, *self.layers)
        return fit and same and bool(self.outputs) and all(item.passed for item in judged)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, ready for JSON."""
        return {"passed": self.passed, **asdict(self)}

    def __str__(self) -> str:
        return plain(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Group(*self._parts())

    def _parts(self) -> list[RenderableType]:
        verdict = "[green]passed[/]" if self.passed else "[red]FAILED[/]"
        parts: list[RenderableType] = [
            f"[bold]Check in {self.dtype} on {self.device}:[/] {verdict}",
            "",
        ]
        outputs = table()
        for column in ("output", "fused", "stock", ""):
            outputs.add_column(column)
        for o in self.outputs:
            outputs.add_row(escape(o.name), _short(o.fused), _short(o.stock), _mark(o))
        parts.append(outputs)
        if self.agreement is not None:
            a = self.agreement
            parts.append(
                f"best class as in float64: fused {a.fused_top1:.1%}, stock {a.stock_top1:.1%} "
                f"of {a.images} images"
            )
            if a.fused_top5 is not None and a.stock_top5 is not None:
                parts.append(
                    f"five best classes shared with float64: fused {a.fused_top5:.1%}, "
                    f"stock {a.stock_top5:.1%}"
                )
        if self.same_function is not None:
            s = self.same_function
            parts.append(f"fused and stock both in float64 differ by {_short(s.fused)} {_mark(s)}")
        if self.layers:
            parts.extend(("", self._layer_table()))
        parts.extend(
            (
                "",
                "[dim]Errors are distances from float64, relative to its norm. A result passes if "
                "its distance, by norm and by worst element, is at most twice stock torch's plus "
                "the dtype's rounding unit.[/]",
            )
        )
        parts.extend(f"[yellow]note:[/] {escape(note)}" for note in self.notes)
        return parts

    def _layer_table(self) -> RenderableType:
        layers = table()
        layers.padding = (0, 1, 0, 0)
        for column in ("layer", "kernel", "fused", "stock", "fused to here", "stock to here", ""):
            layers.add_column(column)
        for c in self.layers:
            layers.add_row(
                c.name,
                c.kernel,
                _short(c.fused),
                _short(c.stock),
                _short(c.total_fused),
                _short(c.total_stock),
                "[green]ok[/]" if c.passed else "[red]FAILED[/]",
            )
        return layers


def check(
    model: nn.Module,
    reference: nn.Module,
    inputs: Inputs,
    *,
    dtype: torch.dtype | None = None,
    layers: bool = True,
    exact: Outputs | None = None,
) -> CheckReport:
    """Compare a fused model and its stock reference with float64.

    Args:
        model: what to judge: a fused model, or any callable module in eval mode.
        reference: the stock model it stands for, in eval mode.
        inputs: a tensor, a tuple of arguments, or a list of either, of which each is one call.
        dtype: convert copies of both models, and the inputs, to this dtype first.
        layers: also judge every fused op by itself, on the first call; takes three times as long.
        exact: `exact_outputs` of the same reference and inputs, if they are known already.

    Returns:
        The report; ``report.passed`` says whether all is right.

    Raises:
        ValueError: a model is in train mode, or there are no inputs.

    Example:
        >>> report = check(fused_resnet.fuse(model), model, torch.randn(8, 3, 224, 224))
        >>> print(report)
        >>> assert report.passed
    """
    for name, m in (("model", model), ("reference", reference)):
        if any(part.training for part in m.modules()):
            raise ValueError(f"{name} is (in part) in train mode; call .eval() first")
    calls = _calls(inputs)
    if dtype is not None:
        model, reference = copy.deepcopy(model).to(dtype), copy.deepcopy(reference).to(dtype)
        calls = [_cast(c, dtype) for c in calls]
    notes: list[str] = []
    with torch.inference_mode():
        if exact is None:
            exact = exact_outputs(reference, calls)
        stocks = _in_both_layouts(reference, calls)
        fused = outputs_of(model, calls)
        checked = compare(fused, stocks, exact)
        skipped = [name for name, t in exact.items() if not t.is_floating_point()]
        if skipped:
            notes.append(f"outputs of integers are not judged: {', '.join(skipped)}")
        same: OutputCheck | None = None
        rows: tuple[LayerCheck, ...] = ()
        if layers:
            known = exact if len(calls) == 1 else exact_outputs(reference, calls[:1])
            same, rows = _check_inside(model, reference, calls[0], known, notes)
    first = next(reference.parameters(), torch.empty(0))
    return CheckReport(
        dtype=str(first.dtype).removeprefix("torch."),
        device=str(first.device),
        outputs=checked,
        layers=rows,
        agreement=agreement(fused, stocks[0], exact),
        same_function=same,
        notes=tuple(notes),
    )


def exact_outputs(reference: nn.Module, inputs: Inputs) -> Outputs:
    """What a float64 copy of ``reference`` returns for ``inputs``; see `check` for both."""
    copied = copy.deepcopy(reference).double()
    with torch.inference_mode():
        return outputs_of(copied, [_cast(c, torch.float64) for c in _calls(inputs)])


def outputs_of(model: Callable[..., Any], inputs: Inputs) -> Outputs:
    """The tensors that ``model`` returns, by name; those of several calls are joined into one.

    Args:
        model: called once for each input.
        inputs: see `check`.
    """
    results: dict[str, list[Tensor]] = {}
    for args in _calls(inputs):
        # Copies, since a model may begin with an operation in place.
        own = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, args)
        leaves, _ = tree_flatten_with_path(model(*own))
        for path, leaf in leaves:
            if isinstance(leaf, Tensor):
                results.setdefault(keystr(path) or "output", []).append(leaf)
    return {name: _join(pieces) for name, pieces in results.items()}


def compare(fused: Outputs, stocks: Sequence[Outputs], exact: Outputs) -> tuple[OutputCheck, ...]:
    """Judge every floating output by the rule.

    Args:
        fused: outputs to judge.
        stocks: stock torch's in the same dtype, from one or more runs that round differently (such
            as both memory layouts). Its error is the largest of them: one run may be exact by luck.
        exact: the reference's in float64.
    """
    rows = []
    for name, reference in exact.items():
        if not reference.is_floating_point():
            continue
        if name not in fused:
            note = "the fused model does not return it"
            rows.append(OutputCheck(name, None, None, False, note))
            continue
        dtype = stocks[0][name].dtype
        try:
            allowed = largest(*(error(stock[name], reference) for stock in stocks))
            found = error(fused[name], reference)
        except ValueError as e:
            rows.append(OutputCheck(name, None, None, False, str(e)))
            continue
        if fused[name].dtype == dtype:
            wrong = fault_of_network(allowed, dtype)
            verdict = _judge(found, allowed, dtype) if wrong is None else (False, wrong)
            rows.append(OutputCheck(name, found, allowed, *verdict))
        else:
            note = f"the fused model returns {fused[name].dtype}, stock {dtype}"
            rows.append(OutputCheck(name, found, allowed, False, note))
    extra = [name for name in fused if name not in exact]
    note = "the stock model does not return it"
    return (*rows, *(OutputCheck(name, None, None, False, note) for name in extra))


def agreement(fused: Outputs, stock: Outputs, exact: Outputs) -> Agreement | None:
    """How often the classes agree, if the only output is a batch of logits [N, classes]."""
    if len(exact) != 1 or fused.keys() != exact.keys() or stock.keys() != exact.keys():
        return None
    (e,), (f,), (s,) = exact.values(), fused.values(), stock.values()
    if e.dim() != 2 or e.shape[0] == 0 or e.shape[1] < 2 or not e.shape == f.shape == s.shape:
        return None

    def top1(logits: Tensor) -> float:
        return (logits.argmax(1) == e.argmax(1)).double().mean().item()

    def top5(logits: Tensor) -> float | None:
        if e.shape[1] < 6:
            return None
        ours, theirs = logits.topk(5).indices, e.topk(5).indices
        return (ours[:, :, None] == theirs[:, None]).any(1).double().mean().item()

    return Agreement(e.shape[0], top1(f), top1(s), top5(f), top5(s))


# --------------------------------------------------------------------------------------------------
# Inside the model: every fused op by itself, and the errors that accumulate.
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Op:
    """A fused op that ran: its name, its verdict, its input and its result on the first image."""

    name: str
    row: LayerCheck | None
    entered: Tensor
    first: Tensor


class _Recorder(OpWatcher):
    """Keeps what every op did; judges it at once if asked to."""

    def __init__(self, model: nn.Module, judge: bool) -> None:
        super().__init__()
        self.names = {p.data_ptr(): name for name, p in model.named_parameters()}
        self.judge = judge
        self.ops: list[_Op] = []

    def saw(self, choice: backends.Choice, operands: Operands, result: Any) -> None:
        """See `OpWatcher`."""
        name = self._name(choice, operands)
        results = (result,) if isinstance(result, Tensor) else result
        row = _check_op(name, choice, operands, results) if self.judge else None
        entered = operands[0]
        assert entered is not None
        self.ops.append(_Op(name, row, entered[:1].clone(), results[0][:1].clone()))

    def _name(self, choice: backends.Choice, operands: Operands) -> str:
        if isinstance(choice.problem, AddReluProblem):
            return f"add_relu behind {self.ops[-1].name}" if self.ops else "add_relu"
        weight = operands[2 if isinstance(choice.problem, ChainProblem) else 1]
        assert weight is not None
        name = self.names.get(weight.data_ptr())
        return choice.kernel.op if name is None else name.removesuffix(".weight")


def _check_op(
    name: str, choice: backends.Choice, operands: Operands, results: tuple[Tensor, ...]
) -> LayerCheck:
    """Judge the results of one op by what float64 and stock torch make of its operands."""
    problem = choice.problem
    exact: Results
    stock: Results
    compute: Compute
    if isinstance(problem, Convolution):
        x, weight, *rest = operands
        assert x is not None
        assert weight is not None
        vectors: Any = rest if len(rest) == 3 else (*rest, None)
        compute = lambda conv, _chain: (conv(problem, x, weight, *vectors),)  # noqa: E731
        exact = compute(reference_conv, reference_chain)
        # Stock torch in the op's own layout. With few pixels and many channels it is up to 5 times
        # as far off there as in NCHW, so that it would fail itself if the smaller error counted;
        # the larger of both would let through more than the rule means.
        last = [t.contiguous(memory_format=channels_last_format(t)) for t in (x, weight)]
        stock = (stock_conv(problem, last[0], last[1], *vectors),)
    elif isinstance(problem, ChainProblem):
        compute = lambda _conv, chain: chain(problem, *operands)  # noqa: E731
        exact, stock = reference_chain(problem, *operands), stock_chain(problem, *operands)
    else:
        a, b = operands
        assert a is not None
        assert b is not None
        exact, stock = (torch.relu(a.double() + b.double()),), (torch.relu(a + b),)
        compute = lambda _conv, _chain: stock  # noqa: E731
    found = largest(*errors_of(results, exact))
    allowed = largest(*marked(errors_of(stock, exact), problem, exact, compute))
    passed, _ = _judge(found, allowed, results[0].dtype)
    return LayerCheck(name, str(problem), choice.kernel.full_name, found, allowed, passed)


def _check_inside(
    model: nn.Module,
    reference: nn.Module,
    args: tuple[Any, ...],
    expected: Outputs,
    notes: list[str],
) -> tuple[OutputCheck | None, tuple[LayerCheck, ...]]:
    """Whether model and reference are one function, and a row for every fused op of ``model``."""
    with _Recorder(model, judge=True) as fused:
        outputs_of(model, [args])
    rows = tuple(op.row for op in fused.ops if op.row is not None)
    wrong = [row for row in rows if row.stock.rounding is not None]
    if wrong:
        notes.append(
            f"stock torch itself is wrong on {len(wrong)} of {len(rows)} ops, so nothing here can "
            f"be relied on: on {wrong[0].name} its error is {wrong[0].stock}"
        )
    if not rows:
        notes.append("no fused op ran in the model, so there are no layers to judge")
    try:
        exact_model = copy.deepcopy(model).double()
        wide = _cast(args, torch.float64)
        with backends.backend("torch"), _Recorder(exact_model, judge=False) as exact:
            ours = outputs_of(exact_model, [wide])
    except Exception as e:  # A model of any kind: it may refuse to be copied or to run in float64.
        notes.append(f"the fused model does not run in float64 ({type(e).__name__}: {e})")
        return None, rows
    same = _same_function(ours, expected)
    if not same.passed:
        where = _first_difference(exact.ops, copy.deepcopy(reference).double(), wide)
        notes.append(
            "the fused model computes another function than the reference, even in float64"
            + (f"; the first convolution to get another input is {where}" if where else "")
        )
    with backends.backend("torch"), _Recorder(model, judge=False) as stock:
        outputs_of(model, [args])
    if not len(rows) == len(exact.ops) == len(stock.ops):
        notes.append("the ops that run differ from run to run, so no accumulated errors are given")
        return same, rows
    return same, tuple(
        LayerCheck(
            **{
                **vars(row),
                "total_fused": _error(f.first, e.first),
                "total_stock": _error(s.first, e.first),
            }
        )
        for row, f, s, e in zip(rows, fused.ops, stock.ops, exact.ops, strict=True)
    )


def _same_function(ours: Outputs, theirs: Outputs) -> OutputCheck:
    worst = Error(0.0, 0.0)
    for name, reference in theirs.items():
        if not reference.is_floating_point():
            continue
        if name not in ours or ours[name].shape != reference.shape:
            note = f"{name} is missing or has another shape"
            return OutputCheck("float64", None, None, False, note)
        worst = max(worst, error(ours[name], reference), key=lambda e: (not e.finite, e.l2))
    passed = worst.finite and worst.l2 <= _SAME_FUNCTION
    note = "" if passed else "not the same function"
    return OutputCheck("float64", worst, None, passed, note)


def _first_difference(
    ops: Sequence[_Op], reference: nn.Module, args: tuple[Any, ...]
) -> str | None:
    """Path of the first convolution whose input differs between both models; None if there is none.

    Args:
        ops: what the fused model ran.
        reference: in the same dtype; its convolutions are found by their paths.
        args: of both.
    """
    seen: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, given: tuple[Any, ...]) -> None:
            seen.setdefault(path, given[0][:1].clone())

        return hook

    entered = {op.name: op.entered for op in reversed(ops)}  # The first call of each counts.
    handles = [
        module.register_forward_pre_hook(keep(path))
        for path, module in reference.named_modules()
        if path in entered
    ]
    try:
        outputs_of(reference, [args])
    finally:
        for handle in handles:
            handle.remove()
    for path, expected in seen.items():  # In order of execution.
        if not _same_function({path: entered[path]}, {path: expected}).passed:
            return path
    return None


# --------------------------------------------------------------------------------------------------
# Small things.
# --------------------------------------------------------------------------------------------------


def _calls(inputs: Inputs) -> list[tuple[Any, ...]]:
    calls = inputs if isinstance(inputs, list) else [inputs]
    if not calls:
        raise ValueError("check needs at least one input, got an empty list")
    return [c if isinstance(c, tuple) else (c,) for c in calls]


def _cast(args: Any, dtype: torch.dtype) -> tuple[Any, ...]:
    def convert(leaf: Any) -> Any:
        is_float = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.to(dtype) if is_float else leaf

    return cast(tuple[Any, ...], tree_map(convert, args))


def _join(pieces: list[Tensor]) -> Tensor:
    if len(pieces) == 1:
        return pieces[0]
    if all(p.dim() > 0 and p.shape[1:] == pieces[0].shape[1:] for p in pieces):
        return torch.cat(pieces)
    return torch.cat([p.flatten() for p in pieces])


def _in_both_layouts(reference: nn.Module, calls: Sequence[tuple[Any, ...]]) -> list[Outputs]:
    """What stock torch returns as it is called, and in the other memory layout."""
    images = [t for args in calls for t in args if isinstance(t, Tensor) and t.dim() in (4, 5)]
    last = bool(images) and images[0].is_contiguous(memory_format=channels_last_format(images[0]))

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() not in (4, 5):
            return leaf
        layout = torch.contiguous_format if last else channels_last_format(leaf)
        return leaf.contiguous(memory_format=layout)

    other = copy.deepcopy(reference)
    for parameter in other.parameters():
        # Not Module.to, which knows either images or videos.
        parameter.data = convert(parameter.data)
    return [outputs_of(reference, list(calls)), outputs_of(other, list(tree_map(convert, calls)))]


def _judge(found: Error, allowed: Error, dtype: torch.dtype) -> tuple[bool, str]:
    if found.within(allowed, dtype):
        return True, ""
    if not found.finite:
        return False, "infinities or NaNs stand elsewhere than in float64"
    by_norm = found.l2 / allowed.l2 if allowed.l2 > 0 else float("inf")
    by_worst = found.worst / allowed.worst if allowed.worst > 0 else float("inf")
    return False, f"{by_norm:.1f} times stock's error by norm, {by_worst:.1f} by worst element"


def _error(actual: Tensor, reference: Tensor) -> Error | None:
    return error(actual, reference) if actual.shape == reference.shape else None


def _short(e: Error | None) -> str:
    if e is None:
        return "-"
    return f"{e.l2:.1e}" + ("" if e.finite else "!")


def _mark(o: OutputCheck) -> str:
    return "[green]ok[/]" if o.passed else f"[red]FAILED[/] {escape(o.note)}"
