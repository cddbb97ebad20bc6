"""Weights from torchvision's model zoo by name, or from a file by path; its code never runs."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: What ``weights=`` takes: a torchvision enum member or its name, or the path of a checkpoint.
Weights = Enum | str | os.PathLike[str] | None

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
#: Keys under which training scripts commonly keep the state_dict among other things.
_NESTED = ("state_dict", "model", "model_state_dict")


def load_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state_dict stored in a checkpoint file.

    Safetensors files are read by safetensors, all others by ``torch.load(weights_only=True)``,
    which refuses a pickle that would do more than make tensors. A state_dict kept under
    ``state_dict``, ``model`` or ``model_state_dict`` is found, and the prefix ``module.`` of
    DataParallel is dropped.

    Args:
        path: of the file.

    Returns:
        Names and CPU tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, is not a checkpoint, or holds more than tensors.

    Example:
        >>> model.load_state_dict(load_file("resnet50.safetensors"))
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file as load_safetensors

        try:
            return load_safetensors(path)
        except SafetensorError as e:
            raise ValueError(f"{path} is not a readable safetensors file: {e}") from e
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise ValueError(
            f"{path} was refused: it holds more than tensors, and loading that could run code from "
            "the file. If you trust it, load it yourself and save model.state_dict(), or use "
            "safetensors. "
            f"({str(e).splitlines()[0]})"
        ) from e
    except (RuntimeError, EOFError) as e:
        raise ValueError(f"{path} is not a readable checkpoint: {e}") from e
    return _state_dict(content, path)


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        for key in _NESTED:
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
    if not isinstance(content, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
    ):
        raise ValueError(
            f"{path} holds no state_dict: expected names and tensors, perhaps under one of "
            f"{', '.join(_NESTED)}; found {type(content).__name__}"
        )
    prefix = "module."
    if content and all(k.startswith(prefix) for k in content):
        return {k.removeprefix(prefix): v for k, v in content.items()}
    return dict(content)


def is_path(weights: Weights) -> bool:
    """Whether ``weights`` means a file rather than an entry of torchvision's model zoo."""
    if isinstance(weights, os.PathLike):
        return True
    return isinstance(weights, str) and (
        weights.endswith(_SUFFIXES) or os.sep in weights or os.path.isfile(weights)
    )


def torchvision_entry(model: str, weights: Enum | str) -> Any:
    """The member of torchvision's weights enum of ``model`` that ``weights`` names.

    Args:
        model: a torchvision builder's name, such as ``resnet50``.
        weights: a member, its name (``IMAGENET1K_V2``, ``DEFAULT``), or enum and name
            (``ResNet50_Weights.IMAGENET1K_V2``).

    Raises:
        ModuleNotFoundError: torchvision is not installed.
        ValueError: torchvision has no weights for this model, or not these.
    """
    try:
        from torchvision.models import get_model_weights
    except ImportError as e:
        raise ModuleNotFoundError(
            f"weights={weights!r} names an entry of torchvision's model zoo, but torchvision "
            'cannot be imported: pip install "fused-resnet[bench]", or give the path of a file'
        ) from e
    try:
        members = get_model_weights(model)
    except ValueError:
        raise ValueError(
            f"torchvision has no weights for {model}; give the path of a checkpoint"
        ) from None
    if isinstance(weights, Enum):
        if weights not in members:
            raise ValueError(f"{weights} are not weights of {model}; expected a {members.__name__}")
        return weights
    name = weights.removeprefix(f"{members.__name__}.")
    if name not in members.__members__:
        raise ValueError(
            f"unknown weights {weights!r} for {model}; available: "
            f"{', '.join(members.__members__)}, or the path of a checkpoint"
        )
    return members[name]
