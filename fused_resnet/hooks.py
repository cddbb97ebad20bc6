"""Hooks: who wants to see the calls of a module, so that fusing must not swallow them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules import module as _torch

#: Hooks for all modules, as ``torch.nn.modules.module.register_module_forward_hook`` adds them.
_GLOBAL: tuple[dict[int, Any], ...] = (
    _torch._global_forward_hooks,
    _torch._global_forward_pre_hooks,
    _torch._global_backward_hooks,
    _torch._global_backward_pre_hooks,
)

_ours: weakref.WeakSet[Callable[..., Any]] = weakref.WeakSet()


def own(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Declare a global hook as the package's own: it watches fused calls and changes none."""
    _ours.add(hook)
    return hook


def is_everywhere() -> bool:
    """Whether someone has registered a hook for all modules."""
    return any(_GLOBAL) and any(hook not in _ours for hooks in _GLOBAL for hook in hooks.values())


def is_on(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its class says: hooks, or a forward of its own."""
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_seen(module: nn.Module) -> bool:
    """Whether a hook of ``module`` or of all modules would see that it is called."""
    return is_on(module) or is_everywhere()
