"""A launch as a value: kernel, types, constants and grid, for run time and certificates alike.

``Launch`` holds all that is known before there are tensors. ``compile_for`` makes machine code of
it for any architecture, with or without a GPU; ``bind`` makes the callable that a plan keeps, which
adds nothing per call but the arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

#: Triton's name of each dtype.
TYPES: Mapping[torch.dtype, str] = MappingProxyType(
    {
        torch.float32: "fp32",
        torch.float16: "fp16",
        torch.bfloat16: "bf16",
        torch.uint8: "u8",
        torch.int32: "i32",
    }
)


@dataclass(frozen=True)
class Launch:
    """One kernel launch up to its tensors.

    ``signature`` names the type of each argument that is not a constant, in the kernel's order:
    ``*fp16`` (a pointer; 16-byte aligned unless it ends in ``?``), ``i32``,
    ``tensordesc<fp16[128, 64]>``. ``constants`` are the rest, in order. ``options`` are Triton's
    (num_warps, num_stages, ...).
    """

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, int], ...]
    grid: tuple[int, int, int]

    def __str__(self) -> str:
        constants = " ".join(f"{name}={value}" for name, value in self.constants)
        options = " ".join(f"{name}={value}" for name, value in self.options)
        return f"{self.kernel.fn.__name__} {constants} {options}"


def pointer(dtype: torch.dtype, aligned: bool = True) -> str:
    """Signature of a pointer, to a 16-byte boundary if ``aligned``."""
    return "*" + TYPES[dtype] + ("" if aligned else "?")


def box(dtype: torch.dtype, *block: int) -> str:
    """Signature of a tensor descriptor with this box."""
    return f"tensordesc<{TYPES[dtype]}[{', '.join(map(str, block))}]>"


def compile_for(launch: Launch, target: GPUTarget) -> Any:
    """Machine code of the launch for ``target``: a ``triton.compiler.CompiledKernel``.

    Its ``asm`` holds ``ttgir``, ``ptx`` and ``cubin``. Needs no GPU; the result is cached on disk
    by Triton itself. The grid and unaligned sizes are not part of the code.
    """
    kernel = launch.kernel
    signature = {name: kind.rstrip("?") for name, kind in launch.signature} | {
        name: "constexpr" for name, _ in launch.constants
    }
    names = kernel.arg_names
    if set(signature) != set(names):
        raise ValueError(f"{kernel.fn.__name__} takes {names}, not {list(signature)}")
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in launch.signature
        if kind.startswith("*") and not kind.endswith("?")
    }
    source = ASTSource(
        kernel,
        signature={name: signature[name] for name in names},
        constexprs=dict(launch.constants),
        attrs=aligned,
    )
    return triton.compile(source, target=target, options=dict(launch.options))


@lru_cache(maxsize=4096)
def _compiled(key: Launch, device: int) -> Any:
    """The launch's code for one device; a module belongs to one CUDA context."""
    del device
    return compile_for(key, triton.runtime.driver.active.get_current_target())


def bind(launch: Launch, device: torch.device) -> Callable[..., None]:
    """A function of the kernel's tensors and sizes that launches it on the current stream.

    On a CPU device the kernel runs in Triton's interpreter. Call it, and use the result, with
    ``device`` current.
    """
    if device.type == "cpu":
        run = launch.kernel[launch.grid]
        constants = dict(launch.constants)

        def interpret(*arguments: Any) -> None:
            run(*arguments, **constants)

        return interpret
    run = _compiled(launch, device.index)[launch.grid]
    values = tuple(value for _, value in launch.constants)

    def start(*arguments: Any) -> None:
        run(*arguments, *values)

    return start
