"""Residual networks with fused convolution, batch norm, add and ReLU."""

from fused_resnet.version import __version__

__all__ = ["__version__"]
