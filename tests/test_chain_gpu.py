"""Chained bottlenecks on your GPU: ``pytest -m gpu tests/test_chain_gpu.py``."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision

pytest.importorskip("triton", reason="this torch comes without Triton")

from fused_resnet import backends, chain
from fused_resnet.backends.triton_.chain_kernel import TritonChain
from tests.chain_cases import chain_data, chain_problem, stock
from tests.helpers import assert_within_rule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda", 0)
KERNEL = TritonChain()
BLOCKS = {
    "64": {"n": 8, "h": 56, "w": 56},
    "64_odd": {"n": 3, "h": 13, "w": 9},
    "64_projection": {"n": 8, "h": 28, "w": 28, "proj": 64},
    "64_transition": {"n": 4, "h": 15, "w": 14, "following": 128, "store": "even"},
    "128": {"m": 128, "n": 8, "h": 28, "w": 28},
    "128_projection": {"m": 128, "n": 4, "h": 27, "w": 28, "proj": 256, "stride": 2},
    "256": {"m": 256, "n": 8, "h": 14, "w": 14},
    "256_pooled": {"m": 256, "n": 8, "h": 14, "w": 14, "following": 0, "store": "pool"},
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_every_configuration_is_right(name: str, dtype: torch.dtype) -> None:
    problem = chain_problem(**BLOCKS[name], dtype=dtype)
    reason = KERNEL.supports(problem, DEVICE)
    if reason is not None:
        pytest.skip(reason)
    args = tuple(None if t is None else t.to(DEVICE) for t in chain_data(problem))
    references = stock(problem, tuple(None if t is None else t.cpu() for t in args), torch.float64)
    usual = stock(problem, args)
    for variant in KERNEL.variants(problem, DEVICE):
        results = variant.run(problem, *args)
        for result, reference, other in zip(results, references, usual, strict=True):
            assert_within_rule(result.cpu(), reference, other.cpu(), dtype)


def test_resnet50_in_chains() -> None:
    model = torchvision.models.resnet50().eval().to(DEVICE, torch.float16)
    x = torch.randn(8, 3, 224, 224, device=DEVICE, dtype=torch.float16)
    with torch.inference_mode(), backends.observe() as choices:
        result = chain(model)(x)
        reference = copy.deepcopy(model).double()(x.double())
        assert_within_rule(result, reference, model(x), torch.float16)
    kernels = [c.kernel.full_name for c in choices if c.kernel.op == "bottleneck_chain"]
    assert kernels
    assert set(kernels) == {"triton/chain"}
