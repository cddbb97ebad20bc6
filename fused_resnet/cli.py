"""The command line ``fused-resnet bench | predict | check | explain | doctor``.

Results go to standard output, progress and errors to standard error. Exit codes: 0 all is well; 1 a
check failed or something must be mended; 2 the command cannot be carried out as given; 130
interrupted.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import torch
import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fused_resnet import _build, backends, bench_table, images, zoo
from fused_resnet.bench import Report, Settings
from fused_resnet.bench import bench as run_bench
from fused_resnet.check import check as run_check
from fused_resnet.console import UserError, err, out
from fused_resnet.contenders import CONTENDERS, DEFAULT, PEERS
from fused_resnet.doctor import examine
from fused_resnet.explain import explain as run_explain
from fused_resnet.machine import has_native_bf16
from fused_resnet.optimize import optimize
from fused_resnet.predict import CsvWriter, Prediction, expand, read_categories
from fused_resnet.predict import predict as run_predict
from fused_resnet.report import compare as compare_reports
from fused_resnet.report import run as run_report
from fused_resnet.report.runner import PAGE, RESULTS
from fused_resnet.version import __version__

P = ParamSpec("P")

#: Images for which `predict` plans first, unless told otherwise.
_MANY = 256

#: What ``-`` means where a file to write is asked for.
STDOUT = Path("-")

app = typer.Typer(
    name="fused-resnet",
    help="Fused conv + BatchNorm + ReLU for PyTorch: measure it, check it, look inside.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_DTYPES = {
    **dict.fromkeys(("float32", "fp32", "f32", "float"), torch.float32),
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
    **dict.fromkeys(("float16", "fp16", "f16", "half"), torch.float16),
    **dict.fromkeys(("float64", "fp64", "f64", "double"), torch.float64),
}

_NAMES = "a builder of torchvision or of this package, timm:NAME, or module:callable"
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=f"{_NAMES}.")]
ModelsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[MODEL]...", help=f"Each {_NAMES}; resnet50 if none.")
]
BatchOption = Annotated[
    list[str] | None, typer.Option("--batch", "-b", help="Batch size; several: 1,16.")
]
DtypeOption = Annotated[
    list[str] | None,
    typer.Option("--dtype", "-t", help="fp32, bf16, fp16 or fp64; several: fp32,bf16."),
]
DeviceOption = Annotated[str, typer.Option("--device", "-d", help="cpu, cuda or cuda:0.")]
BackendOption = Annotated[
    list[str] | None,
    typer.Option("--backend", help=f"Force a backend: {', '.join(backends.NAMES)}."),
]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="Threads of torch.")]
ImagesOption = Annotated[
    Path | None, typer.Option("--images", help="Folder of photos; scikit-image's by default.")
]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights", help="DEFAULT or another entry of the model's zoo, or a file; else random."
    ),
]
SizeOption = Annotated[
    int | None, typer.Option("--size", min=1, help="Height and width of the photos.")
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Also write everything to this file.")
]


def _command(function: Callable[P, None]) -> Callable[P, None]:
    """A command whose foreseeable failures end in one line and an exit code."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            wrong = backends.environment_error or _build.isa_error
            if wrong is not None and function.__name__ != "doctor":
                raise UserError(wrong)
            function(*args, **kwargs)
        except UserError as e:
            err.print(f"[red]error:[/] {escape(str(e))}", soft_wrap=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            err.print("interrupted")
            raise typer.Exit(130) from None

    return run


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit


@app.command()
@_command
def bench(
    models: ModelsArgument = None,
    batch: BatchOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    backend: BackendOption = None,
    threads: ThreadsOption = None,
    folder: ImagesOption = None,
    weights: WeightsOption = None,
    size: SizeOption = None,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0, help="For timing, all cases together.")
    ] = 60.0,
    memory: Annotated[
        bool,
        typer.Option(help="Measure first call and peak memory, each in a process of its own."),
    ] = True,
    json_file: JsonOption = None,
    peers: Annotated[
        bool,
        typer.Option(
            "--peers",
            help="Also time torch.compile, ONNX Runtime, OpenVINO, TensorRT, cuDNN where they run.",
        ),
    ] = False,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune", help="Measure kernels first, and keep what was measured for all later runs."
        ),
    ] = False,
    contenders: Annotated[
        list[str] | None,
        typer.Option(
            "--contenders",
            help=f"What to compare: {', '.join(CONTENDERS)}, or all. With --report: all.",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report",
            metavar="DIR",
            help="Write results.json and index.html into this folder; go on where they end.",
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option("--budget", min=0, help="With --report: begin nothing after these seconds."),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="With --report: forget what the folder holds.")
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            "--compare",
            metavar="OLD.json NEW.json",
            help="Measure nothing; compare two reports. Exit code 1 on a regression.",
        ),
    ] = None,
    threshold: Annotated[
        float, typer.Option("--threshold", min=0, help="With --compare: smaller changes are noise.")
    ] = 0.05,
) -> None:
    """Compare fused networks with stock PyTorch on real photos: speed, memory and error.

    Without arguments: ResNet-50, batch 1 and 16, fp32, and bf16 where the device computes in it.
    """
    if compare is not None:
        _compare(*compare, threshold, _writer(json_file))
        return
    where = _device(device)
    settings = Settings(
        models=tuple(models or ["resnet50"]),
        batches=_batches(batch) or (1, 16),
        dtypes=_dtypes(dtype) or _default_dtypes(where),
        device=str(where),
        threads=threads or torch.get_num_threads(),
        seconds=seconds,
        backends=_backends(backend),
        folder=folder,
        weights=weights,
        size=size,
        memory=memory,
        contenders=_contenders(contenders, report, peers),
        tune=tune,
    )
    write = _writer(json_file)
    with _progress() as tell:
        if report is None:
            found = run_bench(settings, tell)
        else:
            found = run_report(settings, report, budget=budget, fresh=fresh, progress=tell)
    out.print(*bench_table.parts(found), sep="\n")
    write(found.to_dict())
    if report is not None:
        out.print(f"\nWritten: {report / PAGE} and {report / RESULTS}", soft_wrap=True)
    if not found.complete:
        raise typer.Exit(130)
    if not found.correct:
        raise typer.Exit(1)


