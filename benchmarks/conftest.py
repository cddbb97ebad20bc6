"""What the suites share: every benchmark runs once in each contender and dtype."""

import pytest
import torch

from fused_resnet.bench import CONTENDERS


@pytest.fixture(params=CONTENDERS)
def contender(request):
    """One way to run a network, see ``fused_resnet.bench.CONTENDERS``."""
    return CONTENDERS[request.param]


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request):
    return getattr(torch, request.param)
