"""Noise schedules with discrete time steps, stored as tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gencompare.diffusion.schedules import (
    ZERO_SNR,
    NoiseSchedule,
    VarianceExploding,
    VariancePreserving,
    check_sigmas,
)
from gencompare.errors import UserError, check_counts, check_non_negative, check_positive


class LogSNRTable(NoiseSchedule):
    r"""A schedule of T steps with given log-SNR. Step i is at time i / T, so t_min is 1 / T and t_max is 1.

    The schedule is exact at the steps; between steps, the log-SNR is interpolated linearly in time.

    Args:
        log_snr: log-SNR of steps 1 to T, (T,), strictly decreasing; stored in torch's default dtype.
    """

    table: Tensor

    def __init__(self, log_snr: Tensor) -> None:
        super().__init__()
        self.num_train_timesteps = len(log_snr)
        self.t_min = 1 / self.num_train_timesteps
        self.register_buffer("table", log_snr.to(torch.get_default_dtype()), persistent=False)

    @property
    def discrete_times(self) -> Tensor:
        T = self.num_train_timesteps
        return torch.arange(1, T + 1, device=self.table.device, dtype=self.table.dtype) / T

    def log_snr(self, t: Tensor) -> Tensor:
        return _interpolate(self.table, snap_to_integer(t * self.num_train_timesteps) - 1)

    def log_snr_slope(self, t: Tensor) -> Tensor:
        """Compute the derivative of the log-SNR: the slope of the interval that starts at ``t``, or of the last one."""
        position = snap_to_integer(t.detach() * self.num_train_timesteps) - 1
        left = position.clamp(0, len(self.table) - 2).floor().long()
        return (self.table[left + 1] - self.table[left]) * self.num_train_timesteps * torch.ones_like(t)

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        T = self.num_train_timesteps
        increasing = self.table.flip(0).to(log_snr.dtype)
        right = torch.searchsorted(increasing, log_snr.detach().contiguous()).clamp(1, T - 1)
        weight = (log_snr - increasing[right - 1]) / (increasing[right] - increasing[right - 1])
        return (T - (right - 1 + weight.clamp(0, 1))) / T


class BetaTable(LogSNRTable, VariancePreserving):
    r"""The DDPM schedule :math:`x_i = \sqrt{1 - \beta_i}\, x_{i-1} + \sqrt{\beta_i}\, z`, :math:`i = 1, ..., T`.

    At time i / T, :math:`\alpha^2` equals :math:`\bar\alpha_i = \prod_{j \le i} (1 - \beta_j)`, exactly. Ho et al.
    (2020), "Denoising Diffusion Probabilistic Models", https://arxiv.org/abs/2006.11239.

    With :math:`\beta_T = 1`, :math:`x_T` is pure noise and sampling starts from exactly what the model was trained on
    (zero terminal SNR, Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps Are Flawed",
    https://arxiv.org/abs/2305.08891). The log-SNR of this step is stored as `ZERO_SNR`. It needs a parameterisation
    that predicts the image there, such as `V` or `X0`, and a loss that trains it.

    Args:
        betas: beta_1 to beta_T, each in (0, 1); the last may be 1. Sums are computed in float64.
    """

    def __init__(self, betas: Sequence[float] | Tensor) -> None:
        beta = torch.as_tensor(betas, dtype=torch.float64)
        if beta.ndim != 1 or len(beta) < 2:
            raise UserError(f"A table of betas needs at least 2 steps, not {beta.numel()}.")
        if not ((beta > 0) & (beta < 1))[:-1].all() or not 0 < beta[-1] <= 1:
            raise UserError("Every beta of a noise schedule must lie strictly between 0 and 1; only the last may be 1.")
        log_alpha_bar = torch.log1p(-beta).cumsum(0)
        log_snr = log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar))
        if beta[-1] == 1:
            if log_snr[-2] <= ZERO_SNR:
                raise UserError(
                    f"The log-SNR before a last beta of 1 must be above {ZERO_SNR:g}: lower the other betas."
                )
            log_snr[-1] = ZERO_SNR
        super().__init__(log_snr)


def rescale_to_zero_terminal_snr(betas: Tensor) -> Tensor:
    r"""Rescale betas (T,) so that no signal is left at step T, and the first step is unchanged.

    .. math:: \sqrt{\bar\alpha_i} \leftarrow \sqrt{\bar\alpha_1}\,
        \frac{\sqrt{\bar\alpha_i} - \sqrt{\bar\alpha_T}}{\sqrt{\bar\alpha_1} - \sqrt{\bar\alpha_T}}

    Lin et al. (2023), "Common Diffusion Noise Schedules and Sample Steps Are Flawed", algorithm 1,
    https://arxiv.org/abs/2305.08891.
    """
    alpha = torch.exp(torch.log1p(-betas.double()).cumsum(0) / 2)
    alpha_bar = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])).square()
    return 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])


class LinearBetas(BetaTable):
    r""":math:`\beta_i^{1/p}` increases linearly from :math:`\beta_{start}^{1/p}` to :math:`\beta_{end}^{1/p}`.

    Power p = 1 is the linear schedule of Ho et al. (2020, section 4), https://arxiv.org/abs/2006.11239; p = 2 is the
    "scaled linear" schedule of Rombach et al. (2022), https://arxiv.org/abs/2112.10752.

    Args:
        beta_start: beta of the first step.
        beta_end: beta of the last step. The defaults suit T = 1000; for another T, scale both by 1000 / T to end at the
            same noise level.
        num_train_timesteps: T, the number of steps.
        power: p.
        zero_terminal_snr: rescale the betas so that the last is 1: `rescale_to_zero_terminal_snr`.
    """

    def __init__(
        self,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        num_train_timesteps: int = 1000,
        power: float = 1.0,
        zero_terminal_snr: bool = False,
    ) -> None:
        _check_betas("Linear", beta_start, beta_end)
        check_counts("schedule", minimum=2, num_train_timesteps=num_train_timesteps)
        check_positive("schedule.power", power)
        ends = beta_start ** (1 / power), beta_end ** (1 / power)
        betas = torch.linspace(*ends, num_train_timesteps, dtype=torch.float64) ** power
        super().__init__(rescale_to_zero_terminal_snr(betas) if zero_terminal_snr else betas)


class CosineBetas(BetaTable):
    r""":math:`\bar\alpha_i = f(i / T) / f(0)` with :math:`f(t) = \cos^2(\frac{\pi}{2} \frac{t + s}{1 + s})`.

    Nichol and Dhariwal (2021), "Improved Denoising Diffusion Probabilistic Models", eq. 17 and the text below it,
    https://arxiv.org/abs/2102.09672.

    Args:
        s: offset that keeps beta from being too small near t = 0.
        num_train_timesteps: T, the number of steps.
        beta_max: upper bound on every beta; with 1, the last beta is 1 (zero terminal SNR).
    """

    def __init__(self, s: float = 0.008, num_train_timesteps: int = 1000, beta_max: float = 0.999) -> None:
        check_counts("schedule", minimum=2, num_train_timesteps=num_train_timesteps)
        check_non_negative("schedule.s", s)
        if not 0 < beta_max <= 1:
            raise UserError(f"schedule.beta_max={beta_max} must be in (0, 1]; with 1, the last step is pure noise.")
        t = torch.linspace(0, 1, num_train_timesteps + 1, dtype=torch.float64)
        alpha_bar = torch.cos(torch.pi / 2 * (t + s) / (1 + s)) ** 2
        super().__init__((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=beta_max))


class SigmoidBetas(BetaTable):
    r""":math:`\beta_i = \beta_{start} + (\beta_{end} - \beta_{start})\, sigmoid(u_i)` for evenly spaced u from -6 to 6.

    This is the table of GeoDiff (Xu et al. 2022, released code; https://arxiv.org/abs/2203.02923), known as "sigmoid"
    in later libraries. In the sigmoid schedule of Jabri et al. (2022), by contrast, alpha^2 follows a sigmoid.

    Args:
        beta_start: lower asymptote of beta.
        beta_end: upper asymptote of beta; the defaults suit T = 1000.
        num_train_timesteps: T, the number of steps.
    """

    def __init__(self, beta_start: float = 1e-4, beta_end: float = 0.02, num_train_timesteps: int = 1000) -> None:
        _check_betas("Sigmoid", beta_start, beta_end)
        check_counts("schedule", minimum=2, num_train_timesteps=num_train_timesteps)
        u = torch.linspace(-6, 6, num_train_timesteps, dtype=torch.float64)
        super().__init__(beta_start + (beta_end - beta_start) * torch.sigmoid(u))


def _check_betas(name: str, beta_start: float, beta_end: float) -> None:
    if not 0 < beta_start <= beta_end < 1:
        raise UserError(
            f"{name} betas: beta_start={beta_start} and beta_end={beta_end} must satisfy"
            " 0 < beta_start <= beta_end < 1."
        )


class GeometricSigmas(LogSNRTable, VarianceExploding):
    r"""The noise levels of NCSN: L sigmas in geometric progression, :math:`x_t = x_0 + \sigma_i \epsilon`.

    Level i, counted from the smallest, is at time i / L; between levels, sigma is interpolated geometrically. Song and
    Ermon (2019), "Generative Modeling by Estimating Gradients of the Data Distribution", section 4.1,
    https://arxiv.org/abs/1907.05600.

    Args:
        sigma_min: smallest sigma for data in [-1, 1], which is twice the published value for data in [0, 1].
        sigma_max: largest sigma. (The published 0.01 and 1 become 0.02 and 2 here.)
        num_levels: L; 10 in the paper, 232 for CIFAR-10 in Song and Ermon (2020), https://arxiv.org/abs/2006.09011.
    """

    def __init__(self, sigma_min: float = 0.02, sigma_max: float = 2.0, num_levels: int = 10) -> None:
        check_sigmas(type(self).__name__, sigma_min, sigma_max)
        if num_levels < 2:
            raise UserError(f"GeometricSigmas: num_levels={num_levels} must be at least 2.")
        log_sigma = torch.linspace(math.log(sigma_min), math.log(sigma_max), num_levels, dtype=torch.float64)
        super().__init__(-2 * log_sigma)


def snap_to_integer(position: Tensor) -> Tensor:
    """Round positions that differ from an integer only by floating-point error; the derivative stays 1."""
    miss = (position - position.round()).detach()
    rounding = 2 * torch.finfo(position.dtype).eps * position.detach().abs()
    return position - torch.where(miss.abs() <= rounding, miss, 0.0)


def _interpolate(values: Tensor, position: Tensor) -> Tensor:
    """Interpolate ``values`` (T,) linearly at fractional indices, which are clamped to [0, T - 1]."""
    # Clamp by a detached shift, since the derivative of clamp itself is 0 beyond the ends.
    detached = position.detach()
    position = position + (detached.clamp(0, len(values) - 1) - detached)
    left = position.detach().floor().long().clamp(max=len(values) - 2)
    weight = position - left
    # This form is exact at both ends: a (1 - w) + b w equals a at w = 0 and b at w = 1.
    return values[left] * (1 - weight) + values[left + 1] * weight
