"""Fused conv + BatchNorm + ReLU for PyTorch: drop-in modules, whole ResNets, and any model of yours."""

from fused_resnet import functional
from fused_resnet.backends import FusedResNetWarning, backend
from fused_resnet.fold import refresh
from fused_resnet.version import __version__

__all__ = ["FusedResNetWarning", "__version__", "backend", "functional", "refresh"]
