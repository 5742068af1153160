"""A small residual classifier: the network of the compact feature extractors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gencompare.errors import UserError


class PreActivationBlock(nn.Module):
    """x + f(x), f = two times (norm, ReLU, 3x3 convolution) (He et al. 2016, "Identity Mappings", fig. 1b).

    Group norm in place of batch norm: no running statistics, so the averaged weights, several processes and single
    images all see the same function.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.GroupNorm(8, width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False),
        )  # fmt: skip
        # The block begins as the identity.
        nn.init.zeros_(self.body[-1].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ResidualClassifier(nn.Module):
    """Stages of residual blocks, each half the size of the one before; average pool; ``dim`` features; logits.

    Args:
        channels: of the image.
        num_classes: logits.
        widths: channels of each stage, multiples of 8.
        blocks: residual blocks a stage.
        stem_stride: 2 halves the image before the first stage, which is where most of the cost lies.
        dim: features in the layer before the logits.
        defects: flaws of an image that are graded beside its class.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        widths: Sequence[int],
        blocks: int = 1,
        stem_stride: int = 1,
        dim: int = 64,
        defects: int = 2,
    ) -> None:
        super().__init__()
        if not num_classes:
            raise UserError("A classifier needs labelled data.")
        if not widths or any(width % 8 for width in widths):
            raise UserError(f"The widths of a classifier must be multiples of 8, not {list(widths)}.")
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, stride=stem_stride, padding=1)]
        for before, width in zip([None, *widths[:-1]], widths, strict=True):
            if before is not None:
                layers.append(nn.Conv2d(before, width, 3, stride=2, padding=1))
            layers += [PreActivationBlock(width) for _ in range(blocks)]
        self.trunk = nn.Sequential(*layers, nn.GroupNorm(8, widths[-1]), nn.ReLU())
        self.embed = nn.Linear(widths[-1], dim)
        self.head = nn.Linear(dim, num_classes)
        self.grades = nn.Linear(dim, defects)

    def features(self, x: Tensor) -> Tensor:
        """(n, dim): linear in the pooled activations, so that no feature is stuck at zero."""
        return self.features_of(self.last(x))

    def last(self, x: Tensor) -> Tensor:
        """Activations of the last stage, (n, widths[-1], h, w)."""
        return self.trunk(x)

    def features_of(self, last: Tensor) -> Tensor:
        """`features`, from the activations of the last stage."""
        return self.embed(last.mean((2, 3)))

    def classify(self, features: Tensor) -> Tensor:
        """Logits (n, num_classes) of ``features``."""
        return self.head(torch.relu(features))

    def grade(self, features: Tensor) -> Tensor:
        """How strong each flaw is, (n, defects), 0 for none."""
        return self.grades(features)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, num_classes) of images (n, channels, H, W) in [-1, 1]."""
        return self.classify(self.features(x))
