"""Bernoulli pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gencompare.contract import DataSpec
from gencompare.models.likelihoods.base import PixelLikelihood, levels_of, uniform_like


class Bernoulli(PixelLikelihood):
    r"""Pixels that are 1 with probability S(h) and -1 otherwise; S is the logistic function.

    With y = (x + 1) / 2, the log probability is y log S(h) + (1 - y) log S(-h).

    Of images with two levels this is the probability. Grey ones it takes for probabilities: the same expression is then
    the mean, over binary images whose pixels are 1 with probability y, of their log probability (Salakhutdinov and
    Murray 2008, "On the quantitative analysis of deep belief networks", train on such images). It is no probability of
    the grey image: over the levels of a pixel it does not add up to 1 (Loaiza-Ganem and Cunningham 2019, "The
    continuous Bernoulli"). So ``gives_bits`` is false for more than two levels. The mean, 2 S(h) - 1, is a grey image;
    draws are binary ones.
    """

    def __init__(self, spec: DataSpec) -> None:
        super().__init__(spec)
        self.levels = levels_of(spec, "bernoulli")

    @property
    def maps(self) -> int:
        return self.channels

    @property
    def gives_bits(self) -> bool:
        return self.levels == 2

    def log_prob(self, h: Tensor, x: Tensor) -> Tensor:
        return -self._over_pixels(F.binary_cross_entropy_with_logits(h.float(), (x + 1) / 2, reduction="none"))

    def mean(self, h: Tensor) -> Tensor:
        return 2 * torch.sigmoid(h.float()) - 1

    def sample(self, h: Tensor, generator: torch.Generator) -> Tensor:
        probability = torch.sigmoid(h.float())
        return 2.0 * (uniform_like(probability, generator) < probability) - 1
