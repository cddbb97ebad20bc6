"""Sets of certificates as JSON, as a table, and compared with the set that is committed."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.table import Table

from .certificate import Certificate, PtxasReport
from .model import Access, MainLoop, TensorOp
from .occupancy import Occupancy
from .roofline import Bound

#: Written into every file and table.
LABEL = (
    "Read from machine code; no GPU ran. Registers, memory, instructions and access widths are "
    "exact; occupancy follows the vendor's rules; cycles, share and times are predicted."
)

Json = dict[str, Any]
T = TypeVar("T")


def to_json(certificates: Mapping[str, Certificate], toolchain: Mapping[str, str]) -> str:
    """A set of certificates as JSON text whose order and digits depend on the contents alone.

    Each certificate is one line, so that a difference of two files reads as a list of kernels.

    Args:
        certificates: by a key that names kernel, configuration and architecture.
        toolchain: versions of the compilers, ``{"triton": "3.8.0"}``, so that a reader of a
            changed figure sees whether the compiler changed too.
    """

    def line(value: Any) -> str:
        return json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))

    entries = ",\n".join(
        f"{json.dumps(key)}: {line(_plain(certificates[key]))}" for key in sorted(certificates)
    )
    return (
        f'{{\n"label": {line(LABEL)},\n"toolchain": {line(dict(toolchain))},\n'
        f'"certificates": {{\n{entries}\n}}\n}}\n'
    )


def load_json(path: Path) -> Json:
    """A document written by ``to_json``.

    Raises:
        ValueError: the file is not such a document.
    """
    document = json.loads(path.read_text())
    if not isinstance(document, dict) or "certificates" not in document:
        raise ValueError(f"{path} holds no certificates")
    return document


def certificates_of(document: Json) -> dict[str, Certificate]:
    """The certificates of a loaded document; numbers are as it has them, to four decimals."""
    return {key: _certificate(plain) for key, plain in document["certificates"].items()}


def _certificate(plain: Json) -> Certificate:
    """The inverse of ``_plain``."""
    loop, ptxas = plain["loop"], plain["ptxas"]
    return _made(
        Certificate,
        plain,
        tensor=_tensor_ops(plain["tensor"]),
        global_access=_accesses(plain["global_access"]),
        async_copies=tuple(plain["async_copies"]),
        occupancy=_made(Occupancy, plain["occupancy"]),
        bounds=tuple(_made(Bound, bound) for bound in plain["bounds"]),
        ptxas=None if ptxas is None else PtxasReport(**ptxas),
        loop=None
        if loop is None
        else _made(
            MainLoop,
            loop,
            classes=tuple(loop["classes"].items()),
            tensor=_tensor_ops(loop["tensor"]),
            async_copies=tuple(loop["async_copies"]),
            global_access=_accesses(loop["global_access"]),
        ),
    )


def _made(kind: type[T], plain: Json, **converted: Any) -> T:
    """An instance of a dataclass from its fields in ``plain``, which may hold derived ones too."""
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**({name: plain[name] for name in names} | converted))


def _tensor_ops(texts: list[str]) -> tuple[TensorOp, ...]:
    found = []
    for text in texts:
        match = re.fullmatch(r"(.*?)(?: m(\d+)n(\d+)k(\d+))? (\S+) x(\d+)", text)
        if match is None:
            raise ValueError(f"no tensor instruction: {text!r}")
        kind, m, n, k, dtype, count = match.groups()
        shape = None if m is None else (int(m), int(n), int(k))
        found.append(TensorOp(kind, shape, dtype, int(count)))
    return tuple(found)


def _accesses(entries: list[Json]) -> tuple[Access, ...]:
    return tuple(Access(**entry) for entry in entries)


def _plain(certificate: Certificate) -> Json:
    """The certificate's fields and the figures derived from them."""
    plain = dataclasses.asdict(certificate)
    plain["spills"] = certificate.spills
    plain["tensor"] = [str(op) for op in certificate.tensor]
    plain["bounds"] = [
        dataclasses.asdict(b) | {"predicted_us": b.predicted_us, "limiter": b.limiter}
        for b in certificate.bounds
    ]
    plain["occupancy"] |= {
        "blocks": certificate.occupancy.blocks,
        "limiter": certificate.occupancy.limiter,
    }
    loop = certificate.loop
    if loop is not None:
        plain["loop"] |= {
            "classes": dict(loop.classes),
            "tensor": [str(op) for op in loop.tensor],
            "limiter": loop.limiter,
        }
    rounded: Json = _rounded(plain)
    return rounded


