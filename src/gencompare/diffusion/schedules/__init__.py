"""Noise schedules: how much of an image is left, and how much noise is there, at each time."""

from gencompare.diffusion.schedules.base import CLEAN, NoiseSchedule, Scales, VariancePreserving
from gencompare.diffusion.schedules.tables import BetaTable, CosineBetas, LinearBetas

__all__ = ["CLEAN", "BetaTable", "CosineBetas", "LinearBetas", "NoiseSchedule", "Scales", "VariancePreserving"]
