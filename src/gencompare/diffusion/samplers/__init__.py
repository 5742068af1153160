"""Samplers: from noise to images, one denoiser call after another."""

from gencompare.diffusion.samplers.ancestral import DDIM, Ancestral
from gencompare.diffusion.samplers.base import Sampler, Step
from gencompare.diffusion.samplers.ode import Heun

__all__ = ["DDIM", "Ancestral", "Heun", "Sampler", "Step"]
