"""Diffusion models: one composition of schedule, parameterisation, objective, sampler and network for all of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompare.diffusion import editing
from gencompare.diffusion.augmentation import Augmentation
from gencompare.diffusion.denoiser import ClipX0, Denoiser, DenoiserProtocol
from gencompare.diffusion.guidance import Guidance, Guided, check_same_schedule
from gencompare.diffusion.likelihoods import LikelihoodMethod
from gencompare.diffusion.objectives import Objective, Pixels
from gencompare.diffusion.parameterizations import Parameterization, Prediction
from gencompare.diffusion.samplers import Sampler
from gencompare.diffusion.schedules import NoiseSchedule, schedule_curve
from gencompare.errors import UserError, check_number
from gencompare.generative_model import Cond, DataSpec, GenerativeModel, LikelihoodEstimate, SupportsReconstruction
from gencompare.models.latents import Latents, PixelSpace
from gencompare.rng import RandomSource

SCHEDULE_SIZES = {"low_res": "low_res", "embedding": "embedding_dim"}
"""By condition: what a network calls its first size."""
NEEDS = {"label": "a class", "low_res": "a low-resolution image", "embedding": "an embedding"}


class Diffusion(GenerativeModel):
    """A network that is trained to tell image from noise, and sampled by taking the noise away.

    Everything that sets one diffusion model apart from another is a part that it is given.

    Args:
        network: a factory ``(shape, out_channels, num_classes) -> module(x, noise_cond, cond)``; ``num_classes`` is 0
            for a model without labels. Where the data give further conditions, it is also called with ``low_res``,
            channels of the low-resolution image, and ``embedding_dim``; with an augmentation, ``augment_dim``.
        schedule: alpha and sigma over time; a learned one is trained with the network where the objective is a bound,
            and else stays as it starts.
        parameterization: what the network is given and predicts.
        objective: the training loss.
        sampler: how samples are drawn.
        latent: a factory ``spec -> Latents``: the model then works on the whitened latents of a frozen autoencoder, and
            everything below that speaks of images means latents, but for the augmentation. None works on pixels.
        clip_x0: hold predicted images within [-1, 1] while sampling; latents have no bounds and are left alone.
        guidance: steers the denoiser while sampling; None samples what was trained.
        label_dropout: share of the images whose label and embedding are taken away in training, both at once, for
            classifier-free guidance. A low-resolution image always stays.
        augmentation: moves the training images, and tells the network how; None leaves them as they are.
        bits: ways to score images in bits/dim, by name; used where the data have levels.
    """

    takes = frozenset({"low_res", "embedding"})

    def __init__(
        self,
        spec: DataSpec,
        *,
        network: Callable[..., nn.Module],
        schedule: NoiseSchedule,
        parameterization: Parameterization,
        objective: Objective,
        sampler: Sampler,
        latent: Callable[..., Latents] | None = None,
        clip_x0: bool = True,
        guidance: Guidance | None = None,
        label_dropout: float = 0.0,
        augmentation: Augmentation | None = None,
        bits: Mapping[str, LikelihoodMethod] | None = None,
        **training: Any,
    ) -> None:
        super().__init__(spec, **training)
        schedule.check()
        parameterization.check(schedule)
        objective.check(schedule, parameterization)
        if not objective.trains_schedule and any(True for _ in schedule.parameters()):
            warnings.warn(
                f"{type(objective).__name__} trains no schedule: {type(schedule).__name__} stays as it starts."
                " Bounds train it (model/objective=vlb, or vlb_discrete with model.objective.steps=50).",
                stacklevel=2,
            )
            schedule.requires_grad_(False)
        if not objective.trains_variance and parameterization.learns_variance:
            warnings.warn(
                f"{type(objective).__name__} trains no variance: that of the reverse steps stays as the network starts."
                " Use model/objective=hybrid or vlb_discrete, or a parameterization that learns none (eps, v, ...).",
                stacklevel=2,
            )
        self.schedule, self.parameterization = schedule, parameterization
        self.objective, self.sampler, self.clip_x0 = objective, sampler, clip_x0
        self._check_start()
        self.bits = dict(bits or {})
        self.space: Latents | PixelSpace = PixelSpace(spec) if latent is None else latent(spec=spec)
        if latent is not None and getattr(parameterization, "sigma_data", 1.0) != 1:
            warnings.warn(
                f"model.parameterization.sigma_data={parameterization.sigma_data:g}, while whitened latents have a"  # type: ignore[attr-defined]
                " standard deviation of 1: use model.parameterization.sigma_data=1.",
                stacklevel=2,
            )
        if latent is not None and "low_res" in spec.conditions:
            raise UserError(
                "A low-resolution image is a condition on pixels, and this model works on latents: use"
                " model/latent=null."
            )
        self.network = network(
            shape=self.space.latent_shape,
            out_channels=parameterization.outputs * self.space.latent_shape[0],
            num_classes=spec.num_classes if self.conditional else 0,
            **{SCHEDULE_SIZES[name]: shape[0] for name, shape in spec.conditions.items()},
            **({} if augmentation is None else {"augment_dim": augmentation.dim}),
        )
        self._check_noise_levels()
        self.augmentation = augmentation
        if augmentation is not None and "low_res" in spec.conditions:
            raise UserError(
                "model.augmentation moves the training images, and their low-resolution images would stay: use"
                " model/augmentation=null."
            )
        self.told = self.conditional or "embedding" in spec.conditions
        """Whether the network is told what classifier-free guidance goes towards."""
        self.label_dropout = label_dropout
        self._check_label_dropout()
        self.guidance = guidance
        if guidance is not None:
            self._check_guidance(guidance)
            self.conditional = self.conditional or guidance.needs_label

    @property
    def denoiser(self) -> Denoiser:
        """The network under its schedule and parameterisation: what is trained."""
        return Denoiser(self.network, self.schedule, self.parameterization)

    @property
    def sampling_denoiser(self) -> DenoiserProtocol:
        """What samplers see: the denoiser in its wrappings."""
        guided = self.denoiser if self.guidance is None else Guided(self.denoiser, self.guidance, self.unlabelled)
        return self._clipped(guided)

    def _clipped(self, denoiser: DenoiserProtocol) -> DenoiserProtocol:
        return ClipX0(denoiser) if self.clips else denoiser

    @property
    def clips(self) -> bool:
        return self.clip_x0 and isinstance(self.space, PixelSpace)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """The denoiser itself: a trained model may serve another as its guide."""
        return self.denoiser(x_t, t, cond)

    def unlabelled(self, cond: Cond) -> Cond:
        """The same conditions without class and embedding: every label is ``num_classes`` and every embedding nought,
        which stand for none."""
        none = {"label": self.spec.num_classes, "embedding": 0}
        return {name: torch.full_like(value, none[name]) if name in none else value for name, value in cond.items()}

    @property
    def pixels(self) -> Pixels:
        """What a bound on the likelihood must know of the images, or of latents, which are continuous."""
        if isinstance(self.space, PixelSpace):
            return Pixels(self.spec.num_levels, self.space.mask, self.spec.dims)
        return Pixels(None, self.space.mask, math.prod(self.space.latent_shape))

    def losses(self, x: Tensor, cond: Cond, draws: RandomSource) -> dict[str, Tensor]:
        if self.training and self.augmentation is not None:
            real, told = self.augmentation(self.spec.crop(x), draws)
            x = F.pad(real, (self.spec.padding,) * 4, value=-1.0)
            cond = {**cond, "augment": told}
        x = self.space.encode(x)
        if self.training and self.label_dropout:
            dropped = draws.uniform().to(x.device) < self.label_dropout
            without = self.unlabelled(cond)
            cond = {
                name: torch.where(dropped.view(-1, *[1] * (value.ndim - 1)), without[name], value)
                for name, value in cond.items()
            }
        return self.objective.bound_to(self.pixels)(self.denoiser, x, cond, draws)

    @torch.no_grad()
    def sample(self, n: int, cond: Cond | None = None, *, generator: torch.Generator) -> Tensor:
        used = self._ready(cond)
        times = self.sampler.times(self.schedule)
        noise = self.schedule.prior((n, *self.space.latent_shape), generator, self.device, t=times[0])
        x = self.sampler.sample(self.sampling_denoiser, noise, used, generator=generator, times=times)
        return self.space.decode(x).clamp(-1, 1)

    @torch.no_grad()
    def pictures(self, x: Tensor, cond: Cond, *, generator: torch.Generator) -> dict[str, Tensor]:
        """What `Explores` asks for. Encoding and decoding leave guidance out, which would amplify what the one misses
        of the other; the rest is by the sampler, as samples are drawn."""
        cond, x = self._ready(cond), self.space.encode(x)
        unguided = self._clipped(self.denoiser)
        found = {
            "interpolation": editing.interpolation(unguided, x, cond),
            "inpainting": editing.inpainting(self.sampler, self.sampling_denoiser, x, cond, generator),
            "round_trip": editing.round_trip(unguided, x, cond),
            "trajectory": editing.trajectory_rows(self.sampler, self.sampling_denoiser, x, cond, generator),
        }
        return {
            name: self.space.decode(each.flatten(0, 1)).unflatten(0, each.shape[:2]) for name, each in found.items()
        }

    def _ready(self, cond: Cond | None) -> Cond:
        """The conditions that are used, once it is clear that all is there that sampling needs."""
        used = self.used(cond)
        for name in self.uses:
            if name not in used:
                raise UserError(
                    f"This diffusion model is conditional: it needs {NEEDS[name]} for each image, cond['{name}']."
                )
        self.schedule.check()  # a learned one may have changed since it was built
        self._check_start()  # and the sampler may be another one
        if self.guidance is not None:
            check_same_schedule(self.schedule, self.guidance)
            self._check_same_latents(self.guidance)
        return used

    def _check_same_latents(self, guidance: Guidance) -> None:
        """Known once weights are loaded: two autoencoders of one shape make different latents."""
        for name, guide in guidance.guides().items():
            space = getattr(guide, "space", None)
            if isinstance(space, Latents) and isinstance(self.space, Latents) and not space.same_as(self.space):
                raise UserError(
                    f"model.guidance.{name} works on the latents of another autoencoder: train both on one"
                    " (model.latent.run=DIR)."
                )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.schedule.check()  # a learned one may have collapsed, and the last good checkpoint stays

    def sampling_description(self) -> str:
        learned = {"variance"} if self.parameterization.learns_variance else ()
        parts = [self.sampler.describe(learned), *([] if self.guidance is None else [self.guidance.describe()])]
        return ", ".join([*parts, *(["x0 clipped"] if self.clips else [])])

    def likelihoods(self) -> dict[str, LikelihoodEstimate]:
        if self.spec.num_levels is None or not isinstance(self.space, PixelSpace):
            return {}
        return {
            name: LikelihoodEstimate(method.kind, partial(self._bits, method)) for name, method in self.bits.items()
        }

    def _bits(self, method: LikelihoodMethod, x: Tensor, cond: Cond, generator: torch.Generator) -> dict[str, Tensor]:
        self.schedule.check()  # a bound under a log-SNR that rises would be none
        return method.terms(self.denoiser, x, self.used(cond), self.pixels, generator)

    def noise_schedule(self) -> dict[str, list[float]]:
        drawn = schedule_curve(self.schedule)
        return {name: [round(float(value), 4) for value in drawn[name]] for name in ("t", "log_snr")}

    @property
    def trained_against(self) -> list[str]:
        return self.space.trained_against if isinstance(self.space, Latents) else []

    def autoencoder(self) -> SupportsReconstruction | None:
        return self.space if isinstance(self.space, Latents) else None

    def counted_networks(self) -> dict[str, nn.Module]:
        decoder = {"decoder": self.space.coder.decoder} if isinstance(self.space, Latents) else {}
        return {"network": self.network, **decoder, **self._guides()}

    def _guides(self) -> dict[str, nn.Module]:
        """Other models that take part in sampling. They are not of the module tree: nothing here trains, averages or
        saves them."""
        return {} if self.guidance is None else self.guidance.guides()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # What moves this model to a device moves its guides too.
        for guide in self._guides().values():
            guide._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def _check_start(self) -> None:
        """Sampling must start where there is noise alone. That is a setting, but for an end that is learned: there the
        bound counts what is left of the image, and a warning does."""
        problem = self.schedule.start_problem(self.sampler.times(self.schedule)[0])
        if problem and not any(parameter.requires_grad for parameter in self.schedule.parameters()):
            raise UserError(problem)
        if problem:
            warnings.warn(problem, stacklevel=2)

    def _check_noise_levels(self) -> None:
        """A network with parameters for each noise level, ``noise_levels`` of them, must be told which one it is."""
        known = getattr(self.network, "noise_levels", 1)
        if known > 1 and self.parameterization.noise.levels(self.schedule) != known:
            steps = self.schedule.discrete_times
            there = "runs in continuous time" if steps is None else f"has {len(steps)}"
            raise UserError(
                f"{type(self.network).__name__} tells {known} noise levels apart by their index: it needs a schedule of"
                f" {known} levels and noise conditioning LevelIndex, as in model=ncsn; {type(self.schedule).__name__}"
                f" {there}, and the conditioning is {type(self.parameterization.noise).__name__}."
            )

    def _check_label_dropout(self) -> None:
        check_number("model.label_dropout", self.label_dropout)
        if not 0 <= self.label_dropout <= 1:
            raise UserError(f"model.label_dropout={self.label_dropout}: give a share from 0 to 1.")
        if self.label_dropout and not self.told:
            raise UserError(
                f"model.label_dropout={self.label_dropout} needs labels or embeddings: add model.conditional=true."
            )

    def _check_guidance(self, guidance: Guidance) -> None:
        for name, guide in guidance.guides().items():
            works_on = getattr(guide, "space", None)
            there = self.spec.shape if works_on is None else works_on.latent_shape
            if there != self.space.latent_shape or isinstance(works_on, Latents) != isinstance(self.space, Latents):
                raise UserError(
                    f"model.guidance.{name} works on images of {there} and this model on {self.space.latent_shape}:"
                    " a guide of a model on latents needs the same latents."
                )
        if problem := guidance.problem(takes_labels=self.told, knows_no_label=self.label_dropout > 0):
            raise UserError(problem)
        if guidance.needs_label and not self.spec.num_classes:
            raise UserError(f"{type(guidance).__name__} needs labels, and data '{self.spec.name}' has none.")
        for name, guide in guidance.guides().items():
            spec = getattr(guide, "spec", self.spec)
            if (spec.shape, spec.num_classes) != (self.spec.shape, self.spec.num_classes):
                raise UserError(
                    f"model.guidance.{name} was trained on data '{spec.name}', which has other images or classes than"
                    f" '{self.spec.name}'."
                )
            if getattr(guide, "conditional", False) and not (self.conditional or guidance.needs_label):
                raise UserError(
                    f"model.guidance.{name} needs a class for each image, and this model has none to pass on: train"
                    " both with model.conditional=true, or both without."
                )
            if lacking := sorted(getattr(spec, "conditions", {}).keys() - self.spec.conditions.keys()):
                raise UserError(
                    f"model.guidance.{name} was trained with '{lacking[0]}', which this model's data do not give:"
                    f" add +data/condition={lacking[0]}."
                )
        if not any(True for _ in self.schedule.parameters()):
            check_same_schedule(self.schedule, guidance)
