"""Batch inference of a folder of photos with Ray Data; see README.md beside this file."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from fused_resnet import images, optimize, zoo
from fused_resnet.predict import expand

#: Columns of the result.
COLUMNS = ("image", "index", "name", "probability", "error")


class Decoder:
    """From a row with a path to one with pixels [3, H, W], or the reason why there are none."""

    def __init__(self, transform: images.Transform, size: int) -> None:
        self._transform = transform
        self._blank = np.zeros((3, size, size), np.float32)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with pixels and error; pixels are blank where the photo cannot be read."""
        prepared = images.prepare(row["image"], self._transform)
        if isinstance(prepared, str):
            return {**row, "pixels": self._blank, "error": prepared}
        return {**row, "pixels": prepared.numpy(), "error": ""}


class Classifier:
    """A worker: a plan of the network, made once, and called with batches of rows."""

    def __init__(
        self, model: str, weights: str | None, device: str, threads: int, batch: int, budget: float
    ) -> None:
        torch.set_num_threads(threads)
        network = zoo.load(model, weights=weights)
        stock = zoo.converted(network, torch.float32, torch.device(device), channels_last=True)
        self._categories = network.categories
        self._device = device
        example = torch.randn(batch, 3, network.size, network.size, device=device)
        # What one worker measured the others of its machine find in the tuned table. The last batch
        # of a block may be smaller: it gets a program of its own, whose kernels are not measured.
        self.plan = optimize(
            zoo.fused(model, stock),
            example.contiguous(memory_format=torch.channels_last),
            budget=budget,
            dynamic=True,
            max_plans=batch,
        )

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """The best class of each photo; index -1 where there was none to read."""
        x = torch.from_numpy(np.stack(batch["pixels"])).to(self._device)
        with torch.inference_mode():
            logits = self.plan(x.contiguous(memory_format=torch.channels_last))
            best = logits.float().softmax(1).max(1)
        good = batch["error"] == ""
        indices = np.where(good, best.indices.cpu().numpy(), -1)
        names = [self._categories[i] if 0 <= i < len(self._categories) else "" for i in indices]
        return {
            "image": batch["image"],
            "index": indices,
            "name": names,
            "probability": np.where(good, best.values.cpu().numpy(), 0.0),
            "error": batch["error"],
        }


def classify(
    paths: list[Path],
    output: Path,
    *,
    model: str,
    weights: str | None,
    workers: int = 2,
    batch: int = 16,
    device: str = "cpu",
    threads: int = 1,
    budget: float = 60.0,
    classifier: type[Classifier] = Classifier,
) -> int:
    """Classify photos on the running cluster and write a CSV file.

    Args:
        paths: of the photos, valid on every machine.
        output: the CSV file, a row for each photo.
        model: a name that `fused_resnet.zoo` knows.
        weights: an entry of the model's zoo, or the path of a checkpoint.
        workers: processes that hold a plan of the network.
        batch: photos in one call.
        device: ``cpu``, or ``cuda``: one GPU for each worker.
        threads: of torch in a worker.
        budget: seconds in which a worker measures kernels, unless they are known.
        classifier: what a worker is made of.

    Returns:
        How many photos could not be read.
    """
    network = zoo.load(model, weights=weights)
    rows = ray.data.from_items([{"image": str(path.absolute())} for path in paths])
    # Blocks of a few batches: what a lost worker has to do again.
    blocks = max(1, min(len(paths), len(paths) // (4 * batch) + 2 * workers))
    classes = (
        rows.repartition(blocks)
        .map(Decoder(network.transform, network.size))
        .map_batches(
            classifier,
            fn_constructor_args=(model, weights, device, threads, batch, budget),
            batch_size=batch,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_gpus=1 if device.startswith("cuda") else 0,
        )
    )
    failed = 0
    with output.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        for row in classes.iter_rows():
            failed += bool(row["error"])
            writer.writerow(row)
    return failed


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", nargs="+", type=Path, help="photos, or folders of them")
    parser.add_argument("output", type=Path, help="the CSV file to write")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--weights", default="DEFAULT", help="entry of the zoo, or a checkpoint")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds to measure kernels")
    parser.add_argument("--address", help="of a running cluster; 'auto' finds it")
    a = parser.parse_args()
    ray.init(address=a.address, include_dashboard=False if a.address is None else None)
    files = expand(a.images)
    failed = classify(
        files,
        a.output,
        model=a.model,
        weights=a.weights,
        workers=a.workers,
        batch=a.batch,
        device=a.device,
        threads=a.threads,
        budget=a.budget,
    )
    print(f"{len(files) - failed} of {len(files)} photos classified: {a.output}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