@app.command()
@_command
def predict(
    paths: Annotated[
        list[Path], typer.Argument(metavar="IMAGES...", help="Image files, or folders of them.")
    ],
    model: Annotated[str, typer.Option("--model", "-m", help=f"{_NAMES}.")] = "resnet50",
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights", help="An entry of the model's zoo, by default DEFAULT; or 'random'."
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", help="Weights of your own: a state_dict, or safetensors."),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option("--labels", help="Names of the classes: one a line, or a JSON list."),
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Classes for each image.")] = 5,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Images in one call.")] = 16,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    backend: BackendOption = None,
    threads: ThreadsOption = None,
    size: SizeOption = None,
    plan: Annotated[
        bool | None,
        typer.Option(
            "--plan/--no-plan",
            help=f"Measure kernels first; what was measured is kept. By default for {_MANY} images "
            "or more.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the result to this file; - to print it.")
    ] = None,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="Write the result to this file; - to print it.")
    ] = None,
) -> None:
    """Classify images: the best classes of each, with their probabilities.

    Ends with exit code 1 if an image could not be read; the others are classified all the same.
    """
    where, d = _device(device), _one("--dtype", _dtypes(dtype) or (torch.float32,))
    if checkpoint is not None and weights is not None:
        raise UserError("--weights and --checkpoint exclude each other")
    files = expand(paths)
    categories = read_categories(labels) if labels is not None else ()
    printed = STDOUT not in (json_file, csv_file)
    done: list[Prediction] = []
    with contextlib.ExitStack() as stack:
        rows = stack.enter_context(_csv(csv_file))
        write = _writer(json_file)
        tell = stack.enter_context(_progress())
        stack.enter_context(_threads(threads))
        stack.enter_context(_forced(_backends(backend)))
        tell(f"{model}: loading", 0.0)
        source = f"{checkpoint}" if checkpoint is not None else weights or "DEFAULT"
        network = zoo.load(model, weights=None if source == "random" else source, size=size)
        if network.random:
            err.print("[yellow]note:[/] the weights are random: the classes mean nothing")
        classifier = zoo.fused(model, zoo.converted(network, d, where, channels_last=True))
        if plan is True or (plan is None and len(files) >= _MANY):
            example = _example(files, network, batch).to(where, d)
            classifier = optimize(classifier, example, progress=tell)
        found = run_predict(
            classifier,
            files,
            network.transform,
            categories=categories or network.categories,
            top=top,
            batch=batch,
            dtype=d,
            device=where,
        )
        # What was classified before Ctrl-C is kept.
        stack.callback(lambda: write(_predicted(model, network, done)))
        for prediction in found:
            done.append(prediction)
            tell(f"{len(done)} of {len(files)} images", len(done) / len(files))
            rows(prediction)
            if prediction.error:
                reason = escape(f"{prediction.image}: {prediction.error}")
                err.print(f"[yellow]skipped[/] {reason}", soft_wrap=True)
            elif printed:
                out.print(str(prediction), markup=False, soft_wrap=True)
    skipped = sum(bool(p.error) for p in done)
    if skipped:
        err.print(f"{skipped} of {len(files)} images could not be read")
        raise typer.Exit(1)


