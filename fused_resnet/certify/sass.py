"""Machine code as a control-flow graph: what ``nvdisasm`` prints, parsed.

A loop is a natural loop: a branch back to a block that dominates it, and every block that reaches
the branch without passing the loop's head (Aho, Lam, Sethi, Ullman, "Compilers", section 9.6). So
the out-of-line parts of a loop (a barrier's retry, say) belong to it, wherever the assembler put
them, and a backward jump of cold code into the middle of the kernel does not make a loop.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

_SECTION = re.compile(r"^\s*\.section\s+\.text\.([^,\s]+)", re.MULTILINE)
_LABEL = re.compile(r"(\.L[\w$.]+):")
_INSTRUCTION = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(@!?U?PT?\w*\s+)?([A-Z][\w.]*)\s*([^;]*);"
)
_TARGET = re.compile(r"`\((\.L[\w$.]+)\)")
#: nvcc also leaves loops by CALL.REL.NOINC to a label behind them; a real call falls through.
_JUMPS = ("BRA", "BRX", "CALL", "JMP")
_ENDS = ("EXIT", "RET", "KILL", "BPT", "RTT", "LONGJMP")


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: ``LDG.E.128 R4, [R2.64]`` has the opcode ``LDG.E.128``."""

    opcode: str
    operands: str
    predicated: bool

    @property
    def base(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".", 1)[0]

    @property
    def modifiers(self) -> tuple[str, ...]:
        """The opcode's modifiers, in order."""
        return tuple(self.opcode.split(".")[1:])

    @property
    def target(self) -> str | None:
        """The label that a branch goes to."""
        match = _TARGET.search(self.operands)
        return match.group(1) if match else None

    @property
    def access_bytes(self) -> int:
        """Bytes that one thread moves with this load, store or copy; 4 without a modifier."""
        for modifier in self.modifiers:
            if modifier in ("256", "128", "64", "32"):
                return int(modifier) // 8
            if modifier in ("U8", "S8"):
                return 1
            if modifier in ("U16", "S16"):
                return 2
        return 4


@dataclass(frozen=True)
class Loop:
    """Positions of a loop's instructions within its program, ascending."""

    head: int
    body: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """The machine code of one kernel."""

    name: str
    code: tuple[Instruction, ...]
    labels: dict[str, int]

    def __hash__(self) -> int:
        return hash((self.name, self.code))

    @functools.cached_property
    def loops(self) -> tuple[Loop, ...]:
        """Every natural loop, the inner ones before the outer ones that contain them."""
        return _natural_loops(self.code, self.labels)


def parse(disassembly: str) -> tuple[int, dict[str, Program]]:
    """Compute capability and kernels of the output of ``nvdisasm -c``.

    Raises:
        ValueError: the text holds no target architecture or no code.
    """
    # Triton's older ptxas writes the architecture into the ELF flags instead of a directive.
    target = re.search(r"\.target\s+sm_(\d+)|EF_CUDA_SM(\d+)", disassembly)
    sections = list(_SECTION.finditer(disassembly))
    if target is None or not sections:
        raise ValueError("no machine code in this disassembly")
    ends = [m.start() for m in sections[1:]] + [len(disassembly)]
    programs = {}
    for match, end in zip(sections, ends, strict=True):
        name = match.group(1)
        programs[name] = _program(name, disassembly[match.end() : end])
    return int(target.group(1) or target.group(2)), programs


def _program(name: str, text: str) -> Program:
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        stripped = line.strip()
        label = _LABEL.match(stripped)
        if label:
            labels[label.group(1)] = len(code)
            continue
        match = _INSTRUCTION.match(stripped)
        if match:
            predicate, opcode, operands = match.groups()
            if predicate is not None and predicate.strip() in ("@!PT", "@!UPT"):
                # ptxas pads with "@!PT LDS RZ, [RZ]", which takes an issue slot and does nothing.
                opcode, operands, predicate = "NOP", "", None
            code.append(Instruction(opcode, operands.strip(), predicate is not None))
    return Program(name, tuple(code), labels)


def _successors(
    code: tuple[Instruction, ...], labels: dict[str, int], starts: list[int]
) -> list[list[int]]:
    """Successor blocks of each basic block; blocks are numbered by their place in ``starts``."""
    block_at = {start: number for number, start in enumerate(starts)}
    result = []
    for number, start in enumerate(starts):
        end = starts[number + 1] if number + 1 < len(starts) else len(code)
        last = code[end - 1] if end > start else None
        following: list[int] = []
        falls = True
        if last is not None and last.base in _JUMPS:
            # An indirect jump lists its targets: (*"BRANCH_TARGETS .L_x_1,.L_x_2"*).
            indirect = re.findall(r"\.L\w+", last.operands) if last.base == "BRX" else []
            for label in indirect or [last.target or ""]:
                position = labels.get(label)
                if position is not None and position in block_at:
                    following.append(block_at[position])
            # "BRA.U !UP0, target" and "BRA P0, target" carry their condition as an operand.
            falls = last.predicated or re.match(r"!?U?P\d", last.operands) is not None
            falls = falls or "DIV" in last.modifiers or "CONV" in last.modifiers
            falls = falls or last.base == "CALL"
        elif last is not None and last.base in _ENDS:
            falls = last.predicated
        if falls and number + 1 < len(starts):
            following.append(number + 1)
        result.append(following)
    return result


def _natural_loops(code: tuple[Instruction, ...], labels: dict[str, int]) -> tuple[Loop, ...]:
    if not code:
        return ()
    cuts = {0} | {position for position in labels.values() if position < len(code)}
    for position, instruction in enumerate(code[:-1]):
        if instruction.base in (*_JUMPS, *_ENDS):
            cuts.add(position + 1)
    starts = sorted(cuts)
    successors = _successors(code, labels, starts)
    predecessors: list[list[int]] = [[] for _ in starts]
    for block, following in enumerate(successors):
        for other in following:
            predecessors[other].append(block)

    dominators = _dominators(successors, predecessors)
    blocks_of_head: dict[int, set[int]] = {}
    for block, following in enumerate(successors):
        for head in following:
            if head not in dominators[block]:
                continue
            body = blocks_of_head.setdefault(head, {head})
            pending = [block]
            while pending:
                other = pending.pop()
                if other not in body:
                    body.add(other)
                    pending += predecessors[other]
    loops = []
    for head, body in blocks_of_head.items():
        positions: list[int] = []
        for block in sorted(body):
            end = starts[block + 1] if block + 1 < len(starts) else len(code)
            positions += range(starts[block], end)
        loops.append(Loop(starts[head], tuple(positions)))
    return tuple(sorted(loops, key=lambda loop: (len(loop.body), loop.head)))


def _dominators(successors: list[list[int]], predecessors: list[list[int]]) -> list[set[int]]:
    """Dominators of each block; unreachable blocks have none."""
    order: list[int] = []
    seen = {0}
    stack = [(0, iter(successors[0]))]
    while stack:
        block, rest = stack[-1]
        following = next((other for other in rest if other not in seen), None)
        if following is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(successors[following])))
    order.reverse()
    dominators: list[set[int]] = [set() for _ in successors]
    dominators[0] = {0}
    everything = set(order)
    for block in order[1:]:
        dominators[block] = set(everything)
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            known = [dominators[other] for other in predecessors[block] if other in seen]
            now = set.intersection(*known) | {block}
            if now != dominators[block]:
                dominators[block] = now
                changed = True
    return dominators
