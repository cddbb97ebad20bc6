"""How the Gluon kernels are compiled and launched: their shapes, layouts and descriptors."""

import torch

from fused_resnet.problem import ConvProblem

#: Warps, pixels and channels of a tile, columns of y's box, and slots of the ring, by capability.
SHAPES = {90: (8, 256, 128, 64, 3), 100: (4, 128, 128, 64, 5)}

BLOCK_K = 64


def kernel_of(capability: int):
    """The kernel of a GPU; imported late, since not every Triton has Gluon."""
    if capability == 90:
        from fused_resnet.backends.triton_.im2col import conv_im2col_kernel

        return conv_im2col_kernel
    from fused_resnet.backends.triton_.im2col_sm100 import conv_im2col_sm100_kernel

    return conv_im2col_sm100_kernel


def layout(rows: int, cols: int, dtype: torch.dtype):
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


def descriptors(problem: ConvProblem, x, w, residual, y, block_m: int, block_n: int, part: int):
    """Tensor descriptors of x, w, residual and y, all NHWC or KRSC and dense.

    The box of pixels starts at the first window's corner, ``-padding``, and ends at the last one's,
    counted from the end of the image.
    """
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor, TensorDescriptorIm2Col

    p = problem
    m = p.n * p.conv_size[0] * p.conv_size[1]
    sizes = zip(p.conv_size, (p.h, p.w), p.padding, p.stride, strict=True)
    pixels = TensorDescriptorIm2Col.from_tensor(
        x,
        [block_m, BLOCK_K],
        layout(block_m, BLOCK_K, p.dtype),
        element_strides=[1, p.stride[0], p.stride[1], 1],
        pixel_box_lower_corner=[-pad for pad in p.padding],
        pixel_box_upper_corner=[
            (out - 1) * stride + 1 - size - pad for out, size, pad, stride in sizes
        ],
    )

    def matrix(tensor, rows, cols, *block):
        return TensorDescriptor.from_tensor(
            tensor.reshape(rows, cols), list(block), layout(*block, p.dtype)
        )

    return (
        pixels,
        matrix(w, p.k, p.r * p.s * p.c, block_n, BLOCK_K),
        matrix(residual, m, p.k, block_m, part),
        matrix(y, m, p.k, block_m, part),
    )


def run_im2col(capability: int, problem: ConvProblem, data, y) -> None:
    """Launch on y's device: one program an SM walks over tiles. y is dense in channels_last."""
    warps, block_m, block_n, part, slots = SHAPES[capability]
    x, weight, scale, shift, residual = data
    out = y.permute(0, 2, 3, 1)
    x_box, w_box, residual_box, y_box = descriptors(
        problem,
        x.permute(0, 2, 3, 1),
        weight.permute(0, 2, 3, 1).contiguous(),
        out if residual is None else residual.permute(0, 2, 3, 1),
        out,
        block_m,
        block_n,
        part,
    )
    m = out.numel() // problem.k
    tiles = -(-m // block_m) * (problem.k // block_n)
    sms = torch.cuda.get_device_properties(y.device).multi_processor_count
    kernel_of(capability)[(min(tiles, sms),)](
        x_box,
        w_box,
        scale,
        shift,
        residual_box,
        y_box,
        m,
        *constants_of(problem, slots).values(),
        num_warps=warps,
    )
