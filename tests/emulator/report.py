"""What a launch did and what was wrong with it."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

#: Frames in these files are wrappers; a place is the first frame outside of them.
WRAPPER_FILES = frozenset({"device.h", "emulator.h"})

WIDTHS = ("1", "2", "4", "8", "16", "other")


@functools.lru_cache(maxsize=100_000)
def _frames(library: Path, pc: int) -> tuple[tuple[str, str, int], ...]:
    """(function, file, line) of an instruction, from the innermost inlined function outwards."""
    command = ["addr2line", "-e", str(library), "-i", "-f", "-C", hex(pc)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    frames = []
    for function, where in zip(lines[::2], lines[1::2], strict=True):
        file, _, line = where.split(" (")[0].rpartition(":")
        frames.append((function, file, int(line) if line.isdigit() else 0))
    return tuple(frames)


def _outermost_wrapper(library: Path, pc: int) -> tuple[str, int]:
    frames = _frames(library, pc)
    for _, file, line in frames:
        if Path(file).name not in WRAPPER_FILES:
            return file, line
    return frames[-1][1:]


@dataclass(frozen=True)
class Place:
    """A line of a kernel, and who was there: thread and block are linear, -1 if not known."""

    file: str
    line: int
    thread: int = -1
    block: int = -1

    def __str__(self) -> str:
        who = f", thread {self.thread}" if self.thread >= 0 else ""
        who += f" of block {self.block}" if self.thread >= 0 and self.block >= 0 else ""
        return f"{Path(self.file).name}:{self.line}{who}"


@dataclass(frozen=True)
class Finding:
    """One defect: its kind (see README.md), and the accesses that show it, the later one first."""

    kind: str
    message: str
    count: int
    fatal: bool
    places: tuple[Place, ...]

    def __str__(self) -> str:
        places = "; ".join(map(str, self.places)) or "unknown place"
        times = f" ({self.count} times)" if self.count > 1 else ""
        return f"{self.kind}{times}: {self.message} [{places}]"


@dataclass(frozen=True)
class BufferTraffic:
    """Global memory traffic of one buffer; accesses are counted by width in bytes."""

    bytes_read: int
    bytes_written: int
    unique_bytes_read: int
    unique_bytes_written: int
    reads: dict[str, int]
    writes: dict[str, int]


@dataclass(frozen=True)
class Instruction:
    """A memory instruction of the kernel, summed over all warps.

    ``cost`` is wavefronts of shared memory, or 32-byte sectors of global memory; ``ideal`` the
    least that the same bytes need. Kinds: shared_load, shared_store, cp_async (its writes to shared
    memory), ldmatrix, global_load (cp.async's reads too), global_store.
    """

    kind: str
    width: int
    executed: int
    cost: int
    ideal: int
    library: Path = field(repr=False)
    pc: int = field(repr=False)

    @property
    def place(self) -> Place:
        return Place(*_outermost_wrapper(self.library, self.pc))

    def __str__(self) -> str:
        ratio = self.cost / max(1, self.ideal)
        what = f"{self.kind} of {self.width} bytes, {self.executed} warp instructions"
        return f"{self.place}: {what}, {ratio:.2f} of the least cost"


@dataclass(frozen=True)
class Report:
    """The outcome of one launch. Buffers and instructions are filled by the checked build only."""

    kernel: str
    findings: tuple[Finding, ...]
    counters: dict[str, int]
    buffers: dict[str, BufferTraffic]
    instructions: tuple[Instruction, ...]
    #: Copies by cp.async that were overwritten or given up before anybody read them. No defect by
    #: itself, but a sign of a wrong address, or of bytes that need not be moved.
    unread_copies: dict[Place, int]

    @property
    def kinds(self) -> set[str]:
        """The kinds of the findings."""
        return {finding.kind for finding in self.findings}

    def conflicts(self, kind: str) -> float:
        """Cost over the ideal cost of all instructions of a kind; 1.0 is perfect, or none there."""
        chosen = [i for i in self.instructions if i.kind == kind]
        ideal = sum(i.ideal for i in chosen)
        return sum(i.cost for i in chosen) / ideal if ideal else 1.0

    @property
    def ldmatrix_conflicts(self) -> float:
        """As ``conflicts("ldmatrix")``, but counted by both builds."""
        matrices = self.counters["ldmatrix_matrices"]
        return self.counters["ldmatrix_wavefronts"] / matrices if matrices else 1.0

    def raise_findings(self) -> None:
        """Raises KernelError if there is any finding."""
        if self.findings:
            raise KernelError(self)

    def __str__(self) -> str:
        lines = [f"{self.kernel}: {len(self.findings)} findings"]
        lines += [f"  {finding}" for finding in self.findings]
        for name, b in self.buffers.items():
            lines.append(
                f"  {name}: read {b.bytes_read} ({b.unique_bytes_read} unique), "
                f"wrote {b.bytes_written} ({b.unique_bytes_written} unique)"
            )
        lines += [f"  {instruction}" for instruction in self.instructions]
        lines += [f"  {p}: {n} copies never read" for p, n in self.unread_copies.items()]
        return "\n".join(lines)


class KernelError(AssertionError):
    """A kernel did something that it must not."""

    def __init__(self, report: Report) -> None:
        self.report = report
        findings = "\n".join(map(str, report.findings))
        super().__init__(f"{report.kernel}:\n{findings}")


def _places(accesses: Iterable[dict[str, Any]], library: Path) -> Iterable[Place]:
    for access in accesses:
        if "file" in access:
            yield Place(access["file"], access["line"], access["thread"], access["block"])
        elif "pc" in access:
            where = _outermost_wrapper(library, access["pc"])
            yield Place(*where, access["thread"], access["block"])


def _merged(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Findings with the copies that unrolling and inlining made of one line put together."""
    merged: dict[tuple[object, ...], Finding] = {}
    for finding in findings:
        lines = tuple((place.file, place.line) for place in finding.places)
        key = (finding.kind, finding.fatal, lines or finding.message)
        known = merged.get(key)
        merged[key] = replace(known, count=known.count + finding.count) if known else finding
    return tuple(merged.values())


def parse_report(kernel: str, library: Path, raw: dict[str, Any]) -> Report:
    """The report of the runtime, with instructions turned into lines."""
    findings = _merged(
        Finding(
            f["kind"], f["message"], f["count"], f["fatal"], (*_places(f["accesses"], library),)
        )
        for f in raw["findings"]
    )
    buffers = {
        b["name"]: BufferTraffic(
            bytes_read=b["bytes"][0],
            bytes_written=b["bytes"][1],
            unique_bytes_read=b["unique_bytes"][0],
            unique_bytes_written=b["unique_bytes"][1],
            reads=dict(zip(WIDTHS, b["reads_by_width"], strict=True)),
            writes=dict(zip(WIDTHS, b["writes_by_width"], strict=True)),
        )
        for b in raw.get("buffers", [])
    }
    instructions = tuple(
        Instruction(i["kind"], i["width"], i["executed"], i["cost"], i["ideal"], library, i["pc"])
        for i in raw.get("instructions", [])
    )
    unread: dict[Place, int] = {}
    for pc, count in raw.get("unread_copies", []):
        place = Place(*_outermost_wrapper(library, pc))
        unread[place] = unread.get(place, 0) + count
    return Report(kernel, findings, raw["counters"], buffers, instructions, unread)
