"""Subsets of images without randomness."""

from __future__ import annotations

import torch
from torch import Tensor


def evenly_spaced_indices(total: int, n: int) -> Tensor:
    """At most ``n`` indices, evenly spaced over ``total``: they keep the proportions of a set sorted by class."""
    n = min(n, total)
    return torch.arange(n) * total // n
