"""Types of the compiled extension, which is built from csrc/ops.cpp."""

from torch import Tensor

def add_relu(a: Tensor, b: Tensor, inplace: bool) -> Tensor:
    """``relu(a + b)`` of dense CPU tensors of one shape, dtype and strides.

    Shapes are any; dtypes float32, float16, bfloat16 and float64. 16-bit floats are added in fp32
    and rounded once. With ``inplace`` the result is written to, and is, ``a``. Knows no autograd.

    Raises:
        ValueError: the tensors are not on the CPU, differ in shape or strides, are not dense, or,
            with ``inplace``, overlap in part.
        TypeError: the tensors differ in dtype, or it is none of the four.
    """

def affine_act_(
    y: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, epilogue: str
) -> None:
    """``y = epilogue(y * scale + shift, residual)`` in place, in fp32, rounded once.

    ``y`` is [N, K, H, W], float32, float16, bfloat16 or float64, dense in channels_last order, and
    ``residual`` (for the epilogues that read one) is as y. ``scale`` and ``shift`` are [K], float32
    (float64 if y is). Knows no autograd.

    Raises:
        ValueError: a shape, device, memory layout or epilogue is not as above, or ``residual``
            overlaps y in part.
        TypeError: a dtype is not as above.
    """

def isa() -> str:
    """The instruction-set level that the kernels use: ``generic``, ``avx2`` or ``avx512``.

    It is the highest that the CPU and the operating system support, unless the environment variable
    ``FUSED_RESNET_ISA`` names a lower one.

    Raises:
        ValueError: ``FUSED_RESNET_ISA`` names no level, or one that this CPU cannot run.
    """

def set_isa(isa: str) -> None:
    """Use another level, for the whole process.

    Raises:
        ValueError: ``isa`` is none of ``isa_available()``.
    """

def isa_available() -> list[str]:
    """The levels that this CPU can run, lowest first."""

def cpu_features() -> dict[str, bool]:
    """Whether the CPU has ``avx512_bf16`` and ``amx_bf16``, which lie beyond the level."""

def cuda_conv_implicit_gemm(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    gather: Tensor | None,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    epilogue: int,
    arithmetic: int,
    tile: int,
    splits: int,
) -> Tensor:
    """``conv_affine_act`` on the GPU; only where the extension was built with CUDA, as all below.

    x [N, C, H, W] and residual are dense in channels_last order; weight and gather come from
    ``fused_resnet.backends.cuda.pack``; epilogue, arithmetic and tile are positions in
    ``EPILOGUES``, ``ARITHMETICS`` and ``TILES``.

    Raises:
        ValueError: shapes, devices, layouts or addresses do not fit.
        TypeError: dtypes do not fit.
        RuntimeError: CUDA refused the launch.
    """

def cuda_stem(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    padding: tuple[int, int],
    arithmetic: int,
    input_scale: list[float],
    input_shift: list[float],
) -> Tensor:
    """``conv_affine_relu_maxpool`` of x [N, C <= 4, H, W], any strides, floating point or uint8.

    Bytes become ``x * input_scale[c] + input_shift[c]``. Raises as ``cuda_conv_implicit_gemm``.
    """

def cuda_bottleneck_chain(
    mid1: Tensor,
    residual: Tensor,
    weight2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    weight3: Tensor,
    scale3: Tensor,
    shift3: Tensor,
    weight_proj: Tensor | None,
    scale_proj: Tensor | None,
    shift_proj: Tensor | None,
    weight1: Tensor | None,
    scale1: Tensor | None,
    shift1: Tensor | None,
    stride: int,
    step: int,
    even: bool,
) -> tuple[Tensor, Tensor]:
    """(out, mid_next) of a chained bottleneck, in float16 and bfloat16.

    mid1 [N, M, H, W] with M 64 or 128 and residual [N, 4 M, OH, OW] are dense in channels_last
    order; with ``weight_proj`` the residual is a projection's input, read at every ``step``-th row
    and column. The weights are packed by ``fused_resnet.backends.cuda_chain``; mid_next
    [N, L, OH, OW] has no channels without ``weight1``; with ``even`` out has only the pixels of
    even row and column. Raises as ``cuda_conv_implicit_gemm``, also where there is no kernel for
    these channels and this stride.
    """

def cuda_add_relu(a: Tensor, b: Tensor, inplace: bool) -> Tensor:
    """``add_relu`` on the GPU, in float32, float16 and bfloat16."""

def cuda_global_average_pool(x: Tensor) -> Tensor:
    """Means [N, C] of x [N, C, H, W], dense in channels_last order, on the GPU."""

def cuda_to_channels_last(x: Tensor) -> Tensor:
    """A contiguous x [N, C, H, W] on the GPU, laid out anew in channels_last order."""

def build_info() -> dict[str, object]:
    """What the extension was built with.

    Keys: ``compiler``, ``cplusplus`` (the standard, as ``__cplusplus``), ``openmp``, ``torch`` (the
    version built against), ``cuda`` (None, or a dict of ``version`` and ``archs``).
    """

def state_of(tensors: tuple[Tensor | None, ...]) -> bytes | None:
    """Address, version, dtype and device of all ``tensors`` as one key.

    None if one of them was made in inference mode, where tensors keep no version.
    """

def layout_of(tensors: tuple[Tensor | None, ...]) -> bytes:
    """Shape, strides, dtype, device and layout of all ``tensors`` as one key."""
