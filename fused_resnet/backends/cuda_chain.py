"""Weights of the CUDA chained bottleneck, packed as ``csrc/cuda/bottleneck_chain.cuh`` wants them.

The kernel takes the weights of its three convolutions as one stream of tiles, in the order of their
use, each an image of shared memory: rows in the kernel's order of channels, 16-byte chunks swizzled
against bank conflicts.
"""

from __future__ import annotations

import torch
from torch import Tensor

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


def pack_chain(weight2: Tensor, weight3: Tensor, weight1: Tensor | None) -> Tensor:
    """The stream of weights of a chained bottleneck.

    Args:
        weight2: of the 3x3, [M, M, 3, 3] with M 64 or 128; 16-bit.
        weight3: of the 1x1 after it, [4 M, M, 1, 1].
        weight1: of the next block's first 1x1, [L, 4 M, 1, 1] with L a multiple of 32; None if
            there is no next block.

    Returns:
        [9 M M + 4 M M + L 4 M], of the weights' dtype and device.
    """
    m = weight2.shape[0]
    order = channel_order(m).to(weight2.device)
    # [K, C, R, S] as taps and planes of [K, 64].
    taps = weight2[order].permute(2, 3, 0, 1).reshape(9, m, m // _PLANE, _PLANE)
    stream = [_swizzled(taps.transpose(1, 2)).flatten()]
    out_order = channel_order(4 * m).to(weight2.device)
    expand = weight3.flatten(1)[out_order][:, order].view(-1, CHUNK, m // _PLANE, _PLANE)
    chunks = [_swizzled(expand.transpose(1, 2)).flatten(1)]
    if weight1 is not None:
        next_order = channel_order(weight1.shape[0]).to(weight1.device)
        reduce = weight1.flatten(1)[next_order][:, out_order]
        columns = reduce.view(len(next_order), -1, CHUNK).transpose(0, 1)
        chunks.append(_swizzled(columns).flatten(1))
    stream.append(torch.cat(chunks, 1).flatten())
    return torch.cat(stream)
