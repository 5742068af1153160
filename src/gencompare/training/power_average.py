r"""Power-function averages of the weights, and the average of any length as a linear combination of stored ones.

The average of a trajectory :math:`\theta(\tau)` with exponent :math:`\gamma` at time t is

.. math:: \bar\theta_\gamma(t) = \int_0^t p_{t,\gamma}(\tau) \, \theta(\tau) \, d\tau, \qquad
    p_{t,\gamma}(\tau) = \frac{(\gamma + 1) \tau^\gamma}{t^{\gamma + 1}} .

Its length :math:`\sigma_\mathrm{rel}` is the standard deviation of :math:`p_{t,\gamma}`, as a fraction of t.

Karras et al. (2024), "Analyzing and improving the training dynamics of diffusion models", section 3 and appendix C
(https://arxiv.org/abs/2312.02696).
"""

from __future__ import annotations

import math

import numpy as np

MAX_LENGTH = 1 / math.sqrt(12)
"""Length of the uniform average (exponent 0). Longer ones would emphasise the initial weights."""


def exponent_of(length: float) -> float:
    r"""Return the exponent :math:`\gamma` of the average of a given length, the inverse of `length_of`.

    It is the largest root of :math:`\gamma^3 + 7 \gamma^2 + (16 - s) \gamma + 12 - s` with
    :math:`s = \sigma_\mathrm{rel}^{-2}` (Karras et al. 2024, appendix C).

    Args:
        length: :math:`\sigma_\mathrm{rel}`, in (0, `MAX_LENGTH`).
    """
    s = length**-2
    return float(np.roots([1, 7, 16 - s, 12 - s]).real.max())


def length_of(exponent: float) -> float:
    r"""Return :math:`\sigma_\mathrm{rel} = (\gamma + 1)^{1/2} (\gamma + 2)^{-1} (\gamma + 3)^{-1/2}`."""
    return math.sqrt((exponent + 1) / (exponent + 3)) / (exponent + 2)


def decay(exponent: float, step: int) -> float:
    r"""Return the decay :math:`\beta_\gamma(t) = (1 - 1/t)^{\gamma + 1}` of step t, counted from 1.

    With it, the recursion :math:`\bar\theta(t) = \beta \bar\theta(t - 1) + (1 - \beta) \theta(t)` is the integral above
    for weights that are constant between steps: those of step i count :math:`(i^{\gamma + 1} - (i - 1)^{\gamma + 1}) /
    t^{\gamma + 1}`.
    """
    return (1 - 1 / step) ** (exponent + 1)


def inner_products(
    times: np.ndarray, exponents: np.ndarray, other_times: np.ndarray, other_exponents: np.ndarray
) -> np.ndarray:
    r"""Return the inner products of power functions, (n,) and (m,) -> (n, m).

    With :math:`t_a \le t_b`,

    .. math:: \langle p_{t_a,\gamma_a}, p_{t_b,\gamma_b} \rangle
        = \frac{(\gamma_a + 1)(\gamma_b + 1)}{\gamma_a + \gamma_b + 1} \frac{(t_a / t_b)^{\gamma_b}}{t_b}

    (Karras et al. 2024, appendix C.2).
    """
    t_a, gamma_a = times[:, None], exponents[:, None]
    t_b, gamma_b = other_times[None], other_exponents[None]
    exponent_of_later = np.where(t_a < t_b, gamma_b, gamma_a)
    earlier, later = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return scale * (earlier / later) ** exponent_of_later / later


def solve_coefficients(
    times: np.ndarray, exponents: np.ndarray, time: float, exponent: float
) -> tuple[np.ndarray, float]:
    r"""Combine stored power functions to the nearest approximation, in least squares, of another one.

    Args:
        times: times t_i of the stored averages, (n,).
        exponents: their exponents, (n,).
        time: time of the target.
        exponent: exponent of the target.

    Returns:
        The coefficients x_i, (n,), and the relative error :math:`\lVert \sum_i x_i p_i - p \rVert / \lVert p \rVert`
        (Karras et al. 2024, appendix C.2, with the functions scaled to norm 1 to condition the system).
    """
    target = np.array([time], dtype=np.float64), np.array([exponent], dtype=np.float64)
    gram = inner_products(times, exponents, times, exponents)
    norms, target_norm = np.sqrt(gram.diagonal()), math.sqrt(inner_products(*target, *target).item())
    gram, overlap = gram / np.outer(norms, norms), inner_products(times, exponents, *target)[:, 0] / norms / target_norm
    scaled = np.linalg.lstsq(gram, overlap)[0]
    error = math.sqrt(max(0.0, 1 - 2 * scaled @ overlap + scaled @ gram @ scaled))
    return scaled * target_norm / norms, error
