"""Timing fused networks against stock torch: contenders in turn, medians, every sample kept.

How a comparison is made:

1. Check first: every contender's outputs are judged against float64. What is wrong is not timed.
2. Warm up, then rounds. In a round every contender runs one block of calls, the order rotating from
   round to round, so that whatever the machine does meanwhile meets all of them alike.
3. A ratio is the median over the rounds of the ratio within the round, its spread the quartiles.
4. First call and peak memory are measured in a fresh process for each contender (see `probe`).

All contenders have the same weights, dtype, threads and inputs (several, in turn), run in inference
mode, and get their input in the memory layout that suits them.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet import backends, contenders, images, zoo
from fused_resnet.backends import FusedResNetWarning
from fused_resnet.check import Outputs, agreement, compare, exact_outputs, outputs_of
from fused_resnet.console import UserError
from fused_resnet.contenders import CONTENDERS, Run
from fused_resnet.machine import Machine, machine, versions
from fused_resnet.optimize import optimize
from fused_resnet.probe import Probe, ProbeTask, clock, measure
from fused_resnet.rooflines import Ceiling, NetworkLayers

#: Name and version of the format of reports; a reader refuses another.
SCHEMA = "fused_resnet.bench/1"

#: Batches that contenders are given in turn, so that no input stays in the caches by itself.
_ROTATION = 3
#: Images that errors and classes are taken from, where there are as many.
_CHECKED = 16
_MIN_ROUNDS = 5
_MAX_ROUNDS = 1000
_BLOCK_SECONDS = 0.05

#: Called with what is going on and the share of the whole that is done.
Progress = Callable[[str, float], None]


# --------------------------------------------------------------------------------------------------
# Data.
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What is compared: one network at one batch size and dtype.

    ``weights`` and ``photos`` say in words what they are; ``backends`` are those that were forced.
    """

    model: str
    weights: str
    photos: str
    dtype: str
    batch: int
    size: int
    device: str
    threads: int
    backends: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch}, {self.dtype}"


@dataclass
class Measured:
    """What was measured of one contender.

    Attributes:
        error: relative distance of its outputs from float64, by norm.
        top1: share of images whose best class is float64's; None where there are no classes.
        correct: whether the rule of `check` is met; nothing else is measured if not. A peer, which
            need not meet it, is always taken for correct.
        seconds: of one call, one value a round.
        calls: calls in a block, of which a value in ``seconds`` is the mean.
        latencies: seconds of single calls, in the order in which they ran; empty if not asked for.
        first_call: see `Probe`.
        peak_memory: see `Probe`.
        serving_memory: see `Probe`.
        memory_method: see `Probe`.
        note: what went wrong.
        missing: why this contender could not run here; empty if it could.
    """

    error: float | None = None
    top1: float | None = None
    correct: bool = True
    seconds: list[float] = field(default_factory=list)
    calls: int = 0
    latencies: list[float] = field(default_factory=list)
    first_call: float | None = None
    peak_memory: int | None = None
    serving_memory: int | None = None
    memory_method: str = ""
    note: str = ""
    missing: str = ""


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Median and quartiles of at least one value."""
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high)

    @property
    def half_width(self) -> float:
        """Half the distance between the quartiles."""
        return (self.high - self.low) / 2


@dataclass
class Result:
    """A case and what was measured of each contender, by its key."""

    case: Case
    contenders: dict[str, Measured]

    def images_per_second(self, key: str) -> Spread | None:
        """Throughput of a contender; None if it was not timed."""
        measured = self.contenders.get(key)
        if measured is None or not measured.seconds:
            return None
        return Spread.of([self.case.batch / s for s in measured.seconds])

    def speedup(self, key: str, over: str) -> Spread | None:
        """How many times as fast as ``over`` a contender is, by the ratios within the rounds."""
        ours, theirs = self.contenders.get(key), self.contenders.get(over)
        if ours is None or theirs is None:
            return None
        ratios = [b / a for a, b in zip(ours.seconds, theirs.seconds, strict=False)]
        return Spread.of(ratios) if ratios else None


@dataclass
class Report:
    """Everything that one run measured, and what it was measured on.

    Attributes:
        machine: facts of the machine.
        versions: of the software.
        command: the command line.
        created: date and time, UTC, ISO 8601.
        results: one for each case, in the order in which they ran.
        complete: False if the run was interrupted.
        notes: what a reader should know: random weights, skipped photos, warnings.
        pending: cases that are still to be measured, in words; not empty if the time was up.
        inputs: settings that every case shares; filled by ``bench --report`` only.
        layers: see `rooflines`; filled by ``bench --report`` only.
        ceilings: likewise.
        schema: `SCHEMA`.
    """

    machine: Machine
    versions: dict[str, str]
    command: list[str]
    created: str
    results: list[Result] = field(default_factory=list)
    complete: bool = True
    notes: list[str] = field(default_factory=list)
    pending: list[str] = field(default_factory=list)
    inputs: dict[str, Any] = field(default_factory=dict)
    layers: list[NetworkLayers] = field(default_factory=list)
    ceilings: list[Ceiling] = field(default_factory=list)
    schema: str = SCHEMA

    @property
    def correct(self) -> bool:
        """Whether every contender met the rule of `check`."""
        return all(m.correct for r in self.results for m in r.contenders.values())

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, ready for JSON."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write the report as JSON: all of it, or nothing if the process ends meanwhile."""
        path = Path(path)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        partial.replace(path)

    @staticmethod
    def load(path: str | Path) -> Report:
        """Read a report that `save` wrote.

        Raises:
            UserError: there is no such file, or it is no report of this format.
        """
        try:
            data = json.loads(Path(path).read_text())
        except OSError as e:
            raise UserError(f"cannot read {path}: {e.strerror}") from None
        except ValueError as e:
            raise UserError(f"{path} is not JSON: {e}") from None
        found = data.get("schema") if isinstance(data, dict) else None
        if found != SCHEMA:
            raise UserError(f"{path} is no report that can be read: schema {found}, not {SCHEMA}")
        try:
            return _report(data)
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            reason = f"{type(e).__name__}: {e}"
            raise UserError(f"{path} is no report that can be read: {reason}") from None


