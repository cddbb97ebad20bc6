"""Chains of native CPU ops that run as one compiled call (``csrc/cpu/program.h``).

A program is a list of steps over numbered values. Their memory is one arena, planned here by
lifetimes; a residual is added in place where nobody else reads it. The leading steps, whose weights
fit a core's cache beside the activations, run depth-first: whole images at a time, on memory of one
thread. The others run on the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_resnet import _build, memory, problem
from fused_resnet.backends.cpu import geometry, native_conv, pool_window
from fused_resnet.problem import EPILOGUES, ConvProblem


@dataclass(frozen=True)
class Conv:
    """A fused convolution, or the stem where ``problem.pool`` is set.

    Attributes:
        x: value that is read; an input of a stem may have any strides, and be fp32 where the
            program computes in bf16.
        y: value that is made, of dtype ``problem.dtype``.
        problem: what is computed; ``x_channels_last`` is not looked at.
        kernel: a native convolution, as ``_C.cpu_conv_kernels`` lists them; "stem" for the stem.
        packed: the weight as that kernel packs it.
        scale: fp32 [K].
        shift: fp32 [K].
        residual: value of y's shape where the epilogue reads one.
    """

    x: int
    y: int
    problem: ConvProblem
    kernel: str
    packed: Tensor
    scale: Tensor
    shift: Tensor
    residual: int | None = None


@dataclass(frozen=True)
class MaxPool:
    """Max-pooling of x; a NaN in a window is its result."""

    x: int
    y: int
    pool: problem.MaxPool


@dataclass(frozen=True)
class GlobalAveragePool:
    """The mean over H and W: y is [N, C] or [N, C, 1, 1]."""

    x: int
    y: int


@dataclass(frozen=True)
class Linear:
    """``x @ weight.T + bias`` of x [N, C], weight [K, C] and bias [K]."""

    x: int
    y: int
    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class AddRelu:
    """``relu(x + residual)``."""

    x: int
    residual: int
    y: int


@dataclass(frozen=True)
class Convert:
    """An input of the program, of any strides and floating dtype, as a value of y's dtype."""

    x: int
    y: int


Step = Conv | MaxPool | GlobalAveragePool | Linear | AddRelu | Convert


def reads(step: Step) -> tuple[int, ...]:
    """The values that a step reads."""
    residual = getattr(step, "residual", None)
    return (step.x,) if residual is None else (step.x, residual)


@dataclass(frozen=True)
class Place:
    """Where a value lies, as ``cpu::Value`` says it: the kind of memory and the place in it."""

    INPUT, OUTPUT, SHARED, PRIVATE = range(4)

    kind: int
    where: int


@dataclass(frozen=True)
class Layout:
    """The memory of a program.

    Attributes:
        places: of each value.
        private_bytes: of one image in the leading steps.
        shared_bytes: of the batch, for all values that other steps touch too.
    """

    places: dict[int, Place]
    private_bytes: int
    shared_bytes: int


