"""GroupNorm with a scale and a shift for each class."""

from __future__ import annotations

import math

from torch import Tensor, nn


class ClassNorm(nn.Module):
    r"""y = a_y \hat x + b_y, where papers on GANs have (class-conditional) batch norm.

    \hat x is the image after GroupNorm, so it comes out the same whatever images stand beside it. There are as many
    parameters as batch norm has: 2 ``channels``, and as many for each class where there are classes (Dumoulin et al.
    2017, "A learned representation for artistic style", eq. 5).

    Shapes: x (n, channels, H, W), labels (n,) -> (n, channels, H, W).
    """

    def __init__(self, channels: int, num_classes: int = 0) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(math.gcd(8, channels), channels, affine=not num_classes)
        self.classes = nn.Embedding(num_classes, 2 * channels) if num_classes else None
        if self.classes is not None:
            nn.init.ones_(self.classes.weight[:, :channels])
            nn.init.zeros_(self.classes.weight[:, channels:])

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        x = self.norm(x)
        if self.classes is None:
            return x
        scale, shift = self.classes(label)[:, :, None, None].chunk(2, dim=1)
        return scale * x + shift
