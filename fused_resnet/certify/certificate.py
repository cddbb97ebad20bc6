"""A certificate: what the machine code of one kernel says about itself, with no GPU at hand."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from . import tools
from .arch import arch as arch_limits
from .model import Access, MainLoop, TensorOp, fp32_ops, global_access, main_loop, tensor_ops
from .occupancy import Occupancy, occupancy
from .roofline import DEVICES, Bound, Work, bound
from .sass import Program, parse

_RESERVED = 1024


@dataclass(frozen=True)
class PtxasReport:
    """What ``ptxas -v`` says of a kernel, in bytes."""

    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    registers: int


@dataclass(frozen=True)
class Certificate:
    """The judgement of one kernel for one architecture.

    Exact, read from the cubin: ``registers``, ``stack_bytes``, ``local_bytes``, ``local_loads`` and
    ``local_stores`` (instructions), ``static_shared``, ``instructions``, ``tensor``,
    ``global_access``, ``async_copies``, the ``ptxas`` figures where its output was given.
    Computed by NVIDIA's rules: ``occupancy``. A model, hence *predicted*: ``loop`` (see
    ``fused_resnet.certify.model``) and ``bounds``.
    """

    kernel: str
    sm: int
    threads: int
    registers: int
    stack_bytes: int
    local_bytes: int
    local_loads: int
    local_stores: int
    static_shared: int
    dynamic_shared: int
    shared_limit: int
    instructions: int
    tensor: tuple[TensorOp, ...]
    global_access: tuple[Access, ...]
    async_copies: tuple[str, ...]
    occupancy: Occupancy
    loop: MainLoop | None
    bounds: tuple[Bound, ...] = ()
    ptxas: PtxasReport | None = None

    @property
    def shared(self) -> int:
        """Shared memory per block, static and dynamic, in bytes."""
        return self.static_shared + self.dynamic_shared

    @property
    def spills(self) -> bool:
        """Whether registers were spilled or any other value lives in local memory.

        The stack alone does not count: ptxas reserves some without ever touching it.
        """
        spilled = self.ptxas is not None and (
            self.ptxas.spill_store_bytes or self.ptxas.spill_load_bytes
        )
        return bool(self.local_loads or self.local_stores or self.local_bytes or spilled)

    @property
    def fits(self) -> bool:
        """Whether a block can be resident at all: shared memory, registers and warps suffice."""
        return self.occupancy.blocks > 0

    @property
    def tensor_kind(self) -> str | None:
        """``mma.sync``, ``wgmma``, ``tcgen05``, ``fp32``, or None where nothing multiplies."""
        return self.tensor[0].kind.split(" ", 1)[0] if self.tensor else None

    @property
    def share(self) -> float | None:
        """Predicted share of the tensor rate in the main loop."""
        return self.loop.share if self.loop is not None else None

    @property
    def async_in_loop(self) -> bool:
        """Whether asynchronous copies feed the main loop from within it."""
        return self.loop is not None and bool(self.loop.async_copies)

    def widths(self, opcode: str, *, loop: bool = False) -> tuple[int, ...]:
        """Bytes per thread of the global accesses of an opcode (``LDG``, ``STG``, ``LDGSTS``).

        Args:
            opcode: which accesses.
            loop: those of the main loop only.
        """
        accesses = self.global_access if not loop else self.loop.global_access if self.loop else ()
        return tuple(access.bytes for access in accesses if access.opcode == opcode)


def parse_ptxas(log: str) -> dict[str, PtxasReport]:
    """Figures per kernel from the output of ``ptxas -v`` or ``nvcc -Xptxas -v``."""
    reports = {}
    parts = re.split(r"Compiling entry function '([^']+)'", log)
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        frame = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text
        )
        registers = re.search(r"Used (\d+) registers", text)
        if frame is None or registers is None:
            raise ValueError(f"no figures for {name} in this ptxas output")
        stack, stores, loads = map(int, frame.groups())
        reports[name] = PtxasReport(stack, stores, loads, int(registers.group(1)))
    return reports


def certify_all(
    cubin: bytes,
    *,
    threads: int,
    dynamic_shared: int = 0,
    loop_warps: int | None = None,
    work: Work | None = None,
    ptxas_log: str = "",
) -> dict[str, Certificate]:
    """Certificates of every kernel of a cubin, by (mangled) name.

    Args:
        cubin: of one architecture: ``nvcc -cubin``, or ``asm["cubin"]`` of a Triton kernel.
        threads: threads per block at launch.
        dynamic_shared: bytes of shared memory asked for at launch.
        loop_warps: warps that run the main loop, where not all do (tcgen05 with specialised warps).
        work: what the kernel computes at least, for the predicted roofline bounds.
        ptxas_log: output of ``ptxas -v``, for its spill figures.

    Raises:
        ToolMissing: no ``nvdisasm`` or ``cuobjdump``.
        ValueError: not a cubin, or its architecture is unknown.
    """
    sm, programs = parse(tools.run("nvdisasm", cubin, "-c"))
    usage = _usage(tools.run("cuobjdump", cubin, "-res-usage"))
    reports = parse_ptxas(ptxas_log)
    return {
        name: _certificate(
            program,
            sm,
            usage[name],
            threads=threads,
            dynamic_shared=dynamic_shared,
            loop_warps=loop_warps,
            work=work,
            ptxas=reports.get(name),
        )
        for name, program in programs.items()
        if name in usage
    }


def certify(cubin: bytes, *, threads: int, kernel: str = "", **options: Any) -> Certificate:
    """The certificate of one kernel: the only one whose name contains ``kernel``.

    Further arguments are those of ``certify_all``.

    Raises:
        ValueError: none or several kernels match; the message lists what there is.

    Example:
        >>> cubin = Path("kernel.cubin").read_bytes()          # doctest: +SKIP
        >>> certify(cubin, threads=128, dynamic_shared=49152).share    # doctest: +SKIP
        0.97
    """
    found = certify_all(cubin, threads=threads, **options)
    matches = [name for name in found if kernel in name]
    if len(matches) != 1:
        raise ValueError(f"{kernel!r} matches {matches} of the kernels {sorted(found)}")
    return found[matches[0]]


def certify_triton(compiled: Any, **options: Any) -> Certificate:
    """The certificate of a kernel compiled by ``triton.compile``.

    Threads per block (``.reqntid`` of the PTX, so the extra warps of a specialised kernel count)
    and shared memory come from the compiled kernel; ``options`` may add ``loop_warps``, ``work``.
    """
    threads = re.search(r"\.reqntid\s+(\d+)", compiled.asm["ptx"])
    if threads is None:
        raise ValueError(f"no .reqntid in the PTX of {compiled.metadata.name}")
    return certify(
        compiled.asm["cubin"],
        threads=int(threads.group(1)),
        dynamic_shared=compiled.metadata.shared,
        **options,
    )


def _certificate(
    program: Program,
    sm: int,
    usage: dict[str, int],
    *,
    threads: int,
    dynamic_shared: int,
    loop_warps: int | None,
    work: Work | None,
    ptxas: PtxasReport | None,
) -> Certificate:
    limits = arch_limits(sm)
    # From sm_90 on, cuobjdump counts the block's 1 KiB that belongs to the system where the kernel
    # touches shared memory.
    static = usage["SHARED"]
    if sm >= 90 and static >= _RESERVED:
        static -= _RESERVED
    loop = main_loop(program, limits, warps=loop_warps or -(-threads // 32))
    everything = range(len(program.code))
    share = loop.share if loop is not None and loop.share else 1.0
    bases = [instruction.base for instruction in program.code]
    return Certificate(
        kernel=program.name,
        sm=sm,
        threads=threads,
        registers=usage["REG"],
        stack_bytes=usage["STACK"],
        local_bytes=usage["LOCAL"],
        local_loads=bases.count("LDL"),
        local_stores=bases.count("STL"),
        static_shared=static,
        dynamic_shared=dynamic_shared,
        shared_limit=limits.shared_per_block,
        instructions=sum(base != "NOP" for base in bases),
        tensor=tensor_ops(program, everything) or fp32_ops(program, everything),
        global_access=global_access(program.code),
        async_copies=tuple(sorted({"LDGSTS", "UTMALDG", "UBLKCP"} & set(bases))),
        occupancy=occupancy(
            limits, threads=threads, registers=usage["REG"], shared=static + dynamic_shared
        ),
        loop=loop,
        bounds=() if work is None else tuple(bound(work, d, share) for d in DEVICES if d.sm == sm),
        ptxas=ptxas,
    )


def _usage(text: str) -> dict[str, dict[str, int]]:
    """Resource usage per function of ``cuobjdump -res-usage``."""
    functions = re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", text)
    return {
        name: {key: int(value) for key, value in re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", line)}
        for name, line in functions
    }
