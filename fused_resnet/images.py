"""Real photos as batches: those of a folder, or those that scikit-image brings with it.

Photos take torchvision's standard path of evaluation: shorter side to 256, centre 224 x 224, scaled
to [0, 1] and normalised by ImageNet's mean and deviation.
"""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from fused_resnet.console import UserError

#: Suffixes of the files in a folder that are taken for photos.
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp", ".tif", ".tiff")

#: Photos within the wheel of scikit-image (others it would download).
_SAMPLES = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "hubble_deep_field.jpg",
    "camera.png",
    "motorcycle_right.png",
)

# Of ImageNet's training set, in each channel, as all of torchvision's weights expect it.
_MEAN = [0.485, 0.456, 0.406]
_STD = [0.229, 0.224, 0.225]

# Resized by its shorter side, a thinner strip would fill the memory.
_MAX_ASPECT = 50

Transform = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Photos:
    """Photos ready for a network.

    Attributes:
        pixels: [M, 3, size, size], fp32, normalised.
        names: file name of each.
        skipped: (file name, reason) of the files that could not be read.
        source: where they come from, in words.
    """

    pixels: Tensor
    names: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    source: str

    def batch(self, n: int, first: int = 0) -> Tensor:
        """Photos from number ``first`` on, dense NCHW; every second round through them is mirrored.

        Args:
            n: photos in the batch; may exceed the number of files.
            first: number of the first photo.
        """
        m = len(self.names)
        picked = [
            self.pixels[i % m] if i // m % 2 == 0 else self.pixels[i % m].flip(-1)
            for i in range(first, first + n)
        ]
        return torch.stack(picked)


def samples() -> list[Path]:
    """The photos that scikit-image ships.

    Raises:
        UserError: scikit-image is not installed.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            'sample photos come with scikit-image: pip install "fused-resnet[bench]", '
            "or name a folder of photos with --images DIR"
        )
    data = Path(spec.submodule_search_locations[0]) / "data"
    return [data / name for name in _SAMPLES if (data / name).is_file()]


def find(folder: str | Path) -> list[Path]:
    """The photos in ``folder`` and below, sorted by path.

    Raises:
        UserError: there is no such folder, or it holds no photos.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; --images takes a folder of photos")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise UserError(f"no photos in {folder} (looked for {', '.join(SUFFIXES)})")
    return found


def standard_transform(size: int = 224) -> Transform:
    """The preprocessing that torchvision's weights expect, from an image of PIL to [3, size, size].

    Args:
        size: of the centre crop; the shorter side becomes size * 256 / 224 first.

    Raises:
        UserError: torchvision is not installed.
    """
    try:
        from torchvision.transforms import v2
    except ImportError as e:
        raise UserError(
            f'photos are prepared by torchvision: pip install "fused-resnet[bench]" ({e})'
        ) from None
    transform: Transform = v2.Compose(
        [
            v2.Resize(round(size * 256 / 224), antialias=True),
            v2.CenterCrop(size),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean=_MEAN, std=_STD),
        ]
    )
    return transform


def load(
    folder: str | Path | None = None,
    *,
    transform: Transform | None = None,
    limit: int = 64,
) -> Photos:
    """Read photos and prepare them for a network.

    Args:
        folder: read these; None for the ones that scikit-image ships.
        transform: from an image of PIL (RGB) to [3, size, size]; `standard_transform` by default.
        limit: read no more than this many.

    Returns:
        The photos, with the names of those that could not be read and why.

    Raises:
        UserError: there is nothing to read, or nothing of it can be read.

    Example:
        >>> load().batch(16).shape
        torch.Size([16, 3, 224, 224])
    """
    paths = samples() if folder is None else find(folder)
    transform = transform or standard_transform()
    pixels, names, skipped = read(paths[:limit], transform)
    source = "photos of scikit-image" if folder is None else f"photos in {folder}"
    if not pixels:
        name, reason = skipped[0]
        raise UserError(f"none of the {len(skipped)} {source} can be read; {name}: {reason}")
    return Photos(torch.stack(pixels), tuple(names), tuple(skipped), source)


def read(
    paths: Sequence[Path], transform: Transform
) -> tuple[list[Tensor], list[str], list[tuple[str, str]]]:
    """Decode and prepare files; a file that cannot be read is reported, not raised.

    Args:
        paths: of the files.
        transform: from an image of PIL (RGB) to a tensor.

    Returns:
        Tensors and names of the good files, and (name, reason) of the others.
    """
    pixels: list[Tensor] = []
    names: list[str] = []
    skipped: list[tuple[str, str]] = []
    for path in paths:
        prepared = prepare(path, transform)
        if isinstance(prepared, str):
            skipped.append((path.name, prepared))
        else:
            pixels.append(prepared)
            names.append(path.name)
    return pixels, names, skipped


def prepare(file: str | Path | IO[bytes], transform: Transform) -> Tensor | str:
    """Decode one image, upright as its EXIF data say, and prepare it for a network.

    Args:
        file: path, or an open binary file.
        transform: from an image of PIL (RGB) to a tensor.

    Returns:
        The tensor, or a sentence that says why the file cannot be read.

    Example:
        >>> prepare("dog.jpg", standard_transform()).shape
        torch.Size([3, 224, 224])
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            if max(image.size) > _MAX_ASPECT * min(image.size):
                return f"{image.width} x {image.height} pixels are too narrow for a photo"
            upright = ImageOps.exif_transpose(image)
            return transform(upright.convert("RGB"))
    # What PIL raises for a broken file depends on the format and on where it breaks.
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as e:
        return str(e).splitlines()[0] if str(e) else type(e).__name__
