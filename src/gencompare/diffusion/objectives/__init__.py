"""What training minimises: per-sample losses of a denoiser."""

from gencompare.diffusion.objectives.base import Objective
from gencompare.diffusion.objectives.discrete_vlb import DiscreteVLB
from gencompare.diffusion.objectives.hybrid import Hybrid
from gencompare.diffusion.objectives.vlb import VLB
from gencompare.diffusion.objectives.weighted_mse import WeightedMSE

__all__ = ["VLB", "DiscreteVLB", "Hybrid", "Objective", "WeightedMSE"]
