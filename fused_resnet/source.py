"""The model behind a plan: fused, converted, and able to become layers for any shapes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from fused_resnet import backends
from fused_resnet.freshness import state_of
from fused_resnet.fuse import clone, fuse, reject_unsupported
from fused_resnet.graph import capture
from fused_resnet.layers import Layers, lower
from fused_resnet.tracing import FusedModule
from fused_resnet.warn import FusedResNetWarning


class Source:
    """A fused model that shares its parameters with the user's, or has them in another dtype.

    Args:
        model: in eval mode, fused or not; left as it is.
        dtype: to compute in; None for the model's own. Batch norms keep theirs, so that scale and
            shift come from unrounded statistics. Arguments are converted on the way in, results on
            the way out.

    Raises:
        TypeError: as `fuse`.
        ValueError: as `fuse`; the model is in train mode; it is not floating point.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        reject_unsupported(model)
        training = [path for path, m in model.named_modules() if m.training]
        if training:
            where = "it" if training[0] == "" else f"{training[0]!r}"
            raise ValueError(f"a plan is for inference, but {where} is in train mode: call .eval()")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point one, got {dtype}")
        with warnings.catch_warnings():
            # That there is nothing to fuse is no fault of a plan.
            warnings.simplefilter("ignore", FusedResNetWarning)
            fused = any(isinstance(m, FusedModule) for m in model.modules())
            self.model: nn.Module = clone(model) if fused else fuse(model)
        self.dtype = dtype
        if dtype is not None:
            _convert(self.model, dtype)
        self._seen = self._state_of_tensors()

    @property
    def state(self) -> dict[str, Tensor]:
        """Parameters and buffers by name."""
        return {
            name: t
            for name, t in self.model.state_dict(keep_vars=True).items()
            if isinstance(t, Tensor)
        }

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns, converted back to the dtype of the arguments."""
        if self.dtype is None:
            return self.model(*args, **kwargs)
        given = _floating(pytree.tree_leaves((args, kwargs)))
        args, kwargs = cast_floating((args, kwargs), self.dtype)
        result = self.model(*args, **kwargs)
        return result if given is None else cast_floating(result, given)

    def layers(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Layers:
        """What the model computes for arguments of these shapes.

        Raises:
            Untraceable: it cannot be written down.
        """
        with torch.inference_mode(False), torch.no_grad():
            # Stock kernels pack nothing; what matters is that scales and shifts are up to date.
            with backends.backend("torch"):
                self(*args, **kwargs)
            return lower(capture(self.model, args, kwargs, self))

    def check_unchanged(self) -> None:
        """Raise RuntimeError if a parameter was changed since the plan was made."""
        if self._state_of_tensors() != self._seen:
            raise RuntimeError(
                "the model's weights changed after its plan was made, and a plan keeps those it "
                "was made with: call plan.refit(model.state_dict()), or optimize again"
            )

    def refitted(self, state: Mapping[str, Tensor]) -> Source:
        """The same with other weights; the user's model keeps its own."""
        other = copy.copy(self)
        other.model = clone(self.model)
        other.model.load_state_dict(dict(state), assign=True)
        other._seen = other._state_of_tensors()
        return other

    def _state_of_tensors(self) -> Any:
        return state_of(tuple(self.state.values()))


def converted_state(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` in the dtypes and on the devices of ``like``.

    Raises:
        ValueError: names or shapes differ; the message says which.
    """
    missing = [name for name in like if name not in state]
    unknown = [name for name in state if name not in like]
    if missing or unknown:
        raise ValueError(
            "these weights are of another architecture: "
            + "; ".join(
                f"{what} {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
                for what, names in (("missing", missing), ("unknown", unknown))
                if names
            )
        )
    for name, t in like.items():
        if state[name].shape != t.shape:
            raise ValueError(
                f"{name} must be {list(t.shape)}, got {list(state[name].shape)}: these weights are "
                "of another architecture"
            )
    return {name: state[name].detach().to(t.device, t.dtype) for name, t in like.items()}


def _convert(model: nn.Module, dtype: torch.dtype) -> None:
    """Give ``model`` parameters and buffers of its own in ``dtype``, but for batch norms."""
    made: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, _BatchNorm) or type(module).__name__ == "FrozenBatchNorm2d":
            continue
        for tensors, wrap in ((module._parameters, True), (module._buffers, False)):
            for name, t in tensors.items():
                if t is None or not t.is_floating_point() or t.dtype == dtype:
                    continue
                if id(t) not in made:
                    new = t.detach().to(dtype)
                    made[id(t)] = nn.Parameter(new, requires_grad=False) if wrap else new
                tensors[name] = made[id(t)]


def _floating(leaves: list[Any]) -> torch.dtype | None:
    """The dtype of the first floating-point tensor."""
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf.dtype
    return None


def cast_floating(tree: Any, dtype: torch.dtype) -> Any:
    """``tree`` with its floating-point tensors in ``dtype``."""

    def convert(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return pytree.tree_map(convert, tree)


__all__ = ["Source", "cast_floating", "converted_state"]
