"""Parameterisations that take x_t as it is and ask for one combination of image and noise."""

from __future__ import annotations

from torch import Tensor

from gencompare.diffusion.parameterization.base import Parameterization, Prediction
from gencompare.diffusion.schedules import Scales


class Eps(Parameterization):
    """The noise (Ho et al. 2020, section 3.2)."""

    def target(self, x0: Tensor, eps: Tensor, at: Scales) -> Tensor:
        return eps

    def invert(self, out: Tensor, x_t: Tensor, at: Scales) -> Prediction:
        return Prediction(x0=(x_t - at.sigma * out) / at.alpha, eps=out)

    def eps_gain(self, at: Scales) -> Tensor:
        return at.alpha.new_ones(at.alpha.shape)


class X0(Parameterization):
    """The image."""

    def target(self, x0: Tensor, eps: Tensor, at: Scales) -> Tensor:
        return x0

    def invert(self, out: Tensor, x_t: Tensor, at: Scales) -> Prediction:
        return Prediction(x0=out, eps=(x_t - at.alpha * out) / at.sigma)

    def eps_gain(self, at: Scales) -> Tensor:
        return at.alpha / at.sigma


class V(Parameterization):
    r"""v = (alpha eps - sigma x_0) / sqrt(alpha^2 + sigma^2), of the same size at every noise level.

    Salimans and Ho (2022), "Progressive Distillation", appendix D, who have alpha^2 + sigma^2 = 1; the root carries v
    over to schedules that have not.
    """

    def target(self, x0: Tensor, eps: Tensor, at: Scales) -> Tensor:
        return (at.alpha * eps - at.sigma * x0) / _length(at)

    def invert(self, out: Tensor, x_t: Tensor, at: Scales) -> Prediction:
        # (x_t, r v) is (x_0, eps) turned and stretched by r: turn it back.
        r = _length(at)
        cos, sin = at.alpha / r, at.sigma / r
        return Prediction(x0=cos * x_t / r - sin * out, eps=sin * x_t / r + cos * out)

    def eps_gain(self, at: Scales) -> Tensor:
        return at.alpha / _length(at)


class Score(Parameterization):
    r"""The score of p(x_t) itself, grad log p(x_t) = -E[eps | x_t] / sigma (Song and Ermon 2019, section 3.1).

    For networks that are the gradient of an energy, and for the first NCSN. Its size goes as 1 / sigma, which the
    network must follow. The later models of Song et al. divide the network's output by sigma: but for a sign that is
    `Eps`.
    """

    def target(self, x0: Tensor, eps: Tensor, at: Scales) -> Tensor:
        return -eps / at.sigma

    def invert(self, out: Tensor, x_t: Tensor, at: Scales) -> Prediction:
        eps = -at.sigma * out
        return Prediction(x0=(x_t - at.sigma * eps) / at.alpha, eps=eps)

    def eps_gain(self, at: Scales) -> Tensor:
        return at.sigma


class Velocity(Parameterization):
    r"""u = alpha' x_0 + sigma' eps, the velocity of x_t (Lipman et al. 2023, "Flow Matching", theorem 3).

    With rectified flow it is eps - x_0 (Liu et al. 2023). In general u = f x_t + h eps, f = d log alpha / dt and
    h = -sigma lambda' / 2: nothing is divided by alpha on the way to eps.
    """

    def target(self, x0: Tensor, eps: Tensor, at: Scales) -> Tensor:
        return at.log_alpha_slope * (at.alpha * x0 + at.sigma * eps) + _speed_of_noise(at) * eps

    def invert(self, out: Tensor, x_t: Tensor, at: Scales) -> Prediction:
        eps = (out - at.log_alpha_slope * x_t) / _speed_of_noise(at)
        return Prediction(x0=(x_t - at.sigma * eps) / at.alpha, eps=eps)

    def eps_gain(self, at: Scales) -> Tensor:
        return 1 / _speed_of_noise(at)


def _length(at: Scales) -> Tensor:
    return (at.alpha**2 + at.sigma**2).sqrt()


def _speed_of_noise(at: Scales) -> Tensor:
    return -0.5 * at.sigma * at.log_snr_slope
