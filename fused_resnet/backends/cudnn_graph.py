"""One fused convolution as a graph of cuDNN, and the plans that cuDNN's engines offer for it.

    x --> conv --> * scale --> + shift --> epilogue --> y
                   fp32 [K]    fp32 [K]    ReLU, + residual, ReLU

Activations and weights are channels_last in memory (NHWC, KRSC); everything between x and y is
computed in fp32 and never reaches memory. cuDNN compiles the graph into one kernel when a plan is
built, which takes some tenths of a second; a ReLU passes NaN, as torch's does.

Graphs need no device: with the properties of a GPU in place of a handle the same plans are made.
The library is nvidia-cudnn-frontend, https://github.com/NVIDIA/cudnn-frontend (an optional extra).
"""

from __future__ import annotations

import functools
import importlib
import threading
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from fused_resnet.problem import ConvProblem, channels_last_strides

#: Oldest versions that this module is tested with.
MIN_FRONTEND = (1, 14)
MIN_CUDNN = (9, 0)

#: Names of the tensors that `PlannedGraph.execute` takes, with the numbers that cuDNN knows them
#: by.
TENSORS = {"x": 1, "weight": 2, "scale": 3, "shift": 4, "residual": 5, "y": 6}

#: Bytes of workspace that a plan may ask for; the fused engines usually ask for none.
MAX_WORKSPACE = 64 << 20

_DTYPES = {
    torch.float16: "HALF",
    torch.bfloat16: "BFLOAT16",
    torch.float32: "FLOAT",
}


@dataclass(frozen=True)
class Numerics:
    """What a plan may do to the numbers.

    Attributes:
        tf32: fp32 products may be taken on tf32 tensor cores.
        deterministic: the same input must give the same bits at every call.
    """

    tf32: bool
    deterministic: bool


@functools.cache
def missing() -> str | None:
    """Why the library cannot be used, whatever the device; None if it can."""
    try:
        library = frontend()
    except ImportError as e:
        return f'{e}: pip install "fused-resnet[cudnn]"'
    except Exception as e:  # It loads libcudnn, and says in many ways that it found none.
        return f"nvidia-cudnn-frontend does not load: {type(e).__name__}: {e}"
    if _release(library.__version__) < MIN_FRONTEND:
        wanted = ".".join(map(str, MIN_FRONTEND))
        return f"nvidia-cudnn-frontend {library.__version__} is older than {wanted}"
    try:
        version = int(library.backend_version())
    except Exception as e:
        return f"nvidia-cudnn-frontend finds no cuDNN: {e}"
    # 9.24.0 is 92400; up to cuDNN 8, 8.9.7 was 8907.
    found = divmod(version, 10000) if version >= 90000 else divmod(version, 1000)
    if found[0] < MIN_CUDNN[0]:
        return f"cuDNN {library.backend_version_string()} is older than {MIN_CUDNN[0]}"
    return None


def frontend() -> ModuleType:
    """The module ``cudnn``, imported when first asked for.

    Raises:
        ImportError: if nvidia-cudnn-frontend is not installed.
    """
    return importlib.import_module("cudnn")


def unsupported(problem: ConvProblem) -> str | None:
    """Why there is no graph for ``problem``, or None; whether an engine takes it is another matter.

    Args:
        problem: of any dtype and epilogue.
    """
    if problem.dtype not in _DTYPES:
        return f"computes fp16, bf16 and fp32, not {problem.dtype}"
    if problem.pool is not None:
        return "max-pooling is not part of its graph"
    return None


