"""Diffusion models: one composition of schedule, parameterisation, objective, sampler and network for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gencompare.contract import Cond, DataSpec, GenerativeModel
from gencompare.diffusion.denoiser import ClipX0, Denoiser, Denoises
from gencompare.diffusion.objectives import Objective
from gencompare.diffusion.parameterization import Parameterization
from gencompare.diffusion.samplers import Sampler
from gencompare.diffusion.schedules import NoiseSchedule
from gencompare.errors import UserError
from gencompare.seeds import Draws


class Diffusion(GenerativeModel):
    """A network that is trained to tell image from noise, and sampled by taking the noise away.

    Everything that sets one diffusion model apart from another is a part that it is given.

    Args:
        network: a factory ``(shape, out_channels, num_classes) -> module(x, noise_cond, cond)``; ``num_classes`` is 0
            for an unconditional model.
        schedule: alpha and sigma over time; a learned one is trained with the network.
        parameterization: what the network is given and predicts.
        objective: the training loss.
        sampler: how samples are drawn.
        clip_x0: hold predicted images within [-1, 1] while sampling.
    """

    def __init__(
        self,
        spec: DataSpec,
        *,
        network: Callable[..., nn.Module],
        schedule: NoiseSchedule,
        parameterization: Parameterization,
        objective: Objective,
        sampler: Sampler,
        clip_x0: bool = True,
        **training: Any,
    ) -> None:
        super().__init__(spec, **training)
        schedule.check()
        sampler.times(schedule)
        self.schedule, self.parameterization = schedule, parameterization
        self.objective, self.sampler, self.clip_x0 = objective, sampler, clip_x0
        self.network = network(
            shape=spec.shape,
            out_channels=parameterization.outputs * spec.shape[0],
            num_classes=spec.num_classes if self.conditional else 0,
        )

    @property
    def denoiser(self) -> Denoiser:
        """The network under its schedule and parameterisation: what is trained."""
        return Denoiser(self.network, self.schedule, self.parameterization)

    @property
    def sampling_denoiser(self) -> Denoises:
        """What samplers see: the denoiser in its wrappings."""
        return ClipX0(self.denoiser) if self.clip_x0 else self.denoiser

    def losses(self, x: Tensor, cond: Cond, draws: Draws) -> dict[str, Tensor]:
        return self.objective(self.denoiser, x, cond, draws)

    @torch.no_grad()
    def sample(self, n: int, cond: Cond | None = None, *, generator: torch.Generator) -> Tensor:
        used = self.used(cond)
        if self.conditional and "label" not in used:
            raise UserError("This diffusion model is conditional: it needs a class for each image, cond['label'].")
        times = self.sampler.times(self.schedule)
        noise = self.schedule.prior((n, *self.spec.shape), generator, self.device, t=times[0])
        x = self.sampler.sample(self.sampling_denoiser, noise, used, generator=generator, times=times)
        return x.clamp(-1, 1)

    def sampling_description(self) -> str:
        return self.sampler.describe() + (", x0 clipped" if self.clip_x0 else "")

    def counted_networks(self) -> dict[str, nn.Module]:
        return {"network": self.network}
