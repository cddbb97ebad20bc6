"""Other engines as contenders: what they compute, and what they say where they cannot."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import nn

from fused_resnet import peers
from fused_resnet.contenders import CONTENDERS, DEFAULT, PEERS

CPU = torch.device("cpu")


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)
    return nn.Sequential(*layers).eval().requires_grad_(False)


def test_which_there_are() -> None:
    assert {"onnxruntime", "openvino", "freeze"} <= set(PEERS)
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
