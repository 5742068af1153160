"""Coverage: how much of the real data the samples come near to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

BLOCK = 1000
"""Rows of the distance matrix that are held at a time."""


@dataclass(frozen=True)
class Coverage:
    """Share of real images that have a sample within the distance of their own k-th nearest real neighbour.

    Naeem et al. (2020), "Reliable Fidelity and Diversity Metrics for Generative Models", eq. 4. Unlike recall it builds
    no ball around a sample, so single outliers among the samples do not raise it.
    """

    neighbours: int = 5
    better: ClassVar[str] = "higher"

    def __call__(self, generated: Tensor, reference: Tensor) -> float:
        """Features (n, d) and (m, d), m above ``neighbours``; a number from 0 to 1."""
        covered = 0
        for rows in reference.split(BLOCK):
            # The nearest real neighbour of a real image is itself.
            radius = torch.cdist(rows, reference).kthvalue(self.neighbours + 1, dim=1).values
            covered += int((torch.cdist(rows, generated).amin(1) <= radius).sum())
        return covered / len(reference)
