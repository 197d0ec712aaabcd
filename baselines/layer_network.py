"""Text2Live's generator: the skip network that predicts an edit layer from the image (Bar-Tal et al. 2022, Sec. 3).

A U-shaped network, as of the deep image prior (Ulyanov et al. 2018). It is trained from nothing on one image, and its
batch norms always use that image's own statistics.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

SKIP = 4  # channels of a skip connection
# The colour channels of natural images are correlated; the network predicts along these columns instead, their
# principal directions (Olah et al. 2017), each divided by its deviation here.
DIRECTIONS = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))
DEVIATIONS = (1.6, 1.0, 1.0)


class LayerNetwork(nn.Module):
    """An image to the colour and the opacity of an edit layer, both of the image's size."""

    def __init__(self, side, width=128):
        """side: the shorter one of the image, in pixels; the network halves it until about 4 are left, 7 times at most.

        width: channels of all layers but the skip connections'.
        """
        super().__init__()
        self.scale = Scale(3, width, min(7, int(math.log2(side)) - 2), outermost=True)
        self.conv_out = nn.Conv2d(width, 4, 1)
        colours = torch.tensor(DIRECTIONS) / torch.tensor(DEVIATIONS)
        self.register_buffer("colours", colours / colours.norm(dim=0).max())

    def forward(self, image):
        """image [1, 3, H, W] in [0, 1] -> colour [1, 3, H, W] and opacity [1, 1, H, W], in [0, 1]."""
        x = self.conv_out(self.scale(image))
        colour = torch.einsum("dc,bchw->bdhw", self.colours, x[:, :3])
        return colour.sigmoid(), x[:, 3:].sigmoid()


class Scale(nn.Module):
    """One resolution: a skip connection beside a way down to half the size and up again, through the next scale."""

    def __init__(self, width_in, width, depth, outermost=False):
        """depth: the number of scales, with this one."""
        super().__init__()
        self.skip = block(width_in, SKIP, 1)
        self.down = nn.Sequential(block(width_in, width, 3, stride=2), block(width, width, 3))
        self.inner = Scale(width, width, depth - 1) if depth > 1 else nn.Identity()
        last = nn.Sequential(nn.Conv2d(width, width, 1), nn.LeakyReLU(0.2)) if outermost else block(width, width, 1)
        self.join = nn.Sequential(nn.BatchNorm2d(SKIP + width), block(SKIP + width, width, 3), last)

    def forward(self, x):
        """x [1, C_in, H, W] -> [1, C, H, W]."""
        skip, deep = self.skip(x), self.inner(self.down(x))
        deep = F.interpolate(deep, scale_factor=2, mode="bilinear", align_corners=False)
        return self.join(torch.cat([skip, central(deep, skip.shape[2:])], dim=1))


def block(width_in, width_out, size, stride=1):
    """A convolution, a batch norm and LeakyReLU; reflected at the edges."""
    conv = nn.Conv2d(width_in, width_out, size, stride, padding=size // 2, padding_mode="reflect")
    return nn.Sequential(conv, nn.BatchNorm2d(width_out), nn.LeakyReLU(0.2))


def central(x, size):
    """The middle of x [B, C, H, W], of a size (h, w) that is not larger."""
    top, left = ((have - want) // 2 for have, want in zip(x.shape[2:], size, strict=True))
    return x[:, :, top : top + size[0], left : left + size[1]]
