"""A U-Net as it is written by hand: double convolutions, skip connections, a bias everywhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DoubleConv(nn.Sequential):
    """(convolution, norm, ReLU) twice."""

    def __init__(self, c: int, k: int) -> None:
        super().__init__(
            nn.Conv2d(c, k, 3, padding=1),
            nn.BatchNorm2d(k),
            nn.ReLU(inplace=True),
            nn.Conv2d(k, k, 3, padding=1),
            nn.BatchNorm2d(k),
            nn.ReLU(inplace=True),
        )


class PlainUNet(nn.Module):
    """Ronneberger et al., 2015, with padding and batch norm, three levels deep."""

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        w = width
        self.down1, self.down2, self.down3 = (
            DoubleConv(channels, w),
            DoubleConv(w, 2 * w),
            DoubleConv(2 * w, 4 * w),
        )
        self.pool = nn.MaxPool2d(2)
        self.grow2 = nn.ConvTranspose2d(4 * w, 2 * w, 2, stride=2)
        self.up2 = DoubleConv(4 * w, 2 * w)
        self.grow1 = nn.ConvTranspose2d(2 * w, w, 2, stride=2)
        self.up1 = DoubleConv(2 * w, w)
        self.head = nn.Conv2d(w, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] to [N, classes, H, W]; H and W are multiples of 4."""
        one = self.down1(x)
        two = self.down2(self.pool(one))
        y = self.down3(self.pool(two))
        y = self.up2(torch.cat([two, self.grow2(y)], 1))
        y = self.up1(torch.cat([one, self.grow1(y)], 1))
        return self.head(y)
