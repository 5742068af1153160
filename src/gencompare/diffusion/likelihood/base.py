"""What a way to score images is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from gencompare.diffusion.denoiser import Cond, Denoises
from gencompare.diffusion.pixels import Pixels


class LikelihoodMethod(ABC):
    """Bits/dim of images under a denoiser."""

    kind: ClassVar[str]
    """``bound`` (never better than the truth, in expectation) or ``estimate``."""

    @abstractmethod
    def terms(
        self, denoiser: Denoises, x0: Tensor, cond: Cond, pixels: Pixels, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """By name what adds up to -log2 p(x_0) per real value, (n,) each, for images (n, C, H, W); random numbers from
        ``generator`` alone."""

    def __call__(
        self, denoiser: Denoises, x0: Tensor, cond: Cond, pixels: Pixels, generator: torch.Generator
    ) -> Tensor:
        """-log2 p(x_0) per real value, (n,)."""
        return torch.stack(list(self.terms(denoiser, x0, cond, pixels, generator).values())).sum(0)
