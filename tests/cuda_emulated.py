"""The CUDA kernels on the emulator, called as the ``cuda`` backend calls them on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fused_resnet.backends import cuda
from fused_resnet.backends.cuda_chain import PACK, layouts
from fused_resnet.backends.cuda_schedule import ConvSchedule, gathers_wide
from fused_resnet.problem import EPILOGUES, ChainProblem, ConvProblem, conv_out_size
from tests.emulator import Buffer, Output, Report
from tests.emulator.project import kernels

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "tf32": torch.float32,
    "float32": torch.float32,
}


class CProblem(ctypes.Structure):
    """``ConvProblem`` of csrc/conv_problem.h."""

    _fields_ = [
        (name, ctypes.c_int32)
        for name in (
            *("n", "c", "h", "w", "k", "r", "s", "out_h", "out_w", "stride_h", "stride_w"),
            *("padding_h", "padding_w", "dilation_h", "dilation_w", "groups", "epilogue"),
        )
    ]


class ConvArgs(ctypes.Structure):
    """``ConvArgs`` of csrc/cuda/conv_tile.h."""

    _fields_ = [
        ("problem", CProblem),
        *(
            (name, ctypes.c_void_p)
            for name in ("x", "weight", "scale", "shift", "residual", "y", "partial", "gather")
        ),
        ("reduction", ctypes.c_int32),
        ("splits", ctypes.c_int32),
        ("derived", ctypes.c_int32 * 20),
    ]


class StemArgs(ctypes.Structure):
    """``StemArgs`` of csrc/cuda/stem_args.h."""

    _fields_ = [
        ("problem", CProblem),
        ("pool_h", ctypes.c_int32),
        ("pool_w", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("x", "weight", "scale", "shift", "y")),
        *((f"stride_{d}", ctypes.c_int64) for d in "nchw"),
        ("input_scale", ctypes.c_float * 4),
        ("input_shift", ctypes.c_float * 4),
    ]


class PlannedLaunch(ctypes.Structure):
    """``PlannedLaunch`` of tests/emulator/kernels/conv.h."""

    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
        ("args", ConvArgs),
    ]


def c_problem(problem: ConvProblem) -> CProblem:
    """The geometry as the kernels take it; ``out_h`` and ``out_w`` are the convolution's."""
    p = problem
    oh = conv_out_size(p.h, p.r, p.stride[0], p.padding[0], p.dilation[0])
    ow = conv_out_size(p.w, p.s, p.stride[1], p.padding[1], p.dilation[1])
    geometry = (*p.stride, *p.padding, *p.dilation)
    epilogue = EPILOGUES.index(p.epilogue)
    return CProblem(p.n, p.c, p.h, p.w, p.k, p.r, p.s, oh, ow, *geometry, p.groups, epilogue)


@dataclass
class Run:
    """How to execute: checked build or not, order of threads, side of the guard."""

    checked: bool = False
    schedule: str = "depth_first"
    seed: int = 0
    placement: str = "right"
    alignment: int = 16
    reports: list[Report] = field(default_factory=list)

    def launch(
        self,
        library: str,
        kernel: str,
        arguments: dict[str, object],
        grid: tuple[int, ...],
        threads: int,
        shared_bytes: int = 0,
        registered_in: str | None = None,
    ) -> Report:
        """Start one kernel and keep its report."""
        emulator = kernels(registered_in or library, checked=self.checked)
        report = emulator.launch(
            kernel,
            arguments,
            grid=grid,
            block=threads,
            shared_bytes=shared_bytes,
            schedule=self.schedule,
            seed=self.seed,
            placement=self.placement,
        )
        self.reports.append(report)
        return report

    def buffer(self, tensor: Tensor, name: str, initialised: bool = True) -> Buffer:
        """A guarded copy of a dense tensor."""
        return Buffer(
            tensor,
            name=name,
            initialised=initialised,
            placement=self.placement,
            alignment=self.alignment,
        )

    @property
    def findings(self) -> list[str]:
        """Everything that was reported."""
        return [str(finding) for report in self.reports for finding in report.findings]


