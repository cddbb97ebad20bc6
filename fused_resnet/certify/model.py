"""Which pipe bounds a kernel's main loop: a model of cycles, read from machine code.

Unit: cycles of one SM per loop iteration of *four warps, one on each of its four sub-partitions*
(for wgmma that is one warpgroup). Warps beyond that scale every term alike and cancel.

========  =========================================================================================
tensor    FMAs of the tensor instructions over the architecture's rate (``arch.py``). For tcgen05,
          issued once per block, the other terms are scaled to the warps of the block instead.
          A loop with no tensor instruction is judged by its fp32 FMAs and the fp32 rate.
issue     one instruction per clock and sub-partition (Volta whitepaper, and every later one): the
          number of instructions in the loop, those in out-of-line retry paths included.
smem      bytes that pass through shared memory or L1 over 128 bytes per clock (Programming Guide):
          ldmatrix, shared and global loads and stores, cp.async writes, and the operands that
          wgmma and tcgen05 read from shared memory.
share     ideal tensor cycles / max(tensor, issue, smem): the predicted share of the tensor rate.
========  =========================================================================================

Assumptions, each of which flatters or harms some kernels:

* enough warps and stages hide every latency (occupancy and stages are reported beside the share);
* no bank conflicts (the CUDA emulator of the tests counts them);
* every instruction of the loop executes once an iteration, predicated or not, those of loops within
  it too (``inner_loops`` counts those: unless it is 0, the share flatters);
* an access narrower than 4 bytes costs as much as one of 4 bytes;
* wgmma reads B once per warpgroup and A (64 rows) unless it lies in registers; tcgen05 reads A and
  B once per instruction, both at 128 bytes per clock;
* TMA's writes to shared memory use a path of their own and are not counted;
* ``mma.sync`` on sm_90 and sm_100 runs at the fraction given in ``arch.py``: a loop built on it
  has a share of at most that, since the ideal is the rate of wgmma or tcgen05.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from .arch import Arch
from .sass import Instruction, Loop, Program

_WARP = 32

#: Copies that go to shared memory without passing registers: cp.async, TMA tensors, TMA bulk.
ASYNC_COPIES = ("LDGSTS", "UTMALDG", "UBLKCP")

#: Machine instructions of the tensor unit and the PTX that they come from.
TENSOR = {"HMMA": "mma.sync", "HGMMA": "wgmma", "UTCHMMA": "tcgen05"}

_CLASSES = {
    "load_matrix": ("LDSM",),
    "store_matrix": ("STSM",),
    "load_shared": ("LDS",),
    "store_shared": ("STS",),
    "load_global": ("LDG", "LD"),
    "store_global": ("STG", "ST"),
    "load_local": ("LDL",),
    "store_local": ("STL",),
    "load_tensor_memory": ("LDTM",),
    "async_copy": ASYNC_COPIES,
    "synchronise": ("ARRIVES", "BAR", "DEPBAR", "LDGDEPBAR", "SYNCS", "UTCBAR", "WARPGROUP"),
    "memory_order": ("CCTL", "ERRBAR", "FENCE", "MEMBAR"),
    "converge": ("BMOV", "BREAK", "BSSY", "BSYNC", "WARPSYNC", "YIELD"),
    "branch": ("BRA", "BRX", "CALL", "EXIT", "JMP", "RET"),
    "fma_fp32": ("FADD", "FFMA", "FFMA2", "FMUL"),
    "reciprocal": ("MUFU",),
    "convert": ("F2F", "F2FP", "F2I", "I2F", "I2FP"),
}
_CLASS_OF = {base: name for name, bases in _CLASSES.items() for base in bases}


@dataclass(frozen=True)
class TensorOp:
    """A kind of tensor instruction: ``mma.sync m16n8k16 f16``, and how often it occurs.

    ``shape`` is (m, n, k) of one instruction; None where machine code does not tell.
    """

    kind: str
    shape: tuple[int, int, int] | None
    dtype: str
    count: int

    @property
    def fma(self) -> int | None:
        """Multiply-adds of one instruction."""
        return None if self.shape is None else math.prod(self.shape)

    def __str__(self) -> str:
        shape = "" if self.shape is None else " m{}n{}k{}".format(*self.shape)
        return f"{self.kind}{shape} {self.dtype} x{self.count}"


@dataclass(frozen=True)
class Access:
    """Global accesses of one opcode and width: ``LDG``, 16 bytes a thread, 4 instructions."""

    opcode: str
    bytes: int
    count: int


@dataclass(frozen=True)
class MainLoop:
    """The innermost loop around the tensor instructions, and its predicted bound.

    ``classes`` counts instructions per class, by name. Cycles are as the module says; they and
    ``share`` are *predicted*. ``wgmma_waited_at_once`` is None without wgmma; True if the loop
    waits until no wgmma is in flight. ``divisions`` counts what integer divisions leave in
    the loop: reciprocals (MUFU.RCP) and, where the divisor is constant, high halves of products
    (IMAD.HI). 0 means that there are none; more may also stem from fp32 or 64-bit arithmetic.
    """

    instructions: int
    inner_loops: int
    classes: tuple[tuple[str, int], ...]
    tensor: tuple[TensorOp, ...]
    tensor_cycles: float | None
    issue_cycles: float
    smem_cycles: float
    share: float | None
    async_copies: tuple[str, ...]
    global_access: tuple[Access, ...]
    wgmma_waited_at_once: bool | None
    divisions: int

    @property
    def limiter(self) -> str | None:
        """``tensor``, ``issue`` or ``smem``: the largest term."""
        if self.tensor_cycles is None:
            return None
        terms = {
            "tensor": self.tensor_cycles,
            "issue": self.issue_cycles,
            "smem": self.smem_cycles,
        }
        return max(terms, key=lambda name: terms[name])


def instruction_class(instruction: Instruction) -> str:
    """The class an instruction is counted in; ``integer_other`` holds what no class names."""
    if instruction.base in TENSOR:
        return "tensor"
    return _CLASS_OF.get(instruction.base, "integer_other")


def tensor_ops(program: Program, positions: Iterable[int]) -> tuple[TensorOp, ...]:
    """Tensor instructions at these positions, grouped by kind, shape and dtype."""
    found = Counter(
        (TENSOR[program.code[p].base], *_shape_and_dtype(program, p))
        for p in positions
        if program.code[p].base in TENSOR
    )
    ops = [TensorOp(kind, shape, dtype, n) for (kind, shape, dtype), n in found.items()]
    return tuple(sorted(ops, key=str))


def fp32_ops(program: Program, positions: Iterable[int]) -> tuple[TensorOp, ...]:
    """fp32 fused multiply-adds as if each were a warp's 32x1x1 product (FFMA2 does two)."""
    found = Counter(program.code[p].base for p in positions)
    ops = [
        TensorOp("fp32 " + base, (_WARP, 1, width), "fp32", found[base])
        for base, width in (("FFMA", 1), ("FFMA2", 2))
        if found[base]
    ]
    return tuple(ops)


