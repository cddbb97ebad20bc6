"""From convolution bias and batch norm to two fp32 vectors, and a cache that is never stale.

In eval mode a batch norm is an affine map of each channel:

    scale = gamma / sqrt(running_var + eps)
    shift = beta + (conv_bias - running_mean) * scale

Both are computed in float64 and rounded once, to fp32 (they stay float64 for float64 models). The
cache lives outside of the modules: it is in no state_dict, no pickle and no copy. An entry holds
as long as the tensors it came from are the same objects, at the same address, in the same version.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_post_hook

from fused_resnet.freshness import Sources, capturing, keep, state_of, storages

#: Norms by buffers that never change: torchvision's, detectron2's and timm's.
_FROZEN = ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")

#: timm's norms that apply an activation of their own: ``act(drop(norm(x)))``.
_NORM_ACTS = ("BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d")


#: Norms of torch that fold, by the number of dimensions they take (the last: any).
_BATCH_NORMS = (nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

#: Convolutions that are fused, where they are plain.
Conv = nn.Conv2d | nn.Conv3d


def is_plain_conv(module: object) -> bool:
    """Whether ``module`` does what stock ``nn.Conv2d`` or ``nn.Conv3d`` does, by its own weight."""
    stock = nn.Conv3d if isinstance(module, nn.Conv3d) else nn.Conv2d
    return (
        isinstance(module, stock)
        and type(module).forward is stock.forward
        and type(module)._conv_forward is stock._conv_forward
        and "forward" not in vars(module)
        # A parametrized weight may change at every access, as that of spectral_norm does.
        and not parametrize.is_parametrized(module)
    )


def transformed() -> bool:
    """Whether a transform of torch.func runs: its tensors have no memory that one could look at."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_frozen_norm(cls: type) -> bool:
    """Whether modules of this class normalise by buffers, in train mode too."""
    return cls.__name__ in _FROZEN


def _is_norm_act(norm: nn.Module) -> bool:
    # These very classes: what a class derived from them, or a namesake, does is not known.
    cls = type(norm)
    return cls.__module__ == "timm.layers.norm_act" and cls.__name__ in _NORM_ACTS


def activations_of(norm: nn.Module | None) -> tuple[nn.Module, ...]:
    """The modules that ``norm`` applies to its own result, in order; identities are left out.

    Only timm's norms with an activation have some; a dropout layer may stand before it.
    """
    if norm is None or not _is_norm_act(norm):
        return ()
    own = (getattr(norm, "drop", None), getattr(norm, "act", None))
    return tuple(m for m in own if isinstance(m, nn.Module) and type(m) is not nn.Identity)


def why_not_foldable(bn: nn.Module | None) -> str | None:
    """None if ``bn`` is a per-channel affine map in eval mode, else the reason why it is not.

    Known are ``nn.BatchNorm2d``, ``nn.BatchNorm3d`` and ``nn.SyncBatchNorm`` (with running
    statistics), ``FrozenBatchNorm2d`` of torchvision and of detectron2, and timm's variants of
    these that end in an activation (see `activations_of`); None stands for no batch norm at all.
    """
    if bn is None:
        return None
    name = type(bn).__name__
    plain = next((c for c in _BATCH_NORMS if isinstance(bn, c)), None)
    if plain is not None:
        if type(bn).forward is not plain.forward and not _is_norm_act(bn):
            return f"{name} overrides the forward of {plain.__name__}"
        if "forward" in vars(bn):
            return f"the forward of this {name} was replaced"
        if parametrize.is_parametrized(bn):
            return f"{name} is parametrized"
        if getattr(bn, "running_mean", None) is None or getattr(bn, "running_var", None) is None:
            return (
                f"{name} keeps no running statistics, so it normalises by the batch's in eval too"
            )
        return None
    if is_frozen_norm(type(bn)):
        missing = [
            a
            for a in ("weight", "bias", "running_mean", "running_var", "eps")
            if not hasattr(bn, a)
        ]
        return f"{name} lacks {', '.join(missing)}" if missing else None
    return f"{name} is not a batch norm that folds into a scale and a shift"


def why_not_behind(conv: nn.Module | None, bn: nn.Module | None) -> str | None:
    """None if ``bn`` folds into ``conv`` in front of it, else the reason why it does not.

    Beside what `why_not_foldable` knows, a norm must take as many dimensions as ``conv`` returns.
    """
    reason = why_not_foldable(bn)
    if reason is None and not isinstance(bn, nn.SyncBatchNorm | None):
        for_videos = isinstance(bn, nn.BatchNorm3d)
        if for_videos != isinstance(conv, nn.Conv3d):
            return f"{type(bn).__name__} does not take what {type(conv).__name__} returns"
    return reason


def uses_batch_statistics(bn: nn.Module | None) -> bool:
    """Whether ``bn``, as it is now, normalises by the statistics of the batch it is given."""
    if bn is None or is_frozen_norm(type(bn)):
        return False
    return bn.training or getattr(bn, "running_mean", None) is None