@functools.cache
def _planner(library: str, checked: bool) -> ctypes.CDLL:
    return ctypes.CDLL(str(kernels(library, checked=checked).library))


def planned(
    args: ConvArgs, arithmetic: str, tile: int, checked: bool = False
) -> Iterator[tuple[PlannedLaunch, bool]]:
    """The kernel starts of a convolution; true with the one that adds the splits."""
    launches = (PlannedLaunch * 2)()
    plan = _planner(f"conv_{arithmetic}", checked).plan_conv
    count = plan(ctypes.byref(args), tile, 7, launches)
    for i in range(count):
        yield launches[i], i == 1


def nhwc(x: Tensor) -> Tensor:
    """[N, C, H, W] as a dense [N, H, W, C]."""
    return x.permute(0, 2, 3, 1).contiguous()


def conv(
    run: Run,
    problem: ConvProblem,
    arithmetic: str,
    schedule: ConvSchedule,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    bug: str | None = None,
) -> Tensor:
    """``conv_affine_act`` by the implicit GEMM; y is [N, K, OH, OW].

    ``bug`` names a kernel of kernels/conv_bugs.cpp to start instead of the right one.
    """
    packed = cuda.pack(problem, weight, arithmetic == "tf32")
    p = cuda.bundled(problem)
    n, k, oh, ow = p.out_shape
    y = torch.empty(n, oh, ow, k, dtype=p.dtype)
    tensors = {
        "x": nhwc(x),
        "weight": packed.weight,
        "scale": scale,
        "shift": shift,
        "residual": None if residual is None else nhwc(residual),
        "y": y,
        "partial": torch.empty(schedule.splits, y.numel()) if schedule.splits > 1 else None,
        "gather": packed.gather,
    }
    buffers = {
        name: run.buffer(tensor, name, name not in ("y", "partial"))
        for name, tensor in tensors.items()
        if tensor is not None
    }
    try:
        args = ConvArgs(problem=c_problem(p), splits=schedule.splits)
        for name, buffer in buffers.items():
            setattr(args, name, buffer.address)
        args.reduction = packed.weight.shape[1] if packed.gather is not None else 0
        name, way = "conv_implicit_gemm", ""
        if packed.gather is not None:
            name += "_gather"
            way = ",wide" if gathers_wide(p) else ",pairs" if cuda.gather_piece(p) == 2 else ""
        for launch, is_reduction in planned(args, arithmetic, schedule.tile.index, run.checked):
            kernel = f"{name}<{arithmetic},{schedule.tile.name}{way}>"
            if is_reduction:
                kernel = f"conv_reduce_splits<{arithmetic}>"
            seeded = bug is not None and not is_reduction
            # In a struct the emulator sees no const: it is told here what may be written.
            written = {"y"} if is_reduction or schedule.splits == 1 else {"partial"}
            for name_of, buffer in buffers.items():
                buffer.protect(name_of in written)
            run.launch(
                f"conv_{arithmetic}",
                bug if seeded and bug is not None else kernel,
                {"args": launch.args},
                tuple(launch.grid),
                launch.threads,
                launch.shared_bytes,
                "conv_bugs" if seeded else None,
            )
        buffers["y"].copy_to(y)
    finally:
        for buffer in buffers.values():
            buffer.close()
    return y.permute(0, 3, 1, 2)


