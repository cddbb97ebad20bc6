"""Backend ``cudnn``: each fused convolution as one graph of cuDNN (``fused-resnet[cudnn]``).

`CudnnGraph` runs the first plan that cuDNN proposes; its `variants` are the other plans, for a
tuner to time. Scale, shift and all arithmetic between the convolution and the store are fp32. What
is missing or unsupported is said by ``supports``; nothing is imported before a CUDA device asks.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from fused_resnet.backends.cuda import aligned_nhwc, allows_tf32, round_to_tf32
from fused_resnet.backends.cudnn_graph import (
    Numerics,
    PlannedGraph,
    Session,
    missing,
    unsupported,
)
from fused_resnet.backends.kernel import Kernel, PackedKernel
from fused_resnet.freshness import capturing
from fused_resnet.problem import ConvProblem

#: Plans that a tuner is offered for one problem, in cuDNN's order.
MAX_VARIANTS = 8


@functools.cache
def session(device: torch.device) -> Session:
    """The session of a CUDA device with an index."""
    return Session(device)


@functools.cache
def unavailable(device: torch.device) -> str | None:
    """Why no graph runs on ``device``; None if they do."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"cuDNN runs on NVIDIA GPUs, not on {device.type}"
    if reason := missing():
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"its fused graphs need sm_80 or newer, not sm_{major}{minor}"
    return None


def numerics_now(dtype: torch.dtype) -> Numerics:
    """What torch's flags allow: ``cudnn.allow_tf32``, ``cudnn.deterministic`` and its own."""
    deterministic = torch.backends.cudnn.deterministic
    return Numerics(
        tf32=dtype == torch.float32 and allows_tf32(),
        deterministic=deterministic or torch.are_deterministic_algorithms_enabled(),
    )


class CudnnGraph(PackedKernel):
    """Convolution, scale, shift, residual and ReLU as one graph; cuDNN's own choice of engine."""

    backend, op, name = "cudnn", "conv_affine_act", "graph"

    def __init__(self) -> None:
        super().__init__()
        self._pinned: dict[str, _PinnedPlan] = {}

    def supports(self, problem: ConvProblem, device: torch.device) -> str | None:
        """sm_80 and newer; fp16, bf16 and fp32; the geometries and epilogues cuDNN has a plan for.

        The first question about a problem makes cuDNN look for plans, and compiles one.
        """
        if reason := unsupported(problem) or unavailable(device):
            return reason
        if not torch.backends.cudnn.enabled:
            return "torch.backends.cudnn.flags has cuDNN switched off"
        return self._plan(problem, device, None)

    def variants(self, problem: ConvProblem, device: torch.device) -> tuple[Kernel, ...]:
        """A kernel for each of the first plans that build, which are compiled for it."""
        if self.supports(problem, device) is not None:
            return (self,)
        device, problem = _indexed(device), _nhwc(problem)
        keeper, numerics = session(device), numerics_now(problem.dtype)
        names: list[str] = []
        with keeper.lock:
            graph = keeper.graph(problem, numerics)
            if not isinstance(graph, str):
                for plan in graph.plans:
                    if len(names) < MAX_VARIANTS and graph.build(plan) is None:
                        names.append(plan)
            return tuple(self._pinned.setdefault(n, _PinnedPlan(self, n)) for n in names) or (self,)

    def pack_key(self, problem: ConvProblem) -> bool:
        """Whether weights are rounded to tf32."""
        return numerics_now(problem.dtype).tf32

    def prepare(self, problem: ConvProblem, weight: Tensor, scale: Tensor, shift: Tensor) -> Any:
        """Weight dense in [K, R, S, C] order, in tf32 rounded to nearest; scale and shift."""
        weight = weight.detach()
        if numerics_now(problem.dtype).tf32:
            weight = round_to_tf32(weight)
        vectors = (_aligned(v.detach().float()) for v in (scale, shift))
        return aligned_nhwc(weight), *vectors

    def run(self, problem: ConvProblem, *args: Any) -> Tensor:
        """See `Kernel`."""
        return self._run(problem, None, *args)

    def _plan(self, problem: ConvProblem, device: torch.device, plan: str | None) -> str | None:
        """Why there is no such plan (None: no plan at all) for the problem, or None."""
        device, problem = _indexed(device), _nhwc(problem)
        keeper, numerics = session(device), numerics_now(problem.dtype)
        with keeper.lock:
            if not keeper.holds(problem, numerics) and capturing(device):
                return "not planned yet, and a CUDA graph is being captured; run once before"
            graph = keeper.graph(problem, numerics)
            if isinstance(graph, str):
                return graph
            if plan is not None:
                return graph.build(plan)
            try:
                graph.first()
            except RuntimeError as e:
                return str(e)
        return None

    def _run(self, problem: ConvProblem, plan: str | None, *args: Any) -> Tensor:
        x, weight, scale, shift, residual = args
        device, problem = x.device, _nhwc(problem)
        tensors = {"x": aligned_nhwc(x)}
        packed = self.packed(problem, weight, scale, shift)
        tensors |= zip(("weight", "scale", "shift"), packed, strict=True)
        if residual is not None:
            tensors["residual"] = aligned_nhwc(residual)
        y = torch.empty(
            problem.out_shape, dtype=x.dtype, device=device, memory_format=torch.channels_last
        )
        tensors["y"] = y
        keeper = session(device)
        with keeper.lock:
            graph = keeper.graph(problem, numerics_now(problem.dtype))
            if isinstance(graph, str):
                raise RuntimeError(graph)
            name = graph.first() if plan is None else _built(graph, plan)
            # Of torch's allocator at every call: so no two streams share one, and a CUDA graph
            # that is captured keeps its own.
            size = graph.workspace(name)
            workspace = torch.empty(size, dtype=torch.uint8, device=device) if size else y
            addresses = {key: tensor.data_ptr() for key, tensor in tensors.items()}
            graph.execute(name, addresses, workspace.data_ptr(), keeper.handle())
        return y


class _PinnedPlan(Kernel):
    """`CudnnGraph` with one of its plans; shares its weights and graphs."""

    backend, op = "cudnn", "conv_affine_act"

    def __init__(self, base: CudnnGraph, plan: str) -> None:
        self._base, self._name_of_plan = base, plan
        # An instance's name: the class variable of Kernel is only declared.
        self.name = f"{base.name}:{plan}"  # type: ignore[misc]

    def supports(self, problem: ConvProblem, device: torch.device) -> str | None:
        """Where cuDNN proposes this plan and it builds."""
        reason = self._base.supports(problem, device)
        return reason or self._base._plan(problem, device, self._name_of_plan)

    def run(self, problem: ConvProblem, *args: Any) -> Tensor:
        """See `Kernel`."""
        return self._base._run(problem, self._name_of_plan, *args)


def _built(graph: PlannedGraph, plan: str) -> str:
    """The plan's name, once it is built."""
    if reason := graph.build(plan):
        raise RuntimeError(reason)
    return plan


def _indexed(device: torch.device) -> torch.device:
    """The device with its index, which ``torch.device("cuda")`` leaves out."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.device(device.type, index)


def _nhwc(problem: ConvProblem) -> ConvProblem:
    """The problem as cuDNN sees it: x is made channels_last where it is not."""
    if problem.x_channels_last:
        return problem
    return dataclasses.replace(problem, x_channels_last=True)


def _aligned(vector: Tensor) -> Tensor:
    """A dense [K] at an address that 16-byte loads can start from."""
    vector = vector.contiguous()
    return vector if vector.data_ptr() % 16 == 0 else vector.clone()


KERNELS: tuple[Kernel, ...] = (CudnnGraph(),)
