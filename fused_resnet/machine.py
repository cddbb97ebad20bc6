"""Facts about the machine and the software on it, as reports and doctor state them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fused_resnet import _build
from fused_resnet.version import __version__

#: Packages whose versions can change a result or a speed, by distribution name.
_PACKAGES = ("torchvision", "triton", "timm", "scikit-image", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Machine:
    """What a measurement was taken on.

    Attributes:
        cpu: the processor's name.
        cores: processors that this process may use.
        memory: bytes of main memory, 0 where the system does not tell.
        isa: widest instruction set that torch uses here.
        features: instruction-set extensions that matter to us: AVX-512 BF16, AMX.
        gpus: names of the visible GPUs.
        system: operating system and architecture.
    """

    cpu: str
    cores: int
    memory: int
    isa: str
    features: tuple[str, ...]
    gpus: tuple[str, ...]
    system: str


def machine() -> Machine:
    """The facts of this machine."""
    return Machine(
        cpu=cpu_name(),
        cores=usable_cores(),
        memory=_memory(),
        isa=torch.backends.cpu.get_cpu_capability(),
        features=cpu_features(),
        gpus=tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
    )


def versions() -> dict[str, str]:
    """Versions of Python, torch, this package, and those optional packages that are installed."""
    found = {
        "python": platform.python_version(),
        "fused_resnet": __version__,
        "torch": str(torch.__version__),
    }
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    if torch.cuda.is_available() and torch.backends.cudnn.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    for name in _PACKAGES:
        version = package_version(name)
        if version is not None:
            found[name] = version
    return found


def package_version(name: str) -> str | None:
    """The installed version of a distribution, None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_features() -> tuple[str, ...]:
    """Which of the CPU's extensions for 16-bit floats are there, of those that kernels use."""
    if _build.extension is not None:
        known = _build.extension.cpu_features()
        return tuple(sorted(name for name, there in known.items() if there))
    return tuple(n for n in ("amx_bf16", "avx512_bf16") if _capabilities().get(n, False))


def has_native_bf16(device: torch.device) -> bool:
    """Whether ``device`` computes in bfloat16 itself, rather than by way of float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # The names of the flags that x86-64 and Arm have for it.
    flags = ("amx_bf16", "avx512_bf16", "arm_bf16", "sve_bf16", "bf16")
    return bool(cpu_features()) or any(_capabilities().get(flag, False) for flag in flags)


def _capabilities() -> dict[str, Any]:
    """What torch knows of the CPU; older versions have none."""
    capabilities: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    return capabilities()


def usable_cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
