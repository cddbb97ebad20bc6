"""The benchmark behind the page: it resumes where it was stopped and keeps to a time budget."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fused_resnet import backends, images, zoo
from fused_resnet.bench import Progress, Report, Settings, bench, interleave
from fused_resnet.console import UserError
from fused_resnet.machine import machine, versions
from fused_resnet.report.document import page
from fused_resnet.rooflines import NetworkLayers, ceiling, measure_layers

RESULTS = "results.json"
PAGE = "index.html"


def run(
    settings: Settings,
    folder: Path,
    *,
    budget: float | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Measure, and write ``results.json`` and ``index.html`` into a folder after every case.

    Args:
        settings: what to compare; single calls are always timed too.
        folder: made if it is not there. Cases that its ``results.json`` holds are not repeated.
        budget: seconds after which nothing further begins.
        fresh: measure everything anew.
        progress: told what is going on.

    Returns:
        The report, incomplete if Ctrl-C or the budget ended the run.

    Raises:
        UserError: the folder's results are of another machine, other versions or other settings;
            or see `bench`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / RESULTS
    settings = replace(settings, latency=True)
    inputs = _inputs(settings)
    earlier = Report.load(results) if results.exists() and not fresh else None
    if earlier is not None:
        _check_alike(earlier, inputs, results)
        earlier.command = list(sys.argv)
    start = time.monotonic()
    done = list(earlier.results) if earlier is not None else []

    def save(report: Report) -> None:
        done[:] = report.results
        report.inputs = inputs
        report.save(results)
        (folder / PAGE).write_text(page(report), encoding="utf-8")

    report = bench(settings, progress, report=earlier, on_case=save, budget=budget)
    report.results = list(done)  # Without the case that Ctrl-C cut short.
    if report.complete:
        try:
            left = None if budget is None else budget - (time.monotonic() - start)
            _add_layers(settings, report, left, progress or (lambda _text, _share: None), save)
        except KeyboardInterrupt:
            report.complete = False
    save(report)
    return report


def _inputs(settings: Settings) -> dict[str, Any]:
    """What of the settings must be the same for results to stand side by side."""
    return {
        "device": settings.device,
        "threads": settings.threads,
        "backends": list(settings.backends),
        "contenders": list(settings.contenders),
        "photos": None if settings.folder is None else str(settings.folder),
        "weights": settings.weights,
        "size": settings.size,
    }


def _check_alike(earlier: Report, inputs: dict[str, Any], path: Path) -> None:
    differing = [key for key, value in inputs.items() if earlier.inputs.get(key) != value]
    differing += ["machine"] if earlier.machine != machine() else []
    differing += ["versions"] if earlier.versions != versions() else []
    if differing:
        raise UserError(
            f"{path} was measured with other {', '.join(differing)}; use another folder, or "
            "--fresh to measure everything anew"
        )


def _add_layers(
    settings: Settings,
    report: Report,
    left: float | None,
    tell: Progress,
    save: Callable[[Report], None],
) -> None:
    """Ceilings of every dtype, and the layers of every network at its largest batch."""
    device = torch.device(settings.device)
    start = time.monotonic()
    known = {(n.model, n.dtype) for n in report.layers}
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        for model in settings.models:
            for dtype in settings.dtypes:
                name = str(dtype).removeprefix("torch.")
                cases = [r.case for r in report.results]
                batches = [c.batch for c in cases if (c.model, c.dtype) == (model, name)]
                if (model, name) in known or not batches:
                    continue
                if left is not None and time.monotonic() - start > left:
                    report.pending.append(f"layers of {model}, {name}")
                    continue
                if all(c.dtype != name for c in report.ceilings):
                    tell(f"ceilings in {name}", 0.0)
                    report.ceilings.append(ceiling(dtype, device))
                tell(f"{model}, {name}: layer by layer", 0.5)
                report.layers.append(_layers(settings, model, dtype, max(batches)))
                save(report)
    finally:
        torch.set_num_threads(threads)


def _layers(settings: Settings, model: str, dtype: torch.dtype, batch: int) -> NetworkLayers:
    network = zoo.load(model, weights=settings.weights, size=settings.size)
    photos = images.load(settings.folder, transform=network.transform, limit=batch)
    zoo.settle(network, photos.batch(16))
    device = torch.device(settings.device)
    stock = zoo.converted(network, dtype, device, channels_last=True).requires_grad_(False)
    x = photos.batch(batch).to(device, dtype, memory_format=torch.channels_last)

    def timed(calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
        runs = {key: (lambda _x, call=call: call()) for key, call in calls.items()}
        rounds = interleave(runs, {key: [x] for key in calls}, seconds=0.0)
        if not rounds.complete:
            raise KeyboardInterrupt
        return rounds.seconds

    forced = backends.backend(*settings.backends) if settings.backends else nullcontext()
    with torch.inference_mode(), forced:
        layers = measure_layers(zoo.fused(model, stock), x, timed)
    return NetworkLayers(model, str(dtype).removeprefix("torch."), batch, layers)
