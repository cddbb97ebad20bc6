"""Fused conv + BatchNorm + ReLU for PyTorch: modules, whole ResNets, and any model of yours."""

from fused_resnet import functional
from fused_resnet.backends import FusedResNetWarning, backend
from fused_resnet.check import CheckReport, check
from fused_resnet.explain import Explanation, explain
from fused_resnet.fold import refresh
from fused_resnet.fuse import fuse, unfuse
from fused_resnet.modules import BasicBlock, Bottleneck, ConvBNAct, Stem
from fused_resnet.optimize import optimize
from fused_resnet.plan import Plan
from fused_resnet.plan_file import PlanFileError, load
from fused_resnet.resnet import (
    ResNet,
    cifar_resnet,
    plain18,
    plain34,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from fused_resnet.version import __version__

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "CheckReport",
    "ConvBNAct",
    "Explanation",
    "FusedResNetWarning",
    "Plan",
    "PlanFileError",
    "ResNet",
    "Stem",
    "__version__",
    "backend",
    "check",
    "cifar_resnet",
    "explain",
    "functional",
    "fuse",
    "load",
    "optimize",
    "plain18",
    "plain34",
    "refresh",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "unfuse",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
