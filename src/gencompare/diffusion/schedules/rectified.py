"""The schedule of rectified flow and flow matching."""

from __future__ import annotations

import torch
from torch import Tensor

from gencompare.diffusion.schedules.base import NoiseSchedule


class Rectified(NoiseSchedule):
    r"""alpha = 1 - t, sigma = t: a straight line from image to noise (Liu et al. 2023, eq. 1, with time turned round).

    Also the optimal-transport path of Lipman et al. (2023, eq. 20, sigma_min = 0). The log-SNR 2 log((1 - t) / t) is
    infinite at both ends, so time runs from 1e-4 to 1 - 1e-4, and lambda from 18.4 to -18.4. There x_t still holds eps,
    and 1 - t still holds alpha, to three digits in float32. What is left of the image at the end, a ten thousandth, is
    nothing to a network, and the prior is N(0, 1) in practice.
    """

    t_min = 1e-4
    t_max = 1 - 1e-4

    def log_alpha(self, t: Tensor) -> Tensor:
        return torch.log1p(-t)

    def log_snr(self, t: Tensor) -> Tensor:
        return 2 * (torch.log1p(-t) - torch.log(t))

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-0.5 * log_snr).clamp(self.t_min, self.t_max)
