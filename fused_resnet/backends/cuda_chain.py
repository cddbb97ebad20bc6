"""The chained bottleneck of backend ``cuda``, and the packing of its weights.

The kernel takes each weight as a stream of tiles in the order of their use, each an image of shared
memory: rows in the kernel's order of channels, 16-byte chunks swizzled against bank conflicts.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_resnet import _build
from fused_resnet.backends.cuda import aligned_nhwc, unavailable
from fused_resnet.backends.kernel import Kernel, PackedChainKernel
from fused_resnet.problem import ChainProblem

#: Channels of ``out`` that the kernel computes at a time, and the period of its order of channels.
CHUNK = 32

#: Channels in a plane of shared memory, 128 bytes.
_PLANE = 64


def channel_order(channels: int) -> Tensor:
    """The channel in each column of the kernel's products: int64 [channels].

    Column 8 j + 2 t + e of every 32 is channel 8 t + 2 j + e.
    """
    by_column = torch.arange(channels).view(-1, 4, 4, 2)  # [., t, j, e]
    return by_column.transpose(1, 2).flatten()


def _swizzled(tiles: Tensor) -> Tensor:
    """Tiles [..., rows, 32 or 64 elements] with the chunks of each row as ``SmemTile`` has them."""
    *_, rows, elements = tiles.shape
    chunks = elements // 8
    row = torch.arange(rows, device=tiles.device)
    key = row & 7 if chunks == 8 else row >> 1 & 3
    source = torch.arange(chunks, device=tiles.device) ^ key[:, None]  # [rows, chunks]
    pieces = tiles.reshape(*tiles.shape[:-1], chunks, 8)
    index = source[..., None].expand(pieces.shape)
    return pieces.gather(-2, index).flatten(-2)


def pack_taps(weight: Tensor, stride: int = 1) -> Tensor:
    """The weight [M, M, 3, 3] of the 3x3, M a multiple of 64, by plane and tap: [9 M M].

    Taps that read pixels of the same phase under the stride follow each other.
    """
    m = weight.shape[0]
    order = channel_order(m).to(weight.device)
    phases = itertools.product(range(stride), repeat=2)
    taps = [
        (r, s) for row, column in phases for r in range(row, 3, stride)
        for s in range(column, 3, stride)
    ]  # fmt: skip
    by_tap = torch.stack([weight[order, :, r, s] for r, s in taps])  # [9, M, M]
    return _swizzled(by_tap.view(9, m, -1, _PLANE).permute(2, 0, 1, 3)).flatten()


def pack_pointwise(weight: Tensor) -> Tensor:
    """The weight [K, C, 1, 1] of a 1x1 that makes ``out``, by chunks of 32 rows: [K C].

    C is a multiple of 64.
    """
    k, c = weight.shape[:2]
    rows, columns = (channel_order(n).to(weight.device) for n in (k, c))
    chunks = weight.flatten(1)[rows][:, columns].view(-1, CHUNK, c // _PLANE, _PLANE)
    return _swizzled(chunks.transpose(1, 2)).flatten()


def pack_reduce(weight: Tensor) -> Tensor:
    """The weight [L, 4 M, 1, 1] of the next block's 1x1, by chunks of 32 columns: [4 M L]."""
    rows, columns = (channel_order(n).to(weight.device) for n in weight.shape[:2])
    chunks = weight.flatten(1)[rows][:, columns].view(len(rows), -1, CHUNK)
    return _swizzled(chunks.transpose(0, 1)).flatten()


#: How a weight is packed, by its place in the kernel.
PACK: dict[str, Callable[[Tensor], Tensor]] = {
    "taps": pack_taps,
    "strided taps": functools.partial(pack_taps, stride=2),
    "pointwise": pack_pointwise,
    "reduce": pack_reduce,
}


def layouts(problem: ChainProblem) -> tuple[str, ...]:
    """How the weights of the 3x3, the 1x1, the projection and the next 1x1 are packed."""
    taps = "taps" if problem.stride == 1 else "strided taps"
    return (taps, "pointwise", "pointwise", "reduce")


def _aligned(vector: Tensor) -> Tensor:
    """A dense fp32 vector at an address of 16 bytes."""
    return vector if vector.data_ptr() % 16 == 0 else vector.clone()


#: The blocks that there are kernels for: channels of the 3x3, of the next 1x1 and of the projection
#: and stride; and the bytes of shared memory that they need at least. See ``chain_args.h``.
_SHARED_BYTES = {
    (64, 64, 0, 1): 58880,
    (64, 0, 0, 1): 58880,
    (64, 128, 0, 1): 58880,
    (64, 64, 64, 1): 58880,
    (128, 128, 0, 1): 101376,
    (128, 0, 0, 1): 101376,
    (128, 256, 0, 1): 101376,
    (128, 128, 256, 2): 91392,
}


class CudaChain(PackedChainKernel):
    """A bottleneck from its 3x3 on and the next block's first 1x1 in one kernel.

    See ``csrc/cuda/bottleneck_chain.cuh``.
    """

    backend, op, name = "cuda", "bottleneck_chain", "chain"

    def supports(self, problem: ChainProblem, device: torch.device) -> str | None:
        """sm_80 and newer; fp16, bf16; the blocks of `_SHARED_BYTES`; all pixels or even ones."""
        p = problem
        if p.dtype not in (torch.float16, torch.bfloat16):
            return f"computes fp16 and bf16, not {p.dtype}"
        if reason := unavailable(device):
            return reason
        if p.m not in (64, 128) or p.k != 4 * p.m:
            return f"serves 64 and 128 channels and 4 times as many, not {p.m} and {p.k}"
        needed = _SHARED_BYTES.get((p.m, p.next, p.proj, p.stride))
        if needed is None:
            return (
                f"has no kernel for {p.m} channels of stride {p.stride} with "
                f"{f'a projection of {p.proj}' if p.proj else 'no projection'} and {p.next} next"
            )
        if p.store == "pool":
            return (
                "stores pixels, not their mean: no stage of 64 or 128 channels is a ResNet's last"
            )
        properties = torch.cuda.get_device_properties(device)
        available = getattr(properties, "shared_memory_per_block_optin", 48 * 1024)
        if needed > available:
            return f"needs {needed} bytes of shared memory, this GPU has {available}"
        if p.n * p.h * p.w >= 2**30:
            return "the tensors are too large for 32-bit indices"
        return None

    def layouts(self, problem: ChainProblem, device: torch.device) -> tuple[str, ...]:
        """See `PackedChainKernel`."""
        return layouts(problem)

    def pack_key(self, problem: str) -> str:
        """The layout itself."""
        return problem

    def prepare(
        self, problem: str, weight: Tensor, scale: Tensor, shift: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A weight in the kernel's order, and its vectors aligned."""
        return PACK[problem](weight.detach()), _aligned(scale), _aligned(shift)

    def run(self, problem: ChainProblem, *args: Any) -> tuple[Tensor, Tensor]:
        """See `Kernel`."""
        mid, residual, *convs = args
        packed: list[Tensor | None] = []
        for i, layout in enumerate(layouts(problem)):
            weight, scale, shift = convs[3 * i : 3 * i + 3]
            absent = weight is None
            packed += (None,) * 3 if absent else self.packed(layout, weight, scale, shift)
        assert _build.extension is not None
        result: tuple[Tensor, Tensor] = _build.extension.cuda_bottleneck_chain(
            aligned_nhwc(mid),
            aligned_nhwc(residual),
            *packed,
            problem.stride,
            problem.step,
            problem.store == "even",
        )
        return result


KERNELS: tuple[Kernel, ...] = (CudaChain(),)
