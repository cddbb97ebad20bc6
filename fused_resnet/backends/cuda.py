"""Backend ``cuda``: the package's own CUDA kernels (``csrc/cuda``), for sm_80 and newer.

`ImplicitGemm` serves any convolution in fp16, bf16, tf32 and fp32; `CudaStem` the first layer with
its max-pool; `CudaAddRelu` the add. Weights are packed once, into [K, R, S, C / groups]:

- groups narrower than a tile are bundled: ``b`` groups become one of ``b`` times the channels whose
  weights are zero off the diagonal, so that tensor cores see full tiles. (Infinities and NaNs in
  one group's input therefore reach the outputs of its whole bundle.)
- where 16-byte vectors do not fit the channels, the whole reduction is packed without gaps, with a
  table that says where each of its elements lies.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_resnet import _build
from fused_resnet.backends.cuda_schedule import (
    TILES,
    ConvSchedule,
    Tile,
    candidates,
    choose,
    gathers_wide,
)
from fused_resnet.backends.kernel import Kernel, PackedKernel
from fused_resnet.problem import EPILOGUES, AddReluProblem, ConvProblem

#: Arithmetics in the order of ``csrc/cuda/launch.h``.
ARITHMETICS = ("float16", "bfloat16", "tf32", "float32")

#: Kernels of more rows or columns than this are gathered: one bit per tap has to fit a register.
MAX_VECTOR_TAPS = 31

#: Rows of the gathering table are a whole number of the longest slice, 128 bytes.
_SLICE_BYTES = 128

#: Positions in a padded image stay below this, half of ``kOutside`` in ``csrc/cuda/conv_tile.h``.
_MAX_REACH = 1 << 29

#: Where the bits of columns begin in a gathering table, and what lies outside of every image.
_ROW_BITS, _OUTSIDE_BIT, _OUTSIDE_DISTANCES = 16, -(1 << 31), -1

#: Bits of a distance in the gathering table of a wide kernel; longer images are refused.
_DISTANCE_BITS = 16


def round_to_tf32(weight: Tensor) -> Tensor:
    """fp32 rounded to the 10 bits of mantissa that tf32 keeps, ties away from zero."""
    bits = weight.contiguous().view(torch.int32)
    rounded = (bits + 0x1000) & ~0x1FFF
    return torch.where(weight.isfinite(), rounded.view(torch.float32), weight)


def bundle(problem: ConvProblem) -> int:
    """How many groups to compute as one: the fewest that fill a 64-channel tile and its vectors."""
    p = problem
    c, k = p.c // p.groups, p.k // p.groups
    vector = 16 // p.dtype.itemsize
    if p.groups == 1 or (min(c, k) >= 64 and c % vector == 0):
        return 1
    fitting = [b for b in range(1, p.groups + 1) if p.groups % b == 0 and b * c % vector == 0]
    return next((b for b in fitting if b * min(c, k) >= 64), max(fitting, default=1))


def bundled(problem: ConvProblem) -> ConvProblem:
    """The problem that the kernel sees: `bundle` groups to one."""
    return dataclasses.replace(problem, groups=problem.groups // bundle(problem))


def gathers(problem: ConvProblem) -> bool:
    """Whether x must be read element by element, see ``csrc/cuda/conv_implicit_gemm.cuh``."""
    p = bundled(problem)
    vector = 16 // p.dtype.itemsize
    return p.c // p.groups % vector != 0 or max(p.r, p.s) > MAX_VECTOR_TAPS


def bundle_weight(weight: Tensor, groups: int, count: int) -> Tensor:
    """[K, C, R, S] of ``groups`` groups as [K, count * C, R, S] of ``groups / count`` groups."""
    if count == 1:
        return weight
    k, c, r, s = weight.shape
    per_group = weight.view(groups // count, count, k // groups, c, r, s)
    wide = weight.new_zeros(groups // count, count, k // groups, count, c, r, s)
    for i in range(count):
        wide[:, i, :, i] = per_group[:, i]
    return wide.view(k, count * c, r, s)


def gather_piece(problem: ConvProblem) -> int:
    """Channels that the gathering kernel reads at once, as ``csrc/cuda/conv_tile.h`` has it."""
    even = problem.c // problem.groups % 2 == 0
    return 2 if even and problem.dtype.itemsize == 2 and not gathers_wide(problem) else 1


def gather_table(problem: ConvProblem) -> Tensor:
    """Where each piece of the reduction lies, by tap then channel: int32 [pieces, 2], CPU.

    Columns: offset in x, counted from the first tap of an output pixel, and the tap, as
    ``GatherEntry`` in ``csrc/cuda/conv_tile.h`` says. What pads the last slice lies outside.
    """
    p = problem
    c = p.c // p.groups
    step = gather_piece(p)
    reduction = p.r * p.s * c // step
    slice_pieces = _SLICE_BYTES // p.dtype.itemsize // step
    wide = gathers_wide(p)
    table = torch.zeros(-(-reduction // slice_pieces) * slice_pieces, 2, dtype=torch.int32)
    table[:, 1] = _OUTSIDE_DISTANCES if wide else _OUTSIDE_BIT
    row, column, channel = torch.meshgrid(
        torch.arange(p.r), torch.arange(p.s), torch.arange(0, c, step), indexing="ij"
    )
    down, right = row * p.dilation[0], column * p.dilation[1]
    table[:reduction, 0] = ((down * p.w + right) * p.c + channel).flatten()
    taps = down | right << _DISTANCE_BITS if wide else 1 << row | 1 << _ROW_BITS + column
    table[:reduction, 1] = taps.flatten()
    return table


@dataclass(frozen=True)
class PackedConv:
    """Weights as the kernel wants them: rows [K, ...], and the gathering table if there is one."""

    weight: Tensor
    gather: Tensor | None


def pack(problem: ConvProblem, weight: Tensor, tf32: bool) -> PackedConv:
    """Bundle, lay out and, for tf32, round a convolution's weight.

    Args:
        problem: the convolution as the op was given it.
        weight: [K, C / groups, R, S].
        tf32: whether tf32 tensor cores will multiply it.
    """
    weight = bundle_weight(weight.detach(), problem.groups, bundle(problem))
    if tf32:
        weight = round_to_tf32(weight)
    rows = weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)
    if not gathers(problem):
        return PackedConv(rows.contiguous(), None)
    vector = 16 // weight.element_size()
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % vector)).contiguous()
    return PackedConv(rows, gather_table(bundled(problem)).to(weight.device))


def pack_stem(weight: Tensor, tf32: bool) -> Tensor:
    """[K, C <= 4, 7, 7] as [K, 7, 8, 4], zeros in the gaps."""
    weight = round_to_tf32(weight.detach()) if tf32 else weight.detach()
    k, c, r, s = weight.shape
    packed = weight.new_zeros(k, r, 8, 4)
    packed[:, :, :s, :c] = weight.permute(0, 2, 3, 1)
    return packed


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def unavailable(device: torch.device) -> str | None:
    """Why no kernel of this backend runs on ``device``; None if they do."""
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if _build.extension is None:
        return f"the compiled extension is missing: {_build.extension_error}"
    built = _build.extension.build_info()["cuda"]
    if built is None:
        return "the extension was built without CUDA"
    major, minor = torch.cuda.get_device_capability(device)
    if not runs_on(str(built["archs"]), major, minor):
        return f"the extension was built for {built['archs']}, not for sm_{major}{minor}"
    return None


def runs_on(archs: str, major: int, minor: int) -> bool:
    """Whether code for ``archs``, as TORCH_CUDA_ARCH_LIST writes them, runs on sm_<major><minor>.

    Machine code runs on its own major version from its own minor version on; PTX on anything newer.
    """
    for arch in archs.replace(";", " ").split():
        number, _, ptx = arch.partition("+")
        built = tuple(int(part) for part in number.rstrip("af").split("."))
        if built[0] == major and built[1] <= minor:
            return True
        if ptx and built <= (major, minor):
            return True
    return False


def allows_tf32() -> bool:
    """Whether stock torch may use tf32 for a convolution of fp32 tensors."""
    return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]


class ImplicitGemm(PackedKernel):
    """NHWC implicit GEMM with the epilogue fused in; see ``csrc/cuda/conv_implicit_gemm.cuh``.

    Args:
        tile: compute with this tile and the best split for it; None: with the best of all.
        tf32: serve fp32 problems, on the tf32 tensor cores, and no others.
        splits: blocks that share a tile's reduction; None: as many as seem best.
    """

    backend, op = "cuda", "conv_affine_act"

    def __init__(
        self, tile: Tile | None = None, tf32: bool = False, splits: int | None = None
    ) -> None:
        super().__init__()
        self.tile = tile
        self.tf32 = tf32
        self.splits = splits
        # An instance's name: the class variable of Kernel is only declared.
        parts = ["implicit_gemm", *(["tf32"] if tf32 else []), *([tile.name] if tile else [])]
        self.name = "_".join(parts) + (f"/{splits}" if splits else "")  # type: ignore[misc]

    def supports(self, problem: ConvProblem, device: torch.device) -> str | None:
        """sm_80 and newer; fp16, bf16 and fp32; any geometry."""
        if problem.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"computes fp16, bf16 and fp32, not {problem.dtype}"
        if reason := unavailable(device):
            return reason
        if self.tf32 and problem.dtype != torch.float32:
            return f"tf32 serves fp32 tensors, not {problem.dtype}"
        if self.tf32 and not allows_tf32():
            return "torch.backends.cudnn.conv.fp32_precision does not allow tf32"
        return self._too_large(problem)

    def promising(self, problem: ConvProblem, device: torch.device) -> bool:
        """Those of one tile are for the tuner to try."""
        return self.tile is None

    def variants(self, problem: ConvProblem, device: torch.device) -> tuple[Kernel, ...]:
        """Of the kernel that chooses for itself: also the other splits of the tile it chooses."""
        if self.tile is not None:
            return (self,)
        chosen = self.schedule(problem, multiprocessors(device))
        splits = [s.splits for s in self.schedules(problem) if s.tile == chosen.tile]
        near = sorted(
            (s for s in splits if s != chosen.splits), key=lambda s: abs(s - chosen.splits)
        )
        return (self, *(_split(chosen.tile, self.tf32, s) for s in near[:_NEIGHBOURS]))

    def _too_large(self, problem: ConvProblem) -> str | None:
        """Why the kernel's indices do not suffice; None if they do."""
        p, limit = bundled(problem), 2**31
        n, _, oh, ow = p.out_shape
        per_k = p.c // p.groups * p.r * p.s
        # Positions are compared with the padded image, also below zero.
        reach = (p.h + 2 * p.padding[0], p.w + 2 * p.padding[1])
        if n * oh * ow + 128 >= limit or reach[0] * reach[1] * p.c >= limit or per_k >= limit:
            return "the tensors are too large for 32-bit indices"
        if max(reach) >= _MAX_REACH or p.groups > 65535:
            return "the image or the number of groups is too large for the kernel's grid"
        if gathers(p) and gathers_wide(p) and max(reach) >= 1 << _DISTANCE_BITS - 1:
            return "the image is too large for a kernel of so many rows or columns"
        if self.tile is not None and not self.schedules(problem):
            schedule = self.tile.name + (f" split {self.splits}" if self.splits else "")
            which = "a gathered" if gathers(p) else "this"
            return f"a tile of {schedule} is not offered for {which} reduction"
        return None

    def schedules(self, problem: ConvProblem) -> tuple[ConvSchedule, ...]:
        """What a tuner may choose among."""
        every = candidates(bundled(problem), gathers(problem))
        return tuple(
            s for s in every if self.tile in (None, s.tile) and self.splits in (None, s.splits)
        )

    def schedule(self, problem: ConvProblem, processors: int) -> ConvSchedule:
        """What runs on a GPU of that many multiprocessors."""
        return choose(bundled(problem), processors, gathers(problem), self.schedules(problem))

    def pack_key(self, problem: ConvProblem) -> tuple[object, ...]:
        """Bundles depend on the groups; the gathering table on the geometry of x."""
        if gathers(problem):
            return (problem.groups, problem.c, problem.w, problem.dilation)
        return (problem.groups,)

    def prepare(
        self, problem: ConvProblem, weight: Tensor, scale: Tensor, shift: Tensor
    ) -> PackedConv:
        """See `pack`."""
        return pack(problem, weight, self.tf32)

    def run(self, problem: ConvProblem, *args: Any) -> Tensor:
        """See `Kernel`."""
        x, weight, scale, shift, residual = args
        packed = self.packed(problem, weight, scale, shift)
        schedule = self.schedule(problem, multiprocessors(x.device))
        p = bundled(problem)
        assert _build.extension is not None
        result: Tensor = _build.extension.cuda_conv_implicit_gemm(
            aligned_nhwc(x),
            packed.weight,
            scale,
            shift,
            residual if residual is None else nhwc(residual),
            packed.gather,
            (p.r, p.s),
            p.stride,
            p.padding,
            p.dilation,
            p.groups,
            EPILOGUES.index(p.epilogue),
            ARITHMETICS.index("tf32" if self.tf32 else str(p.dtype).removeprefix("torch.")),
            schedule.tile.index,
            schedule.splits,
        )
        return result


