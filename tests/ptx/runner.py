"""Modules and kernels as their users see them."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import data, warp
from .alu import DECODERS
from .machine import Decoded, Scheduler, Wave
from .memory import BASE, GlobalMemory, layout
from .operands import Context, register_dtype, unsupported
from .parse import Entry, Imm, Instruction, PtxError, Symbol, Variable, parse_module

Array = Any
#: Lanes that run at once where blocks allow; more only costs memory.
_LANES = 4096

#: Importing these registers their instructions.
_DECODER_MODULES = (data, warp)


@dataclass(frozen=True)
class Pointer:
    """A pointer ``offset`` bytes into an array."""

    array: Array
    offset: int = 0


class Module:
    """The kernels of a PTX text: ``module[name]``, or by a part of the name that only one has."""

    def __init__(self, text: str) -> None:
        self._parsers, self._variables = parse_module(text)
        self._kernels: dict[str, Kernel] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the kernels, in the order of the text."""
        return tuple(self._parsers)

    def __getitem__(self, name: str) -> Kernel:
        matches = [name] if name in self._parsers else [n for n in self._parsers if name in n]
        if len(matches) != 1:
            raise KeyError(f"{name!r} matches {matches} of the kernels {list(self._parsers)}")
        if matches[0] not in self._kernels:
            self._kernels[matches[0]] = Kernel(self._parsers[matches[0]](), self._variables)
        return self._kernels[matches[0]]


def load(text: str) -> Module:
    """The kernels of a PTX text.

    A kernel is parsed when it is first asked for, and its instructions are decoded when it is run:
    what the runner does not know is an error only where it is used.

    Raises:
        PtxError: the text holds no kernel, or its braces do not match.
    """
    return Module(text)