def _report(data: dict[str, Any]) -> Report:
    """The report of such data; any of the errors of a dict if they are of another form."""
    facts = data.pop("machine")
    for key in ("features", "gpus"):
        facts[key] = tuple(facts[key])
    results = []
    for r in data.pop("results"):
        r["case"]["backends"] = tuple(r["case"]["backends"])
        measured = {k: Measured(**m) for k, m in r["contenders"].items()}
        for m in measured.values():
            m.seconds = [float(s) for s in m.seconds]
        results.append(Result(Case(**r["case"]), measured))
    layers = [NetworkLayers.from_dict(d) for d in data.pop("layers", [])]
    ceilings = [Ceiling(**d) for d in data.pop("ceilings", [])]
    return Report(
        machine=Machine(**facts), results=results, layers=layers, ceilings=ceilings, **data
    )


# --------------------------------------------------------------------------------------------------
# Timing.
# --------------------------------------------------------------------------------------------------


@dataclass
class Rounds:
    """What `interleave` measured.

    Attributes:
        seconds: of one call, for each contender one value a round.
        calls: calls in a block, for each contender.
        complete: False if Ctrl-C ended it.
    """

    seconds: dict[str, list[float]]
    calls: dict[str, int]
    complete: bool = True


def interleave(
    runs: Mapping[str, Run],
    inputs: Mapping[str, Sequence[Tensor]],
    *,
    seconds: float,
    min_rounds: int = _MIN_ROUNDS,
    max_rounds: int = _MAX_ROUNDS,
    single: bool = False,
    on_round: Callable[[float], None] | None = None,
) -> Rounds:
    """Time several functions in turn.

    Args:
        runs: what to call, by name.
        inputs: for each name what to call it with, in rotation.
        seconds: stop after the round in which this time has passed, warm-up included.
        min_rounds: but never before this many rounds.
        max_rounds: and never after this many.
        single: one call a round, however short, for the distribution of latencies; by default
            short calls are timed in blocks.
        on_round: called with the share of the time that has passed.

    Returns:
        One value for each contender and round. Ctrl-C keeps the rounds that were complete.

    Example:
        >>> rounds = interleave({"a": f, "b": g}, {"a": [x], "b": [x]}, seconds=1.0)
        >>> Spread.of([b / a for a, b in zip(rounds.seconds["a"], rounds.seconds["b"])])
    """
    names = list(runs)
    done = Rounds({name: [] for name in names}, dict.fromkeys(names, 0))
    start = time.perf_counter()
    try:
        for name in names:
            for x in inputs[name]:
                once = _block(runs[name], [x])
            done.calls[name] = 1 if single else max(1, math.ceil(_BLOCK_SECONDS / once))
        for i in range(max_rounds):
            passed = time.perf_counter() - start
            if passed >= seconds and i >= min_rounds:
                break
            if on_round is not None:
                on_round(min(1.0, passed / seconds if seconds > 0 else 1.0))
            taken = {}
            for name in names[i % len(names) :] + names[: i % len(names)]:
                n, given = done.calls[name], inputs[name]
                block = [given[(i + j) % len(given)] for j in range(n)]
                taken[name] = _block(runs[name], block) / n
            for name, t in taken.items():
                done.seconds[name].append(t)
    except KeyboardInterrupt:
        done.complete = False
    return done


