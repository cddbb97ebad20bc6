"""Compiles the emulator's runtime and kernel libraries with g++, and keeps what it compiled.

An object is found again by what went into it: the source and the headers that it included when it
was last compiled, the flags, the compiler and the CPU that ``-march=native`` means.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("EMULATOR_CACHE", HERE.parents[1] / ".cache" / "emulator"))
#: The cache forgets what was not used for longest once it holds more than this.
CACHE_BYTES = 512 << 20

CXX = os.environ.get("CXX", "g++")
COMMON = ["-std=c++17", "-march=native", "-fPIC", "-g1", "-Wall", "-Wextra", "-fmax-errors=5"]
RUNTIME = [*COMMON, "-O3"]
KERNELS = [
    *COMMON,
    "-O2",
    # CUDA kernels reinterpret memory freely, and nvcc lets them.
    "-fno-strict-aliasing",
    "-fno-exceptions",
    # Static variables of templates stay with their library: fast and checked ones are both loaded.
    "-fno-gnu-unique",
    "-Wno-unknown-pragmas",
]
CHECKED = [
    "-fsanitize=thread",
    "--param=tsan-instrument-func-entry-exit=0",
    # A tail call would leave no return address in the kernel.
    "-fno-optimize-sibling-calls",
]
WRAPPED = ["memcpy", "memmove", "memset"]


class BuildError(RuntimeError):
    """The compiler refused; the message is its output."""


def _run(command: Sequence[str]) -> bytes:
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{done.stderr.decode(errors='replace')}")
    return done.stdout


@functools.cache
def _toolchain() -> bytes:
    return _run([CXX, "--version"]) + _run([CXX, "-march=native", "-Q", "--help=target"])


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:24]


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    """One build at a time, so that parallel test processes do not compile the same things."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(target: Path, command: Sequence[str]) -> Path:
    """Runs ``command``, which ends with ``-o``, unless the target is there."""
    if target.exists():
        os.utime(target)
    else:
        partial = target.with_suffix(".partial")
        _run([*command, str(partial)])
        partial.rename(target)
    return target


def _headers(rule: Path) -> list[Path]:
    """The files that a dependency rule, as written by the compiler, names after the colon."""
    text = rule.read_text().replace("\\\n", " ")
    return [Path(name) for name in text.partition(":")[2].split()]


def _compile(source: Path, flags: Sequence[str]) -> Path:
    """The object of a source; system headers are taken to change with the compiler only."""
    how = [_toolchain(), " ".join(flags).encode(), str(source).encode()]
    rule = CACHE / f"{source.stem}-{_digest(*how)}.d"

    def target() -> Path:
        contents = (path.read_bytes() for path in _headers(rule) if path.exists())
        return CACHE / f"{source.stem}-{_digest(*how, *contents)}.o"

    if rule.exists() and target().exists():
        os.utime(rule)
        os.utime(target())
        return target()
    partial = rule.with_suffix(".partial")
    _run([CXX, *flags, "-MMD", "-MF", str(rule), "-c", str(source), "-o", str(partial)])
    return partial.rename(target())


def _library(name: str, sources: Sequence[Path], flags: list[str], link: list[str]) -> Path:
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: _compile(source, flags), sources))
    names = [str(path) for path in objects]
    key = _digest(_toolchain(), "\n".join([*names, *link]).encode())
    command = [CXX, "-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs", *names, *link, "-o"]
    return _make(CACHE / f"lib{name}-{key}.so", command)


def _forget_old() -> None:
    files = sorted(CACHE.glob("*-*.*"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for path in files:
        total += path.stat().st_size
        if total > CACHE_BYTES:
            path.unlink()


def _runtime() -> Path:
    return _library("emulator", sorted((HERE / "runtime").glob("*.cpp")), RUNTIME, [])


def build_runtime() -> Path:
    """The shared library of the runtime."""
    with _lock():
        return _runtime()


def build_kernels(
    sources: Sequence[Path], *, checked: bool, include: Sequence[Path] = (), name: str = "kernels"
) -> Path:
    """A shared library of the kernels that ``sources`` register, fast or checked.

    Args:
        sources: Translation units, compiled in parallel; each includes ``register.h``.
        checked: Whether every memory access is reported to the runtime.
        include: Directories for ``#include``, besides the emulator's own.
        name: A part of the library's file name.

    Raises:
        BuildError: The compiler or the linker failed.
    """
    flags = [
        *KERNELS,
        *(CHECKED if checked else []),
        f"-I{HERE}",
        *(f"-I{path}" for path in include),
    ]
    with _lock():
        runtime = _runtime()
        link = [str(runtime), f"-Wl,-rpath,{runtime.parent}"]
        if checked:
            link += [f"-Wl,--wrap={function}" for function in WRAPPED]
        library = _library(name + ("-checked" if checked else ""), sources, flags, link)
        _forget_old()
    return library
