"""Tensors as the launches want them: dense, aligned, rounded. Needs no Triton."""

from __future__ import annotations

import torch
from torch import Tensor

#: Bytes that the widest loads and stores want addresses to be a multiple of.
_ALIGNMENT = 16


def channels_last(tensor: Tensor) -> Tensor:
    """The tensor, dense in channels_last order and 16-byte aligned: itself where it is so."""
    tensor = tensor.contiguous(memory_format=torch.channels_last)
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def vector(tensor: Tensor) -> Tensor:
    """A per-channel scale or shift as a dense, aligned fp32 array; it is one as a rule."""
    if (
        tensor.dtype == torch.float32
        and tensor.is_contiguous()
        and tensor.data_ptr() % _ALIGNMENT == 0
    ):
        return tensor
    tensor = tensor.detach().float().contiguous()
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def nearest_tf32(weight: Tensor) -> Tensor:
    """fp32 values rounded to the nearest tf32 (10 bits after the point), ties away from zero.

    Tensor cores cut fp32 operands off instead, which doubles the error. Weights are rounded when
    they are packed, where it costs nothing; activations, which pass once, are cut.
    """
    bits = weight.detach().view(torch.int32)
    rounded = ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(weight.isfinite(), rounded, weight.detach())
