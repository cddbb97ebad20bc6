"""The compiled extension where it can be used, and the reason where it cannot.

Everything that needs ``fused_resnet._C`` takes it from here, so that the package works without it.
"""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

import torch

_REBUILD = "reinstall with `pip install --no-build-isolation --force-reinstall --no-deps .`"


def load_extension() -> tuple[ModuleType | None, str | None]:
    """Import ``fused_resnet._C``.

    Returns:
        The extension and None, or None and a sentence that says why there is none: it was not
        built, it does not load, or it was built against another torch, whose tensors differ.
    """
    try:
        extension = importlib.import_module("fused_resnet._C")
    except ModuleNotFoundError:
        return None, f"the extension was not built; with a C++20 compiler at hand, {_REBUILD}"
    except ImportError as error:
        return None, _warn(f"the extension does not load ({error}); {_REBUILD}")
    built = extension.build_info()["torch"]
    if _release(built) != _release(torch.__version__):
        return None, _warn(
            f"the extension was built against torch {built}, but torch {torch.__version__} is "
            f"running; {_REBUILD}"
        )
    return extension, None


def _wrong_isa(extension: ModuleType | None) -> str | None:
    try:
        if extension is not None:
            extension.isa()
    except ValueError as error:
        return f"environment variable {error}"
    return None


def _warn(reason: str) -> str:
    """Tell the user once that an extension is there but of no use."""
    warnings.warn(f"fused_resnet runs without its compiled kernels: {reason}", stacklevel=2)
    return reason


def _release(version: str) -> str:
    """The version without its local part: builds of one release share their C++ interface."""
    return str(version).partition("+")[0]


#: The extension, if it can be used.
extension: ModuleType | None
#: Why it cannot be used; None if it can.
extension_error: str | None
extension, extension_error = load_extension()
#: What is wrong with ``FUSED_RESNET_ISA``; None if nothing is. An error where a kernel is chosen.
isa_error: str | None = _wrong_isa(extension)