def _describe(problem: ConvProblem, numerics: Numerics, **where: Any) -> Any:
    """The graph of ``problem``, not yet validated."""
    cudnn, p = frontend(), problem
    data, fp32 = getattr(cudnn.data_type, _DTYPES[p.dtype]), cudnn.data_type.FLOAT
    graph = cudnn.pygraph(
        io_data_type=data, intermediate_data_type=fp32, compute_data_type=fp32, **where
    )

    def tensor(name: str, dtype: Any, n: int, c: int, h: int, w: int) -> Any:
        return graph.tensor(
            name=name,
            uid=TENSORS[name],
            dim=[n, c, h, w],
            stride=list(channels_last_strides(n, c, h, w)),
            data_type=dtype,
        )

    z = graph.conv_fprop(
        image=tensor("x", data, p.n, p.c, p.h, p.w),
        weight=tensor("weight", data, p.k, p.c // p.groups, p.r, p.s),
        padding=list(p.padding),
        stride=list(p.stride),
        dilation=list(p.dilation),
        compute_data_type=fp32,
    )
    z = graph.mul(z, tensor("scale", fp32, 1, p.k, 1, 1))
    z = graph.add(z, tensor("shift", fp32, 1, p.k, 1, 1))
    if p.epilogue in ("relu", "relu_add_relu"):
        z = graph.relu(z)
    if p.has_residual:
        z = graph.add(z, tensor("residual", data, *p.out_shape))
    if p.epilogue in ("add_relu", "relu_add_relu"):
        z = graph.relu(z)
    z.set_name("y").set_uid(TENSORS["y"]).set_output(True).set_data_type(data)
    z.set_dim(list(p.out_shape)).set_stride(list(channels_last_strides(*p.out_shape)))
    return graph


class PlannedGraph:
    """A validated graph and the plans that cuDNN proposes for it, best guess first.

    A plan is named after its engine and the tile that it picked, such as ``eng7_k24=22``; names
    mean the same in another process with the same cuDNN. Plans are built when first asked for.
    Everything but ``plans`` must be used by one thread at a time.

    Args:
        problem: with `unsupported` None.
        numerics: which engines to leave out.
        **where: ``handle=`` of a device, or ``device_property=`` and ``sm_version=`` of one that
            need not be there.

    Raises:
        Exception: of cuDNN's, if the graph is not valid or no engine takes it.
    """

    def __init__(self, problem: ConvProblem, numerics: Numerics, **where: Any) -> None:
        cudnn = frontend()
        self._graph = _describe(problem, numerics, **where)
        self._graph.validate()
        self._graph.build_operation_graph()
        self._graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        notes = cudnn.numerical_note
        unwanted = [notes.DOWN_CONVERT_INPUTS, notes.REDUCED_PRECISION_REDUCTION]
        unwanted += [notes.WINOGRAD, notes.FFT]
        if numerics.deterministic:
            unwanted.append(notes.NONDETERMINISTIC)
        if problem.dtype == torch.float32 and not numerics.tf32:
            unwanted.append(notes.TENSOR_CORE)
        self._graph.deselect_numeric_notes(unwanted)
        self._graph.deselect_workspace_greater_than(MAX_WORKSPACE)
        self._graph.check_support()
        names: dict[str, int] = {}
        for i in range(self._graph.get_execution_plan_count()):
            name = str(self._graph.get_plan_name_at_index(i))
            # Newer libraries also propose engines of their own that are written in Python; they are
            # compiled by another toolchain, and their names follow another scheme.
            if name.startswith("eng"):
                names.setdefault(name, i)
        self._index = names
        self._workspace: dict[str, int] = {}
        self._refused: dict[str, str] = {}

    @property
    def plans(self) -> tuple[str, ...]:
        """Names of the plans that cuDNN proposes, in its order; some may turn out not to build."""
        return tuple(self._index)

    def build(self, plan: str) -> str | None:
        """Compile a plan, once. None if it is ready, else why it cannot be used."""
        if plan in self._workspace:
            return None
        if plan not in self._index:
            return f"cuDNN has no plan {plan} for this problem"
        if plan not in self._refused:
            index = self._index[plan]
            try:
                self._graph.build_plan_at_index(index)
                size = int(self._graph.get_workspace_size_plan_at_index(index))
            except Exception as e:
                self._refused[plan] = f"cuDNN does not build {plan}: {e}"
            else:
                if size <= MAX_WORKSPACE:
                    self._workspace[plan] = size
                    return None
                self._refused[plan] = f"{plan} needs a workspace of {size >> 20} MiB"
        return self._refused[plan]

    def first(self) -> str:
        """The first plan that builds.

        Raises:
            RuntimeError: if none does.
        """
        for plan in self.plans:
            if self.build(plan) is None:
                return plan
        why = next(iter(self._refused.values()), "it proposes none")
        raise RuntimeError(f"cuDNN has no plan that may be used: {why}")

    def workspace(self, plan: str) -> int:
        """Bytes that a built plan needs beside its tensors."""
        return self._workspace[plan]

    def execute(self, plan: str, tensors: dict[str, int], workspace: int, handle: Any) -> None:
        """Start a built plan on the handle's stream.

        Args:
            plan: its name.
            tensors: addresses by the names in `TENSORS`.
            workspace: address of `workspace` bytes, any number if it needs none.
            handle: of the device that the graph was made for.
        """
        addresses = {TENSORS[name]: address for name, address in tensors.items()}
        self._graph.execute_plan_at_index(addresses, workspace, self._index[plan], handle)


class Session:
    """What cuDNN keeps for one device: a handle, and a bounded number of planned graphs.

    Handles and plans must not be used by two threads at once, so all that touches them holds
    ``lock``; what happens under it is work of the host, microseconds once a plan is built.

    Args:
        device: a CUDA device with an index.
        limit: graphs kept; the one that was not used for longest goes first.
    """

    def __init__(self, device: torch.device, limit: int = 1024) -> None:
        self.lock = threading.RLock()
        self._device = device
        self._limit = limit
        self._graphs: dict[tuple[ConvProblem, Numerics], PlannedGraph | str] = {}
        self._handle: Any = None

    def handle(self) -> Any:
        """The handle, made when first asked for, set to torch's current stream."""
        with torch.cuda.device(self._device):
            if self._handle is None:
                self._handle = frontend().create_handle()
            stream = torch.cuda.current_stream(self._device).cuda_stream
            frontend().set_stream(handle=self._handle, stream=stream)
        return self._handle

    def graph(self, problem: ConvProblem, numerics: Numerics) -> PlannedGraph | str:
        """The planned graph, or why there is none; ``lock`` must be held."""
        key = problem, numerics
        found = self._graphs.pop(key, None)
        if found is None:
            try:
                found = PlannedGraph(problem, numerics, handle=self.handle())
            except torch.OutOfMemoryError:
                raise
            except Exception as e:
                found = f"cuDNN has no plan for it: {e}"
        self._graphs[key] = found  # The newest goes last.
        if len(self._graphs) > self._limit:
            self._graphs.pop(next(iter(self._graphs)))
        return found

    def holds(self, problem: ConvProblem, numerics: Numerics) -> bool:
        """Whether `graph` would answer from what it keeps."""
        return (problem, numerics) in self._graphs


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
