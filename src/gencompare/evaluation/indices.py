"""Deterministic subsets of images."""

from __future__ import annotations

import torch
from torch import Tensor


def evenly_spaced_indices(total: int, n: int) -> Tensor:
    """Return at most ``n`` evenly spaced indices below ``total``, which keep the class proportions of a sorted set."""
    n = min(n, total)
    return torch.arange(n) * total // n
