"""Moving data: mov, ld, st, cvta, cp.async, atomics; and what has no effect here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .alu import decodes
from .machine import Decoded, Lanes, Wave
from .memory import AccessError
from .operands import (
    DTYPES,
    WINDOWS,
    Context,
    count,
    items,
    numbers,
    unsupported,
)
from .parse import SIZES, Imm, Instruction, PtxError, Reg, Vector

#: Hints, orders and fences: this machine runs one instruction at a time, so all order is kept.
NO_EFFECT = (
    "applypriority",
    "createpolicy",
    "discard",
    "fence",
    "griddepcontrol",
    "membar",
    "nanosleep",
    "pmevent",
    "prefetch",
    "prefetchu",
)


@decodes(*NO_EFFECT)
def _nothing(context: Context, i: Instruction) -> Decoded:
    return Decoded(i)


@decodes("mov")
def _mov(context: Context, i: Instruction) -> Decoded:
    kind = i.types[-1]
    to, source = i.operands
    if isinstance(to, Vector):
        return _unpack(context, i, kind)
    if isinstance(source, Vector):
        return _pack(context, i, kind)
    read, write = context.read(source, kind), context.write(to, kind)
    return Decoded(i, step=lambda wave, lanes: write(wave, lanes, read(wave, lanes)))


def _unpack(context: Context, i: Instruction, kind: str) -> Decoded:
    """mov.b32 {a, b}, c: the lowest bits to the first."""
    targets = items(i.operands[0])
    bits = 8 * SIZES[kind] // len(targets)
    part = DTYPES[f"u{bits}"]
    read = context.read(i.operands[1], kind)
    writes = [context.write(t, f"b{bits}") for t in targets]

    def step(wave: Wave, lanes: Lanes) -> None:
        value = read(wave, lanes)
        parts = np.array(
            [(value >> value.dtype.type(bits * n)).astype(part) for n in range(len(writes))]
        )
        for write, one in zip(writes, parts, strict=True):
            write(wave, lanes, one)

    return Decoded(i, step=step)


def _pack(context: Context, i: Instruction, kind: str) -> Decoded:
    sources = items(i.operands[1])
    bits = 8 * SIZES[kind] // len(sources)
    reads = [context.read(s, f"u{bits}") for s in sources]
    write, dtype = context.write(i.operands[0], kind), DTYPES[kind]

    def step(wave: Wave, lanes: Lanes) -> None:
        value = dtype.type(0)
        for n, read in enumerate(reads):
            value = value | np.asarray(read(wave, lanes)).astype(dtype) << dtype.type(bits * n)
        write(wave, lanes, np.asarray(value))

    return Decoded(i, step=step)


@decodes("cvta")
def _cvta(context: Context, i: Instruction) -> Decoded:
    kind = i.types[-1]
    space = space_of(i)
    if space == "generic" or kind != "u64":
        raise unsupported(i)
    window = np.uint64(WINDOWS[space])
    read, write = context.read(i.operands[1], kind), context.write(i.operands[0], kind)
    if i.has("to"):
        return Decoded(i, step=lambda w, lanes: write(w, lanes, read(w, lanes) - window))
    return Decoded(i, step=lambda w, lanes: write(w, lanes, read(w, lanes) + window))


def space_of(i: Instruction) -> str:
    """The state space in an opcode; ``generic`` where there is none."""
    for part in i.parts[1:]:
        name = part.split("::")[0]
        if name in WINDOWS:
            if part == "shared::cluster":
                raise unsupported(i, "clusters are not implemented")
            return name
    return "generic"


def _width(i: Instruction) -> int:
    return next((int(p[1:]) for p in i.parts if p in ("v2", "v4", "v8")), 1)


@decodes("ld", "ldu")
def _ld(context: Context, i: Instruction) -> Decoded:
    kind, space = i.types[-1], space_of(i)
    targets = items(i.operands[0])
    if len(targets) != _width(i) or kind not in DTYPES:
        raise unsupported(i)
    dtype, size = DTYPES[kind], SIZES[kind] * len(targets)
    address = context.address(i.operands[1], space)
    writes = [context.write(t, kind) for t in targets]

    def step(wave: Wave, lanes: Lanes) -> None:
        where = address(wave, lanes)
        data, offsets = wave.space(space, where, size, lanes)
        values = data.view(dtype)
        first = offsets // dtype.itemsize
        # A destination may also be the address, so everything is read first.
        loaded = [values[first + n] for n in range(len(writes))]
        for write, value in zip(writes, loaded, strict=True):
            write(wave, lanes, value)

    return Decoded(i, step=step)


@decodes("st")
def _st(context: Context, i: Instruction) -> Decoded:
    kind, space = i.types[-1], space_of(i)
    sources = items(i.operands[1])
    if len(sources) != _width(i) or kind not in DTYPES or space in ("const", "param"):
        raise unsupported(i)
    dtype, size = DTYPES[kind], SIZES[kind] * len(sources)
    address = context.address(i.operands[0], space)
    reads = [context.read(s, kind) for s in sources]

    def step(wave: Wave, lanes: Lanes) -> None:
        data, offsets = wave.space(space, address(wave, lanes), size, lanes)
        values = data.view(dtype)
        first = offsets // dtype.itemsize
        for n, read in enumerate(reads):
            values[first + n] = read(wave, lanes)

    return Decoded(i, step=step)


@decodes("cp")
def _cp(context: Context, i: Instruction) -> Decoded:
    if i.parts[1] != "async" or i.has("bulk", "mbarrier"):
        raise unsupported(i)
    if i.has("commit_group"):
        return Decoded(i, step=lambda w, lanes: w.copies.commit(numbers(w, lanes)))
    if i.has("wait_all"):

        def wait_all(wave: Wave, lanes: Lanes) -> None:
            wave.copies.commit(numbers(wave, lanes))
            wave.copies.wait(numbers(wave, lanes), 0, wave)

        return Decoded(i, step=wait_all)
    if i.has("wait_group"):
        allowed = i.operands[0]
        if not isinstance(allowed, Imm):
            raise unsupported(i)
        return Decoded(i, step=lambda w, lanes: w.copies.wait(numbers(w, lanes), allowed.value, w))
    return _cp_async(context, i)


def _cp_async(context: Context, i: Instruction) -> Decoded:
    """cp.async dst, src, size, src-size: the bytes behind src-size are filled with zeros."""
    amount = i.operands[2]
    if not isinstance(amount, Imm) or not i.has("shared", "shared::cta"):
        raise unsupported(i)
    size = amount.value
    if size not in ((16,) if i.has("cg") else (4, 8, 16)):
        raise unsupported(i, f"cannot copy {size} bytes")
    to, source = context.address(i.operands[0], "shared"), context.address(i.operands[1], "global")
    fourth = i.operands[3] if len(i.operands) > 3 else None
    ignore = isinstance(fourth, Reg) and context.entry.registers[fourth.index] == "pred"
    policy = i.has("L2::cache_hint") and len(i.operands) == 4
    limit = None if fourth is None or policy else context.read(fourth, "pred" if ignore else "u32")

    def step(wave: Wave, lanes: Lanes) -> None:
        lanes = numbers(wave, lanes)
        _, offsets = wave.space("shared", to(wave, lanes), size, lanes)
        where = source(wave, lanes)
        have = np.full(len(lanes), size, np.int64)
        if limit is not None:
            given = np.broadcast_to(limit(wave, lanes), len(lanes))
            have = np.where(given, 0, size) if ignore else given.astype(np.int64)
        if (have > size).any():
            raise AccessError(f"src-size is over {size}", int((have > size).argmax()))
        reads = np.flatnonzero(have > 0)
        start = np.zeros(len(lanes), np.int64)
        if reads.size:
            try:
                _, start[reads] = wave.space("global", where[reads], size, lanes[reads])
            except AccessError as error:
                raise AccessError(str(error), int(reads[error.lane])) from None
        byte = np.arange(size)
        valid = byte < have[:, None]
        target = offsets[:, None] + byte
        # In flight: whoever reads before the wait sees NaN.
        wave.shared.bytes[target] = 0xFF
        wave.copies.issue(lanes, target, np.where(valid, start[:, None] + byte, 0), valid)

    return Decoded(i, step=step)


_ATOMIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda old, x: old + x,
    "min": min,
    "max": max,
    "and": lambda old, x: old & x,
    "or": lambda old, x: old | x,
    "xor": lambda old, x: old ^ x,
    "exch": lambda old, x: x,
    "inc": lambda old, x: old + type(x)(1) if old < x else type(x)(0),
}


@decodes("atom", "red")
def _atom(context: Context, i: Instruction) -> Decoded:
    """Lane after lane, in ascending order: one of the orders that the device may choose."""
    kind, space = i.types[-1], space_of(i)
    name = next((p for p in i.parts[1:] if p in _ATOMIC or p == "cas"), None)
    if name is None or kind not in DTYPES or kind.startswith(("f16", "bf16")) or _width(i) > 1:
        raise unsupported(i)
    dtype, returns = DTYPES[kind], i.op == "atom"
    operands = i.operands[1:] if returns else i.operands
    address = context.address(operands[0], space)
    reads = [context.read(o, kind) for o in operands[1:]]
    write = context.write(i.operands[0] if returns else None, kind)

    def step(wave: Wave, lanes: Lanes) -> None:
        n = count(wave, lanes)
        data, offsets = wave.space(space, address(wave, lanes), dtype.itemsize, lanes)
        values, at = data.view(dtype), offsets // dtype.itemsize
        arguments = [np.broadcast_to(read(wave, lanes), n) for read in reads]
        old = np.empty(n, dtype)
        for lane in range(n):
            old[lane] = before = values[at[lane]]
            if name == "cas":
                compare, new = (a[lane] for a in arguments)
                values[at[lane]] = new if before == compare else before
            else:
                values[at[lane]] = _ATOMIC[name](before, arguments[0][lane])
        write(wave, lanes, old)

    return Decoded(i, step=step)


@decodes("trap", "brkpt")
def _trap(context: Context, i: Instruction) -> Decoded:
    def step(wave: Wave, lanes: Lanes) -> None:
        raise PtxError("the kernel traps")

    return Decoded(i, step=step)


@decodes("activemask")
def _activemask(context: Context, i: Instruction) -> Decoded:
    write = context.write(i.operands[0], "b32")

    def step(wave: Wave, lanes: Lanes) -> None:
        bits = np.zeros(wave.lanes, np.uint64)
        bits[lanes] = np.uint64(1) << (numbers(wave, lanes) % 32).astype(np.uint64)
        masks = bits.reshape(-1, 32).sum(1).astype(np.uint32)
        write(wave, lanes, np.repeat(masks, 32)[lanes])

    return Decoded(i, step=step)
