"""Backend ``torch``: stock ATen, one operation after another. It defines what is right.

Bytes: the activation passes through memory once for the convolution, once for the affine map and
    once for each of add and ReLU, which is what the other backends save.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fused_resnet.backends.kernel import Kernel
from fused_resnet.freshness import capturing
from fused_resnet.numerics import compose_chain, convolve
from fused_resnet.problem import AddReluProblem, ChainProblem, Convolution, channels_last_format


def _unit_statistics(k: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean 0 and variance 1 for [K] channels: they make batch_norm a per-channel affine map."""
    if capturing(device):
        return _new_unit_statistics(k, dtype, device)
    return _cached_unit_statistics(k, dtype, device)


def _new_unit_statistics(k: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    # Made outside any surrounding inference mode, so that autograd may save them later.
    with torch.inference_mode(False):
        zeros = torch.zeros(k, dtype=dtype, device=device)
        return zeros, torch.ones_like(zeros)


_cached_unit_statistics = functools.lru_cache(maxsize=256)(_new_unit_statistics)


def affine(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``y * scale + shift`` per channel: one ATen pass, fp32 arithmetic, one rounding.

    Args:
        y: [N, K, H, W] or [N, K, D, H, W].
        scale: fp32 [K] (float64 if y is).
        shift: as scale.
    """
    mean, var = _unit_statistics(scale.shape[0], scale.dtype, scale.device)
    return torch.batch_norm(y, scale, shift, mean, var, False, 0.0, 0.0, False)


def finish(z: Tensor, residual: Tensor | None, epilogue: str) -> Tensor:
    """Add the residual and apply the ReLUs of ``epilogue`` to z in place, as stock modules do."""
    if epilogue in ("relu", "relu_add_relu"):
        z = z.relu_()
    if residual is not None:
        z = z.add_(residual)
        if epilogue != "add":
            z = z.relu_()
    return z


class AtenConv(Kernel):
    """conv2d, batch_norm with unit statistics as the affine map, add and ReLU in place."""

    backend, op, name = "torch", "conv_affine_act", "aten"

    def supports(self, problem: Convolution, device: torch.device) -> str | None:
        """Everything is supported."""
        return None

    def run(self, problem: Convolution, *args: Any) -> Tensor:
        """See `Kernel`."""
        x, weight, scale, shift, residual = args
        y = convolve(problem, x.contiguous(memory_format=channels_last_format(x)), weight)
        return finish(affine(y, scale, shift), residual, problem.epilogue)


class AtenConv3d(AtenConv):
    """As `AtenConv`, for videos."""

    op = "conv3d_affine_act"


class AtenStem(AtenConv):
    """The stem: as `AtenConv`, then max_pool2d."""

    op = "conv_affine_relu_maxpool"

    def run(self, problem: Convolution, *args: Any) -> Tensor:
        """See `Kernel`."""
        assert problem.pool is not None
        y = super().run(problem, *args)
        return torch.max_pool2d(y, problem.pool.kernel, problem.pool.stride, problem.pool.padding)


class AtenAddRelu(Kernel):
    """add, then ReLU in place."""

    backend, op, name = "torch", "add_relu", "aten"

    def supports(self, problem: AddReluProblem, device: torch.device) -> str | None:
        """Everything is supported."""
        return None

    def run(self, problem: AddReluProblem, *args: Any) -> Tensor:
        """See `Kernel`."""
        a, b = args
        return (a.add_(b) if problem.inplace else torch.add(a, b)).relu_()


class AtenChain(Kernel):
    """The convolutions of a bottleneck one by one, each as `AtenConv` computes it."""

    backend, op, name = "torch", "bottleneck_chain", "aten"
    _conv = AtenConv()

    def supports(self, problem: ChainProblem, device: torch.device) -> str | None:
        """Everything is supported."""
        return None

    def run(self, problem: ChainProblem, *args: Any) -> tuple[Tensor, Tensor]:
        """See `Kernel`."""
        return compose_chain(problem, args, self._conv.run)


KERNELS: tuple[Kernel, ...] = (
    AtenConv(),
    AtenConv3d(),
    AtenStem(),
    AtenAddRelu(),
    AtenChain(),
)
