"""A schedule as plain numbers, for pictures and records."""

from __future__ import annotations

import numpy as np
import torch

from gencompare.diffusion.schedules.base import NoiseSchedule


@torch.no_grad()
def curve(schedule: NoiseSchedule, points: int = 101) -> dict[str, np.ndarray]:
    """``t``, evenly from t_min to t_max, ``log_snr``, ``alpha``, ``sigma`` and ``density`` there: (points,), float64.

    ``density`` is that of the log-SNR when times are drawn uniformly, 1 / ((t_max - t_min) |d lambda / dt|): where
    training, or a grid of even times, spends its effort.
    """
    t = torch.linspace(schedule.t_min, schedule.t_max, points, dtype=torch.float64, device=schedule.device)
    at = schedule.at(t)
    density = 1 / ((schedule.t_max - schedule.t_min) * at.log_snr_slope.abs())
    values = {"t": t, "log_snr": at.log_snr, "alpha": at.alpha, "sigma": at.sigma, "density": density}
    return {name: value.double().cpu().numpy() for name, value in values.items()}
