"""The kernels as the registry sees them: a path per problem and device, made once.

Triton itself is imported when the first path is made: it takes 75 MB, which a CPU never needs.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from fused_resnet.backends.kernel import Kernel, PackedKernel, Prepared
from fused_resnet.problem import AddReluProblem, ConvProblem, MaxPool

from .chain_kernel import TritonChain
from .config import (
    Arch,
    Config,
    configs,
    heuristic,
    padded_channels,
    predicted_cycles,
    stem_pool_tile,
)
from .dense import channels_last, nearest_tf32, vector
from .device import arch_of, on_device, precision_of, refusal
from .im2col_kernel import TritonIm2col

if TYPE_CHECKING:
    from .paths import Operand, Path

#: The max-pool of a ResNet stem, the one that is fused.
STEM_POOL = MaxPool(kernel=(3, 3), stride=(2, 2), padding=(1, 1))

#: Share of the convolution computed twice up to which the fused stem is preferred untuned.
_MOST_EXCESS = 0.3

#: Paths a kernel keeps: compiled code is small, but shapes may vary without end.
_MAX_PATHS = 4096


class _TritonConvolution(PackedKernel):
    """What the convolutions share: a bounded cache of paths, packing and the call."""

    backend: ClassVar[str] = "triton"
    # Under torch.compile scale and shift are temporaries, and the weight is none.
    packs_vectors: ClassVar[bool] = False

    def promising(self, problem: ConvProblem, device: torch.device) -> bool:
        """On a GPU; the interpreter is for tests."""
        return device.type == "cuda"

    def __init__(self, arch: Arch | None = None) -> None:
        super().__init__()
        self._arch = arch
        self._paths: dict[tuple[ConvProblem, torch.device, str], Path] = {}

    @abstractmethod
    def _make(self, problem: ConvProblem, arch: Arch, precision: str, device: torch.device) -> Path:
        """The path for a problem; ``device`` is current."""

    def _path(self, problem: ConvProblem, device: torch.device) -> Path:
        key = problem, device, precision_of(problem.dtype)
        path = self._paths.get(key)
        if path is None:
            with on_device(device):
                path = self._make(problem, self._arch or arch_of(device), key[2], device)
            # The interpreter on the CPU multiplies in fp32 whatever is asked for.
            tf32 = problem.dtype == torch.float32 and key[2] == "tf32"
            path.tf32 = tf32 and device.type == "cuda"
            if len(self._paths) >= _MAX_PATHS:
                self._paths.pop(next(iter(self._paths)), None)
            self._paths[key] = path
        return path

    def prepared(
        self, problem: ConvProblem, weight: Tensor, scale: Tensor, shift: Tensor
    ) -> Prepared:
        """See `PackedKernel`."""
        return super().prepared(self._path(problem, weight.device), weight, scale, shift)

    def layout(self, problem: ConvProblem, device: torch.device) -> Hashable:
        """See `PackedKernel`."""
        return super().layout(self._path(problem, device), device)

    def packed(self, problem: ConvProblem, weight: Tensor, scale: Tensor, shift: Tensor) -> Operand:
        """The packed weights for this problem, from the cache where it is still true."""
        if isinstance(weight, Prepared):
            return cast("Operand", weight.value)
        # Layouts depend on the device too, which only the path knows.
        packed: Operand = super().packed(self._path(problem, weight.device), weight, scale, shift)
        return packed

    def pack_key(self, problem: Any) -> Hashable:
        """The layout of a path, and how its weights are rounded."""
        return problem.layout, problem.tf32

    def prepare(self, problem: Any, weight: Tensor, scale: Tensor, shift: Tensor) -> Operand:
        """Weights in the layout of a path."""
        if problem.tf32:
            weight = nearest_tf32(weight)
        packed: Operand = problem.pack(weight)
        return packed

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
        device = x.device
        path = self._path(problem, device)
        with on_device(device):
            w = super().packed(path, weight, scale, shift)
            y = torch.empty(
                problem.out_shape,
                dtype=x.dtype,
                device=device,
                memory_format=torch.channels_last,
            )
            last = y if residual is None else channels_last(residual)
            path.start(x, w, vector(scale), vector(shift), last, y)
        return y


class TritonConv(_TritonConvolution):
    """``conv_affine_act``: a GEMM, an implicit GEMM or a convolution over padded rows.

    ``arch`` takes the configurations of another GPU than the one at hand, for the interpreter.
    ``config`` is the one to compute with; by default the one that seems best for each problem.
    """

    op: ClassVar[str] = "conv_affine_act"
    name: ClassVar[str] = "conv"

    def __init__(self, arch: Arch | None = None, config: Config | None = None) -> None:
        super().__init__(arch)
        self._config = config
        if config is not None:
            # An instance's name: the class variable of Kernel is only declared.
            self.name = f"conv[{config.name}]"  # type: ignore[misc]

    def supports(self, problem: ConvProblem, device: torch.device) -> str | None:
        """None if this kernel computes ``problem`` on ``device``, else why it does not."""
        if problem.pool is not None:
            return "max-pooling is another kernel's"
        if max(problem.r, problem.s) > 16:
            return "filters larger than 16 are not supported"
        reason = refusal(problem.dtype, device)
        if reason is None and self._config is not None:
            arch, precision = self._arch or arch_of(device), precision_of(problem.dtype)
            if self._config not in configs(problem, arch, precision):
                return "this configuration is not made for such a problem"
        return reason

    def variants(self, problem: ConvProblem, device: torch.device) -> tuple[Kernel, ...]:
        """The configurations of the smallest predicted times; the first is what this one takes.

        The last is TMA im2col where the GPU has it, which nothing but a tuner may admit.
        """
        if self._config is not None or device.type != "cuda":
            return (self,)
        arch, precision = self._arch or arch_of(device), precision_of(problem.dtype)
        ranked = sorted(
            configs(problem, arch, precision),
            key=lambda config: predicted_cycles(config, problem, arch, precision),
        )
        im2col = (_IM2COL,) if _IM2COL.supports(problem, device) is None else ()
        return (self, *(_configured(self._arch, config) for config in ranked[1:_VARIANTS]), *im2col)

    def _make(self, problem: ConvProblem, arch: Arch, precision: str, device: torch.device) -> Path:
        from .paths import make_path

        config = self._config or heuristic(problem, arch, precision)
        return make_path(problem, config, arch, precision, device)


_IM2COL = TritonIm2col()

#: Configurations of one problem that a tuner times.
_VARIANTS = 8


@lru_cache(maxsize=1024)
def _configured(arch: Arch | None, config: Config) -> TritonConv:
    return TritonConv(arch, config)


class TritonStemPool(_TritonConvolution):
    """``conv_affine_relu_maxpool``: the convolution's own output never reaches memory.

    ``arch`` takes the configurations of another GPU than the one at hand, for the interpreter.
    """

    op: ClassVar[str] = "conv_affine_relu_maxpool"
    name: ClassVar[str] = "stem_pool"

    def supports(self, problem: ConvProblem, device: torch.device) -> str | None:
        """None if this kernel computes ``problem`` on ``device``, else why it does not."""
        if problem.pool != STEM_POOL:
            return "only the 3x3 max-pool of stride 2 and padding 1 is fused"
        if problem.epilogue != "relu":
            return "the pooled stem ends in relu"
        if padded_channels(problem) is None:
            return "only ungrouped, undilated convolutions of up to 8 channels are pooled at once"
        return refusal(problem.dtype, device)

    def promising(self, problem: ConvProblem, device: torch.device) -> bool:
        """On a GPU, and where less than 30% of the convolution is computed twice.

        Few images make short strips, and each computes the row above it anew: there the CUDA
        kernel, which keeps whole tiles in shared memory, goes first.
        """
        if device.type != "cuda" or self.supports(problem, device) is not None:
            return False
        from .plans import stem_excess

        arch = self._arch or arch_of(device)
        tile = stem_pool_tile(problem.dtype, precision_of(problem.dtype))
        return stem_excess(problem, tile, arch) < _MOST_EXCESS

    def _make(self, problem: ConvProblem, arch: Arch, precision: str, device: torch.device) -> Path:
        from .paths import StemPoolPath

        tile = stem_pool_tile(problem.dtype, precision)
        return StemPoolPath(problem, tile, arch, precision, device)


class TritonAddRelu(Kernel):
    """``add_relu`` of two tensors that lie alike in memory."""

    backend: ClassVar[str] = "triton"
    op: ClassVar[str] = "add_relu"
    name: ClassVar[str] = "add_relu"

    def supports(self, problem: AddReluProblem, device: torch.device) -> str | None:
        """None if this kernel computes ``problem`` on ``device``, else why it does not."""
        if not problem.same_dense_strides:
            return "a and b do not lie alike in dense memory"
        return refusal(problem.dtype, device)

    def promising(self, problem: AddReluProblem, device: torch.device) -> bool:
        """On a GPU; the interpreter is for tests."""
        return device.type == "cuda"

    def run(self, problem: AddReluProblem, a: Tensor, b: Tensor) -> Tensor:
        """relu(a + b), written to a with ``problem.inplace``."""
        y = a if problem.inplace else torch.empty_like(a)
        start = _add_relu_start(problem, a.device, _aligned(a, b, y))
        with on_device(a.device):
            start(a, b, y)
        return y


def _aligned(*tensors: Tensor) -> bool:
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


@lru_cache(maxsize=_MAX_PATHS)
def _add_relu_start(
    problem: AddReluProblem, device: torch.device, aligned: bool
) -> Callable[..., None]:
    from .launch import bind
    from .plans import add_relu_launch, flat_unit

    with on_device(device):
        start = bind(add_relu_launch(problem, aligned), device)
    size = math.prod(problem.shape)
    units = size // flat_unit(size)
    return lambda a, b, y: start(a, b, y, units)


#: Every kernel of this backend.
KERNELS: tuple[Kernel, ...] = (TritonConv(), TritonStemPool(), TritonAddRelu(), TritonChain())
