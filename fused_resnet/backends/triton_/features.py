"""Memory-bound operations at the two ends of a network: its input images and its pooled features.

They take CUDA tensors, or CPU tensors in Triton's interpreter, and run on the current stream.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from .dense import channels_last
from .device import on_device, refusal
from .launch import bind
from .layout import padded_image
from .plans import mean_launch


def prepare_images(
    images: Tensor,
    dtype: torch.dtype,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """Images as a network's input: cast, normalised and in channels_last order, in one pass.

    Integer images are first scaled from 0..255 to 0..1, as torchvision's transforms do. The
    arithmetic is fp32 with one rounding to ``dtype``.

    Args:
        images: [N, C, H, W], uint8, fp32, fp16 or bf16, of any strides.
        dtype: fp32, fp16 or bf16.
        mean: [C], subtracted.
        std: [C], divided by. Both of mean and std are given, or none.

    Returns:
        [N, C, H, W] in ``dtype``, dense in channels_last order.

    Raises:
        TypeError: for another dtype.
        ValueError: for another rank, if only one of mean and std is given, or they are not [C].
        RuntimeError: if this backend does not serve the device.

    Example:
        >>> x = prepare_images(batch_uint8.cuda(), torch.float16, mean, std)    # doctest: +SKIP
    """
    _check_device(dtype, images.device)
    if images.dtype not in (torch.uint8, torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"images are uint8, fp32, fp16 or bf16, not {images.dtype}")
    if images.ndim != 4:
        raise ValueError(f"images are [N, C, H, W], not {tuple(images.shape)}")
    _, c, h, w = images.shape
    if (mean is None) != (std is None):
        raise ValueError("give both of mean and std, or none")
    if mean is not None and std is not None and (mean.shape != (c,) or std.shape != (c,)):
        raise ValueError(f"mean and std are [{c}], not {tuple(mean.shape)} and {tuple(std.shape)}")
    full = 255.0 if images.dtype == torch.uint8 else 1.0
    affine: tuple[Tensor, Tensor] | None = None
    if mean is not None and std is not None:
        mean64, std64 = (v.to(images.device, torch.float64) for v in (mean, std))
        affine = (1 / (full * std64)).float(), (-mean64 / std64).float()
    elif full != 1.0:
        affine = _unit_range(c, images.device)
    if images.numel() == 0:
        return torch.empty(
            images.shape, dtype=dtype, device=images.device, memory_format=torch.channels_last
        )
    return padded_image(images, (h, w, c), (0, 0), dtype, affine).permute(0, 3, 1, 2)


@lru_cache(maxsize=64)
def _unit_range(c: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.full((c,), 1 / 255, device=device), torch.zeros(c, device=device)


def global_avg_pool(x: Tensor) -> Tensor:
    """Mean over all pixels, summed in fp32: ``torch.nn.functional.adaptive_avg_pool2d(x, 1)``.

    Args:
        x: [N, C, H, W], fp32, fp16 or bf16; the natural layout is channels_last.

    Returns:
        [N, C, 1, 1] in x's dtype.

    Raises:
        ValueError: for another rank, or no pixels.
        RuntimeError: if this backend does not serve the device or dtype.

    Example:
        >>> features = global_avg_pool(x).flatten(1)    # doctest: +SKIP
    """
    _check_device(x.dtype, x.device)
    if x.ndim != 4 or x.shape[2] * x.shape[3] == 0:
        raise ValueError(f"x is [N, C, H, W] with at least one pixel, not {tuple(x.shape)}")
    n, c, h, w = x.shape
    y = torch.empty((n, c, 1, 1), dtype=x.dtype, device=x.device)
    if y.numel():
        start = _mean_start(n, c, h * w, x.dtype, x.device)
        with on_device(x.device):
            start(channels_last(x), y, h * w)
    return y


@lru_cache(maxsize=256)
def _mean_start(
    n: int, c: int, pixels: int, dtype: torch.dtype, device: torch.device
) -> Callable[..., None]:
    with on_device(device):
        return bind(mean_launch(n, c, pixels, dtype), device)


def _check_device(dtype: torch.dtype, device: torch.device) -> None:
    reason = refusal(dtype, device)
    if reason is not None:
        raise RuntimeError(reason)