def count_leading(
    steps: Sequence[Step], sizes: Mapping[int, int], batch: int, weights: Sequence[int], cache: int
) -> int:
    """How many steps at the beginning to run depth-first.

    Those whose weights leave half of the cache to the activations, cut where a single value is
    handed on, if there is such a place.

    Args:
        steps: of the program.
        sizes: bytes of each value for one image.
        batch: images.
        weights: bytes of each step's packed weights.
        cache: bytes of a core's second-level cache.
    """
    if batch < 2:
        return 0
    fitting = next((i for i, size in enumerate(weights) if size > cache // 2), len(steps))
    if fitting == len(steps):
        return fitting
    for cut in range(fitting, 0, -1):
        made = {step.y for step in steps[:cut]}
        if len(made & {v for step in steps[cut:] for v in reads(step)}) == 1:
            return cut
    return fitting


def lay_out(
    steps: Sequence[Step],
    sizes: Mapping[int, int],
    inputs: Sequence[int],
    outputs: Sequence[int],
    batch: int,
    leading: int,
) -> Layout:
    """Plan the memory of a program: where every value lies.

    Args:
        steps: in the order in which they run; each value is made once, before it is read.
        sizes: bytes of each value for one image.
        inputs: values that the caller brings.
        outputs: values that the caller gets.
        batch: images.
        leading: steps that run depth-first.
    """
    places = {v: Place(Place.INPUT, i) for i, v in enumerate(inputs)}
    places |= {v: Place(Place.OUTPUT, i) for i, v in enumerate(outputs)}
    begin = {step.y: i for i, step in enumerate(steps)}
    end = dict(begin)
    for i, step in enumerate(steps):
        for value in reads(step):
            end[value] = i

    planned = [v for v in begin if v not in places]
    private = [v for v in planned if end[v] < leading]
    shared = [v for v in planned if end[v] >= leading]
    # A result may lie on a residual (or, of an addition, on x) that is read for the last time.
    owner = {v: v for v in planned}
    for group in (private, [v for v in shared if begin[v] >= leading]):
        for value in group:
            step = steps[begin[value]]
            operands = reads(step) if isinstance(step, AddRelu) else set(reads(step)) - {step.x}
            for operand in operands:
                if operand in group and end[operand] == begin[value]:
                    owner[value] = owner[operand]

    def plan(values: list[int], scale: int) -> tuple[dict[int, int], int]:
        buffers = [v for v in values if owner[v] == v]
        lifetimes = []
        for buffer in buffers:
            users = [v for v in values if owner[v] == buffer]
            first, last = min(begin[v] for v in users), max(end[v] for v in users)
            if values is shared and first < leading:
                first = 0  # at any time some thread runs any of the leading steps
            lifetimes.append(memory.Lifetime(sizes[buffer] * scale, first, last))
        offsets, total = memory.plan(lifetimes)
        at = dict(zip(buffers, offsets, strict=True))
        return {v: at[owner[v]] for v in values}, total

    private_offsets, private_bytes = plan(private, 1)
    shared_offsets, shared_bytes = plan(shared, batch)
    places |= {v: Place(Place.PRIVATE, where) for v, where in private_offsets.items()}
    places |= {v: Place(Place.SHARED, where) for v, where in shared_offsets.items()}
    return Layout(places, private_bytes, shared_bytes)


class CpuProgram:
    """A chain of native steps for fixed shapes, run as one call on torch's threads.

    Several Python threads may call one program at once: each call uses an arena of its own, which
    is kept for later calls. No memory but that of the results is allocated after the first call.

    Args:
        steps: in order; every value is made by one step, or is an input, before it is read.
        values: shape ([N, C, H, W] or [N, C]) and dtype of each value.
        inputs: values that the caller brings, in the order of the call's arguments.
        outputs: values that the caller gets, each made by a step.

    Attributes:
        leading: how many steps run depth-first.
        arena_bytes: memory of one call beside its inputs, outputs and weights.

    Raises:
        ValueError: if shapes do not fit, a value is missing, or a kernel does not support a
            problem.
        TypeError: if dtypes do not fit.

    Example:
        >>> program = CpuProgram([Convert(0, 1), MaxPool(1, 2, pool)], values, [0], [2])
        >>> (y,) = program(x)
    """

    def __init__(
        self,
        steps: Sequence[Step],
        values: Mapping[int, tuple[Sequence[int], torch.dtype]],
        inputs: Sequence[int],
        outputs: Sequence[int],
    ) -> None:
        if _build.extension is None:
            raise ValueError(f"the compiled extension is missing: {_build.extension_error}")
        self._check(steps, values, inputs, outputs)
        self._isa: str = _build.extension.isa()
        batch = values[inputs[0]][0][0]
        steps = [self._as_conv(s, values) if isinstance(s, Linear) else s for s in steps]
        sizes = {v: math.prod(shape[1:]) * dtype.itemsize for v, (shape, dtype) in values.items()}
        weights = [s.packed.nbytes if isinstance(s, Conv) else 0 for s in steps]
        cache = _build.extension.cpu_cache_bytes()
        self.leading = count_leading(steps, sizes, batch, weights, cache)
        layout = lay_out(steps, sizes, inputs, outputs, batch, self.leading)

        # Small images run several at once, as many as half of the cache holds.
        touched = [sum(sizes[v] for v in (*reads(s), s.y)) for s in steps[: self.leading]]
        images_at_once = max(1, cache // 2 // max(touched, default=cache))
        ids = {value: i for i, value in enumerate(layout.places)}
        described = [
            (place.kind, place.where, list(values[v][0]), values[v][1])
            for v, place in layout.places.items()
        ]
        self._program = _build.extension.CpuProgram(
            *(self._isa, described, batch, self.leading, images_at_once),
            *(layout.private_bytes, layout.shared_bytes),
        )
        for step in steps:
            self._add(step, ids)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the steps.

        Args:
            *inputs: tensors of the shapes and dtypes given; those that are not read by a stem or a
                conversion are copied if they are not dense in channels_last order.

        Returns:
            The outputs: new tensors, channels_last where they have four dimensions.

        Raises:
            ValueError: for another number, shape or device of inputs.
            TypeError: for another dtype.
        """
        return tuple(self._program.run(inputs))

    @property
    def arena_bytes(self) -> int:
        """Memory of one call on torch's present number of threads."""
        return int(self._program.arena_bytes)

    @staticmethod
    def _check(
        steps: Sequence[Step],
        values: Mapping[int, tuple[Sequence[int], torch.dtype]],
        inputs: Sequence[int],
        outputs: Sequence[int],
    ) -> None:
        if not inputs or not steps:
            raise ValueError("a program has at least one input and one step")
        known = set(inputs)
        for step in steps:
            for value in reads(step):
                if value not in known:
                    raise ValueError(f"value {value} is read before it is made, by {step!r}")
            if step.y in known:
                raise ValueError(f"value {step.y} is made twice")
            known.add(step.y)
        if missing := known - values.keys():
            raise ValueError(f"values {sorted(missing)} have no shape")
        if wrong := (set(outputs) - known) | (set(outputs) & set(inputs)):
            raise ValueError(f"outputs {sorted(wrong)} are made by no step")
        if len(set(outputs)) != len(outputs) or len(set(inputs)) != len(inputs):
            raise ValueError("an input or an output is named twice")

    def _as_conv(
        self, step: Linear, values: Mapping[int, tuple[Sequence[int], torch.dtype]]
    ) -> Conv:
        """A linear layer as a convolution of images of one pixel."""
        shape, dtype = values[step.x]
        k, c = step.weight.shape
        p = ConvProblem(
            shape[0], c, 1, 1, k, 1, 1, (1, 1), (0, 0), (1, 1), 1, "none", dtype
        )  # fmt: skip
        packed = native_conv("direct", self._isa, p).pack(step.weight.detach().view(k, c, 1, 1))
        shift = torch.zeros(k) if step.bias is None else step.bias.detach().float()
        return Conv(step.x, step.y, p, "direct", packed, torch.ones(k), shift)

    def _add(self, step: Step, ids: Mapping[int, int]) -> None:
        x, y = ids[step.x], ids[step.y]
        if isinstance(step, Conv):
            p, packed = step.problem, (step.packed, step.scale, step.shift)
            if p.pool is not None:
                self._program.add_stem(x, y, geometry(p), pool_window(p.pool), *packed)
            else:
                residual = -1 if step.residual is None else ids[step.residual]
                epilogue = EPILOGUES.index(p.epilogue)
                self._program.add_conv(x, y, residual, step.kernel, geometry(p), epilogue, *packed)
        elif isinstance(step, MaxPool):
            self._program.add_max_pool(x, y, pool_window(step.pool))
        elif isinstance(step, GlobalAveragePool):
            self._program.add_global_average_pool(x, y)
        elif isinstance(step, AddRelu):
            self._program.add_add_relu(x, ids[step.residual], y)
        elif isinstance(step, Convert):
            self._program.add_convert(x, y)
        else:
            raise AssertionError(f"a linear layer is a convolution by now, not {step!r}")
