"""Noise schedules given by a table with one entry per time step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gencompare.diffusion.schedules import NoiseSchedule, VarianceExploding, VariancePreserving, check_sigmas
from gencompare.errors import UserError


class LogSNRTable(NoiseSchedule):
    r"""T steps whose log-SNR is given: step i is time t = i / T, so that t_min = 1 / T and t_max = 1.

    Exact at the steps; between two of them the log-SNR is linear in time.

    Args:
        log_snr: log-SNR of steps 1 to T, (T,), falling; kept in torch's default type.
    """

    table: Tensor

    def __init__(self, log_snr: Tensor) -> None:
        super().__init__()
        self.T = len(log_snr)
        self.t_min = 1 / self.T
        self.register_buffer("table", log_snr.to(torch.get_default_dtype()), persistent=False)

    @property
    def discrete_times(self) -> Tensor:
        return torch.arange(1, self.T + 1, device=self.table.device, dtype=self.table.dtype) / self.T

    def log_snr(self, t: Tensor) -> Tensor:
        return _interpolate(self.table, on_step(t * self.T) - 1)

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        rising = self.table.flip(0).to(log_snr.dtype)
        right = torch.searchsorted(rising, log_snr.detach().contiguous()).clamp(1, self.T - 1)
        share = (log_snr - rising[right - 1]) / (rising[right] - rising[right - 1])
        return (self.T - (right - 1 + share.clamp(0, 1))) / self.T


class BetaTable(LogSNRTable, VariancePreserving):
    r"""The T steps of a DDPM (Ho et al. 2020): x_i = sqrt(1 - beta_i) x_{i-1} + sqrt(beta_i) z for i = 1, ..., T.

    At time i / T, alpha^2 is the product of the first i factors (1 - beta), the paper's bar alpha_i, exactly.

    Args:
        betas: beta_1 to beta_T, each in (0, 1). Sums are taken in float64.
    """

    def __init__(self, betas: Sequence[float] | Tensor) -> None:
        beta = torch.as_tensor(betas, dtype=torch.float64)
        if beta.ndim != 1 or len(beta) < 2:
            raise UserError(f"A table of betas needs at least 2 steps, not {beta.numel()}.")
        if not ((beta > 0) & (beta < 1)).all():
            raise UserError("Every beta of a noise schedule must lie between 0 and 1 (neither included).")
        log_alpha_bar = torch.log1p(-beta).cumsum(0)
        super().__init__(log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar)))


class LinearBetas(BetaTable):
    r"""beta_i^(1 / power) rises linearly from first^(1 / power) to last^(1 / power).

    ``power`` 1 is the linear table of Ho et al. (2020, section 4), 2 the "scaled linear" one of Rombach et al. (2022).
    The end points suit T = 1000: with another T, scale them by 1000 / T to end at the same noise.
    """

    def __init__(self, first: float = 1e-4, last: float = 0.02, T: int = 1000, power: float = 1.0) -> None:
        _check_ends("Linear", first, last)
        if power <= 0:
            raise UserError(f"schedule.power={power}: give a positive number.")
        ends = first ** (1 / power), last ** (1 / power)
        super().__init__(torch.linspace(*ends, T, dtype=torch.float64) ** power)


class CosineBetas(BetaTable):
    r"""bar alpha_i = f(i / T) / f(0), f(t) = cos^2(pi / 2 (t + s) / (1 + s)), with every beta at most ``beta_max``.

    Nichol and Dhariwal (2021), "Improved Denoising Diffusion Probabilistic Models", eq. 17 and the text below it.
    """

    def __init__(self, s: float = 0.008, T: int = 1000, beta_max: float = 0.999) -> None:
        if s < 0:
            raise UserError(f"schedule.s={s}: give 0 or a positive number.")
        t = torch.linspace(0, 1, T + 1, dtype=torch.float64)
        alpha_bar = torch.cos(torch.pi / 2 * (t + s) / (1 + s)) ** 2
        super().__init__((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=beta_max))


class SigmoidBetas(BetaTable):
    r"""beta_i = first + (last - first) sigmoid(u_i), u evenly spaced from -6 to 6.

    The table of GeoDiff (Xu et al. 2022, "GeoDiff", released code), known as "sigmoid" in later libraries. (Jabri et
    al.'s 2022 sigmoid schedule is another one: there alpha^2 follows the sigmoid.) The end points suit T = 1000.
    """

    def __init__(self, first: float = 1e-4, last: float = 0.02, T: int = 1000) -> None:
        _check_ends("Sigmoid", first, last)
        u = torch.linspace(-6, 6, T, dtype=torch.float64)
        super().__init__(first + (last - first) * torch.sigmoid(u))


def _check_ends(name: str, first: float, last: float) -> None:
    if not 0 < first <= last < 1:
        raise UserError(
            f"{name} betas from {first} to {last}: they must lie within (0, 1), the first not above the last."
        )


def on_step(position: Tensor) -> Tensor:
    """The position, moved onto a whole number that it misses by rounding alone (its slope stays 1)."""
    miss = (position - position.round()).detach()
    rounding = 2 * torch.finfo(position.dtype).eps * position.detach().abs()
    return position - torch.where(miss.abs() <= rounding, miss, 0.0)


def _interpolate(values: Tensor, position: Tensor) -> Tensor:
    """``values`` (T,) at fractional indices, linear in between, held within [0, T - 1]."""
    # By a shift and not by clamp, whose slope is 0 at either end itself.
    at = position.detach()
    position = position + (at.clamp(0, len(values) - 1) - at)
    left = position.detach().floor().long().clamp(max=len(values) - 2)
    share = position - left
    # Either end exactly: a (1 - s) + b s gives a at s = 0 and b at s = 1.
    return values[left] * (1 - share) + values[left + 1] * share


class GeometricSigmas(LogSNRTable, VarianceExploding):
    r"""L noise levels in geometric progression, x_t = x_0 + sigma_i eps (Song and Ermon 2019, section 4.1).

    Level i, counted from the smallest, is time i / L, as step i of a table of betas is; in between sigma is geometric.

    Args:
        sigma_min, sigma_max: smallest and largest noise, for data in [-1, 1]. Published figures are for data in [0, 1]:
            0.01 and 1 there are 0.02 and 2 here.
        levels: L; the paper has 10, Song and Ermon (2020) 232 for CIFAR-10.
    """

    def __init__(self, sigma_min: float = 0.02, sigma_max: float = 2.0, levels: int = 10) -> None:
        check_sigmas(type(self).__name__, sigma_min, sigma_max)
        if levels < 2:
            raise UserError(f"NCSNLevels: levels={levels}: give at least 2.")
        super().__init__(-2 * torch.linspace(math.log(sigma_min), math.log(sigma_max), levels, dtype=torch.float64))
