r"""The schedules of the score SDEs: VP, sub-VP and VE (Song et al. 2021, "Score-Based Generative Modeling").

Song et al. write the SDE, dx = f x dt + g dw (their f(x, t) is f x here), and derive alpha and sigma; here it is the
other way round, and ``sde`` gives their f and g back.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from gencompare.diffusion.schedules.base import NoiseSchedule, VarianceExploding, VariancePreserving
from gencompare.errors import UserError


class _LinearBeta(NoiseSchedule):
    r"""alpha(t) = exp(-B / 2), B(t) = integral of beta from 0 to t, beta(s) = beta_min + s (beta_max - beta_min).

    The noise vanishes at t = 0, where the log-SNR is infinite: ``t_min`` keeps off it.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-5) -> None:
        super().__init__()
        name = type(self).__name__
        if not 0 < beta_min <= beta_max:
            raise UserError(f"{name}: beta from {beta_min} to {beta_max} must be positive and must not fall.")
        if not 0 < t_min < 1:
            raise UserError(f"{name}: t_min={t_min} must lie between 0, where the log-SNR is infinite, and 1.")
        self.beta_min, self.beta_max, self.t_min = beta_min, beta_max, t_min

    def integral(self, t: Tensor) -> Tensor:
        """B(t) = t beta_min + t^2 (beta_max - beta_min) / 2."""
        return t * (self.beta_min + t * (0.5 * (self.beta_max - self.beta_min)))

    def log_alpha(self, t: Tensor) -> Tensor:
        return -0.5 * self.integral(t)

    def _t_from_integral(self, integral: Tensor) -> Tensor:
        """The time in [t_min, t_max] at which B is nearest to the given one."""
        rise = self.beta_max - self.beta_min
        highest = self.beta_min + 0.5 * rise
        b = integral.clamp(max=highest)  # B(1); it may be infinite
        t = 2 * b / (self.beta_min + (self.beta_min**2 + 2 * rise * b).sqrt())
        return t.clamp(self.t_min, self.t_max)


class VP(_LinearBeta, VariancePreserving):
    r"""sigma^2 = 1 - exp(-B), the variance-preserving SDE: f = -beta / 2, g^2 = beta (Song et al. 2021, eq. 11, 29).

    The limit of DDPM's linear table in many steps: beta_i T there is beta here.

    Args:
        beta_min, beta_max: beta at time 0 and 1.
        t_min: where time starts; 1e-5, where sigma is 0.001, is what published models are trained and scored with.
    """

    def log_snr(self, t: Tensor) -> Tensor:
        b = self.integral(t)
        return -b - torch.log(-torch.expm1(-b))

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        # alpha^2 = exp(-B) = sigmoid(lambda)
        return self._t_from_integral(-logsigmoid(log_snr))


class SubVP(_LinearBeta):
    r"""sigma = 1 - exp(-B), the sub-VP SDE: f = -beta / 2, g^2 = beta (1 - exp(-2 B)) (Song et al. 2021, eq. 12, 29).

    Less noise than `VP` at every time. As sigma, not sigma^2, is proportional to t at the start, x_t soon cannot hold
    the noise in float32: at the published t_min of 1e-5 sigma is 1e-6, some ten roundings of x_t. So time starts at
    1e-3, where published samplers end, unless told otherwise; there sigma is 1e-4.

    Args:
        beta_min, beta_max: beta at time 0 and 1.
        t_min: where time starts; 1e-5 is what published models are trained and scored with.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3) -> None:
        super().__init__(beta_min, beta_max, t_min)

    def log_snr(self, t: Tensor) -> Tensor:
        b = self.integral(t)
        return -b - 2 * torch.log(-torch.expm1(-b))

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        # sigma / alpha = exp(-lambda / 2) = 2 sinh(B / 2)
        return self._t_from_integral(2 * torch.asinh(0.5 * torch.exp(-0.5 * log_snr)))


class VE(VarianceExploding):
    r"""sigma(t) = sigma_min (sigma_max / sigma_min)^t, alpha = 1 (Song et al. 2021, eq. 9, appendix C).

    f = 0 and g^2 = 2 sigma^2 log(sigma_max / sigma_min). Log-SNR is linear in time, and finite at 0.

    Args:
        sigma_min, sigma_max: noise at time 0 and 1, for data in [-1, 1]. Published figures are for data in [0, 1]: 0.01
            and 50 there are 0.02 and 100 here.
    """

    t_min = 0.0

    def __init__(self, sigma_min: float = 0.02, sigma_max: float = 100.0) -> None:
        super().__init__()
        check_sigmas(type(self).__name__, sigma_min, sigma_max)
        self.start = math.log(sigma_min)
        self.rise = math.log(sigma_max / sigma_min)

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * (self.start + self.rise * t)

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        return ((-0.5 * log_snr - self.start) / self.rise).clamp(self.t_min, self.t_max)


def check_sigmas(name: str, sigma_min: float, sigma_max: float) -> None:
    """Raises `UserError` unless 0 < sigma_min < sigma_max, both finite."""
    if not 0 < sigma_min < sigma_max < math.inf:
        raise UserError(f"{name}: sigma_min={sigma_min} must be positive and below sigma_max={sigma_max}.")
