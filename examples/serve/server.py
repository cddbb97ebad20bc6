"""A plan of a classifier behind LitServe, with dynamic batching; see README.md beside this file."""

import argparse
import io
import signal
from collections.abc import Sequence
from typing import Annotated, Any

import litserve
import torch
from fastapi import File, Response
from fastapi.responses import JSONResponse

from fused_resnet import images, optimize, zoo


class Api(litserve.LitAPI):
    """From an uploaded photo to its best classes."""

    def __init__(
        self, model: str, weights: str | None, top: int, budget: float, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self._model, self._weights, self._top, self._budget = model, weights, top, budget

    def setup(self, device: str) -> None:
        """Make a plan of the network, in the worker process, and call it once."""
        self._device = device
        network = zoo.load(self._model, weights=self._weights)
        stock = zoo.converted(network, torch.float32, torch.device(device), channels_last=True)
        self._transform, self._categories = network.transform, network.categories
        example = torch.randn(self.max_batch_size, 3, network.size, network.size, device=device)
        # Measured for the smallest and the largest batch; those between get programs as they come.
        self._plan = optimize(
            zoo.fused(self._model, stock),
            example.contiguous(memory_format=torch.channels_last),
            budget=self._budget,
            batch_sizes=(1,),
            dynamic=True,
            max_plans=self.max_batch_size,
        )
        self._logits([torch.zeros(3, network.size, network.size)])

    # Bytes, since they cross to the worker process; FastAPI answers 422 if the field is missing.
    def decode_request(self, request: Annotated[bytes, File(alias="image")]) -> torch.Tensor | str:
        """The photo ready for the network, or why it is none.

        Returned, not raised: an exception would fail the whole batch.
        """
        return images.prepare(io.BytesIO(request), self._transform)

    def batch(self, inputs: list[torch.Tensor | str]) -> list[torch.Tensor | str]:
        """As they are: broken photos among them must keep their places."""
        return inputs

    def unbatch(self, output: list[Any]) -> list[Any]:
        """As they are."""
        return output

    def predict(self, x: list[torch.Tensor | str]) -> list[dict[str, Any] | str]:
        """An answer for each photo; the network sees those that are photos, in one call."""
        good = [item for item in x if isinstance(item, torch.Tensor)]
        if not good:
            return [str(item) for item in x]
        best = self._logits(good).float().softmax(1).topk(self._top)
        answers = iter(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return [
            self._answer(*next(answers), len(good)) if isinstance(item, torch.Tensor) else item
            for item in x
        ]

    def _logits(self, pixels: Sequence[torch.Tensor]) -> torch.Tensor:
        x = torch.stack(list(pixels)).to(self._device, memory_format=torch.channels_last)
        with torch.inference_mode():
            return self._plan(x)

    def _answer(self, indices: list[int], values: list[float], batch: int) -> dict[str, Any]:
        known = self._categories
        classes = [
            {"index": i, "name": known[i] if i < len(known) else "", "probability": p}
            for i, p in zip(indices, values, strict=True)
        ]
        return {"classes": classes, "batch": batch}

    def encode_response(self, output: dict[str, Any] | str) -> Response:
        """200 with the classes, or 422 with the reason."""
        if isinstance(output, str):
            return JSONResponse({"detail": f"not a photo: {output}"}, status_code=422)
        return JSONResponse(output)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--weights", default="DEFAULT", help="entry of the zoo, or a checkpoint")
    parser.add_argument("--top", type=int, default=5, help="classes in an answer")
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds to measure kernels")
    parser.add_argument("--wait", type=float, default=0.01, help="seconds to wait for a batch")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds to wait; then 504")
    parser.add_argument("--max-bytes", type=int, default=20_000_000, help="of a request")
    parser.add_argument("--accelerator", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--workers", type=int, default=1, help="processes for each device")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    a = parser.parse_args()
    api = Api(a.model, a.weights, a.top, a.budget, max_batch_size=a.max_batch, batch_timeout=a.wait)
    server = litserve.LitServer(
        api,
        accelerator=a.accelerator,
        workers_per_device=a.workers,
        timeout=a.timeout,
        max_payload_size=a.max_bytes,
    )
    # LitServe ends its processes where it is interrupted; on SIGTERM, which containers and service
    # managers send, it would leave them behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server.run(host=a.host, port=a.port, generate_client_file=False)


if __name__ == "__main__":
    main()
