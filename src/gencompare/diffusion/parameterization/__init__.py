"""What a network is given and what it is asked for: the image, the noise, or something between the two."""

from gencompare.diffusion.parameterization.base import Parameterization, Prediction
from gencompare.diffusion.parameterization.karras import Karras
from gencompare.diffusion.parameterization.plain import X0, Eps, Score, V, Velocity
from gencompare.diffusion.parameterization.posterior_mean import PosteriorMean
from gencompare.diffusion.parameterization.variance import LearnedVariance

__all__ = [
    "X0",
    "Eps",
    "Karras",
    "LearnedVariance",
    "Parameterization",
    "PosteriorMean",
    "Prediction",
    "Score",
    "V",
    "Velocity",
]
