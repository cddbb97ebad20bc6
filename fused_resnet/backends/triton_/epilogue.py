"""What every Triton convolution does with its accumulators: one function, fp32, one rounding.

    z = acc * scale + shift
    none: z    relu: relu(z)    add: z + r    add_relu: relu(z + r)    relu_add_relu: relu(relu(z) +
    r)

The tile is [BLOCK_M pixels, BLOCK_N channels] of an [M, K] row-major output, that is, of a
channels_last tensor seen as a matrix. ``partial`` is the epilogue of a split reduction: the raw
sums go to an fp32 workspace, and ``reduce_kernel`` applies the real one.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

#: Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), on CPU tensors.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """The sum acc + a @ b in fp32; PRECISION is ``tf32`` or ``ieee`` and matters for fp32 only."""
    if INTERPRETED:
        # The interpreter keeps bf16 as raw 16-bit integers and would multiply those.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def relu(z):
    """max(z, 0), and NaN stays NaN as in torch."""
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """fp32 to the output's dtype, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter's own conversion drops the carry out of the mantissa (1.999 becomes 1.0),
        # so round in integers; what is left is exact.
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        bits = tl.where(value == value, nearest, bits | 0x400000)
        value = bits.to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def affine_act(acc, scale, shift, residual, EPILOGUE: tl.constexpr):
    """The epilogue on fp32 values; scale and shift [BLOCK_N] are broadcast over the rows."""
    z = acc * scale[None, :] + shift[None, :]
    if EPILOGUE == "relu" or EPILOGUE == "relu_add_relu":
        z = relu(z)
    if EPILOGUE == "add" or EPILOGUE == "add_relu" or EPILOGUE == "relu_add_relu":
        z += residual
    if EPILOGUE == "add_relu" or EPILOGUE == "relu_add_relu":
        z = relu(z)
    return z


@triton.jit
def column_halves(acc):
    """Left and right half of the columns: free, as tensor cores lay results out in registers."""
    return tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def store_tile(
    acc,
    scale,
    shift,
    residual,
    y,
    rows,
    m,
    col0,
    col_end,
    LD: tl.constexpr,
    EVEN_N: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Finish acc [BLOCK_M, BLOCK_N] and store it in y [M, LD].

    It belongs at rows ``rows`` and columns ``col0 ...``. Rows from ``m`` on and columns from
    ``col_end`` on are left out. The tile is handled in PARTS column blocks: more parts need fewer
    registers.
    """
    if PARTS > 1:
        left, right = column_halves(acc)
        store_tile(
            left,
            scale,
            shift,
            residual,
            y,
            rows,
            m,
            col0,
            col_end,
            LD,
            EVEN_N,
            EPILOGUE,
            PARTS // 2,
        )
        col1 = col0 + left.shape[1]
        store_tile(
            right,
            scale,
            shift,
            residual,
            y,
            rows,
            m,
            col1,
            col_end,
            LD,
            EVEN_N,
            EPILOGUE,
            PARTS // 2,
        )
    else:
        cols = col0 + tl.arange(0, acc.shape[1])
        offsets = rows[:, None] * LD + cols[None, :]
        inside = (rows < m)[:, None]
        if not EVEN_N:
            inside = inside & (cols < col_end)[None, :]
        if EPILOGUE == "partial":
            tl.store(y + offsets, acc, mask=inside)
        else:
            if EVEN_N:
                a = tl.load(scale + cols)
                b = tl.load(shift + cols)
            else:
                a = tl.load(scale + cols, mask=cols < col_end, other=0.0)
                b = tl.load(shift + cols, mask=cols < col_end, other=0.0)
            r = acc
            if EPILOGUE == "add" or EPILOGUE == "add_relu" or EPILOGUE == "relu_add_relu":
                r = tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
            z = affine_act(acc, a, b, r, EPILOGUE)
            tl.store(y + offsets, round_to(z, y.dtype.element_ty), mask=inside)


@triton.jit
def grouped_tile(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Program id to (tile row, tile column), GROUP_M rows at a time: both operands stay in L2."""
    per_group = GROUP_M * tiles_n
    first = pid // per_group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    return first + pid % per_group % height, pid % per_group // height