def _rounded(value: Any) -> Any:
    """Floats to four decimals, so that the file does not depend on the last bit."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value


@dataclass(frozen=True)
class Worse:
    """A figure that is worse than the committed one, or a kernel that is gone (``missing``)."""

    key: str
    figure: str
    committed: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.figure} was {self.committed}, is {self.now}"


def _loop(name: str) -> Callable[[Json], Any]:
    return lambda plain: None if plain["loop"] is None else plain["loop"][name]


def _narrowest(opcode: str, where: str) -> Callable[[Json], Any]:
    def get(plain: Json) -> Any:
        accesses = plain["global_access"] if where == "kernel" else _loop("global_access")(plain)
        return min((a["bytes"] for a in accesses or () if a["opcode"] == opcode), default=None)

    return get


_LOWER_IS_BETTER: dict[str, Callable[[Json], Any]] = {
    "registers": lambda plain: plain["registers"],
    "stack_bytes": lambda plain: plain["stack_bytes"],
    "local_bytes": lambda plain: plain["local_bytes"],
    "local_loads": lambda plain: plain["local_loads"],
    "local_stores": lambda plain: plain["local_stores"],
    "spill_store_bytes": lambda plain: (plain["ptxas"] or {}).get("spill_store_bytes"),
    "spill_load_bytes": lambda plain: (plain["ptxas"] or {}).get("spill_load_bytes"),
    "shared_bytes": lambda plain: plain["static_shared"] + plain["dynamic_shared"],
    "loop.instructions": _loop("instructions"),
    "loop.issue_cycles": _loop("issue_cycles"),
    "loop.smem_cycles": _loop("smem_cycles"),
    "loop.inner_loops": _loop("inner_loops"),
    "loop.divisions": _loop("divisions"),
    "loop.wgmma_waited_at_once": _loop("wgmma_waited_at_once"),
}
_HIGHER_IS_BETTER: dict[str, Callable[[Json], Any]] = {
    "occupancy.blocks": lambda plain: plain["occupancy"]["blocks"],
    "loop.share": _loop("share"),
    "loop.has_async_copies": lambda plain: bool(_loop("async_copies")(plain)),
    **{f"narrowest {op}": _narrowest(op, "kernel") for op in ("LDG", "STG", "LDGSTS")},
    **{f"narrowest {op} in loop": _narrowest(op, "loop") for op in ("LDG", "STG", "LDGSTS")},
}
_MUST_EQUAL: dict[str, Callable[[Json], Any]] = {
    "tensor instruction": lambda plain: sorted({t.rsplit(" x", 1)[0] for t in plain["tensor"]}),
    "loop found": lambda plain: plain["loop"] is not None,
}

#: Figures whose absence is worse than any value: what was known is no longer.
_MUST_STAY = frozenset({"loop.share", "spill_load_bytes", "spill_store_bytes"})

#: Shares are compared up to what rounding to four decimals can do.
_ROUNDING = 1e-4


def compare(committed: Json, now: Json, *, partial: bool = False) -> list[Worse]:
    """Figures of ``now`` that are worse than those of ``committed``; both are loaded documents.

    A kernel of ``committed`` that ``now`` lacks is reported too, unless ``now`` is ``partial``.
    Kernels that only ``now`` has, and figures that got better, are not reported. More is worse for
    registers, memory, spills and the loop's instructions and cycles; less is worse for occupancy,
    share, access widths and asynchronous copies; any other tensor instruction is worse.
    """
    worse = []
    for key, old in sorted(committed["certificates"].items()):
        new = now["certificates"].get(key)
        if new is None:
            if not partial:
                worse.append(Worse(key, "certificate", "present", "missing"))
            continue
        for figure, get in _MUST_EQUAL.items():
            if get(old) != get(new):
                worse.append(Worse(key, figure, get(old), get(new)))
        for sign, figures in ((1, _LOWER_IS_BETTER), (-1, _HIGHER_IS_BETTER)):
            for figure, get in figures.items():
                before, after = get(old), get(new)
                if before is None or (after is None and figure not in _MUST_STAY):
                    continue
                if after is None or sign * (after - before) > _ROUNDING:
                    worse.append(Worse(key, figure, before, after))
    return worse


def table(certificates: Mapping[str, Certificate], title: str = "Certificates") -> Table:
    """A rich table, one line per certificate, sorted by key."""
    out = Table(title=title, caption=LABEL)
    out.add_column("kernel")
    for name in ("sm", "regs", "spills", "smem KiB", "blocks/SM", "loop instr."):
        out.add_column(name, justify="right")
    out.add_column("tensor instruction")
    out.add_column("predicted share", justify="right")
    out.add_column("async copies")
    out.add_column("loads, stores (B)")
    out.add_column("predicted bound", justify="right")
    for key, c in sorted(certificates.items()):
        loop = c.loop
        share = "-" if loop is None or loop.share is None else f"{loop.share:.2f} {loop.limiter}"
        out.add_row(
            key,
            str(c.sm),
            str(c.registers),
            f"{c.local_loads}+{c.local_stores}" if c.spills else "0",
            f"{c.shared / 1024:.1f}",
            f"{c.occupancy.blocks} {c.occupancy.limiter}",
            "-" if loop is None else str(loop.instructions) + "+" * bool(loop.inner_loops),
            ", ".join(map(str, loop.tensor if loop is not None else c.tensor)) or "-",
            share,
            ", ".join(loop.async_copies) if loop is not None and loop.async_copies else "-",
            ", ".join(f"{a.opcode} {a.bytes}" for a in c.global_access) or "-",
            "; ".join(f"{b.device} {b.predicted_us:.1f} us ({b.limiter})" for b in c.bounds) or "-",
        )
    return out
