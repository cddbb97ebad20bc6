"""Chained bottlenecks drawn at random, and what stock torch makes of them in any dtype."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.problem import ChainProblem
from tests.helpers import channels_last


def chain_problem(
    m: int = 64,
    n: int = 2,
    h: int = 7,
    w: int = 9,
    *,
    k: int | None = None,
    following: int | None = None,
    proj: int = 0,
    stride: int = 1,
    step: int | None = None,
    store: str = "all",
    dtype: torch.dtype = torch.float16,
) -> ChainProblem:
    """A problem of few words: an identity block of a stage unless told otherwise."""
    following = m if following is None else following
    step = (stride if proj else 1) if step is None else step
    return ChainProblem(n, m, h, w, k or 4 * m, following, proj, stride, step, store, dtype)


def chain_data(p: ChainProblem, seed: int = 0) -> tuple[Tensor | None, ...]:
    """The op's tensors; scales have both signs."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    vectors = torch.float64 if p.dtype == torch.float64 else torch.float32

    def conv(k: int, c: int, r: int) -> tuple[Tensor | None, ...]:
        if not c or not k:
            return (None, None, None)
        weight = draw(k, c, r, r) / (c * r * r) ** 0.5
        return weight.to(p.dtype), (draw(k) * 1.2).to(vectors), draw(k).to(vectors)

    residual = (p.n, p.proj, p.h, p.w) if p.step > 1 else p.residual_shape
    return (
        channels_last(draw(p.n, p.m, p.h, p.w).to(p.dtype)),
        channels_last(draw(*residual).to(p.dtype)),
        *conv(p.m, p.m, 3),
        *conv(p.k, p.m, 1),
        *conv(p.k, p.proj, 1),
        *conv(p.next, p.k, 1),
    )


def stock(
    p: ChainProblem, args: tuple[Any, ...], dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The chain by stock operations: in its own dtype, or in ``dtype``."""
    if dtype is not None:
        args = tuple(None if t is None else t.to(dtype) for t in args)
    mid, residual, w2, s2, b2, w3, s3, b3, wp, sp, bp, w1, s1, b1 = args

    def norm(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        mean, var = torch.zeros_like(scale), torch.ones_like(scale)
        return F.batch_norm(y, mean, var, scale, shift, eps=0.0)

    z = norm(F.conv2d(mid, w2, None, p.stride, 1), s2, b2).relu()
    z = norm(F.conv2d(z, w3), s3, b3)
    if wp is not None:
        residual = norm(F.conv2d(residual, wp, None, p.step), sp, bp)
    whole = (z + residual).relu()
    mid_next = torch.empty(p.next_shape, dtype=whole.dtype, device=whole.device)
    if w1 is not None:
        mid_next = norm(F.conv2d(whole, w1), s1, b1).relu()
    if p.store == "even":
        whole = whole[..., ::2, ::2]
    if p.store == "pool":
        whole = F.adaptive_avg_pool2d(whole, 1)
    return whole, mid_next


def call(p: ChainProblem, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """The registered op on these tensors."""
    out, mid_next = torch.ops.fused_resnet.bottleneck_chain(*args, p.stride, p.store)
    return out, mid_next
