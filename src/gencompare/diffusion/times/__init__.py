"""Which times are used: drawn at random to train at, or laid out in a grid to sample through."""

from gencompare.diffusion.times.grids import KarrasGrid, LogSNRGrid, QuadraticGrid, TimeGrid, UniformGrid
from gencompare.diffusion.times.training import LogitNormalTimes, LogNormalTimes, TimeDistribution, UniformTimes

__all__ = [
    "KarrasGrid",
    "LogNormalTimes",
    "LogSNRGrid",
    "LogitNormalTimes",
    "QuadraticGrid",
    "TimeDistribution",
    "TimeGrid",
    "UniformGrid",
    "UniformTimes",
]