def _block(run: Run, inputs: Sequence[Tensor]) -> float:
    """Seconds for one call with each input, the device's work included."""
    start = clock()  # Waits for the accelerator, where there is one.
    for x in inputs:
        run(x)
    return clock() - start


# --------------------------------------------------------------------------------------------------
# The benchmark.
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What to compare.

    Attributes:
        models: names, see `zoo`.
        batches: batch sizes.
        dtypes: dtypes of weights and activations.
        device: where to run.
        threads: of torch on the CPU.
        seconds: to spend on timing, all cases together.
        backends: forced for the fused networks; empty for the default choice.
        folder: of photos; None for those of scikit-image.
        weights: see `zoo.load`.
        size: of the photos; None for what each network is made for.
        memory: whether to measure first call and memory, in fresh processes.
        contenders: keys of `contenders.CONTENDERS`, stock torch among them.
        latency: whether to time single calls too.
        tune: whether kernels are measured first, so that the fused networks choose by that.
    """

    models: tuple[str, ...] = ("resnet50",)
    batches: tuple[int, ...] = (1, 16)
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    device: str = "cpu"
    threads: int = 1
    seconds: float = 60.0
    backends: tuple[str, ...] = ()
    folder: Path | None = None
    weights: str | None = None
    size: int | None = None
    memory: bool = True
    contenders: tuple[str, ...] = contenders.DEFAULT
    latency: bool = False
    tune: bool = False


def bench(
    settings: Settings,
    progress: Progress | None = None,
    *,
    report: Report | None = None,
    on_case: Callable[[Report], None] | None = None,
    budget: float | None = None,
) -> Report:
    """Compare networks as ``settings`` say.

    Ctrl-C ends the run; the report then holds what was measured until then, marked as incomplete.

    Args:
        settings: what to compare.
        progress: told what is going on.
        report: of an earlier run with like settings: its cases are kept and not measured again.
        on_case: called with the report whenever a case is complete.
        budget: seconds after which no further case begins; those left out are ``report.pending``.

    Raises:
        UserError: see `zoo.load` and `images.load`; unknown contenders, or no stock torch.
    """
    _check_contenders(settings.contenders)
    report = report or Report(
        machine=machine(),
        versions=versions(),
        command=list(sys.argv),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    tell = progress or (lambda _text, _share: None)
    deadline = math.inf if budget is None else time.monotonic() + budget
    report.complete, report.pending = True, []
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        with (
            _cudnn_autotuning(),
            _collected_warnings(report.notes),
            _forced(settings.backends),
            tempfile.TemporaryDirectory(prefix="fused_resnet_") as scratch,
        ):
            _bench(settings, report, tell, on_case or (lambda _report: None), deadline, scratch)
    except KeyboardInterrupt:
        report.complete = False
    finally:
        torch.set_num_threads(threads)
    return report


def _check_contenders(keys: Sequence[str]) -> None:
    unknown = [key for key in keys if key not in CONTENDERS]
    if unknown:
        raise UserError(f"unknown contender {unknown[0]!r}; one of {', '.join(CONTENDERS)}")
    if not any(CONTENDERS[key].role == "stock" for key in keys):
        raise UserError("errors are compared with stock torch's: add the contender stock_nhwc")


def _bench(
    settings: Settings,
    report: Report,
    tell: Progress,
    on_case: Callable[[Report], None],
    deadline: float,
    scratch: str,
) -> None:
    known = {(r.case.model, r.case.dtype, r.case.batch) for r in report.results}
    names = {dtype: str(dtype).removeprefix("torch.") for dtype in settings.dtypes}
    todo = [
        (model, dtype, batch)
        for model, dtype, batch in product(settings.models, settings.dtypes, settings.batches)
        if (model, names[dtype], batch) not in known
    ]
    network, photos, stage = None, None, None
    for i, (model, dtype, batch) in enumerate(todo):
        report.pending = [f"{m}, batch {b}, {names[d]}" for m, d, b in todo[i:]]
        if time.monotonic() > deadline:
            return
        if network is None or photos is None or network.name != model:
            tell(f"{model}: loading", i / len(todo))
            network, photos = _loaded(model, settings, report.notes)
            torch.save(network.model.state_dict(), Path(scratch) / "weights.pt")
            stage = None
        if stage is None or stage.dtype != dtype:
            stage = _Stage(settings, network, photos, dtype, Path(scratch))

        def share(text: str, part: float, done: int = i) -> None:
            tell(text, (done + part) / len(todo))

        result = Result(stage.case(batch), {})
        report.results.append(result)
        with torch.inference_mode():
            stage.measure(result, settings.seconds / len(todo), share)
        report.pending.pop(0)
        on_case(report)


def _loaded(model: str, settings: Settings, notes: list[str]) -> tuple[zoo.Network, images.Photos]:
    network = zoo.load(model, weights=settings.weights, size=settings.size)
    photos = images.load(
        settings.folder,
        transform=network.transform,
        limit=max(_CHECKED, *settings.batches),
    )
    _note_inputs(notes, network, photos)
    zoo.settle(network, photos.batch(_CHECKED))
    return network, photos


class _Stage:
    """All contenders of one network in one dtype, and their float64 reference."""

    def __init__(
        self,
        settings: Settings,
        network: zoo.Network,
        photos: images.Photos,
        dtype: torch.dtype,
        scratch: Path,
    ) -> None:
        self.settings = settings
        self.network = network
        self.photos = photos
        self.dtype = dtype
        self.scratch = scratch
        self.device = torch.device(settings.device)
        self.stocks = {layout: self._stock(layout) for layout in (False, True)}
        self._exact: dict[int, Outputs] = {}

    def _stock(self, channels_last: bool) -> nn.Module:
        layout = zoo.converted(self.network, self.dtype, self.device, channels_last)
        return layout.requires_grad_(False)

    def case(self, batch: int) -> Case:
        s = self.settings
        dtype = str(self.dtype).removeprefix("torch.")
        return Case(
            self.network.name,
            self.network.weights,
            f"{len(self.photos.names)} {self.photos.source}",
            dtype,
            batch,
            self.network.size,
            s.device,
            s.threads,
            s.backends,
        )

    def measure(self, result: Result, seconds: float, tell: Progress) -> None:
        """Check, time and probe all contenders at one batch size, filling ``result`` as it goes."""
        case = result.case
        tell(f"{case}: building", 0.0)
        runs = self._make(result)
        tell(f"{case}: checking against float64", 0.1)
        self._check(result, runs)
        good = [key for key in runs if result.contenders[key].correct]
        inputs = {key: self._inputs(key, case.batch) for key in good}
        rounds = interleave(
            {key: runs[key] for key in good},
            inputs,
            seconds=seconds * (0.7 if self.settings.latency else 1.0),
            on_round=lambda part: tell(f"{case}: timing", 0.2 + 0.5 * part),
        )
        for key in good:
            result.contenders[key].seconds = rounds.seconds[key]
            result.contenders[key].calls = rounds.calls[key]
        if rounds.complete and self.settings.latency:
            tell(f"{case}: single calls", 0.7)
            rounds = interleave(
                {key: runs[key] for key in good}, inputs, seconds=0.3 * seconds, single=True
            )
            for key in good:
                result.contenders[key].latencies = rounds.seconds[key]
        if not rounds.complete:
            raise KeyboardInterrupt
        if self.settings.memory:
            torch.save(self.photos.batch(case.batch), self.scratch / "inputs.pt")
            for i, key in enumerate(good):
                tell(f"{case}: first call and memory", 0.7 + 0.3 * i / len(good))
                self._probe(key, case, result.contenders[key])

    def _inputs(self, key: str, batch: int) -> list[Tensor]:
        contender = CONTENDERS[key]
        return [
            contender.input(self.photos.batch(batch, i * batch), self.dtype, self.device)
            for i in range(_ROTATION)
        ]

    def _make(self, result: Result) -> dict[str, Run]:
        """What to call for every contender that can run; the others say in ``result`` why not."""
        runs: dict[str, Run] = {}
        if self.settings.tune:
            stock, example = self.stocks[True], self._inputs("fused", result.case.batch)[0]
            optimize(zoo.fused(self.network.name, stock), example, progress=False)
        torch.compiler.reset()  # What was compiled for other cases counts against torch's limit.
        for key in self.settings.contenders:
            contender = CONTENDERS[key]
            measured = result.contenders[key] = Measured()
            measured.missing = contender.why_missing(self.device, self.dtype) or ""
            if measured.missing:
                continue
            example = self._inputs(key, result.case.batch)[0]
            stock = self.stocks[contender.channels_last]
            if contender.role == "ours":
                runs[key] = contender.make(self.network.name, stock, example)
                continue
            try:
                runs[key] = contender.make(self.network.name, stock, example)
                runs[key](example)
            # What another engine raises cannot be known, and must not end the comparison.
            except Exception as e:
                runs.pop(key, None)
                measured.missing = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
        return runs

    def _check(self, result: Result, runs: dict[str, Run]) -> None:
        """Errors and classes of every contender, over about as many images at every batch size."""
        batch = result.case.batch
        wanted = min(_CHECKED, max(len(self.photos.names), 2))
        longest = max(math.ceil(wanted / b) * b for b in self.settings.batches)
        n = longest if longest % batch == 0 else math.ceil(wanted / batch) * batch
        pixels = self.photos.batch(n)
        if n not in self._exact:
            pieces = self._calls("stock_nhwc", pixels, min(n, 4))
            self._exact[n] = exact_outputs(self.stocks[True], pieces)
        exact = self._exact[n]
        results = {
            key: outputs_of(run, self._calls(key, pixels, batch)) for key, run in runs.items()
        }
        stocks = [results[key] for key in results if CONTENDERS[key].role == "stock"]
        for key, theirs in results.items():
            rows = compare(theirs, stocks, exact)
            classes = agreement(theirs, stocks[0], exact)
            found = result.contenders[key]
            found.error = max((r.fused.l2 for r in rows if r.fused is not None), default=None)
            found.top1 = None if classes is None else classes.fused_top1
            wrong = [r for r in rows if not r.passed]
            if wrong and CONTENDERS[key].role != "stock":
                found.correct = CONTENDERS[key].role != "ours"
                found.note = f"{wrong[0].name}: {wrong[0].note}"

    def _calls(self, key: str, pixels: Tensor, batch: int) -> list[Tensor]:
        contender = CONTENDERS[key]
        return [contender.input(piece, self.dtype, self.device) for piece in pixels.split(batch)]

    def _probe(self, key: str, case: Case, measured: Measured) -> None:
        task = ProbeTask(
            case.model,
            str(self.scratch / "weights.pt"),
            str(self.scratch / "inputs.pt"),
            key,
            case.dtype,
            case.device,
            case.threads,
            case.backends,
        )
        found = measure(task)
        if isinstance(found, Probe):
            measured.first_call = found.first_call
            measured.peak_memory = found.peak_memory
            measured.serving_memory = found.serving_memory
            measured.memory_method = found.method
        else:
            measured.note = f"first call and memory could not be measured: {found}"


def _note_inputs(notes: list[str], network: zoo.Network, photos: images.Photos) -> None:
    if network.random:
        notes.append(
            f"{network.name} has random weights, its batch norm statistics taken from the photos: "
            "speed and error are realistic, its classes mean nothing"
        )
    for name, reason in photos.skipped:
        note = f"{name} was skipped: {reason}"
        if note not in notes:
            notes.append(note)


@contextlib.contextmanager
def _forced(names: tuple[str, ...]) -> Iterator[None]:
    if not names:
        yield
        return
    with backends.backend(*names):
        yield


@contextlib.contextmanager
def _collected_warnings(notes: list[str]) -> Iterator[None]:
    """Our own warnings become notes of the report; others are shown as ever."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FusedResNetWarning)
        try:
            yield
        finally:
            ours = [w for w in caught if issubclass(w.category, FusedResNetWarning)]
            notes.extend(dict.fromkeys(str(w.message) for w in ours))
            others = [w for w in caught if w not in ours]
    for w in others:
        warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)


@contextlib.contextmanager
def _cudnn_autotuning() -> Iterator[None]:
    """Stock torch at its best: cuDNN picks its algorithms by measurement."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
