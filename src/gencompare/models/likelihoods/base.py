"""What every distribution of pixels promises."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from gencompare.contract import DataSpec
from gencompare.errors import UserError


class PixelLikelihood(nn.Module, ABC):
    """p(x | h) for x (n, C, H, W) and a decoder's output h (n, ``maps``, H, W)."""

    def __init__(self, spec: DataSpec) -> None:
        super().__init__()
        self.channels = spec.shape[0]
        self.num_levels = spec.num_levels
        self.register_buffer("mask", spec.mask(), persistent=False)
        self.mask: Tensor

    @property
    @abstractmethod
    def maps(self) -> int:
        """Numbers that the decoder gives for each place."""

    @abstractmethod
    def log_prob(self, h: Tensor, x: Tensor) -> Tensor:
        """log p(x | h) in nats, (n,), summed over real pixels."""

    @abstractmethod
    def mean(self, h: Tensor) -> Tensor:
        """E[x | h], (n, C, H, W)."""

    @abstractmethod
    def sample(self, h: Tensor, generator: torch.Generator) -> Tensor:
        """A draw from p(x | h), (n, C, H, W)."""

    @property
    def gives_bits(self) -> bool:
        """Whether ``log_prob`` is the probability, or the density, of the very values that the data take. Only then are
        its bits/dim those of the data, and fit to be held against other models'."""
        return True

    def picture(self, x: Tensor) -> Tensor:
        """Images, black where there are no real pixels: nothing was learned there."""
        return torch.where(self.mask > 0, x, -1.0)

    @property
    def step(self) -> float:
        """Delta, the distance between neighbouring levels."""
        assert self.num_levels is not None
        return 2 / (self.num_levels - 1)

    def _over_pixels(self, log_prob: Tensor) -> Tensor:
        return (log_prob * self.mask).flatten(1).sum(1)

    def _to_levels(self, x: Tensor) -> Tensor:
        """The nearest of the values that a pixel can take."""
        return ((x.clamp(-1, 1) + 1) / self.step).round() * self.step - 1


def levels_of(spec: DataSpec, option: str) -> int:
    """``spec.num_levels``. Raises `UserError` for continuous data, which ``model/likelihood=<option>`` cannot score."""
    if spec.num_levels is None:
        raise UserError(
            f"model/likelihood={option} needs pixels with levels, and data '{spec.name}' is continuous: use"
            " model/likelihood=gaussian."
        )
    return spec.num_levels


def uniform_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform numbers in [0, 1) of the shape and type of x, drawn where the generator lives."""
    return torch.rand(x.shape, generator=generator, device=generator.device).to(x)
