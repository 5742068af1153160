"""A further kernel distance, for ``+evaluation/metric=mmd``: Gaussian kernel, any number of samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

BLOCK = 2000


@dataclass(frozen=True)
class GaussianMMD:
    """1000 (mean k(x, x') + mean k(y, y') - 2 mean k(x, y)) with k(x, y) = exp(-|x - y|^2 / (2 b^2)).

    On CLIP's features scaled to length 1, with b = 10, this is CMMD (Jayasumana et al. 2024, "Rethinking FID", section
    4): a distance that assumes no Gaussian and has little bias in n.

    Args:
        bandwidth: b, in units of the features; None takes the median distance of real images.
        normalize: scale each image's features to length 1 first.
    """

    bandwidth: float | None = None
    normalize: bool = False
    better: ClassVar[str] = "lower"

    def __call__(self, generated: Tensor, reference: Tensor) -> float:
        """Features (n, d) and (m, d)."""
        x, y = generated.double(), reference.double()
        if self.normalize:
            x, y = (torch.nn.functional.normalize(f, dim=1) for f in (x, y))
        b = self.bandwidth
        if b is None:
            some = y[:: max(1, len(y) // BLOCK)]
            b = float(torch.pdist(some).median()) or 1.0
        within = mean_kernel(x, x, b) + mean_kernel(y, y, b)
        return 1000 * (within - 2 * mean_kernel(x, y, b))


def mean_kernel(x: Tensor, y: Tensor, bandwidth: float) -> float:
    """Mean of the kernel over all pairs of rows, pairs of a row with itself included."""
    total = 0.0
    for rows in x.split(BLOCK):
        total += float(torch.cdist(rows, y).square_().div_(-2 * bandwidth**2).exp_().sum())
    return total / (len(x) * len(y))
