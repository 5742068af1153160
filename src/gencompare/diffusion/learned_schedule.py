"""A schedule that is trained with the network."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from gencompare.diffusion.schedules import VariancePreserving
from gencompare.errors import TrainingStopped, UserError


class LearnedSchedule(VariancePreserving):
    r"""lambda(t) = -gamma(t), gamma(t) = gamma_min + (gamma_max - gamma_min) s(t), s rising from 0 at t = 0 to 1 at 1.

    Kingma et al. (2021), "Variational Diffusion Models", section 4 and appendix H. s is a small network whose weights
    are positive, h(t) = a t + mean_k w_k sigmoid(v_k (2 t - 1) + b_k), brought to its ends: s = (h(t) - h(0)) /
    (h(1) - h(0)). So what shapes the interior never moves the ends, and the two can be trained for different things:
    the ends by the bound on the likelihood, which in continuous time depends on nothing else of it, the interior for a
    small variance of the loss (their section 5.1, appendix I.2). It starts near a straight line, the same one for every
    seed.

    Args:
        gamma_min, gamma_max: -log-SNR at the ends of time; learned from these values on (the paper's are -13.3 and 5).
        features: sigmoids in s (the paper's 1024).
    """

    t_min = 0.0

    def __init__(self, gamma_min: float = -13.3, gamma_max: float = 5.0, features: int = 1024) -> None:
        super().__init__()
        if not -math.inf < gamma_min < gamma_max < math.inf:
            raise UserError(f"Learned: gamma_min={gamma_min} must be below gamma_max={gamma_max}.")
        if features < 1:
            raise UserError(f"Learned: features={features}: give at least 1.")
        self.gamma_min = nn.Parameter(torch.tensor(float(gamma_min)))
        self.gamma_max = nn.Parameter(torch.tensor(float(gamma_max)))
        # Before the softplus that makes it positive. The steps of the sigmoids are spread evenly over time: together
        # they rise almost straight, and no two are alike, so nothing random is needed to tell them apart.
        steepness = 4.0
        centres = (torch.arange(features) + 0.5) / features * 2 - 1
        self.straight = nn.Parameter(torch.tensor(_before_softplus(1.0)))
        self.height = nn.Parameter(torch.full((features,), _before_softplus(1.0)))
        self.steepness = nn.Parameter(torch.full((features,), _before_softplus(steepness)))
        self.bias = nn.Parameter(-steepness * centres)

    def end_parameters(self) -> list[nn.Parameter]:
        """gamma_min and gamma_max."""
        return [self.gamma_min, self.gamma_max]

    def interior_parameters(self) -> list[nn.Parameter]:
        """What shapes the schedule between its ends, and leaves these as they are."""
        return [self.straight, self.height, self.steepness, self.bias]

    def log_snr(self, t: Tensor) -> Tensor:
        ends = torch.arange(2, dtype=t.dtype, device=t.device)
        height = self._rising(torch.cat([t.flatten(), ends]))
        share = ((height[:-2] - height[-2]) / (height[-1] - height[-2])).reshape(t.shape)
        return -(self.gamma_min * (1 - share) + self.gamma_max * share)  # either end exactly

    def _rising(self, t: Tensor) -> Tensor:
        """h(t). No matrix product: under autocast it would be in 16 bits."""
        steps = torch.sigmoid(softplus(self.steepness) * (2 * t[..., None] - 1) + self.bias)
        return softplus(self.straight) * t + (softplus(self.height) * steps).mean(-1)

    @torch.no_grad()
    def check(self, points: int = 1001) -> None:
        """As for every schedule; and a log-SNR that spans less than 1 has collapsed."""
        super().check(points)
        if self.gamma_max - self.gamma_min < 1:
            raise TrainingStopped(
                f"Schedule Learned has collapsed: its log-SNR runs from {-float(self.gamma_min):.4g} to"
                f" {-float(self.gamma_max):.4g} only",
                "Train it with a lower learning rate, or with other gamma_min and gamma_max to start from.",
            )


def _before_softplus(value: float) -> float:
    return math.log(math.expm1(value))
