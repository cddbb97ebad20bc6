"""The Gluon kernels ``im2col`` and ``im2col_sm100`` as the tuner sees them: NEVER EXECUTED HERE.

No GPU has run them, and they do not run in Triton's interpreter. So the registry does not know
them, and no untuned choice takes them: they are among the variants of ``TritonConv``, which a tuner
compares with float64 on the user's own GPU and layer before it times them. Their name says it.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_resnet.backends.kernel import PackedKernel
from fused_resnet.problem import ConvProblem

from .dense import channels_last, vector
from .device import arch_of, on_device, refusal

#: Warps, pixels and channels of a tile, columns of y's box, and slots of the ring, by tensor
#: instruction.
SHAPES = {"wgmma": (8, 256, 128, 64, 3), "tcgen05": (4, 128, 128, 64, 5)}

#: Products of one slot: 128 bytes of 16-bit values, the widest swizzle of shared memory.
BLOCK_K = 64


class TritonIm2col(PackedKernel):
    """``conv_affine_act`` by TMA im2col and warp specialisation, on sm_90 and sm_100."""

    backend: ClassVar[str] = "triton"
    op: ClassVar[str] = "conv_affine_act"
    name: ClassVar[str] = "im2col[never executed here]"
    packs_vectors: ClassVar[bool] = False

    def supports(self, problem: ConvProblem, device: torch.device) -> str | None:
        """None if this kernel computes ``problem`` on ``device``, else why it does not."""
        p = problem
        reason = refusal(p.dtype, device)
        if reason is not None:
            return reason
        if device.type != "cuda":
            return "Gluon kernels do not run in Triton's interpreter"
        family = arch_of(device).family
        if family not in SHAPES:
            return "TMA im2col is for sm_90 and sm_100"
        if find_spec("triton.experimental.gluon") is None:
            return "this Triton has no Gluon"
        if p.dtype == torch.float32:
            return "only fp16 and bf16"
        if p.pool is not None or p.groups != 1 or p.dilation != (1, 1):
            return "only ungrouped, undilated convolutions without pooling"
        if p.stride[0] != p.stride[1] or p.padding[0] != p.padding[1]:
            return "only one stride and one padding for rows and columns"
        block_n = SHAPES[family][2]
        if p.c % BLOCK_K or p.k % block_n:
            return f"channels are no multiple of {BLOCK_K} and {block_n}"
        if max(p.r, p.s) > 16:
            return "filters larger than 16 are not supported"
        return None

    def promising(self, problem: ConvProblem, device: torch.device) -> bool:
        """Never: only a tuner's verification and clock admit it."""
        return False

    def prepare(self, problem: ConvProblem, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """[K, R, S, C]."""
        return weight.detach().permute(0, 2, 3, 1).contiguous()

    def run(
        self,
        problem: ConvProblem,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
    ) -> Tensor:
        """The op's result [N, K, OH, OW], dense in channels_last order."""
        arch = arch_of(x.device)
        warps, block_m, block_n, part, slots = SHAPES[arch.family]
        with on_device(x.device):
            y = torch.empty(
                problem.out_shape,
                dtype=x.dtype,
                device=x.device,
                memory_format=torch.channels_last,
            )
            boxes = descriptors(
                problem,
                channels_last(x),
                self.packed(problem, weight, scale, shift),
                y if residual is None else channels_last(residual),
                y,
                (block_m, block_n, part),
            )
            m = y.numel() // problem.k
            # One program an SM walks over tiles.
            tiles = -(-m // block_m) * (problem.k // block_n)
            kernel_of(arch.family)[(min(tiles, arch.sms),)](
                *boxes[:2],
                vector(scale),
                vector(shift),
                *boxes[2:],
                m,
                *constants_of(problem, slots).values(),
                num_warps=warps,
            )
        return y


@lru_cache(maxsize=2)
def kernel_of(family: str) -> Any:
    """The kernel of a tensor instruction; imported late, since not every Triton has Gluon."""
    if family == "wgmma":
        from .im2col import conv_im2col_kernel

        return conv_im2col_kernel
    from .im2col_sm100 import conv_im2col_sm100_kernel

    return conv_im2col_sm100_kernel


def layout(rows: int, cols: int, dtype: torch.dtype) -> Any:
    """How a box lies in shared memory."""
    from triton.experimental.gluon import language

    element = language.float16 if dtype == torch.float16 else language.bfloat16
    return language.NVMMASharedLayout.get_default_for([rows, cols], element)


def constants_of(problem: ConvProblem, slots: int) -> dict[str, object]:
    """The kernel's compile-time arguments, in order."""
    oh, ow = problem.conv_size
    return {
        "C": problem.c, "K": problem.k, "OH": oh, "OW": ow, "R": problem.r, "S": problem.s,
        "STRIDE": problem.stride[0], "PAD": problem.padding[0], "SLOTS": slots,
        "EPILOGUE": problem.epilogue,
    }  # fmt: skip


def descriptors(
    problem: ConvProblem,
    x: Tensor,
    w: Tensor,
    residual: Tensor,
    y: Tensor,
    tile: tuple[int, int, int],
) -> tuple[Any, ...]:
    """Tensor descriptors of x, w, residual and y; w is [K, R, S, C], the others channels_last.

    ``tile`` is pixels and channels of a tile and columns of y's box. The box of pixels starts at
    the first window's corner, ``-padding``, and ends at the last one's, counted from the end of the
    image.
    """
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor, TensorDescriptorIm2Col

    p, (block_m, block_n, part) = problem, tile
    m = p.n * p.conv_size[0] * p.conv_size[1]
    sizes = zip(p.conv_size, (p.h, p.w), p.padding, p.stride, strict=True)
    pixels = TensorDescriptorIm2Col.from_tensor(
        x.permute(0, 2, 3, 1),
        [block_m, BLOCK_K],
        layout(block_m, BLOCK_K, p.dtype),
        element_strides=[1, p.stride[0], p.stride[1], 1],
        pixel_box_lower_corner=[-pad for pad in p.padding],
        pixel_box_upper_corner=[
            (out - 1) * stride + 1 - size - pad for out, size, pad, stride in sizes
        ],
    )

    def matrix(tensor: Tensor, rows: int, cols: int, box_rows: int, box_cols: int) -> Any:
        return TensorDescriptor.from_tensor(
            tensor.reshape(rows, cols), [box_rows, box_cols], layout(box_rows, box_cols, p.dtype)
        )

    return (
        pixels,
        matrix(w, p.k, p.r * p.s * p.c, block_n, BLOCK_K),
        matrix(residual.permute(0, 2, 3, 1), m, p.k, block_m, part),
        matrix(y.permute(0, 2, 3, 1), m, p.k, block_m, part),
    )