@app.command()
@_command
def check(
    model: ModelArgument,
    batch: BatchOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    backend: BackendOption = None,
    threads: ThreadsOption = None,
    folder: ImagesOption = None,
    weights: WeightsOption = None,
    size: SizeOption = None,
    layers: Annotated[bool, typer.Option(help="Also judge every fused op by itself.")] = True,
    json_file: JsonOption = None,
) -> None:
    """Compare a fused network and stock PyTorch with float64, as a whole and op by op.

    Ends with exit code 1 if an error is larger than the rule allows.
    """
    where = _device(device)
    names = _backends(backend)
    reports = []
    write = _writer(json_file)
    with _progress() as tell, _threads(threads), _forced(names):
        tell(f"{model}: loading", 0.0)
        network, photos = _load(model, weights, size, folder)
        cases = [
            (d, b)
            for d in _dtypes(dtype) or _default_dtypes(where)
            for b in _batches(batch) or (8,)
        ]
        for i, (d, b) in enumerate(cases):
            tell(f"{model}: checking batch {b}, {d}", i / len(cases))
            stock = zoo.converted(network, d, where, channels_last=True)
            x = photos.batch(b).to(where, d).contiguous(memory_format=torch.channels_last)
            reports.append((b, run_check(zoo.fused(model, stock), stock, x, layers=layers)))
    for b, report in reports:
        out.print(f"[bold]{model}[/] ({network.weights}), batch {b}, {photos.source}")
        out.print(report)
        out.print()
    _print_skipped(photos)
    write(
        {
            "model": model,
            "weights": network.weights,
            "checks": [{"batch": b, **report.to_dict()} for b, report in reports],
        }
    )
    if not all(report.passed for _, report in reports):
        raise typer.Exit(1)


@app.command()
@_command
def explain(
    model: ModelArgument,
    batch: BatchOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    backend: BackendOption = None,
    weights: WeightsOption = None,
    size: SizeOption = None,
    json_file: JsonOption = None,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Optimize it, and tell each layer's kernel, time and error."),
    ] = False,
) -> None:
    """Name each convolution, batch norm, add and ReLU, what became of it, and why not where not."""
    where = _device(device)
    names = _backends(backend)
    write = _writer(json_file)
    with _forced(names):
        network = zoo.load(model, weights=weights, size=size)
        d = _one("--dtype", _dtypes(dtype) or (torch.float32,))
        b = _one("--batch", _batches(batch) or (1,))
        stock = zoo.converted(network, d, where, channels_last=True)
        example = torch.zeros(b, 3, network.size, network.size, dtype=d, device=where)
        if plan:
            made = optimize(zoo.fused(model, stock), torch.randn_like(example))
            found = made.explain()
            out.print(found)
            write(found.to_dict())
            return
        table = run_explain(zoo.fused(model, stock), example)
        out.print(str(table), markup=False, soft_wrap=True)
        write({**table.to_dict(), "model": model})


@app.command()
@_command
def doctor(json_file: JsonOption = None) -> None:
    """Say what is installed, what works here, and what to mend (exit code 1 if anything is)."""
    write = _writer(json_file)
    diagnosis = examine()
    out.print(diagnosis)
    write(diagnosis.to_dict())
    if not diagnosis.healthy:
        raise typer.Exit(1)


# --------------------------------------------------------------------------------------------------
# From what is typed to what is meant.
# --------------------------------------------------------------------------------------------------


def _split(values: list[str] | None) -> list[str]:
    return [part.strip() for value in values or [] for part in value.split(",") if part.strip()]


def _batches(values: list[str] | None) -> tuple[int, ...]:
    sizes = []
    for text in _split(values):
        if not text.isdecimal() or int(text) < 1:
            raise UserError(f"--batch takes positive whole numbers, got {text!r}")
        sizes.append(int(text))
    return tuple(dict.fromkeys(sizes))


def _dtypes(values: list[str] | None) -> tuple[torch.dtype, ...]:
    found = []
    for text in _split(values):
        dtype = _DTYPES.get(text.lower().removeprefix("torch."))
        if dtype is None:
            raise UserError(f"unknown dtype {text!r}; fp32, bf16, fp16 or fp64")
        found.append(dtype)
    return tuple(dict.fromkeys(found))


