"""The tuned table: what was measured on this machine, kept from one process to the next.

One JSON file in the user's cache folder holds, for each environment (device, its capability or
instruction set, threads, versions), an entry for each problem: the kernels that were right and
their times, and those that were not and why. It also holds proofs: the errors that the layers of
one whole network had with one choice of kernels and one set of weights.

The file is a cache and nothing more. One that is missing, unreadable, truncated, of another version
or of somebody else is reported once, put aside and rebuilt. It is replaced in one step, and
processes that write at the same time merge what they know under a lock. Its size is bounded: the
oldest entries go first.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import platformdirs
import torch

from fused_resnet import _build
from fused_resnet.machine import cpu_name, versions
from fused_resnet.problem import Problem
from fused_resnet.warn import FusedResNetWarning

#: Environment variable: another path for the file, or ``off`` to neither read nor write one.
ENV = "FUSED_RESNET_TUNED_TABLE"

#: Name and version of the format; a file of another is put aside.
SCHEMA = "fused_resnet.tuned/2"

#: Bounds of the file: environments, and entries and proofs of each.
MAX_ENVIRONMENTS, MAX_ENTRIES, MAX_PROOFS = 8, 2048, 64

#: A kernel within this share of the fastest is as fast: the one that is listed first is taken.
NEAR_TIE = 0.03

#: Seconds that a process waits for another one to finish writing.
_PATIENCE = 5.0


@dataclass(frozen=True)
class Timing:
    """A kernel that was right, and how fast it was.

    Attributes:
        kernel: its full name.
        seconds: of one call, the lower quartile.
        error: relative distance from float64, by norm.
        exact: see `Kernel.exact`.
    """

    kernel: str
    seconds: float
    error: float
    exact: bool = True


@dataclass(frozen=True)
class Entry:
    """What was measured of one problem.

    Attributes:
        stock_error: stock torch's distance from float64, by norm.
        timings: the kernels that were right, in the order in which near-ties are decided.
        rejected: (kernel, reason) of all others.
        effort: ``balanced`` or ``max``: which kernels were candidates.
        when: seconds since 1970.
        spread: half of the fastest kernel's calls took at least so many times its time: 1 on an
            idle machine.
    """

    stock_error: float
    timings: tuple[Timing, ...]
    rejected: tuple[tuple[str, str], ...] = ()
    effort: str = "balanced"
    when: float = 0.0
    spread: float = 1.0

    @property
    def considered(self) -> frozenset[str]:
        """Full names of all kernels that were looked at."""
        return frozenset((*(t.kernel for t in self.timings), *(name for name, _ in self.rejected)))

    def ranked(self, tolerance: float | None) -> list[Timing]:
        """Timings from the best on.

        Args:
            tolerance: the largest error that a kernel which is not exact may have; None to leave
                such kernels out.
        """
        left = [
            t for t in self.timings if t.exact or (tolerance is not None and t.error <= tolerance)
        ]
        ranked = []
        while left:
            limit = min(t.seconds for t in left) * (1 + NEAR_TIE)
            best = next(t for t in left if t.seconds <= limit)
            left.remove(best)
            ranked.append(best)
        return ranked


@dataclass(frozen=True)
class Proof:
    """What came of one network with one choice of kernels and one set of weights.

    Attributes:
        kernels: full name of the kernel of each layer in the end.
        errors: of each layer, (ours, stock torch's).
        notes: what a reader should know.
        join: whether native layers in a row become one call.
        seconds: of one call of the whole; None if it was not timed.
        when: seconds since 1970.
        spans: which bottlenecks are chained, and how: the fields of each `layers.Span`.
    """

    kernels: tuple[str, ...]
    errors: tuple[tuple[float, float], ...]
    notes: tuple[str, ...] = ()
    join: bool = True
    seconds: float | None = None
    when: float = 0.0
    spans: tuple[tuple[int, bool, bool, str], ...] = ()


@dataclass
class _Environment:
    entries: dict[str, Entry] = field(default_factory=dict)
    proofs: dict[str, Proof] = field(default_factory=dict)

    def merge(self, other: _Environment) -> None:
        """Take over what ``other`` knows that is newer, and keep the newest within the bounds."""
        _merge(self.entries, other.entries, MAX_ENTRIES)
        _merge(self.proofs, other.proofs, MAX_PROOFS)

    @property
    def when(self) -> float:
        """The time of the newest part."""
        times = [e.when for e in self.entries.values()] + [p.when for p in self.proofs.values()]
        return max(times, default=0.0)


_Part = TypeVar("_Part", Entry, Proof)


def _merge(mine: dict[str, _Part], other: Mapping[str, _Part], limit: int) -> None:
    for key, value in other.items():
        if key not in mine or mine[key].when < value.when:
            mine[key] = value
    for key in sorted(mine, key=lambda k: mine[k].when)[: max(0, len(mine) - limit)]:
        del mine[key]


class TunedTable:
    """A table in a file, read when first needed; see the module. Safe to share between threads.

    Args:
        path: of the file; None to keep everything in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._environments: dict[str, _Environment] | None = None
        self._told: set[str] = set()

    # ----------------------------------------------------------------------------------- what is in

    def entry(self, op: str, problem: Problem, device: torch.device) -> Entry | None:
        """What was measured of ``problem`` on ``device`` as things are now; None if nothing was."""
        return self._environment(device).entries.get(key_of(op, problem))

    def proof(self, device: torch.device, digest: str) -> Proof | None:
        """The proof of that digest, see `fused_resnet.prove`."""
        return self._environment(device).proofs.get(digest)

    def put(self, op: str, problem: Problem, device: torch.device, entry: Entry) -> None:
        """Remember an entry; `save` writes it."""
        with self._lock:
            self._environment(device).entries[key_of(op, problem)] = entry

    def put_proof(self, device: torch.device, digest: str, proof: Proof) -> None:
        """Remember a proof; `save` writes it."""
        with self._lock:
            self._environment(device).proofs[digest] = proof

    def counts(self) -> dict[str, int]:
        """Entries for each environment."""
        return {name: len(e.entries) for name, e in self._loaded().items()}

    def _environment(self, device: torch.device) -> _Environment:
        return self._loaded().setdefault(environment_of(device), _Environment())

    # ----------------------------------------------------------------------------- reading, writing

    def _loaded(self) -> dict[str, _Environment]:
        with self._lock:
            if self._environments is None:
                self._environments = self._read()
            return self._environments

    def _read(self) -> dict[str, _Environment]:
        if self.path is None:
            return {}
        try:
            return _parse(self.path.read_text("utf-8"))
        except FileNotFoundError:
            return {}
        except OSError as e:
            self._tell(f"the tuned table {self.path} cannot be read ({e.strerror}) and is ignored")
        except ValueError as e:
            aside = self.path.with_name(self.path.name + ".unreadable")
            with contextlib.suppress(OSError):
                os.replace(self.path, aside)
            self._tell(
                f"the tuned table {self.path} is ignored and will be rebuilt: {e}; the file is "
                f"kept as {aside.name}"
            )
        return {}

    def problem(self) -> str | None:
        """What is wrong with the file as it is now; None if nothing is."""
        if self.path is None or not self.path.exists():
            return None
        try:
            _parse(self.path.read_text("utf-8"))
        except (OSError, ValueError) as e:
            return str(e)
        return None

    def save(self) -> bool:
        """Merge with what the file holds by now and replace it; whether that worked.

        Failure is reported once, as a warning: the table then serves this process only.
        """
        if self.path is None:
            return False
        with self._lock:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with _locked(self.path.with_name(self.path.name + ".lock")):
                    mine = self._loaded()
                    for name, environment in self._read().items():
                        mine.setdefault(name, _Environment()).merge(environment)
                    for environment in mine.values():
                        environment.merge(_Environment())
                    oldest = sorted(mine, key=lambda name: mine[name].when)
                    for name in oldest[: max(0, len(mine) - MAX_ENVIRONMENTS)]:
                        del mine[name]
                    _replace(self.path, _serialise(mine))
            except OSError as e:
                self._tell(f"the tuned table {self.path} cannot be written: {e.strerror or e}")
                return False
        return True

    def clear(self) -> None:
        """Forget everything and remove the file."""
        with self._lock:
            self._environments = {}
            if self.path is not None:
                self.path.unlink(missing_ok=True)

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            warnings.warn(message, FusedResNetWarning, stacklevel=2)


# --------------------------------------------------------------------------------------------------
# Keys.
# --------------------------------------------------------------------------------------------------


def key_of(op: str, problem: Problem) -> str:
    """The key of a problem: all its fields, and the op."""
    return f"{op} {problem!r}"


def environment_of(device: torch.device) -> str:
    """Everything beside the problem that a measurement depends on, in words."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
        return f"{_gpu(index)}, fp32 as {conv.fp32_precision}; {_software()}"
    isa = "none" if _build.extension is None else _build.extension.isa()
    threads = f"{torch.get_num_threads()} threads"
    if limit := os.environ.get("OMP_THREAD_LIMIT"):  # OpenMP may grant fewer.
        threads = f"{threads}, at most {limit}"
    return f"{_processor()}, {isa}, {threads}; {_software()}"


@functools.cache
def _gpu(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)}, capability {major}.{minor}"


@functools.cache
def _processor() -> str:
    return f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"


@functools.cache
def _software() -> str:
    found = versions()
    names = ("fused_resnet", "torch", "cuda", "cudnn", "triton")
    return ", ".join(f"{name} {found[name]}" for name in names if name in found)


# --------------------------------------------------------------------------------------------------
# The file.
# --------------------------------------------------------------------------------------------------


def _parse(text: str) -> dict[str, _Environment]:
    """The content of a file.

    Raises:
        ValueError: it is not a table of this version; the message says what it is instead.
    """
    try:
        data = json.loads(text)
    except ValueError as e:
        raise ValueError(f"it is not JSON ({e})") from None
    found = data.get("schema") if isinstance(data, dict) else None
    if found != SCHEMA:
        raise ValueError(f"its schema is {found!r}, not {SCHEMA!r}")
    try:
        return {
            str(name): _Environment(
                {str(k): _entry(e) for k, e in content["entries"].items()},
                {str(k): _proof(p) for k, p in content["proofs"].items()},
            )
            for name, content in data["environments"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f"its content is damaged ({type(e).__name__}: {e})") from None


def _entry(data: dict[str, Any]) -> Entry:
    timings = tuple(
        Timing(str(t["kernel"]), float(t["seconds"]), float(t["error"]), bool(t["exact"]))
        for t in data["timings"]
    )
    rejected = tuple((str(name), str(reason)) for name, reason in data["rejected"])
    stock_error, when, spread = (float(data[key]) for key in ("stock_error", "when", "spread"))
    return Entry(stock_error, timings, rejected, str(data["effort"]), when, spread)


def _proof(data: dict[str, Any]) -> Proof:
    return Proof(
        tuple(map(str, data["kernels"])),
        tuple((float(a), float(b)) for a, b in data["errors"]),
        tuple(map(str, data["notes"])),
        bool(data["join"]),
        None if data["seconds"] is None else float(data["seconds"]),
        float(data["when"]),
        tuple((int(b), bool(f), bool(p), str(s)) for b, f, p, s in data.get("spans", ())),
    )


def _serialise(environments: dict[str, _Environment]) -> str:
    content = {
        name: {
            "entries": {k: asdict(e) for k, e in environment.entries.items()},
            "proofs": {k: asdict(p) for k, p in environment.proofs.items()},
        }
        for name, environment in environments.items()
    }
    return json.dumps({"schema": SCHEMA, "environments": content}, indent=1) + "\n"


def _replace(path: Path, text: str) -> None:
    """Put ``text`` in the place of the file in one step; what is there stays whole if it fails."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file among processes.

    Raises:
        OSError: it cannot be had within a few seconds.
    """
    with path.open("a") as file:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process holds {path}") from None
                time.sleep(0.02)
        yield


# --------------------------------------------------------------------------------------------------
# The table of this user.
# --------------------------------------------------------------------------------------------------


def default_path() -> Path | None:
    """Where the table lies; None if the environment switches it off."""
    value = os.environ.get(ENV, "")
    if value.lower() == "off":
        return None
    if value:
        return Path(value).expanduser()
    return Path(platformdirs.user_cache_dir("fused_resnet")) / "tuned.json"


_tables: dict[Path, TunedTable] = {}
_tables_lock = threading.Lock()


def table() -> TunedTable:
    """The table at `default_path`, one object for each path; where it is off, a new empty one."""
    path = default_path()
    if path is None:
        return TunedTable(None)
    with _tables_lock:
        return _tables.setdefault(path, TunedTable(path))


__all__ = [
    "ENV",
    "SCHEMA",
    "Entry",
    "Proof",
    "Timing",
    "TunedTable",
    "default_path",
    "environment_of",
    "key_of",
    "table",
]