def global_access(code: Iterable[Instruction]) -> tuple[Access, ...]:
    """Global loads, stores and cp.async by width, in the order of opcode and width."""
    found = Counter((i.base, i.access_bytes) for i in code if i.base in ("LDG", "STG", "LDGSTS"))
    return tuple(Access(base, width, n) for (base, width), n in sorted(found.items()))


def main_loop(program: Program, arch: Arch, *, warps: int) -> MainLoop | None:
    """The model's judgement of the main loop; None if no loop holds a tensor instruction or FMA.

    ``warps`` is how many warps of a block run the loop (it matters for tcgen05 only). Of several
    innermost loops with tensor instructions, the one with the most multiply-adds counts; of equal
    ones, the one that is fed by asynchronous copies.
    """
    loop = _find(program)
    if loop is None:
        return None
    code = [program.code[p] for p in loop.body]
    tensor = tensor_ops(program, loop.body)
    ideal: float | None = None
    actual: float | None = None
    if tensor:
        if all(op.fma is not None for op in tensor):
            ideal = sum(_tensor_cycles(op, arch, 1.0) for op in tensor)
            actual = sum(_tensor_cycles(op, arch, arch.mma_sync_fraction) for op in tensor)
    else:
        tensor = fp32_ops(program, loop.body)
        ideal = actual = sum(
            op.count * (op.fma or 0) * arch.partitions / arch.fp32 for op in tensor
        )

    groups = max(1.0, warps / arch.partitions) if _once_per_block(tensor) else 1.0
    issue = len(code) * groups
    smem = _smem_cycles(code, tensor, arch, groups)
    return MainLoop(
        instructions=len(code),
        inner_loops=_inner_loops(program, loop),
        classes=tuple(sorted(Counter(map(instruction_class, code)).items())),
        tensor=tensor,
        tensor_cycles=actual,
        issue_cycles=issue,
        smem_cycles=smem,
        share=None if ideal is None or actual is None else ideal / max(actual, issue, smem),
        async_copies=tuple(sorted({i.base for i in code if i.base in ASYNC_COPIES})),
        global_access=global_access(code),
        wgmma_waited_at_once=_waited_at_once(code),
        divisions=sum(
            (i.base == "MUFU" and "RCP" in i.modifiers)
            or (i.base in ("IMAD", "UIMAD") and "HI" in i.modifiers)
            for i in code
        ),
    )


