"""First call and peak memory of one contender, measured in a process of its own.

``measure`` starts the process; the module run as ``python -m fused_resnet.probe`` is what runs in
it. A fresh process is the only place where a first call is a first call, and where the peak belongs
to one contender alone.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fused_resnet import backends, footprint, zoo
from fused_resnet.contenders import CONTENDERS


@dataclass(frozen=True)
class ProbeTask:
    """What the process does.

    Attributes:
        model: name of the network, see `zoo`.
        weights: path of its state_dict.
        inputs: path of a batch saved by torch.
        contender: key in `contenders.CONTENDERS`.
        dtype: as torch names it, without ``torch.``.
        device: as torch names it.
        threads: of torch.
        backends: forced ones; empty for the default choice.
    """

    model: str
    weights: str
    inputs: str
    contender: str
    dtype: str
    device: str
    threads: int
    backends: tuple[str, ...] = ()


@dataclass(frozen=True)
class Probe:
    """What it measured.

    Attributes:
        first_call: seconds from the loaded stock model to the first result: fusing, choosing and
            verifying kernels, packing weights, compiling, and the call itself.
        peak_memory: bytes at the peak of three calls, the first among them, above those held
            before: activations, packed weights, workspaces. None where the system does not tell.
        serving_memory: bytes at the peak of three later calls, once all is gone that the contender
            does not hold: the network's weights in whatever form, activations, the engine. What it
            takes to go on serving. None as above.
        method: how the memory was measured: on the CPU without pages of files, see `footprint`.
    """

    first_call: float
    peak_memory: int | None
    serving_memory: int | None
    method: str


def clock() -> float:
    """Seconds, once all work given to the accelerator is done.

    As ``torch.utils.benchmark.timer``, whose import costs a first call's worth of time by itself.
    """
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def measure(task: ProbeTask, timeout: float = 600.0) -> Probe | str:
    """Run ``task`` in a fresh process.

    Returns:
        The figures, or in words why there are none.
    """
    command = [sys.executable, "-m", "fused_resnet.probe"]
    try:
        done = subprocess.run(
            command, input=json.dumps(asdict(task)), capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return f"the first call took longer than {timeout:.0f} s"
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"the process ended with code {done.returncode}"
    return Probe(**json.loads(done.stdout.splitlines()[-1]))


def _run(task: ProbeTask) -> Probe:
    contender = CONTENDERS[task.contender]
    device, dtype = torch.device(task.device), getattr(torch, task.dtype)
    torch.set_num_threads(task.threads)
    network = zoo.load(task.model, weights=task.weights)
    stock = contender.stock(network, dtype, device)
    x = contender.input(torch.load(task.inputs, weights_only=True), dtype, device)
    del network
    with ExitStack() as stack:
        if task.backends:
            stack.enter_context(backends.backend(*task.backends))
        stack.enter_context(torch.inference_mode())
        before = _reset_peak(device)
        start = clock()
        run = contender.make(task.model, stock, x)
        run(x)
        first_call = clock() - start
        for _ in range(2):
            run(x)
        peak, method = _peak(device)
        weights = sum(t.nbytes for t in stock.state_dict().values())
        del stock
        _reset_peak(device)
        for _ in range(3):
            run(x)
        serving, _ = _peak(device)
    if before is None or peak is None or serving is None:
        return Probe(first_call, None, None, method)
    return Probe(first_call, peak - before, serving - before + weights, method)


def _reset_peak(device: torch.device) -> int | None:
    """Bytes held now, from which on the peak is measured."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.memory_allocated(device))
    footprint.give_back()  # What was freed must not hide what is needed.
    return footprint.resident() if footprint.reset_peak() else None


def _peak(device: torch.device) -> tuple[int | None, str]:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device)), "torch.cuda.max_memory_allocated"
    return footprint.peak(), "VmHWM - RssFile of /proc/self/status"


def _main() -> None:
    fields: dict[str, Any] = json.load(sys.stdin)
    fields["backends"] = tuple(fields["backends"])
    print(json.dumps(asdict(_run(ProbeTask(**fields)))))


if __name__ == "__main__":
    _main()
