"""A discriminator of patches: it judges every part of an image by itself."""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.networks.blocks import he_normal


class PatchDiscriminator(nn.Module):
    """(n, C, H, W) to (n, patches): a score for each of the overlapping patches of an image.

    Convolutions of 4x4 with stride 2, and two of stride 1 that end in a map of scores: Isola et al. (2017),
    "Image-to-image translation with conditional adversarial networks", appendix 6.1.2, with group norm in place of
    batch norm, so that no image's score depends on another's. Their 70x70 patches are ``layers=3``; small images want
    fewer, and get no more than leave a side of 4.

    Args:
        shape: (C, H, W) of the images.
        width: channels of the first convolution, a multiple of 8; doubled by each further one, up to 8 times.
        layers: convolutions of stride 2, at most.
    """

    def __init__(self, shape: tuple[int, int, int], *, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        if width < 8 or width % 8 or layers < 1:
            raise UserError(f"A discriminator of patches with width={width}, layers={layers}: a multiple of 8, and 1.")
        if min(shape[1:]) < 8:
            raise UserError(f"Images of {shape[1]}x{shape[2]} have no patches: use model.discriminator=null.")
        while layers > 1 and min(shape[1:]) < 4 * 2**layers:
            layers -= 1
        widths = [width * min(2**k, 8) for k in range(layers + 1)]
        self.stem = nn.Conv2d(shape[0], widths[0], 4, stride=2, padding=1)
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 4, stride=2 if k < layers - 1 else 1, padding=1, bias=False)
            for k, (before, after) in enumerate(itertools.pairwise(widths))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, after) for after in widths[1:])
        self.out = nn.Conv2d(widths[-1], 1, 4, padding=1)
        he_normal(self.stem)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.stem(x), 0.2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = F.leaky_relu(norm(conv(h)), 0.2)
        return self.out(h).flatten(1)
