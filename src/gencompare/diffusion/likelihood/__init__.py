"""Bits/dim of a diffusion model: a bound and an estimate."""

from gencompare.diffusion.likelihood.base import LikelihoodMethod
from gencompare.diffusion.likelihood.ode import ODE
from gencompare.diffusion.likelihood.vlb import VLB

__all__ = ["ODE", "VLB", "LikelihoodMethod"]