def stem(
    run: Run,
    problem: ConvProblem,
    arithmetic: str,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Tensor:
    """``conv_affine_relu_maxpool`` of x with any dense strides, floating point or uint8."""
    packed = cuda.pack_stem(weight, arithmetic == "tf32")
    n, k, ph, pw = problem.out_shape
    y = torch.empty(n, ph, pw, k, dtype=packed.dtype)
    # x as it lies in memory, with its strides beside it.
    flat = x.as_strided((x.numel(),), (1,))
    tensors = {"x": flat, "weight": packed, "scale": scale, "shift": shift, "y": y}
    buffers = {name: run.buffer(t, name, name != "y") for name, t in tensors.items()}
    try:
        args = StemArgs(problem=c_problem(problem), pool_h=ph, pool_w=pw)
        for name, buffer in buffers.items():
            setattr(args, name, buffer.address)
            buffer.protect(name == "y")
        for dimension, stride in zip("nchw", x.stride(), strict=True):
            setattr(args, f"stride_{dimension}", stride)
        for c in range(problem.c if mean is not None and std is not None else 0):
            args.input_scale[c] = 1 / (255 * std[c])
            args.input_shift[c] = -mean[c] / std[c]
        shared_bytes = _planner("stem", run.checked).stem_shared_bytes(packed.element_size())
        run.launch(
            "stem",
            f"stem<{arithmetic}{',uint8' if x.dtype == torch.uint8 else ''}>",
            {"args": args},
            (n * -(-ph // 4) * -(-pw // 8), -(-k // 64)),
            160,
            shared_bytes,
        )
        buffers["y"].copy_to(y)
    finally:
        for buffer in buffers.values():
            buffer.close()
    return y.permute(0, 3, 1, 2)


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def add_relu(
    run: Run, a: Tensor, b: Tensor, placements: tuple[str, str, str] | None, blocks: int = 3
) -> Tensor:
    """relu(a + b) of flat tensors; into a if ``placements`` is None.

    A buffer placed "left" begins at a page, one placed "right" ends at one: where its size is not a
    multiple of 16 bytes it is misaligned.
    """
    size = a.element_size()
    with contextlib.ExitStack() as stack:

        def buffer(tensor: Tensor, name: str, placement: str) -> Buffer:
            return stack.enter_context(
                Buffer(tensor, name=name, placement=placement, alignment=size)
            )

        where = placements or ("right",) * 3
        first = buffer(a, "a", where[0])
        arguments = {"a": first, "b": buffer(b, "b", where[1])}
        arguments["y"] = first if placements is None else buffer(a, "y", where[2])
        run.launch(
            "elementwise",
            f"add_relu<{_name(a)}>",
            {**arguments, "count": a.numel()},
            (blocks,),
            256,
        )
        result: Tensor = arguments["y"].read()
    return result


def global_average_pool(run: Run, x: Tensor) -> Tensor:
    """[N, P, C] to its means over P, [N, C]."""
    n, pixels, c = x.shape
    y = torch.empty(n, c, dtype=x.dtype)
    vector = 16 // x.element_size()
    size, suffix = (vector, "") if c % vector == 0 else (1, ",scalar")
    run.launch(
        "elementwise",
        f"global_average_pool<{_name(x)}{suffix}>",
        {"x": x, "y": Output(y), "pixels": pixels, "channels": c},
        (n, -(-c // (32 * size))),
        256,
    )
    return y


def transpose(run: Run, x: Tensor) -> Tensor:
    """[N, I, J] to [N, J, I]."""
    n, rows, columns = x.shape
    y = torch.empty(n, columns, rows, dtype=x.dtype)
    run.launch(
        "elementwise",
        f"transpose<{_name(x)}>",
        {"x": x, "y": Output(y), "rows": rows, "columns": columns},
        (-(-rows // 64) * -(-columns // 64), n),
        256,
    )
    return y


class ChainArgs(ctypes.Structure):
    """``ChainArgs`` of csrc/cuda/chain_args.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("n", "h", "w", "mid", "next", "proj", "stride")),
        *((name, ctypes.c_int32) for name in ("step", "residual_h", "residual_w", "even")),
        *((name, ctypes.c_void_p) for name in ("mid1", "weight2", "weight3", "weight_proj")),
        *((name, ctypes.c_void_p) for name in ("weight1", "scale2", "shift2", "scale3", "shift3")),
        *((name, ctypes.c_void_p) for name in ("scale_proj", "shift_proj", "scale1", "shift1")),
        *((name, ctypes.c_void_p) for name in ("residual", "out", "mid_next")),
        *((name, ctypes.c_int32) for name in ("out_h", "out_w", "kept_h", "kept_w")),
        *((name, ctypes.c_int32) for name in ("tile_h", "tile_w", "part_h", "part_w", "tiles")),
        ("divisors", ctypes.c_int32 * 9),
    ]


def chain_args(problem: ChainProblem, residual: Tensor) -> ChainArgs:
    """What the kernels take of a problem, without pointers; ``residual`` is [N, C, H, W]."""
    p = problem
    return ChainArgs(
        n=p.n,
        h=p.h,
        w=p.w,
        mid=p.m,
        next=p.next,
        proj=p.proj,
        stride=p.stride,
        step=p.step,
        residual_h=residual.shape[2],
        residual_w=residual.shape[3],
        even=p.store == "even",
    )


def plan_chain(
    given: ChainArgs, problem: ChainProblem, way: str, checked: bool = False
) -> tuple[str, int, int]:
    """Name, threads and shared bytes of the kernel; fills the derived fields of ``given``.

    Args:
        given: the arguments.
        problem: what is computed.
        way: ``resident`` or ``streamed`` weights.
        checked: which of the emulator's builds.

    Raises:
        ValueError: there is no such kernel.
    """
    p, threads = problem, ctypes.c_int()
    kind = "next" if p.next == p.m else "wider" if p.next else "last"
    if p.proj:
        kind = "projected" if p.stride == 1 else "strided"
    name = f"{p.m},{way},{kind}"
    plan = _planner("bottleneck_chain", checked).plan_chain
    shared_bytes = plan(name.encode(), ctypes.byref(given), ctypes.byref(threads))
    if shared_bytes < 0:
        raise ValueError(f"no kernel {name} for {problem}")
    arithmetic = str(p.dtype).removeprefix("torch.")
    return f"bottleneck_chain<{arithmetic},{name}>", threads.value, shared_bytes


def bottleneck_chain(
    run: Run, problem: ChainProblem, way: str, blocks: int, *args: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The op by at most ``blocks`` blocks; see `plan_chain` for ``way``."""
    mid, residual, *convs = args
    assert mid is not None
    assert residual is not None
    out, mid_next = (
        mid.new_empty(n, h, w, c) for n, c, h, w in (problem.out_shape, problem.next_shape)
    )
    tensors = {"mid1": nhwc(mid), "residual": nhwc(residual), "out": out, "mid_next": mid_next}
    places = zip(("2", "3", "_proj", "1"), layouts(problem), strict=True)
    for i, (name, layout) in enumerate(places):
        weight, scale, shift = convs[3 * i : 3 * i + 3]
        if weight is not None and scale is not None and shift is not None:
            tensors |= {
                "weight" + name: PACK[layout](weight),
                "scale" + name: scale,
                "shift" + name: shift,
            }
    results = ["out"] + (["mid_next"] if problem.next else [])
    buffers = {
        name: run.buffer(t, name, name not in results) for name, t in tensors.items() if t.numel()
    }
    try:
        given = chain_args(problem, residual)
        for name, buffer in buffers.items():
            setattr(given, name, buffer.address)
            buffer.protect(name in results)
        kernel, threads, shared_bytes = plan_chain(given, problem, way, run.checked)
        grid = (min(blocks, given.tiles),)
        run.launch("bottleneck_chain", kernel, {"args": given}, grid, threads, shared_bytes)
        for name in results:
            buffers[name].copy_to(tensors[name])
    finally:
        for buffer in buffers.values():
            buffer.close()
    return out.permute(0, 3, 1, 2), mid_next.permute(0, 3, 1, 2)
