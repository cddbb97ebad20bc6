"""The machine: lanes, registers, spaces, and the scheduler that moves lanes through a kernel.

One lane is one thread; all lanes of several blocks run at once, each numpy operation acting on
those that stand at the same instruction. Of the groups of lanes at different instructions the one
furthest behind runs first, which brings lanes that diverged together again. Once in a while the one
furthest ahead gets a turn, so that a lane that spins does not keep the one it waits for from
running.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from .memory import (
    LOCAL_WINDOW,
    PARAM_WINDOW,
    SHARED_WINDOW,
    AccessError,
    GlobalMemory,
    PerUnit,
)
from .parse import Entry, Instruction, PtxError

Array = Any
#: Lanes an instruction acts on: all of them, or those of these numbers (ascending).
Lanes = Any
Step = Callable[["Wave", Lanes], None]
#: A step that needs whole warps: warps, and which of their 32 lanes take part.
WarpStep = Callable[["Wave", Array, Array], None]

WARP = 32
_ALL = slice(None)
#: Every how many turns the group furthest ahead runs instead of the one furthest behind.
_FAIRNESS = 64

REGISTER_TYPES = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Wave:
    """Blocks that run at the same time, and all that they can see."""

    def __init__(
        self,
        entry: Entry,
        blocks: Array,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        memory: GlobalMemory,
        params: Array,
        shared_bytes: int,
        local_bytes: int,
        register_types: list[np.dtype],
    ) -> None:
        threads = block[0] * block[1] * block[2]
        # Blocks are padded to whole warps; padding lanes have exited before they start.
        self.per_block = -(-threads // WARP) * WARP
        self.lanes = len(blocks) * self.per_block
        thread = np.tile(np.arange(self.per_block), len(blocks))
        self.exists = thread < threads
        self.block_number = np.repeat(np.arange(len(blocks)), self.per_block)
        number = np.repeat(blocks, self.per_block)
        self.lane_ids = np.arange(self.lanes)
        self.registers = [
            # Nothing has been written yet: NaN in every float format, False in a predicate.
            np.zeros(self.lanes, bool) if t.kind == "b" else np.full(self.lanes, ~t.type(0), t)
            for t in register_types
        ]
        self.shared = PerUnit("shared", len(blocks), shared_bytes, 0xFF)
        self.local = PerUnit("local", self.lanes, local_bytes, 0xFF)
        self.params = PerUnit("param", 1, params.size, 0)
        self.params.bytes[: params.size] = params
        self.memory = memory
        self.special = _special(thread, number, grid, block)
        self.copies = AsyncCopies(self.lanes)
        self.executed: Counter[str] = Counter()

    def space(self, name: str, addresses: Array, size: int, lanes: Lanes) -> tuple[Array, Array]:
        """Bytes of a state space and offsets into them, for accesses of ``size`` bytes.

        ``name`` is global, shared, local, param or generic; const variables live in global memory.
        """
        if name == "generic":
            name, addresses = _generic(addresses)
        if name == "shared":
            unit, space = self.block_number[lanes], self.shared
        elif name == "local":
            unit, space = self.lane_ids[lanes], self.local
        elif name == "param":
            unit, space = np.zeros(1, np.int64), self.params
        else:
            return self.memory.bytes, self.memory.locate(addresses, size)
        return space.bytes, space.locate(addresses, size, unit)


class AsyncCopies:
    """cp.async of every lane: issued, committed in groups, and landed only when waited for."""

    def __init__(self, lanes: int) -> None:
        self.groups = np.zeros(lanes, np.int64)
        self.pending: list[tuple[Array, Array, Array, Array, Array]] = []

    def issue(self, lanes: Array, to: Array, source: Array, valid: Array) -> None:
        """Bytes ``source`` [lanes, size] go to offsets ``to``; those not ``valid`` become zero."""
        self.pending.append((lanes, self.groups[lanes], to, source, valid))

    def commit(self, lanes: Array) -> None:
        """Close the group that the lanes' latest copies belong to."""
        self.groups[lanes] += 1

    def wait(self, lanes: Array, allowed: int, wave: Wave) -> None:
        """Land all groups of these lanes but the ``allowed`` latest."""
        waiting = np.zeros(wave.lanes, bool)
        waiting[lanes] = True
        left = []
        for owner, group, to, source, valid in self.pending:
            ready = waiting[owner] & (group < self.groups[owner] - allowed)
            if ready.any():
                data = np.where(valid[ready], wave.memory.bytes[source[ready]], 0)
                wave.shared.bytes[to[ready]] = data
            if not ready.all():
                keep = ~ready
                left.append((owner[keep], group[keep], to[keep], source[keep], valid[keep]))
        self.pending = left


