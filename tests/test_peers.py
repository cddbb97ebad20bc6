"""Other engines as contenders: what they compute, and what they say where they cannot."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fused_resnet import peers
from fused_resnet.backends import FusedResNetWarning, cudnn
from fused_resnet.contenders import CONTENDERS, DEFAULT, PEERS

CPU = torch.device("cpu")


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)
    return nn.Sequential(*layers).eval().requires_grad_(False)


def test_which_there_are() -> None:
    assert {"onnxruntime", "openvino", "freeze", "tensorrt", "cudnn"} <= set(PEERS)
    assert not set(PEERS) & set(DEFAULT)
    assert CONTENDERS["plan"].role == "ours"


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    why = peers.why_no_onnxruntime(CPU, torch.float32)
    assert why == (
        "onnxruntime and onnx and onnxscript not installed: pip install onnxruntime onnx onnxscript"
    )
    why = peers.why_no_openvino(CPU, torch.float32)
    assert why == "openvino not installed: pip install openvino"


@pytest.mark.parametrize("why", [peers.why_no_onnxruntime, peers.why_no_openvino])
def test_what_they_cannot_compute_is_told(why: Any) -> None:
    assert "not on cuda" in why(torch.device("cuda"), torch.float32)
    assert "float16" in why(CPU, torch.float16)


CUDA = torch.device("cuda", 0)


def test_tensorrt_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not on cpu" in str(peers.why_no_tensorrt(CPU, torch.float16))
    assert "float64" in str(peers.why_no_tensorrt(CUDA, torch.float64))
    why = peers.why_no_tensorrt(CUDA, torch.float16)
    assert why == "torch_tensorrt not installed: pip install torch_tensorrt"


@pytest.mark.parametrize("tf32", [True, False])
def test_tensorrt_compiles_the_stock_model_as_it_is(
    monkeypatch: pytest.MonkeyPatch, tf32: bool
) -> None:
    """By a stand-in for the package, which needs a GPU."""
    asked: list[tuple[Any, dict[str, Any]]] = []

    def compile(module: nn.Module, **options: Any) -> nn.Module:
        asked.append((module, options))
        return module

    monkeypatch.setitem(sys.modules, "torch_tensorrt", SimpleNamespace(compile=compile))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    stock, x = model(), torch.randn(2, 3, 8, 8)
    run = CONTENDERS["tensorrt"].make("small", stock, x)
    assert torch.equal(run(x), stock(x))
    ((module, options),) = asked
    assert module is stock
    assert options["inputs"][0] is x
    assert options["use_explicit_typing"]
    assert options["disable_tf32"] is not tf32


def test_cudnn_is_a_plan_of_that_backend_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned here on the CPU, where stock torch has to stand in for all of its kernels."""
    assert "not on cpu" in str(CONTENDERS["cudnn"].why_missing(CPU, torch.float16))
    assert "float64" in str(CONTENDERS["cudnn"].why_missing(CUDA, torch.float64))
    monkeypatch.setattr(cudnn, "missing", lambda: "nvidia-cudnn-frontend is not installed")
    cudnn.unavailable.cache_clear()
    assert CONTENDERS["cudnn"].why_missing(CUDA, torch.float16) == cudnn.missing()
    cudnn.unavailable.cache_clear()
    stock, x = model(), torch.randn(2, 3, 8, 8)
    with pytest.warns(FusedResNetWarning, match="backend cudnn was forced but cannot compute"):
        run: Any = CONTENDERS["cudnn"].make("tests.unet:PlainUNet", stock, x)
    assert "backend cudnn was forced" in str(run.explain())
    assert torch.allclose(run(x), stock(x), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("key", PEERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_compute_what_stock_torch_does(key: str, dtype: torch.dtype) -> None:
    contender = CONTENDERS[key]
    missing = contender.why_missing(CPU, dtype)
    if missing is not None:
        pytest.skip(missing)
    stock, x = model().to(dtype), torch.randn(2, 3, 8, 8, dtype=dtype)
    expected = stock(x)
    with torch.inference_mode():
        found = contender.make("small", stock, x)(x)
    assert found.dtype == dtype
    assert torch.allclose(found, expected, atol=1e-5 if dtype == torch.float32 else 0.05)
    assert next(stock.parameters()).dtype == dtype
