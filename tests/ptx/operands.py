"""Reading and writing operands: closures made once per instruction, run once per step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .machine import REGISTER_TYPES, Lanes, Wave
from .memory import LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW
from .parse import (
    SIZES,
    Address,
    Entry,
    Imm,
    Instruction,
    Operand,
    PtxError,
    Reg,
    Special,
    Symbol,
    Vector,
)

Array = Any
Read = Callable[[Wave, Lanes], Array]
Write = Callable[[Wave, Lanes, Array], None]

#: numpy's view of each type; 16-bit floats and packed pairs are handled as bits.
DTYPES: dict[str, np.dtype] = {
    **{f"u{n}": np.dtype(f"u{n // 8}") for n in (8, 16, 32, 64)},
    **{f"b{n}": np.dtype(f"u{n // 8}") for n in (8, 16, 32, 64)},
    **{f"s{n}": np.dtype(f"i{n // 8}") for n in (8, 16, 32, 64)},
    "f16": np.dtype("u2"),
    "bf16": np.dtype("u2"),
    "f16x2": np.dtype("u4"),
    "bf16x2": np.dtype("u4"),
    "tf32": np.dtype("f4"),
    "f32": np.dtype("f4"),
    "f64": np.dtype("f8"),
    "pred": np.dtype(bool),
}


def register_dtype(kind: str) -> np.dtype:
    """How a register of a type is stored: as unsigned bits, or as bool."""
    return np.dtype(bool) if kind == "pred" else np.dtype(REGISTER_TYPES[SIZES[kind]])


@dataclass(frozen=True)
class Context:
    """What an instruction's decoder may look up: its kernel and the addresses of symbols.

    ``spaces`` maps a symbol to its state space and its address within it.
    """

    entry: Entry
    spaces: dict[str, tuple[str, int]]

    def read(self, operand: Operand | None, kind: str) -> Read:
        """Values of an operand as ``DTYPES[kind]``: one a lane, or one for all.

        A wider register gives its low bits; a narrower one is extended with zeros.
        """
        dtype = DTYPES[kind]
        if isinstance(operand, Reg):
            return self._read_register(operand, dtype)
        if isinstance(operand, Imm):
            value = immediate(operand, dtype)
            return lambda wave, lanes: value
        if isinstance(operand, Special):
            name = operand.name

            def special(wave: Wave, lanes: Lanes) -> Array:
                try:
                    values = wave.special[name]
                except KeyError:
                    raise PtxError(f"special register {name} is not known") from None
                return values[lanes].astype(dtype)

            return special
        if isinstance(operand, Symbol):
            _, address = self.symbol(operand)
            value = np.asarray(address).astype(dtype)[()]
            return lambda wave, lanes: value
        raise PtxError(f"cannot read the operand {operand}")

    def _read_register(self, operand: Reg, dtype: np.dtype) -> Read:
        index = operand.index
        stored = register_dtype(self.entry.registers[index])
        if stored.kind == "b":
            if operand.negated:
                return lambda wave, lanes: ~wave.registers[index][lanes]
            return lambda wave, lanes: wave.registers[index][lanes]
        if stored.itemsize == dtype.itemsize:
            return lambda wave, lanes: wave.registers[index][lanes].view(dtype)
        bits = np.dtype(REGISTER_TYPES[dtype.itemsize])
        return lambda wave, lanes: wave.registers[index][lanes].astype(bits).view(dtype)

    def write(self, operand: Operand | None, kind: str) -> Write:
        """Store values of a type; into a wider register they are extended by sign or zeros."""
        if operand is None:
            return lambda wave, lanes, values: None
        if not isinstance(operand, Reg):
            raise PtxError(f"cannot write to {operand}")
        index, dtype = operand.index, DTYPES[kind]
        stored = register_dtype(self.entry.registers[index])
        if stored.kind == "b":

            def store_predicate(wave: Wave, lanes: Lanes, values: Array) -> None:
                wave.registers[index][lanes] = values

            return store_predicate
        bits = np.dtype(REGISTER_TYPES[dtype.itemsize])
        if stored.itemsize < dtype.itemsize:
            raise PtxError(f"a {kind} does not fit the register {operand.name}")
        signed = dtype.kind == "i"

        def store(wave: Wave, lanes: Lanes, values: Array) -> None:
            values = np.asarray(values)
            if values.dtype != dtype:
                raise PtxError(f"internal: {values.dtype} for a {kind}")
            # numpy extends by sign from signed types, with zeros from unsigned ones.
            wave.registers[index][lanes] = values.astype(stored) if signed else values.view(bits)

        return store

    def symbol(self, operand: Symbol) -> tuple[str, int]:
        """State space of a symbol and its address within the space."""
        if operand.name not in self.spaces:
            raise PtxError(f"unknown name {operand.name}")
        space, address = self.spaces[operand.name]
        return space, address + operand.offset

    def address(self, operand: Operand | None, space: str) -> Read:
        """Addresses of an operand within a state space, as int64 and one a lane."""
        if not isinstance(operand, Address):
            raise PtxError(f"{operand} is not an address")
        offset = operand.offset
        if isinstance(operand.base, Reg):
            size = register_dtype(self.entry.registers[operand.base.index]).itemsize
            base = self.read(operand.base, f"u{8 * size}")
            return lambda wave, lanes: base(wave, lanes).astype(np.int64) + offset
        if isinstance(operand.base, Symbol):
            of, fixed = self.symbol(operand.base)
            if space == "generic":
                fixed += WINDOWS[of]
        else:
            fixed = operand.base.value
        fixed += offset
        return lambda wave, lanes: np.full(count(wave, lanes), fixed, np.int64)


#: What is added to an address within a space to make it generic.
WINDOWS = {
    "global": 0,
    "const": 0,
    "shared": SHARED_WINDOW,
    "local": LOCAL_WINDOW,
    "param": PARAM_WINDOW,
}


def immediate(operand: Imm, dtype: np.dtype) -> Array:
    """A literal as a numpy scalar of a type."""
    if dtype.kind == "b":
        return np.bool_(operand.value)
    if operand.float_bits:
        stored = np.uint32(operand.value) if operand.float_bits == 32 else np.uint64(operand.value)
        value = stored.view(np.float32 if operand.float_bits == 32 else np.float64)
        if dtype.kind == "f":
            return value.astype(dtype)
        if dtype.itemsize == stored.itemsize:
            return stored.view(dtype)
        raise PtxError("a float literal where none fits")
    if dtype.kind == "f":
        raise PtxError("an integer literal where a float is wanted")
    bits = np.dtype(REGISTER_TYPES[dtype.itemsize])
    return np.array(operand.value & (1 << 8 * dtype.itemsize) - 1, bits).view(dtype)[()]


def count(wave: Wave, lanes: Lanes) -> int:
    """How many lanes there are."""
    return wave.lanes if isinstance(lanes, slice) else len(lanes)


def numbers(wave: Wave, lanes: Lanes) -> Array:
    """The lanes' numbers, also where all are meant."""
    return wave.lane_ids if isinstance(lanes, slice) else lanes


def items(operand: Operand | None) -> tuple[Operand | None, ...]:
    """The elements of a vector operand, or the operand itself."""
    return operand.items if isinstance(operand, Vector) else (operand,)


def unsupported(instruction: Instruction, why: str = "is not known to the runner") -> PtxError:
    """The error for what the runner does not implement."""
    return PtxError(f"line {instruction.line}: {instruction.text}: {why}")
