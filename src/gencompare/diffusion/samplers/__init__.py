"""Samplers: from noise to images, one denoiser call after another."""

from gencompare.diffusion.samplers.adaptive import RK45
from gencompare.diffusion.samplers.ancestral import DDIM, Ancestral
from gencompare.diffusion.samplers.base import Sampler, Step
from gencompare.diffusion.samplers.langevin import AnnealedLangevin, PredictorCorrector
from gencompare.diffusion.samplers.multistep import DPMSolverPP2M, UniPC
from gencompare.diffusion.samplers.ode import Euler, Heun
from gencompare.diffusion.samplers.sde import EulerMaruyama, ReverseDiffusion

__all__ = [
    "DDIM",
    "RK45",
    "Ancestral",
    "AnnealedLangevin",
    "DPMSolverPP2M",
    "Euler",
    "EulerMaruyama",
    "Heun",
    "PredictorCorrector",
    "ReverseDiffusion",
    "Sampler",
    "Step",
    "UniPC",
]
