"""PTX text to kernels: parameters, variables, registers, and instructions with parsed operands.

Only syntax is handled here; what an instruction means is decided by the decoders, so a module may
hold kernels that cannot be run. PTX ISA 9.0 is the reference for names.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

#: Bytes of each fundamental type.
SIZES = {f"{letter}{bits}": bits // 8 for letter in "bus" for bits in (8, 16, 32, 64)}
SIZES |= {"f16": 2, "bf16": 2, "f32": 4, "tf32": 4, "f64": 8, "f16x2": 4, "bf16x2": 4, "pred": 1}


class PtxError(RuntimeError):
    """A kernel did what it must not do, or holds what the runner does not know.

    The message names the line of the PTX text, the instruction and, where there is one, the thread.
    """


@dataclass(frozen=True)
class Reg:
    """A register, by its number in the kernel; ``negated`` for ``!%p``."""

    index: int
    name: str
    negated: bool = False


@dataclass(frozen=True)
class Special:
    """A special register such as ``%tid.x``."""

    name: str


@dataclass(frozen=True)
class Imm:
    """A literal: an int, or the bits of a float with their width."""

    value: int
    float_bits: int = 0


@dataclass(frozen=True)
class Symbol:
    """The address of a variable, parameter or label, plus a byte offset."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Vector:
    """``{a, b, ...}``; None stands for the sink ``_``."""

    items: tuple[Operand | None, ...]


@dataclass(frozen=True)
class Address:
    """``[base + offset]``."""

    base: Reg | Symbol | Imm
    offset: int = 0


@dataclass(frozen=True)
class Pair:
    """``a|b``: two destinations."""

    first: Operand | None
    second: Operand | None


Operand = Reg | Special | Imm | Symbol | Vector | Address | Pair


@dataclass(frozen=True)
class Instruction:
    """One instruction; ``parts`` is the opcode split at its dots."""

    parts: tuple[str, ...]
    operands: tuple[Operand | None, ...]
    guard: Reg | None
    line: int
    text: str

    @property
    def op(self) -> str:
        """The first part of the opcode."""
        return self.parts[0]

    @property
    def types(self) -> tuple[str, ...]:
        """The types among the opcode's parts, in order."""
        return tuple(p for p in self.parts[1:] if p in SIZES)

    def has(self, *names: str) -> bool:
        """Whether any of these is among the opcode's modifiers."""
        return any(name in self.parts[1:] for name in names)


@dataclass(frozen=True)
class Variable:
    """A variable in a state space; ``size`` is None for dynamic shared memory."""

    name: str
    space: str
    align: int
    size: int | None
    data: bytes = b""


@dataclass
class Entry:
    """A kernel: what its registers are, what it executes and where its labels point."""

    name: str
    params: list[Variable]
    registers: list[str] = field(default_factory=list)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    targets: dict[str, tuple[str, ...]] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    threads: tuple[int, ...] | None = None