def _default_dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    return (torch.float32, torch.bfloat16) if has_native_bf16(device) else (torch.float32,)


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise UserError(f"unknown device {text!r}; cpu, cuda or cuda:0") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise UserError(f"device {text!r} is not supported; cpu, cuda or cuda:0")
    count = torch.cuda.device_count()
    if count == 0:
        built = torch.version.cuda or torch.version.hip
        reason = "torch finds none" if built else "this torch is built for the CPU only"
        raise UserError(f"no CUDA device: {reason}; use --device cpu, or see fused-resnet doctor")
    if device.index is not None and device.index >= count:
        raise UserError(f"no device {text!r}: there are {count}, counted from cuda:0")
    return device


def _backends(values: list[str] | None) -> tuple[str, ...]:
    names = tuple(_split(values))
    for name in names:
        if name not in backends.NAMES:
            raise UserError(f"unknown backend {name!r}; one of {', '.join(backends.NAMES)}")
    return names


def _contenders(values: list[str] | None, report: Path | None, peers: bool) -> tuple[str, ...]:
    keys = tuple(_split(values))
    if keys == ("all",) or (not keys and report is not None):
        return tuple(CONTENDERS)
    return tuple(dict.fromkeys((*(keys or DEFAULT), *(PEERS if peers else ()))))


def _one(option: str, values: tuple[Any, ...]) -> Any:
    if len(values) > 1:
        raise UserError(f"{option} takes one value here, got {len(values)}")
    return values[0]


# --------------------------------------------------------------------------------------------------
# Parts of commands.
# --------------------------------------------------------------------------------------------------


def _load(
    model: str, weights: str | None, size: int | None, folder: Path | None
) -> tuple[zoo.Network, images.Photos]:
    network = zoo.load(model, weights=weights, size=size)
    photos = images.load(folder, transform=network.transform)
    zoo.settle(network, photos.batch(16))
    return network, photos


def _print_skipped(photos: images.Photos) -> None:
    for name, reason in photos.skipped:
        out.print(f"[yellow]note:[/] {escape(f'{name} was skipped: {reason}')}")


def _compare(
    old: Path, new: Path, threshold: float, write: Callable[[dict[str, Any]], None]
) -> None:
    comparison = compare_reports(Report.load(old), Report.load(new), threshold)
    out.print(comparison)
    write(comparison.to_dict())
    if not comparison.passed:
        raise typer.Exit(1)


@contextlib.contextmanager
def _forced(names: tuple[str, ...]) -> Iterator[None]:
    if not names:
        yield
        return
    with backends.backend(*names):
        yield


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """A progress bar on standard error, as long as that is a terminal."""
    columns = (
        SpinnerColumn(),
        BarColumn(20),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda text, share: bar.update(task, description=text, completed=share)


def _writer(path: Path | None) -> Callable[[dict[str, Any]], None]:
    """A function that writes the JSON file; that it can be written is known before the work."""
    if path is None:
        return lambda _data: None
    if path == STDOUT:
        return lambda data: typer.echo(json.dumps(data, indent=1))
    _check_writable(path)

    def write(data: dict[str, Any]) -> None:
        try:
            path.write_text(json.dumps(data, indent=1) + "\n")
        except OSError as e:
            raise UserError(f"cannot write {path}: {e.strerror}") from None

    return write


@contextlib.contextmanager
def _csv(path: Path | None) -> Iterator[Callable[[Prediction], None]]:
    """A function that adds a prediction to the CSV file."""
    if path is None:
        yield lambda _prediction: None
    elif path == STDOUT:
        yield CsvWriter(sys.stdout).write
    else:
        _check_writable(path)
        with path.open("w", newline="", encoding="utf-8") as stream:
            yield CsvWriter(stream).write


def _check_writable(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    if not path.absolute().parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}")


def _example(files: list[Path], network: zoo.Network, batch: int) -> torch.Tensor:
    """A batch of the first photo that can be read, in the layout that `predict` uses."""
    prepared = (images.prepare(path, network.transform) for path in files)
    x = next((p for p in prepared if isinstance(p, torch.Tensor)), None)
    if x is None:
        x = torch.zeros(3, network.size, network.size)
    n = min(batch, len(files))
    return x.expand(n, *x.shape).contiguous(memory_format=torch.channels_last)


def _predicted(model: str, network: zoo.Network, done: list[Prediction]) -> dict[str, Any]:
    return {
        "model": model,
        "weights": network.weights,
        "predictions": [p.to_dict() for p in done if not p.error],
        "skipped": [p.to_dict() for p in done if p.error],
    }
