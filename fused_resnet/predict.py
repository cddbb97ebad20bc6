"""`predict`: the best classes of image files, read, prepared and classified as a stream.

Files are decoded by a few threads while the network computes, a bounded number ahead, so a folder
of any size needs the memory of a few batches.
"""

from __future__ import annotations

import csv
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from fused_resnet import images
from fused_resnet.console import UserError
from fused_resnet.machine import usable_cores

#: From a batch [N, 3, H, W] to logits [N, classes].
Classifier = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Guess:
    """One class of an image: its number, its name (empty if unknown), its softmax probability."""

    index: int
    name: str
    probability: float

    def __str__(self) -> str:
        return self.name or f"class {self.index}"


@dataclass(frozen=True)
class Prediction:
    """What became of one file: its best classes, best first, or why it could not be read."""

    image: str
    guesses: tuple[Guess, ...] = ()
    error: str = ""

    def __str__(self) -> str:
        if self.error:
            return f"{self.image}\n  could not be read: {self.error}"
        return "\n".join([self.image, *(f"  {g.probability:6.1%}  {g}" for g in self.guesses)])

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        if self.error:
            return {"image": self.image, "error": self.error}
        return {"image": self.image, "classes": [asdict(guess) for guess in self.guesses]}


class CsvWriter:
    """Writes predictions as CSV while they come: a row for each guess, or one with the error."""

    def __init__(self, stream: IO[str]) -> None:
        self._writer = csv.writer(stream, lineterminator="\n")
        self._writer.writerow(("image", "rank", "index", "name", "probability", "error"))

    def write(self, prediction: Prediction) -> None:
        """Add the rows of one image."""
        for rank, g in enumerate(prediction.guesses, 1):
            row = (prediction.image, rank, g.index, g.name, f"{g.probability:.6g}", "")
            self._writer.writerow(row)
        if prediction.error:
            self._writer.writerow((prediction.image, "", "", "", "", prediction.error))


def expand(paths: Iterable[str | Path]) -> list[Path]:
    """The files that paths of files and folders mean, those below a folder sorted.

    Args:
        paths: a file is taken whatever its name; of a folder, the files that look like images. A
            path that does not exist is kept, so that it is reported with the unreadable ones.

    Raises:
        UserError: a folder holds no images.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        found.extend(images.find(path) if path.is_dir() else [path])
    return list(dict.fromkeys(found))


def predict(
    classifier: Classifier,
    paths: Sequence[Path],
    transform: images.Transform,
    *,
    categories: Sequence[str] = (),
    top: int = 5,
    batch: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    workers: int | None = None,
) -> Iterator[Prediction]:
    """Classify image files.

    Args:
        classifier: from [N, 3, H, W] (channels_last, N at most ``batch``) to logits [N, classes].
        paths: files to read.
        transform: from an image of PIL (RGB) to [3, H, W].
        categories: names of the classes, in order; none where they are unknown.
        top: classes to return for each image.
        batch: images in one call.
        dtype: of the batch; the softmax is computed in float32.
        device: of the batch.
        workers: threads that decode; as many as processors by default.

    Yields:
        One `Prediction` for each path, in their order.

    Raises:
        UserError: the classifier does not return one row of logits for each image.

    Example:
        >>> for p in predict(model, [Path("dog.jpg")], weights.transforms(), categories=names):
        ...     print(p.image, p.guesses[0].name)
    """
    with ThreadPoolExecutor(workers or usable_cores(), thread_name_prefix="decode") as pool:
        waiting: deque[tuple[Path, Future[Tensor | str]]] = deque()
        ahead = ((path, pool.submit(images.prepare, path, transform)) for path in paths)
        try:
            waiting.extend(islice(ahead, 2 * batch))
            while waiting:
                ready = [waiting.popleft() for _ in range(min(batch, len(waiting)))]
                prepared = [(path, future.result()) for path, future in ready]
                waiting.extend(islice(ahead, len(ready)))  # Decoded while the network computes.
                pixels = [x for _, x in prepared if isinstance(x, Tensor)]
                guesses = iter(
                    _classify(classifier, pixels, categories, top, dtype, torch.device(device))
                )
                for path, x in prepared:
                    if isinstance(x, Tensor):
                        yield Prediction(str(path), next(guesses))
                    else:
                        yield Prediction(str(path), error=x)
        finally:
            for _, future in waiting:
                future.cancel()


def _classify(
    classifier: Classifier,
    pixels: Sequence[Tensor],
    categories: Sequence[str],
    top: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[tuple[Guess, ...]]:
    if not pixels:
        return []
    x = torch.stack(list(pixels)).to(device, dtype, memory_format=torch.channels_last)
    with torch.inference_mode():
        logits = classifier(x)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != len(pixels):
            what = f"a tensor {list(logits.shape)}" if isinstance(logits, Tensor) else "no tensor"
            raise UserError(f"only classifiers can predict classes; this network returns {what}")
        scores, order = logits.float().softmax(1).topk(min(top, logits.shape[1]))
    return [
        tuple(
            Guess(index, categories[index] if index < len(categories) else "", probability)
            for index, probability in zip(indices, probabilities, strict=True)
        )
        for indices, probabilities in zip(order.tolist(), scores.tolist(), strict=True)
    ]


def read_categories(path: Path) -> tuple[str, ...]:
    """Names of classes from a file: one on each line, or a JSON list of names.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read the names of classes in {path}: {e}") from None
    if path.suffix != ".json":
        return tuple(text.splitlines())
    try:
        names = json.loads(text)
    except ValueError as e:
        raise UserError(f"{path} is not JSON: {e}") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} must hold a list of names")
    return tuple(names)
