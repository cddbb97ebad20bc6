"""``bottleneck_chain`` as the registry sees it: packing, buffers and one launch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fused_resnet.backends.kernel import PackedChainKernel
from fused_resnet.problem import ChainProblem

from .config import Arch
from .dense import channels_last, vector
from .device import arch_of, on_device, refusal

if TYPE_CHECKING:
    from .chain_plan import ChainTile
    from .paths import Operand

#: Bound problems a kernel keeps.
_MAX_BOUND = 1024


class _Layout(NamedTuple):
    """How a weight [K, C, R, S] is passed: as dense [K, R*S*C], or as a descriptor with a box."""

    box: tuple[int, int] | None


class _Packed(NamedTuple):
    w: Operand
    scale: Tensor
    shift: Tensor


class _Bound(NamedTuple):
    """What is done once per problem and device."""

    start: Callable[..., None]
    programs: int
    layouts: tuple[_Layout, ...]
    sizes: tuple[int, ...]


class TritonChain(PackedChainKernel):
    """Chained bottlenecks of 64, 128 or 256 channels in fp16 and bf16; see ``chain``.

    ``arch`` takes the configurations of another GPU than the one at hand, for the interpreter;
    ``tile`` one configuration instead of the predicted best.
    """

    backend: ClassVar[str] = "triton"
    op: ClassVar[str] = "bottleneck_chain"

    def __init__(self, arch: Arch | None = None, tile: ChainTile | None = None) -> None:
        super().__init__()
        # An instance's name: the class variable of Kernel is only declared.
        self.name = "chain" if tile is None else f"chain:{tile}"  # type: ignore[misc]
        self._arch, self._tile = arch, tile
        self._bound: dict[tuple[ChainProblem, torch.device], _Bound] = {}
        self._variants: dict[ChainTile, TritonChain] = {}

    def promising(self, problem: ChainProblem, device: torch.device) -> bool:
        """On a GPU; the interpreter is for tests."""
        return device.type == "cuda"

    def supports(self, problem: ChainProblem, device: torch.device) -> str | None:
        """None if this kernel computes ``problem`` on ``device``, else why it does not."""
        if problem.dtype not in (torch.float16, torch.bfloat16):
            return f"chained bottlenecks are of fp16 and bf16, not {problem.dtype}"
        if reason := refusal(problem.dtype, device):
            return reason
        from .chain_plan import chain_tiles, unsupported

        if reason := unsupported(problem):
            return reason
        tiles = chain_tiles(problem, self._arch or arch_of(device))
        if not tiles:
            return f"no configuration for {problem} fits this GPU without spills"
        if self._tile is not None and self._tile not in tiles:
            return f"the configuration {self._tile} is not offered here"
        return None

    def variants(self, problem: ChainProblem, device: torch.device) -> tuple[TritonChain, ...]:
        """A kernel for each configuration of this GPU."""
        if self._tile is not None or self.supports(problem, device) is not None:
            return (self,)
        from .chain_plan import chain_tiles

        tiles = chain_tiles(problem, self._arch or arch_of(device))
        return tuple(self._variants.setdefault(t, TritonChain(self._arch, t)) for t in tiles)

    def layouts(self, problem: ChainProblem, device: torch.device) -> tuple[_Layout, ...]:
        """See `PackedChainKernel`."""
        with on_device(device):
            return self._bind(problem, device).layouts

    def pack_key(self, problem: Any) -> _Layout:
        """The layout of one of the weights."""
        layout: _Layout = problem
        return layout

    def prepare(self, problem: Any, weight: Tensor, scale: Tensor, shift: Tensor) -> _Packed:
        """A weight [K, C, R, S] as [K, R*S*C], scale and shift as aligned fp32 arrays."""
        from .layout import matrix

        w: Operand = weight.detach().permute(0, 2, 3, 1).contiguous()
        if problem.box is not None:
            w = matrix(w, weight.shape[0], weight[0].numel(), problem.box)
        return _Packed(w, vector(scale), vector(shift))

    def run(self, problem: ChainProblem, *args: Any) -> tuple[Tensor, Tensor]:
        """See `Kernel`."""
        p, device = problem, args[0].device
        with on_device(device):
            bound = self._bind(p, device)
            mid, residual = channels_last(args[0]), channels_last(args[1])
            weights: list[Any] = []
            for i, layout in enumerate(bound.layouts):
                weight, scale, shift = args[2 + 3 * i : 5 + 3 * i]
                if weight is None:
                    weights += (mid, mid, mid)  # Never read.
                else:
                    weights += self.packed(layout, weight, scale, shift)
            mid_next = torch.empty(
                p.next_shape, dtype=p.dtype, device=device, memory_format=torch.channels_last
            )
            if p.store == "pool":
                out = torch.empty(
                    (p.n, bound.programs // p.n, p.k), dtype=torch.float32, device=device
                )
            else:
                out = torch.empty(
                    p.out_shape, dtype=p.dtype, device=device, memory_format=torch.channels_last
                )
            bound.start(mid, residual, *weights, out, mid_next, *bound.sizes, *residual.shape[2:])
            if p.store == "pool":
                mean = out.sum(1) / math.prod(p.size)
                out = mean.to(p.dtype).view(p.out_shape)
        return out, mid_next

    def _bind(self, problem: ChainProblem, device: torch.device) -> _Bound:
        key = problem, device
        bound = self._bound.get(key)
        if bound is None:
            from .chain_plan import chain_launch, chain_tile, programs
            from .launch import bind

            p = problem
            tile = self._tile or chain_tile(p, self._arch or arch_of(device))
            boxes = ((p.m, tile.block_k), (tile.block_c, p.m), (tile.block_c, p.proj),
                     (p.next, tile.block_c))  # fmt: skip
            bound = _Bound(
                bind(chain_launch(p, tile), device),
                programs(p, tile),
                tuple(_Layout(box if tile.tma else None) for box in boxes),
                (p.n, p.h, p.w, *p.size),
            )
            if len(self._bound) >= _MAX_BOUND:
                self._bound.pop(next(iter(self._bound)), None)
            self._bound[key] = bound
        return bound