_VARIABLE = re.compile(
    r"\.(?P<space>shared|global|const|local|param)\s+(?:\.align\s+(?P<align>\d+)\s+)?"
    r"(?:\.attribute\([^)]*\)\s*)?\.(?P<type>\w+)\s+"
    r"(?:\.ptr\s*(?:\.\w+\s*)*(?:\d+\s*)?)?(?P<name>[\w$%.]+)\s*(?:\[(?P<count>\d*)\])?"
    r"\s*(?:=\s*(?P<data>.+))?$",
    re.DOTALL,
)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(?:\(([^)]*)\))?([^{]*)\{")
_BRACE = re.compile(r"[{}]")
_LABEL = re.compile(r"([\w$]+):(?!:)")
_LINE_DIRECTIVE = re.compile(r"\.(loc|file)\b")
_STATEMENT = re.compile(r"(?:@(!?)([\w$%]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)
_INT = re.compile(r"[-+]?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?$")


def strip_comments(text: str) -> str:
    """The text with comments blanked and every line break kept."""
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m.group().count("\n"), text, flags=re.DOTALL)
    return re.sub(r"//[^\n]*", "", text)


def parse_module(text: str) -> tuple[dict[str, Callable[[], Entry]], list[Variable]]:
    """What parses each kernel, by name, and the variables of the module."""
    text = strip_comments(text)
    entries: dict[str, Callable[[], Entry]] = {}
    spans: list[tuple[int, int]] = []
    for match in _ENTRY.finditer(text):
        end = _closing(text, match.end() - 1)
        spans.append((match.start(), end))
        entries[match.group(1)] = functools.partial(_entry, text, match, end)
    if not entries:
        raise PtxError("no .entry in this PTX")
    functions = re.finditer(r"\.func\b[^;{]*\{", text)
    spans += [(match.start(), _closing(text, match.end() - 1)) for match in functions]
    outside = text
    for start, end in sorted(spans, reverse=True):
        outside = outside[:start] + outside[end + 1 :]
    found = (variable(statement.strip()) for statement in outside.split(";"))
    return entries, [v for v in found if v is not None]


def _entry(text: str, head: re.Match[str], end: int) -> Entry:
    return _Body(text, head, end).entry


def _closing(text: str, start: int) -> int:
    """Position of the brace that closes the one at ``start``."""
    depth = 0
    for brace in _BRACE.finditer(text, start):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return brace.start()
    raise PtxError(f"line {text.count(chr(10), 0, start) + 1}: unbalanced brace")


def variable(text: str) -> Variable | None:
    """A variable or parameter declaration; None if the text is something else."""
    start = re.search(r"\.(shared|global|const|local|param)\b", text)
    if start is None:
        return None
    match = _VARIABLE.match(text[start.start() :].strip())
    if match is None:
        raise PtxError(f"cannot parse the declaration {text!r}")
    item = SIZES[match["type"]]
    count = match["count"]
    data = _initial(match["data"], match["type"]) if match["data"] else b""
    size: int | None = item
    if count is not None:
        # "name[]" without data is dynamic shared memory.
        size = item * int(count) if count else (len(data) or None)
    return Variable(match["name"], match["space"], int(match["align"] or item), size, data)


def _initial(text: str, kind: str) -> bytes:
    out = b""
    for word in text.strip().strip("{}").split(","):
        literal = _literal(word.strip())
        if literal is None:
            raise PtxError(f"initial value {word.strip()!r} is not a literal")
        out += (literal.value & (1 << 8 * SIZES[kind]) - 1).to_bytes(SIZES[kind], "little")
    return out


@functools.lru_cache(maxsize=4096)
def _literal(word: str) -> Imm | None:
    if _INT.match(word):
        return Imm(int(word.rstrip("U"), 0))
    if re.match(r"0[fF][0-9a-fA-F]{8}$", word):
        return Imm(int(word[2:], 16), 32)
    if re.match(r"0[dD][0-9a-fA-F]{16}$", word):
        return Imm(int(word[2:], 16), 64)
    if re.match(r"[-+]?\d*\.\d*(?:[eE][-+]?\d+)?$", word) and any(map(str.isdigit, word)):
        return Imm(struct.unpack("<Q", struct.pack("<d", float(word)))[0], 64)
    return Imm(32) if word == "WARP_SZ" else None


def split(text: str, separator: str = ",") -> list[str]:
    """Parts between separators that stand outside of brackets."""
    if not any(bracket in text for bracket in "{[("):
        return [part.strip() for part in text.split(separator)] if text else []
    parts, depth, part = [], 0, ""
    for letter in text:
        depth += (letter in "{[(") - (letter in "}])")
        if letter == separator and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += letter
    if part.strip():
        parts.append(part.strip())
    return parts


class _Body:
    """Reads the statements of one kernel; registers live in the braces that declare them."""

    def __init__(self, text: str, head: re.Match[str], end: int) -> None:
        params = []
        for declaration in split(head.group(2) or ""):
            param = variable(declaration)
            if param is None:
                raise PtxError(f"cannot parse the parameter {declaration!r}")
            params.append(param)
        self.entry = Entry(head.group(1), params)
        threads = re.search(r"\.reqntid\s+([\d,\s]+)", head.group(3))
        if threads:
            self.entry.threads = tuple(map(int, threads.group(1).split(",")))
        self.scopes: list[dict[str, Reg]] = [{}]
        self._statements(text, head.end(), end)

    def _statements(self, text: str, position: int, end: int) -> None:
        line = text.count("\n", 0, position) + 1
        while position < end:
            letter = text[position]
            if letter == "\n":
                line += 1
                position += 1
            elif letter.isspace() or letter == ";":
                position += 1
            elif letter == "{":
                self.scopes.append({})
                position += 1
            elif letter == "}":
                self.scopes.pop()
                position += 1
            elif _LINE_DIRECTIVE.match(text, position):
                position = text.find("\n", position)
            elif label := _LABEL.match(text, position):
                self.entry.labels[label.group(1)] = len(self.entry.code)
                position = label.end()
            else:
                stop = text.find(";", position, end)
                if stop < 0:
                    raise PtxError(f"line {line}: statement without a semicolon")
                statement = text[position:stop]
                self._statement(" ".join(statement.split()), line)
                line += statement.count("\n")
                position = stop + 1

    def _statement(self, text: str, line: int) -> None:
        if text.startswith(".reg"):
            self._declare(text)
        elif text.startswith(".branchtargets"):
            # The label of the list is the one just read.
            name = list(self.entry.labels)[-1]
            del self.entry.labels[name]
            self.entry.targets[name] = tuple(split(text.removeprefix(".branchtargets")))
        elif text.startswith(".pragma"):
            return
        elif text.startswith("."):
            declared = variable(text)
            if declared is None:
                raise PtxError(f"line {line}: unknown directive {text!r}")
            self.entry.variables.append(declared)
        else:
            match = _STATEMENT.match(text)
            if match is None:
                raise PtxError(f"line {line}: cannot parse {text!r}")
            negated, guard, opcode, operands = match.groups()
            self.entry.code.append(
                Instruction(
                    tuple(opcode.split(".")),
                    tuple(self._operand(o, line) for o in split(operands)),
                    self._register(guard, bool(negated), line) if guard else None,
                    line,
                    text,
                )
            )

    def _declare(self, text: str) -> None:
        match = re.match(r"\.reg\s+\.(\w+)\s+(.+)$", text)
        if match is None:
            raise PtxError(f"cannot parse {text!r}")
        for item in split(match.group(2)):
            many = re.match(r"([\w$%]+)<(\d+)>$", item)
            names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [item]
            for name in names:
                self.scopes[-1][name] = Reg(len(self.entry.registers), name)
                self.entry.registers.append(match.group(1))

    def _find(self, name: str) -> Reg | None:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), None)

    def _register(self, name: str, negated: bool, line: int) -> Reg:
        found = self._find(name)
        if found is None:
            raise PtxError(f"line {line}: unknown register {name}")
        return Reg(found.index, name, negated)

    def _operand(self, text: str, line: int) -> Operand | None:
        if text == "_":
            return None
        if text[0] == "{":
            return Vector(tuple(self._operand(t, line) for t in split(text.strip("{} "))))
        if text[0] == "[":
            return self._address(text.strip("[] "), line)
        if "|" in text:
            first, second = split(text, "|")
            return Pair(self._operand(first, line), self._operand(second, line))
        literal = _literal(text)
        if literal is not None:
            return literal
        if text[0] == "!":
            return self._register(text[1:], True, line)
        found = self._find(text)
        if found is not None:
            return found
        if text[0] == "%":
            return Special(text)
        name, _, offset = text.partition("+")
        return Symbol(name.strip(), int(offset or "0", 0))

    def _address(self, text: str, line: int) -> Address:
        match = re.match(r"([\w$%]+)\s*(?:\+\s*([-+]?\w+)|(-\s*\w+))?$", text)
        if match is None:
            raise PtxError(f"line {line}: cannot parse the address [{text}]")
        offset = int((match[2] or match[3] or "0").replace(" ", ""), 0)
        base = self._operand(match[1], line)
        if not isinstance(base, Reg | Symbol | Imm):
            raise PtxError(f"line {line}: cannot use {match[1]} as an address")
        return Address(base, offset)
