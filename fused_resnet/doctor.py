"""`fused-resnet doctor`: what is installed, what the machine offers, what works, what to mend."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape

from fused_resnet import _build, backends, tuned_table
from fused_resnet.backends import cudnn_graph
from fused_resnet.console import megabytes, plain, table
from fused_resnet.machine import Machine, machine, package_version, versions
from fused_resnet.problem import (
    AddReluProblem,
    ChainProblem,
    Conv3dProblem,
    ConvProblem,
    MaxPool,
    Problem,
)

Status = Literal["ok", "note", "broken"]

#: Variables that change what runs or how fast, beside all that begin with FUSED_RESNET_.
_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUDA_VISIBLE_DEVICES",
    "DNNL_MAX_CPU_ISA",
    "KMP_AFFINITY",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "TORCH_CUDA_ARCH_LIST",
    "TRITON_INTERPRET",
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST_TORCH = (2, 9)
#: Present while NVIDIA's kernel driver is loaded.
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis.

    Attributes:
        section: what it belongs to.
        name: of the thing.
        value: what was found.
        status: ``ok``; ``note``: works, but worth knowing; ``broken``: the user must mend it.
    """

    section: str
    name: str
    value: str
    status: Status = "ok"


@dataclass(frozen=True)
class Diagnosis:
    """All findings. Print it, ask ``healthy``, or take the data by `to_dict`."""

    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Whether there is nothing that the user must mend."""
        return all(f.status != "broken" for f in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The findings as plain data, ready for JSON."""
        return {"healthy": self.healthy, "findings": [asdict(f) for f in self.findings]}

    def __str__(self) -> str:
        return plain(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        marks = {"ok": "", "note": "[yellow]note[/]", "broken": "[red]BROKEN[/]"}
        rows = table()
        rows.add_column("")
        rows.add_column("", overflow="fold")
        rows.show_header = False
        section = None
        for f in self.findings:
            if f.section != section:
                if section is not None:
                    rows.add_row("", "")
                rows.add_row(f"[bold]{f.section}[/]", "")
                section = f.section
            mark = marks[f.status]
            rows.add_row(f"  {f.name}", f"{mark} {escape(f.value)}" if mark else escape(f.value))
        yield rows
        yield ""
        broken = sum(f.status == "broken" for f in self.findings)
        yield "Nothing to mend." if not broken else f"[red]To mend: {broken}, marked BROKEN.[/]"


def examine() -> Diagnosis:
    """Look at everything; each backend's kernels are verified on small problems."""
    facts = machine()
    return Diagnosis(
        (
            *_versions(),
            *_processor(facts),
            *_extension(),
            *_devices(facts),
            *(finding for device in _present() for finding in _backends(device)),
            *_tuned_table(),
            *_environment(),
        )
    )


def _versions() -> Iterator[Finding]:
    for name, version in versions().items():
        if name == "torch" and _release(version) < _OLDEST_TORCH:
            wanted = ".".join(map(str, _OLDEST_TORCH))
            yield Finding("Versions", name, f"{version}; pip install 'torch>={wanted}'", "broken")
        else:
            yield Finding("Versions", name, version)
    for name, purpose in (
        ("triton", "the backend triton"),
        ("torchvision", "models and weights by name, and preparing photos"),
        ("scikit-image", "the sample photos of bench and check"),
    ):
        if package_version(name) is None:
            extra = (
                "pip install triton" if name == "triton" else 'pip install "fused-resnet[bench]"'
            )
            yield Finding("Versions", name, f"missing, needed for {purpose}: {extra}", "note")
    # Where torch has no CUDA, nobody misses it.
    if torch.version.cuda is not None and (reason := cudnn_graph.missing()):
        yield Finding(
            "Versions", "nvidia-cudnn-frontend", f"for the backend cudnn: {reason}", "note"
        )


def _processor(facts: Machine) -> Iterator[Finding]:
    yield Finding("Processor", "name", facts.cpu)
    yield Finding("Processor", "cores", f"{facts.cores}, torch uses {torch.get_num_threads()}")
    if facts.memory:
        yield Finding("Processor", "memory", megabytes(facts.memory))
    features = f" with {', '.join(facts.features)}" if facts.features else ""
    yield Finding("Processor", "torch's level", f"{facts.isa}{features}")
    if _build.extension is not None and _build.isa_error is None:
        available = ", ".join(_build.extension.isa_available())
        yield Finding(
            "Processor", "our level", f"{_build.extension.isa()} (available: {available})"
        )


def _extension() -> Iterator[Finding]:
    section = "Compiled extension"
    if _build.extension is None:
        # A file that is there but does not load is a fault; none at all is a choice.
        built = any(Path(__file__).parent.glob("_C.*.so"))
        reason = str(_build.extension_error)
        if not built:
            reason += ". Without it the backends torch, library and triton work"
        yield Finding(section, "loaded", f"no: {reason}", "broken" if built else "note")
        return
    info = _build.extension.build_info()
    yield Finding(section, "loaded", f"yes, built against torch {info['torch']}")
    openmp = "with OpenMP" if info["openmp"] else "without OpenMP"
    yield Finding(section, "compiler", f"{info['compiler']}, {openmp}")
    cuda = info["cuda"]
    if cuda is None:
        yield Finding(section, "CUDA kernels", "none inside")
    else:
        archs = ", ".join(cuda["archs"])
        yield Finding(section, "CUDA kernels", f"CUDA {cuda['version']} for {archs}")


def _devices(facts: Machine) -> Iterator[Finding]:
    for i, name in enumerate(facts.gpus):
        major, minor = torch.cuda.get_device_capability(i)
        memory = megabytes(torch.cuda.get_device_properties(i).total_memory)
        yield Finding("Devices", f"cuda:{i}", f"{name}, capability {major}.{minor}, {memory}")
    yield Finding("Devices", "cpu", "yes")
    if facts.gpus:
        return
    if torch.version.cuda is None and torch.version.hip is None:
        yield Finding("Devices", "cuda", "no: this torch is built for the CPU only")
    elif _NVIDIA_DRIVER.exists() and not os.environ.get("CUDA_VISIBLE_DEVICES", "all"):
        yield Finding("Devices", "cuda", "hidden by CUDA_VISIBLE_DEVICES", "note")
    elif _NVIDIA_DRIVER.exists():
        reason = (
            f"there is an NVIDIA driver, but torch (CUDA {torch.version.cuda}) finds no GPU: the "
            "driver may be too old, or this container may have been given none"
        )
        yield Finding("Devices", "cuda", reason, "broken")
    else:
        yield Finding("Devices", "cuda", "no: torch could use a GPU, but there is none")


def _present() -> list[torch.device]:
    found = [torch.device("cpu")]
    if torch.cuda.is_available():
        found.append(torch.device("cuda"))
    return found


def _backends(device: torch.device) -> Iterator[Finding]:
    section = f"Backends on {device.type}"
    if _build.isa_error is not None:
        yield Finding(section, "all", "not tried: FUSED_RESNET_ISA is wrong, see below", "note")
        return
    for name in backends.NAMES:
        kernels = [k for k in backends.KERNELS if k.backend == name]
        usable: dict[str, list[str]] = {}
        wrong: dict[str, str] = {}
        reasons: dict[str, None] = {}
        for kernel in kernels:
            for dtype in _DTYPES:
                short = str(dtype).removeprefix("torch.")
                for problem in _problems(kernel.op, dtype):
                    reason = kernel.supports(problem, device)
                    if reason is not None:
                        reasons[reason] = None
                        continue
                    fault = backends.verdict(kernel, device, dtype)
                    if fault is None:
                        dtypes = usable.setdefault(kernel.op, [])
                        if short not in dtypes:
                            dtypes.append(short)
                    else:
                        wrong[f"{kernel.name} in {short}"] = fault
                    break
        if usable:
            ops = "; ".join(f"{op} ({', '.join(dtypes)})" for op, dtypes in usable.items())
            yield Finding(section, name, f"usable for {ops}")
        else:
            yield Finding(section, name, f"not usable: {'; '.join(list(reasons)[:2])}")
        for what, fault in wrong.items():
            yield Finding(section, f"{name}: {what}", f"gives wrong results: {fault}", "broken")


def _problems(op: str, dtype: torch.dtype) -> list[Problem]:
    """Typical problems of an op: a kernel that supports none of them is of no use to a ResNet."""
    if op == "add_relu":
        return [AddReluProblem((8, 64, 56, 56), dtype, False, True)]
    if op == "bottleneck_chain":
        return [ChainProblem(8, 64, 56, 56, 256, 64, 0, 1, 1, "all", dtype)]
    if op == "conv3d_affine_act":
        window = (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1)
        return [
            Conv3dProblem(2, 64, (8, 28, 28), 64, *window, 1, epilogue, dtype)
            for epilogue in ("relu", "add_relu")
        ]
    if op == "conv_affine_relu_maxpool":
        pool = MaxPool((3, 3), (2, 2), (1, 1))
        return [
            ConvProblem(
                8, 3, 224, 224, 64, 7, 7, (2, 2), (3, 3), (1, 1), 1, "relu", dtype, True, pool
            )
        ]
    return [
        ConvProblem(8, 64, 56, 56, 64, r, r, (1, 1), (r // 2, r // 2), (1, 1), 1, epilogue, dtype)
        for r in (1, 3)
        for epilogue in ("relu", "add_relu")
    ]


def _tuned_table() -> Iterator[Finding]:
    section = "Tuned table"
    found = tuned_table.table()
    if found.path is None:
        yield Finding(section, "file", f"none: {tuned_table.ENV} switches it off", "note")
        return
    wrong = found.problem()
    if wrong is not None:
        yield Finding(section, "file", f"{found.path} is not used: {wrong}", "note")
        return
    yield Finding(section, "file", f"{found.path}" + ("" if found.path.exists() else " (not yet)"))
    here = tuned_table.environment_of(torch.device("cpu")) if _build.isa_error is None else None
    for name, count in found.counts().items():
        mark = "as things are now: " if name == here else ""
        yield Finding(section, f"{count} problems", f"{mark}{name}")


def _environment() -> Iterator[Finding]:
    names = sorted({*(n for n in os.environ if n.startswith("FUSED_RESNET_")), *_VARIABLES})
    found = [(name, os.environ[name]) for name in names if name in os.environ]
    wrong = {backends.ENV: backends.environment_error, "FUSED_RESNET_ISA": _build.isa_error}
    for name, value in found:
        reason = wrong.get(name)
        text = value or "(empty)"
        if reason is None:
            yield Finding("Environment", name, text)
        else:
            yield Finding("Environment", name, f"{text}: unset or mend it; {reason}", "broken")
    if not found:
        yield Finding("Environment", "variables", "none that matter are set")


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
