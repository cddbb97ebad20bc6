"""Instructions that a whole warp executes together: shuffles, votes, ldmatrix, mma.

Fragment layouts are those of the PTX ISA 9.0, section "Warp-level matrix instructions": with
``group = lane >> 2`` and ``t = lane & 3``, a lane holds row ``group`` (and ``group + 8``) of A and
of the accumulators, and column ``group`` of B.

mma sums its products in float64 and rounds once. The device adds in an order, and with cut-offs,
that NVIDIA does not publish; its result differs in the last bits of float32.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .alu import decodes
from .formats import bf16_to_f32, f16_of, f16_to_f32
from .machine import WARP, Decoded, Lanes, WarpStep, Wave
from .operands import Array, Context, items, unsupported
from .parse import Instruction, Operand, Pair, PtxError

_LANE = np.arange(WARP)
_GROUP, _T = _LANE >> 2, _LANE & 3


def _lanes_of(warps: Array) -> Array:
    """Numbers of all lanes of some warps, [warps * 32]."""
    return (warps[:, None] * WARP + _LANE).reshape(-1)


def _read(context: Context, operand: Operand | None, kind: str) -> Callable[..., Array]:
    """Reads an operand for all lanes of some warps, [warps, 32]."""
    read = context.read(operand, kind)

    def by_warp(wave: Wave, warps: Array) -> Array:
        values = np.broadcast_to(read(wave, _lanes_of(warps)), len(warps) * WARP)
        return values.reshape(-1, WARP)

    return by_warp


def _write(context: Context, operand: Operand | None, kind: str) -> Callable[..., None]:
    """Writes [warps, 32] values to the lanes that take part."""
    write = context.write(operand, kind)

    def by_warp(wave: Wave, warps: Array, active: Array, values: Array) -> None:
        chosen = active.reshape(-1)
        flat = np.ascontiguousarray(np.broadcast_to(values, active.shape)).reshape(-1)
        write(wave, _lanes_of(warps)[chosen], flat[chosen])

    return by_warp


def _collective(
    context: Context, i: Instruction, step: WarpStep, mask: Operand | None = None
) -> Decoded:
    members = None
    if mask is not None:
        read = context.read(mask, "u32")

        def members(wave: Wave, lanes: Lanes) -> Array:
            return np.broadcast_to(read(wave, lanes), wave.lanes)

    return Decoded(i, warp_step=step, members=members)


@decodes("shfl")
def _shfl(context: Context, i: Instruction) -> Decoded:
    """shfl.sync.mode.b32 d|p, a, b, c, mask; c holds the segment mask and the clamp."""
    if not i.has("sync") or len(i.operands) != 5:
        raise unsupported(i)
    mode = i.parts[2]
    d, a, b, c, mask = i.operands
    target, valid = (d.first, d.second) if isinstance(d, Pair) else (d, None)
    read_a, read_b, read_c = (_read(context, o, k) for o, k in ((a, "b32"), (b, "s32"), (c, "s32")))
    write, write_valid = _write(context, target, "b32"), _write(context, valid, "pred")

    def step(wave: Wave, warps: Array, active: Array) -> None:
        value, by, control = (r(wave, warps) for r in (read_a, read_b, read_c))
        by, clamp, segment = by & 31, control & 31, control >> 8 & 31
        upper = (_LANE & segment) | (clamp & ~segment)
        lower = _LANE & segment
        if mode == "up":
            source = _LANE - by
            inside = source >= upper
        else:
            source = {
                "down": lambda: _LANE + by,
                "bfly": lambda: _LANE ^ by,
                "idx": lambda: lower | (by & ~segment),
            }[mode]()
            inside = source <= upper
        source = np.where(inside, source, _LANE)
        if not np.take_along_axis(active, source, 1)[active].all():
            raise PtxError(f"line {i.line}: {i.text}: reads a lane that does not take part")
        write(wave, warps, active, np.take_along_axis(value, source, 1))
        write_valid(wave, warps, active, inside)

    return _collective(context, i, step, mask)


@decodes("vote")
def _vote(context: Context, i: Instruction) -> Decoded:
    if not i.has("sync"):
        raise unsupported(i)
    mode = i.parts[2]
    read = _read(context, i.operands[1], "pred")
    write = _write(context, i.operands[0], "b32" if mode == "ballot" else "pred")

    def step(wave: Wave, warps: Array, active: Array) -> None:
        yes = read(wave, warps)
        if mode == "ballot":
            bits = np.where(yes & active, np.uint64(1) << _LANE.astype(np.uint64), np.uint64(0))
            result = bits.sum(1).astype(np.uint32)
        elif mode == "all":
            result = (yes | ~active).all(1)
        elif mode == "any":
            result = (yes & active).any(1)
        elif mode == "uni":
            result = (yes | ~active).all(1) | ~(yes & active).any(1)
        else:
            raise unsupported(i)
        write(wave, warps, active, result[:, None])

    return _collective(context, i, step, i.operands[2])


@decodes("redux")
def _redux(context: Context, i: Instruction) -> Decoded:
    kind = i.types[-1]
    functions = {
        "add": (np.add, 0),
        "and": (np.bitwise_and, -1),
        "or": (np.bitwise_or, 0),
        "xor": (np.bitwise_xor, 0),
        "min": (np.minimum, None),
        "max": (np.maximum, None),
    }
    name = next((p for p in i.parts if p in functions), None)
    if name is None or kind not in ("u32", "s32", "b32"):
        raise unsupported(i)
    function = functions[name][0]
    read, write = _read(context, i.operands[1], kind), _write(context, i.operands[0], kind)

    def step(wave: Wave, warps: Array, active: Array) -> None:
        values = read(wave, warps)
        rows = [
            function.reduce(v[a], dtype=values.dtype) for v, a in zip(values, active, strict=True)
        ]
        write(wave, warps, active, np.array(rows, values.dtype)[:, None])

    return _collective(context, i, step, i.operands[2])


@decodes("elect")
def _elect(context: Context, i: Instruction) -> Decoded:
    """elect.sync d|p, mask: the lowest member is the leader."""
    d = i.operands[0]
    if not isinstance(d, Pair):
        raise unsupported(i)
    write, write_leads = _write(context, d.first, "b32"), _write(context, d.second, "pred")

    def step(wave: Wave, warps: Array, active: Array) -> None:
        leader = active.argmax(1)[:, None]
        write(wave, warps, active, leader.astype(np.uint32))
        write_leads(wave, warps, active, leader == _LANE)

    return _collective(context, i, step, i.operands[1])


def barrier_warp(context: Context, i: Instruction) -> Decoded:
    """bar.warp.sync: lanes wait for each other, and that is all."""
    return _collective(context, i, lambda wave, warps, active: None, i.operands[0])


# --- matrices ------------------------------------------------------------------------------------


def _matrices(i: Instruction) -> int:
    if not i.has("m8n8") or i.types != ("b16",):
        raise unsupported(i)
    return int(next(p for p in i.parts if p in ("x1", "x2", "x4"))[1:])


def _rows(context: Context, i: Instruction, operand: Operand | None) -> Callable[..., Array]:
    """Offsets, in 16-bit elements, of the eight rows of each matrix: [warps, matrices, 8, 8]."""
    matrices = _matrices(i)
    address = context.address(operand, "shared")
    if not i.has("shared", "shared::cta"):
        raise unsupported(i, "only matrices in shared memory are implemented")

    def rows(wave: Wave, warps: Array) -> Array:
        # Lane 8 m + r holds the address of row r of matrix m.
        lanes = (warps[:, None] * WARP + np.arange(8 * matrices)).reshape(-1)
        _, offsets = wave.space("shared", address(wave, lanes), 16, lanes)
        return offsets.reshape(-1, matrices, 8, 1) // 2 + np.arange(8)

    return rows


@decodes("ldmatrix")
def _ldmatrix(context: Context, i: Instruction) -> Decoded:
    rows = _rows(context, i, i.operands[1])
    writes = [_write(context, t, "b32") for t in items(i.operands[0])]
    transposed = i.has("trans")

    def step(wave: Wave, warps: Array, active: Array) -> None:
        matrices = wave.shared.bytes.view(np.uint16)[rows(wave, warps)]
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        for m, write in enumerate(writes):
            low, high = matrices[:, m, _GROUP, 2 * _T], matrices[:, m, _GROUP, 2 * _T + 1]
            pair = low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)
            write(wave, warps, active, pair)

    return _collective(context, i, step)


@decodes("stmatrix")
def _stmatrix(context: Context, i: Instruction) -> Decoded:
    rows = _rows(context, i, i.operands[0])
    reads = [_read(context, s, "b32") for s in items(i.operands[1])]
    transposed = i.has("trans")

    def step(wave: Wave, warps: Array, active: Array) -> None:
        where = rows(wave, warps)
        matrices = np.empty(where.shape, np.uint16)
        for m, read in enumerate(reads):
            pair = read(wave, warps)
            matrices[:, m, _GROUP, 2 * _T] = pair.astype(np.uint16)
            matrices[:, m, _GROUP, 2 * _T + 1] = (pair >> np.uint32(16)).astype(np.uint16)
        wave.shared.bytes.view(np.uint16)[where] = (
            matrices.swapaxes(2, 3) if transposed else matrices
        )

    return _collective(context, i, step)


@decodes("mma")
def _mma(context: Context, i: Instruction) -> Decoded:
    """mma.sync.aligned.m16n8kK.row.col.d.a.b.c: D = A B + C."""
    shape = next((p for p in i.parts if p.startswith("m16n8k")), None)
    if shape is None or not i.has("row") or not i.has("col") or len(i.types) != 4:
        raise unsupported(i)
    k = int(shape.removeprefix("m16n8k"))
    d_kind, a_kind, b_kind, c_kind = i.types
    widths = {"f16": (8, 16), "bf16": (8, 16), "tf32": (4, 8)}
    if a_kind != b_kind or k not in widths.get(a_kind, ()) or d_kind not in ("f16", "f32"):
        raise unsupported(i)
    d, a, b, c = (items(o) for o in i.operands)
    read_a, read_b = ([_read(context, r, "b32") for r in regs] for regs in (a, b))
    read_c = _accumulators(context, c, c_kind)
    write_d = _results(context, d, d_kind)
    elements = _tf32_fragments if a_kind == "tf32" else _packed_fragments(a_kind)

    def step(wave: Wave, warps: Array, active: Array) -> None:
        left = np.zeros((len(warps), 16, k))
        right = np.zeros((len(warps), k, 8))
        for n, read in enumerate(read_a):
            # Registers of A go down eight rows first, then along k.
            for column, value in elements(read(wave, warps), n >> 1):
                left[:, _GROUP + 8 * (n & 1), column] = value
        for n, read in enumerate(read_b):
            for row, value in elements(read(wave, warps), n):
                right[:, row, _GROUP] = value
        write_d(wave, warps, active, left @ right + read_c(wave, warps))

    return _collective(context, i, step)


def _packed_fragments(kind: str) -> Callable[[Array, int], list[tuple[Array, Array]]]:
    """Positions along k, and values, of a register with two 16-bit elements."""
    widen = f16_to_f32 if kind == "f16" else bf16_to_f32

    def fragments(register: Array, block: int) -> list[tuple[Array, Array]]:
        low = widen(register.astype(np.uint16))
        high = widen((register >> np.uint32(16)).astype(np.uint16))
        return [(8 * block + 2 * _T, low), (8 * block + 2 * _T + 1, high)]

    return fragments


def _tf32_fragments(register: Array, block: int) -> list[tuple[Array, Array]]:
    """Position along k, and value, of a register with one TF32: the low 13 bits are ignored."""
    cut = (register & np.uint32(0xFFFFE000)).view(np.float32)
    return [(4 * block + _T, cut)]


def _accumulators(
    context: Context, registers: tuple[Operand | None, ...], kind: str
) -> Callable[[Wave, Array], Array]:
    """Reads C as float64 [warps, 16, 8]."""
    reads = [_read(context, r, "f32" if kind == "f32" else "b32") for r in registers]

    def accumulators(wave: Wave, warps: Array) -> Array:
        c = np.zeros((len(warps), 16, 8))
        for n, read in enumerate(reads):
            value = read(wave, warps)
            if kind == "f32":
                c[:, _GROUP + 8 * (n >> 1), 2 * _T + (n & 1)] = value
            else:
                c[:, _GROUP + 8 * n, 2 * _T] = f16_to_f32(value.astype(np.uint16))
                high = (value >> np.uint32(16)).astype(np.uint16)
                c[:, _GROUP + 8 * n, 2 * _T + 1] = f16_to_f32(high)
        return c

    return accumulators


def _results(
    context: Context, registers: tuple[Operand | None, ...], kind: str
) -> Callable[[Wave, Array, Array, Array], None]:
    """Writes D from float64 [warps, 16, 8]."""
    writes = [_write(context, r, "f32" if kind == "f32" else "b32") for r in registers]

    def results(wave: Wave, warps: Array, active: Array, values: Array) -> None:
        for n, write in enumerate(writes):
            if kind == "f32":
                chosen = values[:, _GROUP + 8 * (n >> 1), 2 * _T + (n & 1)].astype(np.float32)
            else:
                halves = [
                    f16_of(values[:, _GROUP + 8 * n, 2 * _T + high]).astype(np.uint32)
                    for high in (0, 1)
                ]
                chosen = halves[0] | halves[1] << np.uint32(16)
            write(wave, warps, active, chosen)

    return results
