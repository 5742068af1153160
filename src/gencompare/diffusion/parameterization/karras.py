"""The preconditioning of EDM."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from gencompare.diffusion.noise_conditioning import LogSigma, NoiseConditioning
from gencompare.diffusion.parameterization.base import Parameterization, Prediction
from gencompare.diffusion.schedules import Scales
from gencompare.errors import UserError


@dataclass(frozen=True)
class Karras(Parameterization):
    r"""x_0 = c_skip y + c_out F(c_in y; c_noise) with y = x_t / alpha: what the network F sees and says has variance 1.

    Karras et al. (2022), "Elucidating the Design Space", table 1 and appendix B.6, who have alpha = 1. With
    s = sigma / alpha and d = ``sigma_data``,

        c_skip = d^2 / (s^2 + d^2),  c_out = s d / sqrt(s^2 + d^2),  c_in = 1 / sqrt(s^2 + d^2),  c_noise = ln(s) / 4.

    It is written with r = sqrt(sigma^2 + alpha^2 d^2), so that nothing is divided by a small alpha.

    Args:
        sigma_data: d, the standard deviation of the data's pixels.
    """

    noise: NoiseConditioning = field(default_factory=LogSigma)
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if self.sigma_data <= 0:
            raise UserError(f"parameterization.sigma_data={self.sigma_data}: give a positive number.")

    def input(self, x_t: Tensor, t: Tensor, at: Scales) -> tuple[Tensor, Tensor]:
        x_t, noise = super().input(x_t, t, at)
        return x_t / self._r(at), noise

    def target(self, x0: Tensor, eps: Tensor, at: Scales) -> Tensor:
        # (x_0 - c_skip y) / c_out
        return (at.sigma / self.sigma_data * x0 - at.alpha * self.sigma_data * eps) / self._r(at)

    def invert(self, out: Tensor, x_t: Tensor, at: Scales) -> Prediction:
        r, d = self._r(at), self.sigma_data
        x0 = at.alpha * d * d / r * (x_t / r) + at.sigma * d / r * out
        eps = at.sigma / r * (x_t / r) - at.alpha * d / r * out
        return Prediction(x0=x0, eps=eps)

    def eps_gain(self, at: Scales) -> Tensor:
        return at.alpha * self.sigma_data / self._r(at)

    def _r(self, at: Scales) -> Tensor:
        return (at.sigma**2 + (at.alpha * self.sigma_data) ** 2).sqrt()
