"""What benchmarks compare: stock torch, its compiler, other engines, and this package.

To add a contender, write a function ``make(name, model, example)`` and an entry of `CONTENDERS`.
Benchmarks, probes, tables and the report page take it from there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fused_resnet import backends, peers, zoo
from fused_resnet.backends import cudnn
from fused_resnet.optimize import optimize

#: What is timed: from a batch to whatever the network returns.
Run = Callable[[Tensor], Any]

#: ``stock``: what errors are compared with. ``ours``: must meet the rule of `check`, or it is not
#: timed. ``peer``: its error is shown beside the others'.
Role = Literal["stock", "peer", "ours"]


def _nothing_missing(_device: torch.device, _dtype: torch.dtype) -> None:
    return None


@dataclass(frozen=True)
class Contender:
    """One way to run a network.

    Attributes:
        label: as tables print it.
        role: see `Role`.
        channels_last: whether it gets weights and input in this layout rather than NCHW.
        make: makes what is called, from the network's name, its stock model (in eval mode, of this
            dtype and layout, on this device) and an example batch. What it makes is called with
            batches of the example's shape, and only with these, in inference mode.
        why_missing: why it cannot run on a device in a dtype, in words; None if it can.
    """

    label: str
    role: Role
    channels_last: bool
    make: Callable[[str, nn.Module, Tensor], Run]
    why_missing: Callable[[torch.device, torch.dtype], str | None] = _nothing_missing

    def stock(self, network: zoo.Network, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """A copy of the stock model as this contender wants it."""
        model = zoo.converted(network, dtype, device, self.channels_last)
        return model.requires_grad_(False)

    def input(self, batch: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A batch [N, 3, H, W] as this contender wants it."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return batch.to(device, dtype).contiguous(memory_format=layout)


def _as_it_is(_name: str, stock: nn.Module, _example: Tensor) -> Run:
    return stock


def _fused(name: str, stock: nn.Module, _example: Tensor) -> Run:
    return zoo.fused(name, stock)


def _plan(name: str, stock: nn.Module, example: Tensor) -> Run:
    plan = optimize(zoo.fused(name, stock), example, progress=False)
    if plan.shapes:
        plan.forget_source()  # It meets no other shapes, and so needs no weights but packed ones.
    return plan


def _cudnn(name: str, stock: nn.Module, example: Tensor) -> Run:
    # A plan whose convolutions are graphs of cuDNN, with batch norm, sum and ReLU inside.
    with backends.backend("cudnn"):
        return optimize(zoo.fused(name, stock), example, progress=False)


def _no_cudnn(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return f"cuDNN has no fused graphs in {dtype}"
    return cudnn.unavailable(device)


def _compiled(_name: str, stock: nn.Module, _example: Tensor) -> Run:
    # One shape: code that is specialised to it is the quickest that the compiler makes.
    run: Run = torch.compile(stock, dynamic=False)
    return run


def _no_compiler(device: torch.device, _dtype: torch.dtype) -> str | None:
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "torch.compile needs a C++ compiler: install g++, or name one by CXX"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0):
        return "torch.compile needs a GPU of compute capability 7.0 or newer"
    return None


#: Every contender, by key, in the order of tables. The first is what most people run.
CONTENDERS: dict[str, Contender] = {
    "stock_nchw": Contender("stock NCHW", "stock", False, _as_it_is),
    "stock_nhwc": Contender("stock NHWC", "stock", True, _as_it_is),
    "compile": Contender("torch.compile", "peer", True, _compiled, _no_compiler),
    "freeze": Contender("torch.compile, frozen", "peer", True, peers.frozen, _no_compiler),
    "onnxruntime": Contender(
        "ONNX Runtime", "peer", False, peers.onnxruntime, peers.why_no_onnxruntime
    ),
    "openvino": Contender("OpenVINO", "peer", False, peers.openvino, peers.why_no_openvino),
    "tensorrt": Contender("TensorRT", "peer", False, peers.tensorrt, peers.why_no_tensorrt),
    "cudnn": Contender("cuDNN, fused", "peer", True, _cudnn, _no_cudnn),
    "fused": Contender("fused", "ours", True, _fused),
    "plan": Contender("plan", "ours", False, _plan),
}

#: Those that are compared unless others are asked for.
DEFAULT = ("stock_nchw", "stock_nhwc", "fused", "plan")

#: The engines of others.
PEERS = tuple(key for key, contender in CONTENDERS.items() if contender.role == "peer")


def label(key: str) -> str:
    """The name of a contender as tables print it; the key itself where it is no longer known."""
    contender = CONTENDERS.get(key)
    return key if contender is None else contender.label


def is_ours(key: str) -> bool:
    """Whether a contender is this package's."""
    contender = CONTENDERS.get(key)
    return contender is not None and contender.role == "ours"