def fold(
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """(scale, shift) of a batch norm in eval mode, after a convolution with ``bias``.

    Args:
        bias: the convolution's bias [K], None for none.
        gamma: batch norm weight [K], None for ones.
        beta: batch norm bias [K], None for zeros.
        mean: running mean [K].
        var: running variance [K].
        eps: added to the variance.
        dtype: of the result; the arithmetic is float64.

    Returns:
        scale [K] and shift [K]. Differentiable in every argument.

    Example:
        >>> bn = torch.nn.BatchNorm2d(8).eval()
        >>> scale, shift = fold(None, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)
    """
    scale = (var.double() + eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma.double()
    offset = -mean.double() if bias is None else bias.double() - mean.double()
    shift = offset * scale
    if beta is not None:
        shift = shift + beta.double()
    return scale.to(dtype), shift.to(dtype)


class _CachedFold(torch.autograd.Function):
    """`fold` for autograd with its result given: the cached values, at their address.

    Kernels recognise packed weights by the address of scale and shift, so a model that runs with
    gradients enabled must hand them the same memory at every call.
    """

    @staticmethod
    def forward(
        ctx: Any,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor,
        var: Tensor,
        eps: float,
        cached: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(bias, gamma, mean, var)
        ctx.eps = eps
        ctx.dtypes = [None if t is None else t.dtype for t in (bias, gamma, beta)]
        return cached[0].detach(), cached[1].detach()

    @staticmethod
    def backward(ctx: Any, d_scale: Tensor, d_shift: Tensor) -> tuple[Tensor | None, ...]:
        bias, gamma, mean, var = ctx.saved_tensors
        d_scale, d_shift = d_scale.double(), d_shift.double()
        rstd = (var.double() + ctx.eps).rsqrt()
        offset = -mean.double() if bias is None else bias.double() - mean.double()
        scale = rstd if gamma is None else rstd * gamma.double()
        d_bias, d_gamma, d_beta = d_shift * scale, (d_scale + d_shift * offset) * rstd, d_shift
        grads = [
            None if dtype is None else g.to(dtype)
            for g, dtype in zip((d_bias, d_gamma, d_beta), ctx.dtypes, strict=True)
        ]
        return *grads, None, None, None, None


class _Entry:
    """A cached (scale, shift) with the state of the tensors it came from."""

    __slots__ = ("memory", "result", "state")

    def __init__(self, state: Any, sources: Sources, result: tuple[Tensor, Tensor]) -> None:
        self.state = state
        self.memory = storages(sources)
        self.result = result

    def holds(self, state: Any) -> bool:
        if self.state != state:
            return False
        for ref in self.memory:  # noqa: SIM110  a generator would cost more than all the rest
            if ref() is None:
                return False
        return True


_cache: weakref.WeakKeyDictionary[nn.Module, dict[int, _Entry]] = weakref.WeakKeyDictionary()


def refresh(model: nn.Module) -> None:
    """Forget everything derived from the parameters of ``model``; the next call derives it anew.

    Needed only after edits that torch keeps no record of: in-place writes through ``tensor.data``,
    or through memory shared with another library. Edits under ``torch.no_grad()``, optimizer
    steps, ``load_state_dict`` and conversions are noticed without it.

    Example:
        >>> model.conv1.weight.data.mul_(0.5)
        >>> fused_resnet.refresh(model)
    """
    with torch.no_grad():
        for module in model.modules():
            _cache.pop(module, None)
            for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if not t.is_inference():
                    # Moves the version counter and nothing else: what was made from it is stale.
                    torch.autograd.graph.increment_version(t)


def _count_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Move the version counters of what an optimizer has changed: fused ones don't do it."""
    if not torch.compiler.is_compiling():
        for group in optimizer.param_groups:
            torch.autograd.graph.increment_version(
                [p for p in group["params"] if not p.is_inference()]
            )


register_optimizer_step_post_hook(_count_step)


def weight_of(conv: Conv) -> Tensor:
    """``conv.weight``, quicker: attribute access through nn.Module costs several times more."""
    weight = conv._parameters.get("weight")
    return conv.weight if weight is None else weight  # None: a parametrization computes it


def affine_of(conv: Conv, bn: nn.Module | None) -> tuple[Tensor, Tensor]:
    """(scale, shift) that stand for the bias of ``conv`` and for ``bn`` in eval mode, cached.

    Args:
        conv: the convolution.
        bn: the batch norm behind it (see `why_not_foldable`), or None.

    Returns:
        scale [K] and shift [K] on conv's device, fp32 (float64 if the weight is). They carry
        gradients to the bias and to bn's weight and bias where grad mode is on and these require
        them.
    """
    bias, gamma, beta, mean, var, eps = sources = _sources(conv, bn)
    weight = weight_of(conv)
    if torch.compiler.is_compiling() or transformed() or torch._C._get_tracing_state():
        # A graph is recorded: it must compute these from the parameters, or there is no memory.
        return _fold_any(weight, *sources)
    # batch_norm writes running statistics without moving their version counters, but the module
    # counts its batches.
    counter = None if bn is None else bn._buffers.get("num_batches_tracked")
    tensors = (bias, gamma, beta, mean, var, counter)
    state = state_of(tensors)
    if state is None:
        # A tensor made in inference mode: an edit of it would go unseen, so nothing is kept.
        return _fold_any(weight, *sources)
    state = state, eps, weight.dtype, weight.device
    entries = _cache.get(conv)
    entry = None if entries is None else entries.get(id(bn))
    if entry is None or not entry.holds(state):
        if capturing(weight.device):
            return _fold_any(weight, *sources)
        # Outside of inference mode, so that the cached vectors can serve autograd later.
        with torch.inference_mode(False), torch.no_grad():
            scale, shift = _fold_any(weight, *sources)
        entries = _cache.setdefault(conv, {})
        if len(entries) >= _MAX_NORMS:
            entries.clear()
        entries[id(bn)] = entry = _Entry(state, tensors, (keep(scale), keep(shift)))
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in tensors):
        return entry.result
    if mean is None or var is None or mean.requires_grad or var.requires_grad:
        return _fold_any(weight, *sources)
    result = _CachedFold.apply(bias, gamma, beta, mean, var, eps, entry.result)
    return cast(tuple[Tensor, Tensor], result)


@dataclass(frozen=True)
class Recipe:
    """How a scale or a shift comes about, with names in a state_dict in the place of tensors.

    Attributes:
        part: 0 for the scale, 1 for the shift.
        weight: of the convolution, of which only shape and dtype count.
        bias: of the convolution.
        gamma: the batch norm's weight.
        beta: its bias.
        mean: its running mean; None if there is no batch norm.
        var: its running variance.
        eps: its eps.
    """

    part: int
    weight: str
    bias: str | None = None
    gamma: str | None = None
    beta: str | None = None
    mean: str | None = None
    var: str | None = None
    eps: float = 0.0

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor that it takes."""
        names = (self.weight, self.bias, self.gamma, self.beta, self.mean, self.var)
        return tuple(name for name in names if name is not None)

    def cook(self, state: Mapping[str, Tensor]) -> Tensor:
        """The vector [K] that it makes of the tensors in ``state``."""
        names = (self.bias, self.gamma, self.beta, self.mean, self.var)
        bias, gamma, beta, mean, var = (
            None if name is None else state[name].detach() for name in names
        )
        return _fold_any(state[self.weight], bias, gamma, beta, mean, var, self.eps)[self.part]


def recipes(model: nn.Module) -> dict[int, Recipe]:
    """How the vectors were made that `affine_of` keeps for ``model``, by the identity of each."""
    names = {id(t): name for name, t in model.state_dict(keep_vars=True).items()}
    modules = {id(None): None, **{id(m): m for m in model.modules()}}
    found: dict[int, Recipe] = {}
    for conv in model.modules():
        for ident, entry in _cache.get(conv, {}).items():
            if not isinstance(conv, Conv) or ident not in modules:
                continue
            *tensors, eps = _sources(conv, modules[ident])
            tensors = [conv.weight, *tensors]
            if all(t is None or id(t) in names for t in tensors):
                weight, *rest = [None if t is None else names[id(t)] for t in tensors]
                assert weight is not None
                bias, gamma, beta, mean, var = rest
                for part in (0, 1):
                    recipe = Recipe(part, weight, bias, gamma, beta, mean, var, eps)
                    found[id(entry.result[part])] = recipe
    return found


_Sources = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, float]


def _sources(conv: Conv, bn: nn.Module | None) -> _Sources:
    """What the two vectors are computed from: bias, gamma, beta, mean, var, eps."""
    # Dictionaries first, as in `weight_of`.
    parameters = conv._parameters
    bias = parameters["bias"] if "bias" in parameters else conv.bias  # noqa: SIM401
    if bn is None:
        return bias, None, None, None, None, 0.0
    parameters, buffers = bn._parameters, bn._buffers
    if "weight" in parameters and "running_mean" in buffers:
        return (
            bias,
            parameters["weight"],
            parameters["bias"],
            buffers["running_mean"],
            buffers["running_var"],
            bn.eps,  # type: ignore[return-value]
        )
    return bias, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps  # type: ignore[return-value]


#: Batch norms that may share one convolution before its cache starts over.
_MAX_NORMS = 8


def _fold_any(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if mean is not None and var is not None:
        return fold(bias, gamma, beta, mean, var, eps, dtype)
    scale = torch.ones(weight.shape[0], dtype=dtype, device=weight.device)
    shift = torch.zeros_like(scale) if bias is None else bias.to(dtype)
    return scale, shift