#: Splits that a tuner tries beside the one that seems best.
_NEIGHBOURS = 3


@functools.cache
def _split(tile: Tile, tf32: bool, splits: int) -> ImplicitGemm:
    return ImplicitGemm(tile, tf32, splits)


def nhwc(x: Tensor) -> Tensor:
    """``x`` dense in channels_last order, copied if it is not."""
    return x.contiguous(memory_format=torch.channels_last)


def aligned_nhwc(x: Tensor) -> Tensor:
    """The same at an address that 16-byte copies can start from."""
    x = nhwc(x)
    return x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.channels_last)


class CudaStem(PackedKernel):
    """7x7 convolution, scale, shift, ReLU, 3x3 max-pool in one kernel; ``csrc/cuda/stem.cuh``."""

    backend, op = "cuda", "conv_affine_relu_maxpool"

    def __init__(self, tf32: bool = False) -> None:
        super().__init__()
        self.tf32 = tf32
        self.name = "stem_tf32" if tf32 else "stem"  # type: ignore[misc]

    def supports(self, problem: ConvProblem, device: torch.device) -> str | None:
        """The residual networks' stem: at most 4 channels, 7x7/2, 3x3/2 pool; x of any layout."""
        p = problem
        if p.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"computes fp16, bf16 and fp32, not {p.dtype}"
        if reason := unavailable(device):
            return reason
        if self.tf32 and p.dtype != torch.float32:
            return f"tf32 serves fp32 tensors, not {p.dtype}"
        if self.tf32 and not allows_tf32():
            return "torch.backends.cudnn.conv.fp32_precision does not allow tf32"
        if (p.r, p.s, p.stride, p.dilation, p.groups) != (7, 7, (2, 2), (1, 1), 1) or p.c > 4:
            return "computes 7x7 convolutions of stride 2 from at most 4 channels"
        pool = p.pool
        if pool is None or (pool.kernel, pool.stride, pool.padding) != ((3, 3), (2, 2), (1, 1)):
            return "pools 3x3 with stride 2 and padding 1"
        if p.epilogue != "relu":
            return f"its epilogue is relu, not {p.epilogue}"
        return None

    def prepare(self, problem: ConvProblem, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """See `pack_stem`."""
        return pack_stem(weight, self.tf32)

    def run(self, problem: ConvProblem, *args: Any) -> Tensor:
        """See `Kernel`."""
        x, weight, scale, shift, _ = args
        packed = self.packed(problem, weight, scale, shift)
        return stem(x, packed, scale, shift, problem.padding, self.tf32)


def stem(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    shift: Tensor,
    padding: tuple[int, int],
    tf32: bool = False,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Tensor:
    """The stem, from images as they come: floating point, or bytes that it normalises.

    Args:
        x: [N, C <= 4, H, W], any strides; of the dtype of ``packed``, or uint8.
        packed: from `pack_stem`.
        scale: fp32 [K].
        shift: fp32 [K].
        padding: of the convolution.
        tf32: multiply fp32 on the tf32 tensor cores.
        mean: with uint8 only, per channel: the convolution sees ``(x / 255 - mean) / std``.
        std: with uint8 only.

    Returns:
        [N, K, PH, PW] in channels_last order.

    Raises:
        ValueError: shapes, devices or the padding do not fit.
        TypeError: dtypes do not fit.

    Example:
        >>> packed = pack_stem(model.conv1.weight, tf32=False)
        >>> y = stem(pixels, packed, scale, shift, (3, 3), mean=(0.485, 0.456, 0.406),
        ...          std=(0.229, 0.224, 0.225))
    """
    c = x.shape[1]
    mean, std = mean or (0.0,) * c, std or (1.0,) * c
    dtype = "tf32" if tf32 else str(packed.dtype).removeprefix("torch.")
    assert _build.extension is not None
    result: Tensor = _build.extension.cuda_stem(
        x,
        packed,
        scale,
        shift,
        padding,
        ARITHMETICS.index(dtype),
        [1 / (255 * s) for s in std],
        [-m / s for m, s in zip(mean, std, strict=True)],
    )
    return result


class CudaAddRelu(Kernel):
    """Vectorised ``relu(a + b)``; ``csrc/cuda/add_relu.cuh``."""

    backend, op, name = "cuda", "add_relu", "add_relu"

    def supports(self, problem: AddReluProblem, device: torch.device) -> str | None:
        """sm_80 and newer; two dense tensors of one layout."""
        if problem.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"computes fp16, bf16 and fp32, not {problem.dtype}"
        if reason := unavailable(device):
            return reason
        if not problem.same_dense_strides:
            return "the tensors are not dense or differ in memory layout"
        return None

    def run(self, problem: AddReluProblem, *args: Any) -> Tensor:
        """See `Kernel`."""
        a, b = args
        assert _build.extension is not None
        result: Tensor = _build.extension.cuda_add_relu(a, b, problem.inplace)
        return result


#: The kernels that choose their own tile come first; those of one tile are for the tuner.
KERNELS: tuple[Kernel, ...] = (
    ImplicitGemm(tf32=True),
    ImplicitGemm(),
    *(ImplicitGemm(tile, tf32) for tf32 in (True, False) for tile in TILES),
    CudaStem(tf32=True),
    CudaStem(),
    CudaAddRelu(),
)
