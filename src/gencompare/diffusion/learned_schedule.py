"""A noise schedule that is trained with the network."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from gencompare.diffusion.schedules import VariancePreserving
from gencompare.errors import TrainingStopped, UserError


class LearnedSchedule(VariancePreserving):
    r"""The learned schedule of VDM: :math:`\lambda_t = -\gamma(t)` with a monotone network :math:`\gamma`.

    .. math::
        \gamma(t) = \gamma_{min} + (\gamma_{max} - \gamma_{min})\, s(t), \qquad s(t) = \frac{h(t) - h(0)}{h(1) - h(0)},

        h(t) = a t + \frac{1}{K} \sum_k w_k\, sigmoid(v_k (2 t - 1) + b_k), \qquad a, w_k, v_k > 0.

    Normalising h separates the endpoints from the shape, so that they can be trained on different losses: the endpoints
    on the variational bound, which in continuous time depends only on the endpoints, and the shape on the variance of
    the loss. Kingma et al. (2021), "Variational Diffusion Models", section 4, section 5.1, and appendices H and I.2,
    https://arxiv.org/abs/2107.00630. The initial schedule is close to a straight line and does not depend on the seed.

    Args:
        gamma_min: initial negative log-SNR at time 0 (-13.3 in the paper).
        gamma_max: initial negative log-SNR at time 1 (5 in the paper).
        num_features: K, the number of sigmoids (1024 in the paper).
    """

    t_min = 0.0

    def __init__(self, gamma_min: float = -13.3, gamma_max: float = 5.0, num_features: int = 1024) -> None:
        super().__init__()
        if not -math.inf < gamma_min < gamma_max < math.inf:
            raise UserError(f"LearnedSchedule: gamma_min={gamma_min} must be below gamma_max={gamma_max}.")
        if num_features < 1:
            raise UserError(f"LearnedSchedule: num_features={num_features} must be at least 1.")
        self.gamma_min = nn.Parameter(torch.tensor(float(gamma_min)))
        self.gamma_max = nn.Parameter(torch.tensor(float(gamma_max)))
        # Positive weights are stored before the softplus. The sigmoids are centred at evenly spaced times, so their sum
        # is nearly straight. They all differ, so no random initialisation is needed to break the symmetry.
        steepness = 4.0
        centres = (torch.arange(num_features) + 0.5) / num_features * 2 - 1
        self.straight = nn.Parameter(torch.tensor(_inverse_softplus(1.0)))
        self.height = nn.Parameter(torch.full((num_features,), _inverse_softplus(1.0)))
        self.steepness = nn.Parameter(torch.full((num_features,), _inverse_softplus(steepness)))
        self.bias = nn.Parameter(-steepness * centres)

    def endpoint_parameters(self) -> list[nn.Parameter]:
        """Return gamma_min and gamma_max."""
        return [self.gamma_min, self.gamma_max]

    def interior_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of s(t), which do not affect the endpoints."""
        return [self.straight, self.height, self.steepness, self.bias]

    def log_snr(self, t: Tensor) -> Tensor:
        ends = torch.arange(2, dtype=t.dtype, device=t.device)
        h = self._h(torch.cat([t.flatten(), ends]))
        s = ((h[:-2] - h[-2]) / (h[-1] - h[-2])).reshape(t.shape)
        return -(self.gamma_min * (1 - s) + self.gamma_max * s)  # exact at both ends

    def _h(self, t: Tensor) -> Tensor:
        """Compute h(t) without a matrix product, which autocast would compute in 16 bits."""
        sigmoids = torch.sigmoid(softplus(self.steepness) * (2 * t[..., None] - 1) + self.bias)
        return softplus(self.straight) * t + (softplus(self.height) * sigmoids).mean(-1)

    @torch.no_grad()
    def check(self, points: int = 1001) -> None:
        """Check as in `NoiseSchedule.check`, and raise `TrainingStopped` if the log-SNR spans less than 1."""
        super().check(points)
        if self.gamma_max - self.gamma_min < 1:
            raise TrainingStopped(
                f"LearnedSchedule has collapsed: its log-SNR only ranges from {-float(self.gamma_min):.4g} to"
                f" {-float(self.gamma_max):.4g}",
                "Train with a lower learning rate, or start from another gamma_min and gamma_max.",
            )


def _inverse_softplus(value: float) -> float:
    return math.log(math.expm1(value))
