"""What the suites share: every benchmark runs once in each contender and dtype."""

import pytest
import torch

from fused_resnet.contenders import CONTENDERS


@pytest.fixture(params=CONTENDERS)
def contender(request):
    """One way to run a network, see ``fused_resnet.contenders.CONTENDERS``."""
    return CONTENDERS[request.param]


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request):
    return getattr(torch, request.param)
