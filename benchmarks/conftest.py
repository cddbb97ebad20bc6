"""What the suites share: every benchmark in every contender, inputs ready, stock torch not handicapped."""

import pytest
import torch

from fused_resnet.bench import CONTENDERS


@pytest.fixture(params=CONTENDERS, autouse=True)
def contender(request):
    """One way to run a network, see ``fused_resnet.bench.CONTENDERS``."""
    with torch.inference_mode():
        yield CONTENDERS[request.param]


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request):
    return getattr(torch, request.param)