def _generic(addresses: Array) -> tuple[str, Array]:
    """The space that generic addresses lie in, and the addresses within it."""
    for name, window in (
        ("param", PARAM_WINDOW),
        ("local", LOCAL_WINDOW),
        ("shared", SHARED_WINDOW),
    ):
        inside = addresses >= window
        if inside.all():
            return name, addresses - window
        if inside.any():
            raise AccessError("lanes use different spaces in one access", int(inside.argmax()))
    return "global", addresses


def _special(thread: Array, number: Array, grid: Any, block: Any) -> dict[str, Array]:
    """Special registers, one value a lane."""
    values = {
        "%tid": (thread % block[0], thread // block[0] % block[1], thread // block[0] // block[1]),
        "%ctaid": (number % grid[0], number // grid[0] % grid[1], number // grid[0] // grid[1]),
        "%ntid": block,
        "%nctaid": grid,
    }
    lane = thread % WARP
    out = {
        f"{name}.{axis}": np.broadcast_to(np.asarray(v, np.uint32), thread.shape)
        for name, of_axis in values.items()
        for axis, v in zip("xyz", of_axis, strict=True)
    }
    one = np.uint64(1)
    below = (one << lane.astype(np.uint64)) - one
    masks = {
        "eq": one << lane.astype(np.uint64),
        "lt": below,
        "le": below * np.uint64(2) + one,
    }
    everything = np.uint64(0xFFFFFFFF)
    masks |= {"ge": everything & ~masks["lt"], "gt": everything & ~masks["le"]}
    out |= {f"%lanemask_{name}": mask.astype(np.uint32) for name, mask in masks.items()}
    out |= {"%laneid": lane.astype(np.uint32), "%warpid": (thread // WARP).astype(np.uint32)}
    return out


class Decoded:
    """An instruction ready to run: exactly one of ``step``, ``warp_step`` and ``control``.

    ``control`` is bra, brx, ret or bar. ``members`` reads the member mask of a warp-wide step.
    """

    def __init__(
        self,
        source: Instruction,
        *,
        step: Step | None = None,
        warp_step: WarpStep | None = None,
        members: Callable[[Wave, Lanes], Array] | None = None,
        control: str = "",
        target: Any = None,
    ) -> None:
        self.source, self.step, self.warp_step = source, step, warp_step
        self.members, self.control, self.target = members, control, target


class Scheduler:
    """Runs a wave from the first instruction until every lane has exited."""

    def __init__(self, wave: Wave, code: list[Decoded], max_steps: int) -> None:
        self.wave, self.code, self.steps_left = wave, code, max_steps
        self.end = len(code)
        self.pc = np.where(wave.exists, 0, self.end)
        self.blocked = np.zeros(wave.lanes, bool)
        #: Barrier that a lane waits at, and the lanes it expects (0: all of the block); -1 if none.
        self.barrier = np.full(wave.lanes, -1)
        self.expected = np.zeros(wave.lanes, np.int64)
        self.tried_at = -1

    def run(self) -> None:
        """Run to the end; raises PtxError as soon as a lane does what it must not."""
        turn = 0
        with np.errstate(all="ignore"):
            while True:
                position = np.where(self.blocked, self.end, self.pc)
                first = int(position.min())
                if first >= self.end:
                    if not self.blocked.any():
                        return
                    if not self._open_barriers() and not self._retry():
                        self._stuck()
                    continue
                turn += 1
                if turn % _FAIRNESS == 0:
                    first = int(position[position < self.end].max())
                self._advance(first)

    def _advance(self, p: int) -> None:
        """Run the lanes at ``p`` until they branch apart, block, or meet other lanes."""
        here = self.pc == p
        if here.all():
            lanes: Lanes = _ALL
            meeting = self.end
        else:
            lanes = np.flatnonzero(here)
            others = self.pc[~here & (self.pc < self.end)]
            ahead = others[others > p]
            meeting = int(ahead.min()) if ahead.size else self.end
            alone = others.size == 0
        whole = lanes is _ALL or alone
        self.blocked[lanes] = False
        wave = self.wave
        while p < self.end:
            decoded = self.code[p]
            source = decoded.source
            self.steps_left -= 1
            if self.steps_left < 0:
                raise self._error(source, "the kernel does not end (max_steps reached)", None)
            active = lanes
            if source.guard is not None:
                taken = wave.registers[source.guard.index][lanes] != source.guard.negated
                if not taken.all():
                    active = np.flatnonzero(taken) if lanes is _ALL else lanes[taken]
            nobody = active is not lanes and active.size == 0
            if decoded.control == "bar" and not nobody:
                self._block_at_barrier(decoded, lanes, active, p)
                return
            if decoded.control in ("bra", "brx", "ret") and not nobody:
                if active is not lanes or decoded.control == "brx":
                    self.pc[lanes] = p + 1
                    self.pc[active] = self._targets(decoded, active)
                    return
                backwards = decoded.target <= p
                p = decoded.target
                if not whole and (backwards or p >= meeting):
                    break
                continue
            if decoded.warp_step is not None and not nobody:
                if not self._warp_step(decoded, lanes, active, p):
                    return
            elif decoded.step is not None and not nobody:
                wave.executed[source.op] += 1
                try:
                    decoded.step(wave, active)
                except AccessError as error:
                    raise self._error(source, str(error), self._lane(active, error.lane)) from None
                except PtxError as error:
                    raise self._error(source, str(error), self._lane(active, 0)) from None
            p += 1
            if p >= meeting:
                break
        self.pc[lanes] = p

    def _targets(self, decoded: Decoded, active: Lanes) -> Any:
        if decoded.control != "brx":
            return decoded.target
        read, positions = decoded.target
        index = read(self.wave, active)
        if (index >= len(positions)).any():
            raise self._error(decoded.source, "branch index out of range", None)
        return positions[index]

    def _block_at_barrier(self, decoded: Decoded, lanes: Lanes, active: Lanes, p: int) -> None:
        self.pc[lanes] = p + 1
        self.pc[active] = p
        self.blocked[active] = True
        read_number, read_count = decoded.target
        self.barrier[active] = read_number(self.wave, active)
        self.expected[active] = read_count(self.wave, active)
        self.wave.executed[decoded.source.op] += 1

    def _open_barriers(self) -> bool:
        """Open every barrier that all its lanes have reached; whether there was one."""
        per_block = self.wave.per_block
        barrier = self.barrier.reshape(-1, per_block)
        live = (self.pc < self.end).reshape(-1, per_block)
        opened = False
        for block, number in {
            (int(b), int(barrier[b, t])) for b, t in zip(*np.nonzero(barrier >= 0), strict=True)
        }:
            at = np.flatnonzero(barrier[block] == number) + block * per_block
            # A thread that has exited does not keep the others waiting, as on the device.
            count = self.expected[at[0]] or int(live[block].sum())
            if (self.expected[at] != self.expected[at[0]]).any():
                raise self._error(
                    self.code[self.pc[at[0]]].source, "lanes expect different counts", int(at[0])
                )
            if len(at) < count:
                continue
            self._same_place_in_warp(at)
            self.barrier[at] = -1
            self.blocked[at] = False
            self.pc[at] += 1
            opened = True
        return opened

    def _same_place_in_warp(self, at: Array) -> None:
        """bar.sync wants all lanes of a warp at the same instruction."""
        warps = at // WARP
        first = np.r_[True, warps[1:] != warps[:-1]]
        place = self.pc[at][np.maximum.accumulate(np.where(first, np.arange(len(at)), 0))]
        if (place != self.pc[at]).any():
            lane = int(at[(place != self.pc[at]).argmax()])
            raise self._error(
                self.code[self.pc[lane]].source, "lanes of one warp are at different barriers", lane
            )

    def _warp_step(self, decoded: Decoded, lanes: Lanes, active: Lanes, p: int) -> bool:
        """Run a warp-wide instruction for warps whose members have all arrived.

        Returns whether all lanes did it; otherwise those that did have moved on, and the others
        are blocked until the rest of their warp comes.
        """
        wave, source = self.wave, decoded.source
        arrived = np.zeros(wave.lanes, bool)
        arrived[active] = True
        by_warp = arrived.reshape(-1, WARP)
        warps = np.flatnonzero(by_warp.any(1))
        here = by_warp[warps]
        if decoded.members is None or here.all():
            needed = np.ones_like(here)
        else:
            mask = decoded.members(wave, _ALL).reshape(-1, WARP)[warps]
            bits = mask[np.arange(len(warps)), here.argmax(1)].astype(np.uint64)
            needed = (bits[:, None] >> np.arange(WARP, dtype=np.uint64) & np.uint64(1)) != 0
            # Lanes that do not exist or have exited cannot be waited for.
            needed &= (self.pc < self.end).reshape(-1, WARP)[warps] | here
            if (here & ~needed).any():
                raise self._error(source, "a lane is not in its own member mask", None)
        complete = (here | ~needed).all(1)
        if complete.any():
            wave.executed[source.op] += 1
            try:
                decoded.warp_step(wave, warps[complete], here[complete])  # type: ignore[misc]
            except AccessError as error:
                lane = int((warps[complete][error.lane // WARP]) * WARP + error.lane % WARP)
                raise self._error(source, str(error), lane) from None
        if complete.all():
            return True
        waiting = np.zeros_like(by_warp)
        waiting[warps[~complete]] = here[~complete]
        waits = waiting.reshape(-1)
        self.pc[lanes] = p + 1
        self.pc[waits] = p
        self.blocked[waits] = True
        return False

    def _retry(self) -> bool:
        """Let lanes at warp-wide instructions try again, since others may have exited meanwhile."""
        waiting = self.blocked & (self.barrier < 0)
        done = self.wave.executed.total()
        if not waiting.any() or done == self.tried_at:
            return False
        self.tried_at = done
        self.blocked[waiting] = False
        return True

    def _stuck(self) -> None:
        # A barrier may only be waiting for the lanes of a warp-wide instruction: name that first.
        in_warp = np.flatnonzero(self.blocked & (self.barrier < 0))
        what = "warp-wide instruction" if in_warp.size else "barrier"
        lane = int(in_warp[0] if in_warp.size else np.flatnonzero(self.blocked)[0])
        message = f"deadlock: a {what} that not all of its lanes reach"
        raise self._error(self.code[self.pc[lane]].source, message, lane)

    def _lane(self, lanes: Lanes, position: int) -> int:
        return position if lanes is _ALL else int(lanes[position])

    def _error(self, source: Instruction, message: str, lane: int | None) -> PtxError:
        where = ""
        if lane is not None:
            s = self.wave.special
            block = tuple(int(s[f"%ctaid.{a}"][lane]) for a in "xyz")
            thread = tuple(int(s[f"%tid.{a}"][lane]) for a in "xyz")
            where = f" (block {block}, thread {thread})"
        return PtxError(f"line {source.line}: {source.text}: {message}{where}")