class Kernel:
    """One kernel; ``run`` executes it."""

    def __init__(self, entry: Entry, module_variables: list[Variable]) -> None:
        self.entry = entry
        self._module = module_variables
        self._offsets, self._size = layout(entry.params, 0)

    @property
    def name(self) -> str:
        """The kernel's (mangled) name."""
        return self.entry.name

    def run(
        self,
        grid: Sequence[int] | int,
        block: Sequence[int] | int,
        args: Sequence[Any],
        shared_bytes: int = 0,
        *,
        max_steps: int = 10_000_000,
    ) -> Counter[str]:
        """Run all blocks; arrays among the arguments are changed in place.

        Args:
            grid: blocks in x, y, z; trailing ones may be left out.
            block: threads per block, likewise.
            args: one for each parameter: a numpy array (its address; C-contiguous), a ``Pointer``
                into one, an int, a float, or the bytes of a struct. Parameters beyond these must be
                pointers and get null (Triton's scratch pointers).
            shared_bytes: dynamic shared memory.
            max_steps: instructions, counted once for all lanes of a wave, after which a kernel is
                taken not to end.

        Returns:
            How often each opcode's first part was executed, counted once for all lanes at it.

        Raises:
            PtxError: an access out of bounds or misaligned, a deadlock, a division by zero, an
                unknown instruction, and the like; the message names line, block and thread.
        """
        grid3, block3 = _three(grid, "grid"), _three(block, "block")
        threads = block3[0] * block3[1] * block3[2]
        if threads > 1024:
            raise PtxError(f"{threads} threads per block are more than 1024")
        required = self.entry.threads
        if required is not None and block3 != _three(required, "reqntid"):
            raise PtxError(f"the kernel requires {required} threads per block, not {block}")
        arrays = [a.array if isinstance(a, Pointer) else a for a in args]
        arrays = [a for a in arrays if isinstance(a, np.ndarray)]
        module_globals = [v for v in self._module if v.space in ("global", "const")]
        memory = GlobalMemory(arrays, module_globals)
        params = self._marshal(args, memory)

        used = {o.name for i in self.entry.code for o in _symbols(i)}
        shared = [v for v in self._module if v.space == "shared" and v.name in used]
        shared += [v for v in self.entry.variables if v.space == "shared"]
        local = [v for v in self.entry.variables if v.space == "local"]
        shared_at, shared_size = layout(shared, shared_bytes)
        local_at, local_size = layout(local, 0)
        spaces = {name: ("global", at) for name, at in memory.addresses.items()}
        spaces |= {name: ("shared", at) for name, at in shared_at.items()}
        spaces |= {name: ("local", at) for name, at in local_at.items()}
        spaces |= {name: ("param", at) for name, at in self._offsets.items()}

        code = [_decode(Context(self.entry, spaces), i) for i in self.entry.code]
        types = [register_dtype(kind) for kind in self.entry.registers]
        blocks = grid3[0] * grid3[1] * grid3[2]
        at_once = max(1, _LANES // threads)
        executed: Counter[str] = Counter()
        for first in range(0, blocks, at_once):
            numbers = np.arange(first, min(blocks, first + at_once))
            wave = Wave(
                self.entry, numbers, grid3, block3, memory, params, shared_size, local_size, types
            )
            Scheduler(wave, code, max_steps).run()
            executed += wave.executed
        memory.write_back()
        return executed

    def _marshal(self, args: Sequence[Any], memory: GlobalMemory) -> Array:
        """The bytes of the parameters."""
        params = self.entry.params
        if len(args) > len(params):
            raise PtxError(f"{len(args)} arguments for {len(params)} parameters of {self.name}")
        out = np.zeros(self._size, np.uint8)
        addresses = iter(memory.address_of)
        for number, param in enumerate(params):
            at, size = self._offsets[param.name] - BASE, param.size or 0
            if number >= len(args):
                if size != 8:
                    raise PtxError(f"no argument for parameter {number} of {self.name}")
                continue
            raw = _bytes_of_argument(args[number], size, addresses)
            if len(raw) != size:
                raise PtxError(f"argument {number} of {self.name} has {len(raw)} bytes, not {size}")
            out[at : at + size] = np.frombuffer(raw, np.uint8)
        return out


def _bytes_of_argument(argument: Any, size: int, addresses: Any) -> bytes:
    if isinstance(argument, np.ndarray | Pointer):
        offset = argument.offset if isinstance(argument, Pointer) else 0
        return int(next(addresses) + offset).to_bytes(8, "little")
    if isinstance(argument, bytes):
        return argument
    if isinstance(argument, np.generic):
        return argument.tobytes()
    if isinstance(argument, float):
        return struct.pack("<f" if size == 4 else "<d", argument)
    if isinstance(argument, int):
        return (argument & (1 << 8 * size) - 1).to_bytes(size, "little")
    raise PtxError(f"cannot pass a {type(argument).__name__} to a kernel")


def _three(value: Sequence[int] | int, what: str) -> tuple[int, int, int]:
    given = (value,) if isinstance(value, int) else tuple(value)
    if not 1 <= len(given) <= 3 or min(given) < 1:
        raise PtxError(f"{what} must be one to three positive numbers: {value}")
    x, y, z = (*given, 1, 1)[:3]
    return x, y, z


def _symbols(instruction: Instruction) -> list[Symbol]:
    """Names that an instruction's operands mention."""
    found = []
    for operand in instruction.operands:
        base = getattr(operand, "base", operand)
        if isinstance(base, Symbol):
            found.append(base)
    return found


def _decode(context: Context, i: Instruction) -> Decoded:
    labels, end = context.entry.labels, len(context.entry.code)
    try:
        if i.op == "bra":
            return Decoded(i, control="bra", target=labels[_label(i)])
        if i.op == "brx":
            positions = [labels[name] for name in context.entry.targets[_label(i, 1)]]
            index = context.read(i.operands[0], "u32")
            return Decoded(i, control="brx", target=(index, np.array(positions)))
        if i.op in ("ret", "exit"):
            return Decoded(i, control="ret", target=end)
        if i.op in ("bar", "barrier"):
            return _barrier(context, i)
        if i.op not in DECODERS:
            raise unsupported(i)
        return DECODERS[i.op](context, i)
    except PtxError as error:
        if str(error).startswith("line"):
            raise
        raise unsupported(i, str(error)) from None
    except (KeyError, StopIteration, IndexError, ValueError) as error:
        raise unsupported(i, f"is not understood ({error!r})") from None


def _label(i: Instruction, position: int = 0) -> str:
    operand = i.operands[position]
    if not isinstance(operand, Symbol):
        raise unsupported(i)
    return operand.name


def _barrier(context: Context, i: Instruction) -> Decoded:
    if i.has("warp"):
        return warp.barrier_warp(context, i)
    if not i.has("sync"):
        raise unsupported(i)
    number = context.read(i.operands[0], "u32")
    threads = context.read(i.operands[1] if len(i.operands) > 1 else Imm(0), "u32")
    return Decoded(i, control="bar", target=(number, threads))
