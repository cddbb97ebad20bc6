"""A program as one CUDA graph: captured once, replayed with static inputs.

Inputs are copied into static tensors, the graph is replayed, results are copied out, all on the
caller's stream. Calls of several threads take turns; a call on another stream than the last one
waits on the device for that one's copies to be done, and on the host for nothing.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fused_resnet.warn import FusedResNetWarning

#: Calls before the capture: kernels are compiled and workspaces allocated by then.
_WARM_UP = 3


class Runtime(Protocol):
    """The part of torch.cuda that a graph needs; tests give another."""

    def warm_up(self, call: Callable[[], Any]) -> None:
        """Call it on a stream of its own, as a capture wants it."""

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """A function that replays what ``call`` did, and what ``call`` returned."""

    def wait(self, mark: Any) -> None:
        """Have the current stream wait for a mark."""

    def mark(self) -> Any:
        """A mark behind all work of the current stream."""


class CudaRuntime:
    """`Runtime` by torch.cuda, on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def warm_up(self, call: Callable[[], Any]) -> None:
        """See `Runtime`."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream(self.device).wait_stream(stream)

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """See `Runtime`."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph):
            result = call()
        return graph.replay, result

    def wait(self, mark: Any) -> None:
        """See `Runtime`."""
        torch.cuda.current_stream(self.device).wait_event(mark)

    def mark(self) -> Any:
        """See `Runtime`."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event


class CudaGraph:
    """A callable that replays a program.

    Args:
        program: what is captured, of tensors.
        example: inputs of the shapes to come.
        runtime: by default torch.cuda.
    """

    def __init__(
        self,
        program: Callable[..., Any],
        example: Sequence[Tensor],
        runtime: Runtime | None = None,
    ) -> None:
        self._runtime = runtime or CudaRuntime(example[0].device)
        self._lock = threading.Lock()
        with torch.inference_mode(False), torch.no_grad():
            self._static = [t.detach().clone() for t in example]
            for _ in range(_WARM_UP):
                self._runtime.warm_up(lambda: program(*self._static))
            self._replay, self._result = self._runtime.capture(lambda: program(*self._static))
        self._done = self._runtime.mark()

    @staticmethod
    def or_plain(
        program: Callable[..., Any], example: Sequence[Tensor], runtime: Runtime | None = None
    ) -> Any:
        """A graph of ``program``; ``program`` itself, and a warning, if it cannot be captured."""
        try:
            return CudaGraph(program, example, runtime)
        except Exception as e:
            warnings.warn(
                f"the plan runs without a CUDA graph, which could not be captured: "
                f"{type(e).__name__}: {e}",
                FusedResNetWarning,
                stacklevel=3,
            )
            return program

    def renewed(self, program: Callable[..., Any]) -> Any:
        """A graph of another program with the same inputs."""
        return CudaGraph.or_plain(program, self._static, self._runtime)

    def __call__(self, *tensors: Tensor) -> Any:
        """What the program returns, in memory of its own."""
        with self._lock:
            self._runtime.wait(self._done)
            for static, t in zip(self._static, tensors, strict=True):
                static.copy_(t)
            self._replay()
            result = pytree.tree_map(
                lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, self._result
            )
            self._done = self._runtime.mark()
        return result


__all__ = ["CudaGraph", "CudaRuntime", "Runtime"]
