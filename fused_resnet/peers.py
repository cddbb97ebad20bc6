"""Other engines as contenders: torch.compile with frozen weights, ONNX Runtime, OpenVINO, TensorRT.

Each takes the stock model and runs it its own way, on as many threads as torch. One that is not
installed, or cannot compute in a dtype, says so; nothing is imported before it is asked for.
"""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[Tensor], Any]


def _missing_packages(*names: str) -> str | None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return f"{' and '.join(missing)} not installed: pip install {' '.join(missing)}"


# --------------------------------------------------------------------------------------------------
# torch.compile with freezing.
# --------------------------------------------------------------------------------------------------


def frozen(_name: str, model: nn.Module, example: Tensor) -> Run:
    """``torch.compile`` with weights folded into the code as constants, which lets it pack them."""
    from torch._inductor import config

    compiled: Run = torch.compile(model, dynamic=False)
    # The setting counts when the code is made, at the first call; frozen weights want no_grad.
    with config.patch(freezing=True), torch.no_grad():
        compiled(example)
    return compiled


# --------------------------------------------------------------------------------------------------
# ONNX Runtime.
# --------------------------------------------------------------------------------------------------


def why_no_onnxruntime(device: torch.device, dtype: torch.dtype) -> str | None:
    """None if `onnxruntime` can run, else why not."""
    if device.type != "cpu":
        return f"ONNX Runtime is compared on the CPU, not on {device.type}"
    if dtype != torch.float32:
        return f"ONNX Runtime's CPU kernels do not compute convolutions in {dtype}"
    return _missing_packages("onnxruntime", "onnx", "onnxscript")


def onnxruntime(_name: str, model: nn.Module, example: Tensor) -> Run:
    """ONNX Runtime's CPU provider with all graph optimisations."""
    import onnxruntime as ort

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of the exporter, about itself.
        program = torch.onnx.export(model, (example,), dynamo=True, verbose=False)
    assert program is not None
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Threads that spin between calls would take cores from the contenders that come next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        program.save(path)
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()

    def run(x: Tensor) -> Tensor:
        (result,) = session.run(None, {given.name: x.numpy()})
        return torch.from_numpy(result)

    return run


# --------------------------------------------------------------------------------------------------
# OpenVINO.
# --------------------------------------------------------------------------------------------------

_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def why_no_openvino(device: torch.device, dtype: torch.dtype) -> str | None:
    """None if `openvino` can run, else why not."""
    if device.type != "cpu":
        return f"OpenVINO is compared on the CPU, not on {device.type}"
    if dtype not in _PRECISIONS:
        return f"OpenVINO's CPU plugin does not compute in {dtype}"
    return _missing_packages("openvino")


def openvino(_name: str, model: nn.Module, example: Tensor) -> Run:
    """OpenVINO's CPU plugin, tuned for latency; in bf16 with fp32 weights and inputs."""
    import openvino as ov

    dtype = example.dtype
    # It converts to the precision that it is asked for by itself, as its users have it do.
    whole = model.float() if dtype != torch.float32 else model
    converted = ov.convert_model(whole, example_input=example.float(), input=[tuple(example.shape)])
    if dtype != torch.float32:
        model.to(dtype)
    compiled = ov.Core().compile_model(
        converted,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": _PRECISIONS[dtype],
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    request = compiled.create_infer_request()

    def run(x: Tensor) -> Tensor:
        (result,) = request.infer([x.float().numpy()]).values()
        return torch.from_numpy(result).to(dtype)

    return run


# --------------------------------------------------------------------------------------------------
# TensorRT.
# --------------------------------------------------------------------------------------------------


def why_no_tensorrt(device: torch.device, dtype: torch.dtype) -> str | None:
    """None if `tensorrt` can run, else why not."""
    if device.type != "cuda":
        return f"TensorRT runs on NVIDIA GPUs, not on {device.type}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"TensorRT does not compute in {dtype}"
    return _missing_packages("torch_tensorrt")


def tensorrt(_name: str, model: nn.Module, example: Tensor) -> Run:
    """TensorRT by torch-tensorrt, in the model's dtype, with fp32 as stock torch has it here."""
    import torch_tensorrt

    run: Run = torch_tensorrt.compile(
        model,
        ir="dynamo",
        inputs=[example],
        use_explicit_typing=True,  # Else it picks other precisions than it was given.
        disable_tf32=not torch.backends.cudnn.allow_tf32,
        require_full_compilation=True,  # What it cannot do is told rather than run by torch.
    )
    return run


__all__ = [
    "frozen",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "why_no_onnxruntime",
    "why_no_openvino",
    "why_no_tensorrt",
]
