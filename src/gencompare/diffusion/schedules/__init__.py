"""Noise schedules: how much of an image is left, and how much noise is there, at each time."""

from gencompare.diffusion.schedules.base import CLEAN, NoiseSchedule, Scales, VarianceExploding, VariancePreserving
from gencompare.diffusion.schedules.curve import curve
from gencompare.diffusion.schedules.karras import Karras
from gencompare.diffusion.schedules.learned import Learned
from gencompare.diffusion.schedules.levels import NCSNLevels
from gencompare.diffusion.schedules.rectified import Rectified
from gencompare.diffusion.schedules.sde import VE, VP, SubVP
from gencompare.diffusion.schedules.tables import BetaTable, CosineBetas, LinearBetas, SigmoidBetas

__all__ = [
    "CLEAN",
    "VE",
    "VP",
    "BetaTable",
    "CosineBetas",
    "Karras",
    "Learned",
    "LinearBetas",
    "NCSNLevels",
    "NoiseSchedule",
    "Rectified",
    "Scales",
    "SigmoidBetas",
    "SubVP",
    "VarianceExploding",
    "VariancePreserving",
    "curve",
]
