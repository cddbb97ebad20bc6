"""Each fused op of a network by itself, against what this machine can do at most: a roofline.

Everything here is measured on the machine at hand but the bytes, which are counted: the least that
an op must move (its input, weights, residual and output once), and what stock torch moves with a
pass through memory for each of convolution, batch norm, addition, ReLU and pooling. Ceilings of
GPUs that are not at hand are in ``certify.roofline``; those are predictions.

Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore
architectures", CACM 52(4), 2009.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fused_resnet import backends
from fused_resnet.probe import clock
from fused_resnet.problem import ConvProblem

#: Side of the square matrices whose product gives the peak of arithmetic.
_GEMM = 2048
#: Bytes of the tensor whose copy gives the bandwidth; larger than any last-level cache in use.
_COPIED = 512 << 20
_REPEATS = 7

#: From functions to the seconds that a call of each takes, one value a round.
Timer = Callable[[dict[str, Callable[[], Any]]], dict[str, list[float]]]


@dataclass(frozen=True)
class Ceiling:
    """What the device reaches at most in a dtype: measured, by torch's own best kernels.

    Attributes:
        dtype: of the matrix product, as torch names it.
        flops: FLOP/s of a product of two square matrices.
        bandwidth: bytes a second, read and written, of a copy of a large tensor.
    """

    dtype: str
    flops: float
    bandwidth: float


@dataclass(frozen=True)
class LayerTime:
    """One fused op of a network.

    Attributes:
        name: path of its convolution, the first where several layers are alike.
        problem: shapes, dtype and epilogue in words.
        count: layers of the network that are alike.
        kernel: what computed it, as ``backend/name``.
        flops: of the convolution (a multiply-add is two).
        min_bytes: see the module.
        stock_bytes: see the module.
        fused: seconds of a call, one value a round.
        stock: seconds of stock torch's calls for the same, in channels_last.
    """

    name: str
    problem: str
    count: int
    kernel: str
    flops: int
    min_bytes: int
    stock_bytes: int
    fused: list[float] = field(default_factory=list)
    stock: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class NetworkLayers:
    """The fused ops of one network in one case."""

    model: str
    dtype: str
    batch: int
    layers: list[LayerTime]

    @staticmethod
    def from_dict(data: dict[str, Any]) -> NetworkLayers:
        """From plain data, as ``dataclasses.asdict`` makes it."""
        layers = [LayerTime(**layer) for layer in data["layers"]]
        return NetworkLayers(data["model"], data["dtype"], data["batch"], layers)


def ceiling(dtype: torch.dtype, device: torch.device) -> Ceiling:
    """Measure the ceilings: the best of a few repetitions, as they bound everything else."""
    a = torch.randn(_GEMM, _GEMM, device=device).to(dtype)
    b = torch.randn(_GEMM, _GEMM, device=device).to(dtype)
    product = torch.empty_like(a)
    source = torch.zeros(_COPIED // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source).fill_(1.0)
    gemm = _best(lambda: torch.mm(a, b, out=product))
    copied = _best(lambda: target.copy_(source))
    name = str(dtype).removeprefix("torch.")
    return Ceiling(name, 2 * _GEMM**3 / gemm, 2 * source.nbytes / copied)


def _best(call: Callable[[], Any]) -> float:
    best = math.inf
    for _ in range(_REPEATS):
        start = clock()
        call()
        best = min(best, clock() - start)
    return best


def measure_layers(model: nn.Module, x: Tensor, time: Timer | None = None) -> list[LayerTime]:
    """Time every fused op of a model by itself, and stock torch's calls for the same.

    Args:
        model: fused, in eval mode.
        x: its input.
        time: how calls are timed, in turn; None to count only.

    Returns:
        One entry for each different op, in order of execution.
    """
    recorder = _Recorder(model)
    with recorder:
        model(x)
    found = []
    for op in recorder.ops.values():
        calls = {"fused": op.call, "stock": stock_call(op.problem, op.operands)}
        seconds = time(calls) if time is not None else {"fused": [], "stock": []}
        found.append(
            LayerTime(
                op.name,
                str(op.problem),
                op.count,
                op.kernel,
                op.problem.flops,
                op.problem.min_bytes,
                stock_bytes(op.problem),
                seconds["fused"],
                seconds["stock"],
            )
        )
    return found


def stock_bytes(problem: ConvProblem) -> int:
    """Bytes that stock torch moves for a fused op, each of its passes reading and writing once."""
    item = problem.dtype.itemsize
    oh, ow = problem.conv_size
    out = item * problem.n * problem.k * oh * ow
    weight = item * problem.k * (problem.c // problem.groups) * problem.r * problem.s
    passes = item * problem.n * problem.c * problem.h * problem.w + weight + out  # Convolution.
    passes += 2 * out  # Batch norm.
    passes += 2 * out * problem.epilogue.count("relu")
    passes += 3 * out if problem.has_residual else 0
    if problem.pool is not None:
        passes += out + item * math.prod(problem.out_shape)
    return passes


@dataclass
class _Op:
    """A fused op as a model called it."""

    name: str
    problem: ConvProblem
    kernel: str
    call: Callable[[], Any]
    operands: Sequence[Tensor]
    count: int = 1


class _Recorder(TorchDispatchMode):
    """Keeps one call of each different fused convolution."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = {p.data_ptr(): name for name, p in model.named_parameters()}
        self.ops: dict[ConvProblem, _Op] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "fused_resnet":
            return func(*args, **kwargs)
        with backends.observe() as choices:
            result = func(*args, **kwargs)
        problem = choices[-1].problem if choices else None
        if isinstance(problem, ConvProblem):
            if problem in self.ops:
                self.ops[problem].count += 1
            else:
                operands = [t for t in args if isinstance(t, Tensor)]
                name = self._names.get(operands[1].data_ptr(), func.__name__)
                self.ops[problem] = _Op(
                    name.removesuffix(".weight"),
                    problem,
                    choices[-1].kernel.full_name,
                    lambda: func(*args, **kwargs),
                    operands,
                )
        return result


def stock_call(problem: ConvProblem, operands: Sequence[Tensor]) -> Callable[[], Tensor]:
    """Stock torch's calls for the op, in place where torchvision's modules work in place."""
    x, weight, scale, shift, *rest = operands
    mean, var = torch.zeros_like(scale), torch.ones_like(scale)

    def call() -> Tensor:
        y = torch.conv2d(
            x, weight, None, problem.stride, problem.padding, problem.dilation, problem.groups
        )
        y = torch.batch_norm(y, scale, shift, mean, var, False, 0.0, 0.0, True)
        if problem.epilogue.startswith("relu"):
            y = torch.relu_(y)
        if rest:
            y += rest[0]
        if problem.epilogue in ("add_relu", "relu_add_relu"):
            y = torch.relu_(y)
        if problem.pool is not None:
            pool = problem.pool
            y = torch.max_pool2d(y, pool.kernel, pool.stride, pool.padding)
        return y

    return call
