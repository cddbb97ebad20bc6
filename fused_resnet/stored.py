"""Tensors in a file of the format of safetensors, read one at a time.

``safe_open`` maps the whole file into memory, where all that was read stays until the last tensor
of it is gone. A plan wants each weight for a moment only, to pack it: so it is read from the file
when it is asked for, into memory of its own.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a file by name, each read when it is asked for if nobody holds it already.

    Args:
        path: of the file.
        device: where the tensors go.

    Attributes:
        metadata: what the header says beside tensors.
        like: shape and dtype of every tensor, on the meta device.

    Raises:
        SafetensorError: the file is not of that format, or not complete.

    Example:
        >>> with StoredTensors(path, torch.device("cpu")) as stored:
        ...     weight = stored["conv1.weight"]
    """

    def __init__(self, path: Path, device: torch.device | None = None) -> None:
        self.device = device
        with safe_open(str(path), framework="pt") as file:  # It checks the header.
            self.metadata: dict[str, str] = file.metadata() or {}
            self.like = {
                name: described(file.get_tensor(name))
                for name in file.keys()  # noqa: SIM118  (it is no dict)
            }
        self._held: weakref.WeakValueDictionary[str, Tensor] = weakref.WeakValueDictionary()
        self._file = path.open("rb")
        size = int.from_bytes(self._file.read(8), "little")
        header: dict[str, Any] = json.loads(self._file.read(size))
        self._begin = {name: 8 + size + header[name]["data_offsets"][0] for name in self.like}

    def __getitem__(self, name: str) -> Tensor:
        held = self._held.get(name)
        if held is not None:
            return held
        meta = self.like[name]
        found = torch.empty(meta.shape, dtype=meta.dtype)
        self._file.seek(self._begin[name])
        if self._file.readinto(found.view(-1).view(torch.uint8).numpy().data) != meta.nbytes:
            raise ValueError(f"it ends within {name}")
        found = self._held[name] = found.to(self.device)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.like)

    def __len__(self) -> int:
        return len(self.like)

    def __enter__(self) -> StoredTensors:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def described(t: Tensor) -> Tensor:
    """Shape, strides and dtype of a tensor, on the meta device.

    ``empty_like`` of a tensor that is there already would import sympy, of 30 MB.
    """
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


class Renamed(Mapping[str, Tensor]):
    """The tensors of a mapping whose names begin with ``prefix``, without it."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        self._tensors = tensors
        self._prefix = prefix

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (
            name.removeprefix(self._prefix)
            for name in self._tensors
            if name.startswith(self._prefix)
        )

    def __len__(self) -> int:
        return sum(1 for _ in self)


__all__ = ["Renamed", "StoredTensors", "described"]