def _find(program: Program) -> Loop | None:
    for weigh in (_tensor_weight, _fp32_weight):
        weights = [(weigh(program, loop), loop) for loop in program.loops]
        heavy = [(weight, loop) for weight, loop in weights if weight]
        # Inner loops come first, so a loop is innermost if no earlier one lies within it.
        innermost = [
            (weight, loop)
            for number, (weight, loop) in enumerate(heavy)
            if not any(set(other.body) < set(loop.body) for _, other in heavy[:number])
        ]
        if innermost:
            return max(innermost, key=lambda pair: (pair[0], _is_fed(program, pair[1])))[1]
    return None


def _is_fed(program: Program, loop: Loop) -> bool:
    """Whether a loop holds asynchronous copies."""
    return any(program.code[p].base in ASYNC_COPIES for p in loop.body)


def _inner_loops(program: Program, loop: Loop) -> int:
    """Loops within a loop that do more than retry a barrier until it opens."""
    body = set(loop.body)
    return sum(
        set(inner.body) < body
        and not any(program.code[p].base in ("SYNCS", "NANOSLEEP") for p in inner.body)
        for inner in program.loops
    )


def _tensor_weight(program: Program, loop: Loop) -> int:
    return sum(op.count * (op.fma or 1) for op in tensor_ops(program, loop.body))


def _fp32_weight(program: Program, loop: Loop) -> int:
    return sum(op.count * (op.fma or 0) for op in fp32_ops(program, loop.body))


def _once_per_block(tensor: tuple[TensorOp, ...]) -> bool:
    return any(op.kind == "tcgen05" for op in tensor)


def _tensor_cycles(op: TensorOp, arch: Arch, mma_sync_fraction: float) -> float:
    """Cycles of an SM for ``op.count`` instructions of each of four warps (see the module)."""
    rate: float = arch.tensor_tf32 if op.dtype == "tf32" else arch.tensor_f16
    if not rate:
        raise ValueError(f"sm_{arch.sm} has no {op.dtype} tensor instructions")
    each = op.fma or 0
    if op.kind == "mma.sync":
        each *= arch.partitions
        rate *= mma_sync_fraction
    elif op.kind == "tcgen05" and op.shape is not None and op.shape[0] == 64:
        # 64 rows use half of the 128 lanes of tensor memory, at half the rate (assumption).
        rate /= 2
    return op.count * each / rate


