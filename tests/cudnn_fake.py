"""A stand-in for the module ``cudnn`` that computes graphs on the CPU, from raw addresses.

It sees what the real library would see: dimensions, strides, data types and addresses. So a graph
that is wired wrongly, or described otherwise than its tensors lie in memory, comes out wrong here.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

TYPES = SimpleNamespace(FLOAT=torch.float32, HALF=torch.float16, BFLOAT16=torch.bfloat16)
NOTES = ("DOWN_CONVERT_INPUTS", "REDUCED_PRECISION_REDUCTION", "WINOGRAD", "FFT",
         "NONDETERMINISTIC", "TENSOR_CORE")  # fmt: skip


class FakeTensor:
    """A tensor of a graph: described by the caller (an input), or computed from others."""

    def __init__(self, compute: Callable[[dict[int, int]], Tensor] | None = None) -> None:
        self.compute = compute
        self.uid = -1
        self.dim: list[int] = []
        self.stride: list[int] = []
        self.dtype = torch.float32

    def view(self, addresses: dict[int, int]) -> Tensor:
        """The memory at this tensor's address, as it was described."""
        address = addresses[self.uid]
        assert address % 16 == 0, "cuDNN is told that tensors are aligned to 16 bytes"
        last = sum((d - 1) * s for d, s in zip(self.dim, self.stride, strict=True))
        size = (last + 1) * self.dtype.itemsize
        memory = (ctypes.c_char * size).from_address(address)
        flat = torch.frombuffer(memory, dtype=self.dtype)
        return flat.as_strided(self.dim, self.stride)

    def value(self, addresses: dict[int, int]) -> Tensor:
        """fp32, as everything within a graph."""
        if self.compute is not None:
            return self.compute(addresses)
        return self.view(addresses).float()

    def set_name(self, name: str) -> FakeTensor:
        return self

    def set_output(self, is_output: bool) -> FakeTensor:
        assert is_output
        return self

    def set_uid(self, uid: int) -> FakeTensor:
        self.uid = uid
        return self

    def set_data_type(self, dtype: torch.dtype) -> FakeTensor:
        self.dtype = dtype
        return self

    def set_dim(self, dim: list[int]) -> FakeTensor:
        self.dim = dim
        return self

    def set_stride(self, stride: list[int]) -> FakeTensor:
        self.stride = stride
        return self


@dataclass
class FakeCudnn:
    """The module. Plans are names; those in ``broken`` do not build, ``tensor_core`` ones are tf32.

    Attributes:
        graphs: every graph made, in order.
        executed: (graph, plan, stream) of every call, in order.
    """

    plans: tuple[str, ...] = ("eng4_k24=3", "eng7_k24=21", "eng7_k24=22", "eng8")
    broken: frozenset[str] = frozenset()
    tensor_core: frozenset[str] = frozenset({"eng4_k24=3", "eng7_k24=21", "eng7_k24=22"})
    workspace: int = 0
    version: int = 92400
    __version__: str = "1.32.0"
    graphs: list[FakeGraph] = field(default_factory=list)
    executed: list[tuple[FakeGraph, str, int]] = field(default_factory=list)
    busy: threading.Lock = field(default_factory=threading.Lock)

    data_type = TYPES
    heur_mode = SimpleNamespace(A="A", FALLBACK="FALLBACK")
    numerical_note = SimpleNamespace(**{name: name for name in NOTES})

    def backend_version(self) -> int:
        return self.version

    def backend_version_string(self) -> str:
        return str(self.version)

    def create_handle(self) -> SimpleNamespace:
        return SimpleNamespace(stream=0)

    def set_stream(self, handle: SimpleNamespace, stream: int) -> None:
        handle.stream = stream

    def pygraph(self, **settings: Any) -> FakeGraph:
        assert settings["intermediate_data_type"] == settings["compute_data_type"] == torch.float32
        graph = FakeGraph(self)
        self.graphs.append(graph)
        return graph


class FakeGraph:
    """What the backend uses of ``cudnn.pygraph``."""

    def __init__(self, library: FakeCudnn) -> None:
        self.library = library
        self.inputs: dict[int, FakeTensor] = {}
        self.barred: set[str] = set()
        self.built: set[str] = set()
        self.last = FakeTensor()

    def tensor(
        self, name: str, uid: int, dim: list[int], stride: list[int], data_type: torch.dtype
    ) -> FakeTensor:
        made = FakeTensor().set_uid(uid).set_dim(dim).set_stride(stride).set_data_type(data_type)
        assert uid not in self.inputs
        self.inputs[uid] = made
        return made

    def _op(self, compute: Callable[[dict[int, int]], Tensor]) -> FakeTensor:
        self.last = FakeTensor(compute)
        return self.last

    def conv_fprop(
        self,
        image: FakeTensor,
        weight: FakeTensor,
        padding: list[int],
        stride: list[int],
        dilation: list[int],
        compute_data_type: torch.dtype,
    ) -> FakeTensor:
        assert compute_data_type == torch.float32
        groups = image.dim[1] // weight.dim[1]
        return self._op(
            lambda at: torch.conv2d(
                image.value(at), weight.value(at), None, stride, padding, dilation, groups
            )
        )

    def mul(self, a: FakeTensor, b: FakeTensor) -> FakeTensor:
        return self._op(lambda at: a.value(at) * b.value(at))

    def add(self, a: FakeTensor, b: FakeTensor) -> FakeTensor:
        return self._op(lambda at: a.value(at) + b.value(at))

    def relu(self, a: FakeTensor) -> FakeTensor:
        return self._op(lambda at: a.value(at).relu())

    def validate(self) -> None: ...

    def build_operation_graph(self) -> None: ...

    def create_execution_plans(self, heuristics: list[str]) -> None:
        assert heuristics == ["A", "FALLBACK"]

    def deselect_numeric_notes(self, notes: list[str]) -> None:
        if "TENSOR_CORE" in notes:
            self.barred |= self.library.tensor_core

    def deselect_workspace_greater_than(self, limit: int) -> None: ...

    def check_support(self) -> None:
        if not self.library.plans:
            raise RuntimeError("No engine configs")

    def get_execution_plan_count(self) -> int:
        return len(self.library.plans)

    def get_plan_name_at_index(self, index: int) -> str:
        return self.library.plans[index]

    def build_plan_at_index(self, index: int) -> None:
        plan = self.library.plans[index]
        if plan in self.barred or plan in self.library.broken:
            raise RuntimeError("Deselecting execution plan")
        assert plan not in self.built, "built twice"
        self.built.add(plan)

    def get_workspace_size_plan_at_index(self, index: int) -> int:
        assert self.library.plans[index] in self.built
        return self.library.workspace

    def execute_plan_at_index(
        self, addresses: dict[int, int], workspace: int, index: int, handle: SimpleNamespace
    ) -> None:
        plan = self.library.plans[index]
        assert plan in self.built
        assert set(addresses) == {*self.inputs, self.last.uid}
        assert self.library.busy.acquire(blocking=False), "two threads at once"
        try:
            result = self.last.value(addresses)
            assert list(result.shape) == self.last.dim
            self.last.view(addresses).copy_(result)
            self.library.executed.append((self, plan, handle.stream))
        finally:
            self.library.busy.release()