def _smem_cycles(
    code: list[Instruction], tensor: tuple[TensorOp, ...], arch: Arch, groups: float
) -> float:
    per_warp = 0
    for instruction in code:
        if instruction.base in ("LDSM", "STSM"):
            matrices = next((int(m) for m in instruction.modifiers if m in ("2", "4")), 1)
            per_warp += matrices * 8 * 16
        elif instruction.base in ("LDS", "STS", "LDG", "STG", "LDGSTS"):
            per_warp += _WARP * max(instruction.access_bytes, 4)
    operands = 0
    for op in tensor:
        if op.kind in ("wgmma", "tcgen05") and op.shape is not None:
            m, n, k = op.shape
            item = 4 if op.dtype == "tf32" else 2
            rows = n if op.dtype.endswith("/register A") else m + n
            operands += op.count * rows * k * item
    return (per_warp * arch.partitions * groups + operands) / arch.shared_bytes_per_clock


def _waited_at_once(code: list[Instruction]) -> bool | None:
    """Whether the loop waits for all its wgmma: a wait that allows zero groups in flight."""
    if not any(i.base == "HGMMA" for i in code):
        return None
    allowed = [
        int(match.group(1), 16)
        for i in code
        if i.opcode.startswith("WARPGROUP.DEPBAR")
        and (match := re.search(r"gsb\d+,\s*0x([0-9a-f]+)", i.operands))
    ]
    return 0 in allowed


def _shape_and_dtype(program: Program, position: int) -> tuple[tuple[int, int, int] | None, str]:
    instruction = program.code[position]
    if instruction.base == "UTCHMMA":
        return _tcgen05_shape(program, position)
    dtype = next((m.lower() for m in instruction.modifiers if m in ("BF16", "TF32")), "f16")
    if instruction.base == "HGMMA":
        m, n, k = map(int, instruction.modifiers[0].split("x"))
        # "HGMMA R24, gdesc[..], R24" reads both operands from shared memory, "HGMMA R24, R4,
        # gdesc[..], R24" takes A from registers.
        operands = instruction.operands.split(",")
        in_registers = len(operands) > 1 and not operands[1].strip().startswith("gdesc")
        return (m, n, k), dtype + ("/register A" if in_registers else "")
    digits = instruction.modifiers[0]
    return (int(digits[:2]), int(digits[2]), int(digits[3:])), dtype


def _tcgen05_shape(program: Program, position: int) -> tuple[tuple[int, int, int] | None, str]:
    """Shape and dtype from the instruction descriptor, a constant that a ``UMOV`` loads.

    Its fields (PTX ISA 9.0, "Instruction descriptor", kinds f16 and tf32): bits 7-9 the type of
    A (0 fp16, 1 bf16, 2 tf32), 17-22 N / 8, 24-28 M / 16.
    """
    register = re.search(r"idesc\[(UR\d+)\]", program.code[position].operands)
    if register is None:
        return None, "unknown"
    for earlier in reversed(program.code[:position]):
        if re.match(rf"{register.group(1)}\b", earlier.operands):
            value = re.search(r",\s*0x([0-9a-f]+)$", earlier.operands)
            if earlier.base != "UMOV" or value is None:
                return None, "unknown"
            descriptor = int(value.group(1), 16)
            dtype = {0: "f16", 1: "bf16", 2: "tf32"}.get(descriptor >> 7 & 7, "unknown")
            m, n = (descriptor >> 24 & 31) * 16, (descriptor >> 17 & 63) * 8
            if m not in (64, 128) or dtype == "unknown":
                # A pair of SMs shares the product (cta_group::2), or a type that has no rate here.
                return None, dtype
            return (m, n, 8 if dtype == "tf32" else 16), dtype
    return None, "unknown"
