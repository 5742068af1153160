"""Diffusion models, composed of a schedule, a parameterisation, an objective, a sampler and a network."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gencompare.diffusion import editing
from gencompare.diffusion.augmentation import Augmentation
from gencompare.diffusion.consistency import MultistepConsistency
from gencompare.diffusion.data_likelihood import DataLikelihood, Decoder, GaussianDecoder
from gencompare.diffusion.denoiser import ClipX0, Denoiser, DenoiserProtocol
from gencompare.diffusion.guidance import Guidance, Guided, check_same_schedule
from gencompare.diffusion.likelihoods import LikelihoodMethod
from gencompare.diffusion.objectives import Objective
from gencompare.diffusion.parameterizations import Parameterization, Prediction
from gencompare.diffusion.patches import RandomPatches
from gencompare.diffusion.samplers import Sampler
from gencompare.diffusion.schedules import NoiseSchedule, schedule_curve
from gencompare.errors import UserError, check_number
from gencompare.generative_model import Cond, DataSpec, GenerativeModel, LikelihoodEstimate, SupportsReconstruction
from gencompare.models.latents import Latents, PixelSpace
from gencompare.networks.conditioning import pixel_coordinates
from gencompare.private_apis import MovesOtherModules
from gencompare.rng import RandomSource, full_precision

CONDITION_SIZE_ARGS = {"low_res": "low_res_channels", "embedding": "embedding_dim"}
"""Argument of the network factory for the size (the first dimension) of each condition."""
CONDITION_NAMES = {"label": "a class", "low_res": "a low-resolution image", "embedding": "an embedding"}


class Diffusion(MovesOtherModules, GenerativeModel):
    r"""A diffusion model: a network trained to denoise :math:`x_t = \alpha_t x_0 + \sigma_t \epsilon`, and a sampler.

    All diffusion models are this class with different parts.

    Args:
        network: a factory ``(shape, out_channels, num_classes) -> module(x, noise_cond, cond)``; ``num_classes`` is 0
            for an unconditional model. For data with more conditions, the factory also receives ``low_res_channels``
            and ``embedding_dim``; with an augmentation, ``augment_dim``; with patches, ``coordinate_channels``; with an
            objective that needs time intervals, ``interval_dim``.
        schedule: alpha and sigma over time. A learned schedule is trained if the objective is a bound; otherwise it
            keeps its initial values.
        parameterization: defines the network inputs and the meaning of the network output.
        objective: the training loss.
        sampler: the sampling method.
        latent: a factory ``spec -> Latents``. The model then works on the whitened latents of a frozen autoencoder, and
            every other part works on latents instead of images, except the augmentation. If None, the model works on
            pixels.
        clip_x0: clip predicted images to [-1, 1] while sampling; has no effect on latents, which are unbounded.
        dynamic_threshold: the quantile of dynamic thresholding, which replaces plain clipping (see `ClipX0`); None
            disables it.
        guidance: guidance of the denoiser while sampling; None disables guidance.
        label_dropout: probability of dropping label and embedding (both together) of a training image, for
            classifier-free guidance. A low-resolution image is never dropped.
        augmentation: transforms training images and conditions the network on the transform; None disables it.
        patches: trains on random crops of images or latents, and conditions the network on the coordinates of their
            pixels; None trains on whole images without coordinates.
        pixel_decoder: p(x_0 | x_1), the last term of variational bounds in training and evaluation.
        likelihoods: methods that compute bits/dim, by name; used only for models of discrete pixels.
        teacher: the run whose weights the network starts from: ``run``, its folder or None, ``checkpoint`` and
            ``weights``. Only the training task uses these settings.
    """

    supported_conditions = frozenset({"low_res", "embedding"})

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
        dynamic_threshold: float | None = None,
        guidance: Guidance | None = None,
        label_dropout: float = 0.0,
        augmentation: Augmentation | None = None,
        patches: RandomPatches | None = None,
        pixel_decoder: Decoder = GaussianDecoder(),
        likelihoods: Mapping[str, LikelihoodMethod] | None = None,
        teacher: Mapping[str, Any] | None = None,
        **training: Any,
    ) -> None:
        super().__init__(spec, **training)
        self.schedule, self.parameterization = schedule, parameterization
        self.objective, self.sampler = objective, sampler
        self.clip_x0, self.dynamic_threshold = clip_x0, dynamic_threshold
        self.guidance, self.label_dropout = guidance, label_dropout
        self.augmentation, self.patches = augmentation, patches
        self.pixel_decoder, self.likelihood_methods = pixel_decoder, dict(likelihoods or {})
        self.has_droppable_cond = self.conditional or "embedding" in spec.conditions
        """Whether the network receives conditions that classifier-free guidance can drop."""
        self.space: Latents | PixelSpace = PixelSpace(spec) if latent is None else latent(spec=spec)
        if not isinstance(self.space, Latents | PixelSpace):
            raise UserError(
                "Diffusion models work on pixels or on continuous latents, not on tokens: use model/latent=autoencoder."
            )
        self.network = network(
            shape=self.space.latent_shape,
            out_channels=parameterization.output_multiplier * self.space.latent_shape[0],
            num_classes=spec.num_classes if self.conditional else 0,
            **{CONDITION_SIZE_ARGS[name]: shape[0] for name, shape in spec.conditions.items()},
            **({} if augmentation is None else {"augment_dim": augmentation.dim}),
            **({} if patches is None else {"coordinate_channels": 2}),
            **({"interval_dim": 1} if objective.needs_interval else {}),
        )
        check_composition(self)
        self._checked = schedule, sampler
        if guidance is not None:
            self.conditional = self.conditional or guidance.needs_label

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser that is trained: the network with its schedule and parameterisation."""
        return Denoiser(self.network, self.schedule, self.parameterization)

    @property
    def sampling_denoiser(self) -> DenoiserProtocol:
        """The denoiser that the sampler calls, with guidance and clipping."""
        guided = self.denoiser if self.guidance is None else Guided(self.denoiser, self.guidance, self.drop_cond)
        return self._clip(guided)

    def _clip(self, denoiser: DenoiserProtocol) -> DenoiserProtocol:
        return ClipX0(denoiser, self.dynamic_threshold) if self.clips_x0 else denoiser

    @property
    def clips_x0(self) -> bool:
        return self.clip_x0 and isinstance(self.space, PixelSpace)

    @property
    def data_likelihood(self) -> DataLikelihood:
        """The data and their decoder in bounds: pixels, or latents, which are continuous."""
        if isinstance(self.space, PixelSpace):
            return DataLikelihood(self.spec.num_bins, self.space.mask, self.spec.num_values, self.pixel_decoder)
        return DataLikelihood(None, self.space.mask, math.prod(self.space.latent_shape), self.pixel_decoder)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """Predict x_0 and eps. This makes a trained model usable as a guiding model."""
        return self.denoiser(x_t, t, cond)

    @property
    def step_kind(self) -> str:
        """Kind of the next step: the FLOPs of a step depend on the size of its crops."""
        if self.patches is None or self.rng is None:
            return ""
        divisor = self.patches.draw_divisor(self.rng)
        return "" if divisor == 1 else f"crops of 1/{divisor}"

    def losses(self, x: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        # Before anything else is drawn, since `step_kind` draws it, too.
        divisor = 1 if self.patches is None else self.patches.draw_divisor(rng)
        if self.training and self.augmentation is not None:
            x, augment_cond = self.augmentation(self.spec.crop(x), rng)
            x = self.spec.pad(x)
            cond = {**cond, "augment": augment_cond}
        x0 = self.space.encode(x)
        if self.training and self.label_dropout:
            cond = self._dropout(cond, rng.uniform().to(x.device) < self.label_dropout)
        if self.training and self.patches is not None:
            grid = pixel_coordinates(*x0.shape[2:], like=x0).expand(len(x0), -1, -1, -1)
            x0, coordinates = self.patches(torch.cat([x0, grid], dim=1), divisor, rng).tensor_split([-2], dim=1)
            cond = {**cond, "coordinates": coordinates}
        if self.training and (num_scores := getattr(self.network, "num_token_scores", 0)):
            cond = {**cond, "token_scores": rng.uniform((num_scores,)).to(x.device)}
        objective = self.objective.with_likelihood(self.data_likelihood).with_drop_cond(self.drop_cond)
        # Losses in evaluation are those of the end of training, so that they are comparable during training.
        return objective.at_progress(self.progress if self.training else 1.0)(self.denoiser, x0, cond, rng)

    def micro_batched_networks(self) -> list[nn.Module]:
        return [self.network]

    def lr_factors(self) -> dict[str, float]:
        own = self.network.lr_factors() if hasattr(self.network, "lr_factors") else {}  # type: ignore[operator]
        return {f"network.{name}": factor for name, factor in own.items()}

    def sharded_network(self) -> nn.Module | None:
        return self.network if hasattr(self.network, "blocks") else None

    def drop_cond(self, cond: Cond) -> Cond:
        """Replace classes and embeddings with their null values: ``num_classes`` for labels, and 0 for embeddings."""
        null = {"label": self.spec.num_classes, "embedding": 0}
        return {name: torch.full_like(value, null[name]) if name in null else value for name, value in cond.items()}

    def _dropout(self, cond: Cond, drop: Tensor) -> Cond:
        """Replace classes and embeddings with their null values where ``drop`` (n,) is true."""
        dropped = self.drop_cond(cond)
        return {
            name: torch.where(drop.view(-1, *[1] * (value.ndim - 1)), dropped[name], value)
            for name, value in cond.items()
        }

    @torch.no_grad()
    def sample(self, n: int, cond: Cond | None = None, *, generator: torch.Generator) -> Tensor:
        cond = self._sampling_conditions(cond)
        times = self.sampler.times(self.schedule).to(full_precision(self.dtype))
        noise = self.schedule.prior((n, *self.space.latent_shape), generator, self.device, t=times[0])
        x = self.sampler.sample(self.sampling_denoiser, noise, cond, generator=generator, times=times)
        return self.space.decode(x).clamp(-1, 1)

    @torch.no_grad()
    def visualize(self, x: Tensor, cond: Cond, *, generator: torch.Generator) -> dict[str, Tensor]:
        """Create interpolations, inpaintings, round trips through the noise, and sampling trajectories.

        Interpolations and round trips map images to noise and back without guidance, which would make the round trip
        less accurate. Inpaintings and trajectories use the sampler and the guidance of the model. A consistency model
        has no map from images to noise.
        """
        cond, x = self._sampling_conditions(cond), self.space.encode(x)
        unguided = self._clip(self.denoiser)
        images = {
            "inpainting": editing.inpainting(self.sampler, self.sampling_denoiser, x, cond, generator),
            "trajectory": editing.trajectory_rows(self.sampler, self.sampling_denoiser, x, cond, generator),
        }
        if self.objective.trains_denoiser:
            images["interpolation"] = editing.interpolation(unguided, x, cond)
            images["round_trip"] = editing.round_trip(unguided, x, cond)
        return {name: self.space.decode(z.flatten(0, 1)).unflatten(0, z.shape[:2]) for name, z in images.items()}

    def _sampling_conditions(self, cond: Cond | None) -> Cond:
        """Select the conditions of this model. Raise `UserError` if a condition is missing or the model cannot
        sample."""
        cond = self.select_conditions(cond)
        for name in self.condition_names:
            if name not in cond:
                raise UserError(
                    f"This conditional diffusion model needs {CONDITION_NAMES[name]} for each image, passed as"
                    f" cond['{name}']."
                )
        self._recheck()
        return cond

    def _recheck(self) -> None:
        """Repeat the checks of parts that may have changed: a learned schedule, a new sampler, and guiding models."""
        if self._has_learned_schedule or self._checked != (self.schedule, self.sampler):
            self.schedule.check()
            check_sampling_start(self.schedule, self.sampler)
            check_sampler(self.objective, self.sampler)
            self._checked = self.schedule, self.sampler
        if self.guidance is not None:
            check_same_schedule(self.schedule, self.guidance)
            check_same_latents(self.space, self.guidance)

    @property
    def _has_learned_schedule(self) -> bool:
        return any(True for _ in self.schedule.parameters())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.schedule.check()  # if a learned schedule has collapsed, keep the last good checkpoint

    def sampling_description(self) -> str:
        learned = {"variance"} if self.parameterization.learns_variance else ()
        parts = [self.sampler.describe(learned), *([] if self.guidance is None else [self.guidance.describe()])]
        if self.clips_x0:
            threshold = self.dynamic_threshold
            parts.append("x0 clipped" if threshold is None else f"x0 thresholded at quantile {threshold:g}")
        return ", ".join(parts)

    def likelihoods(self) -> dict[str, LikelihoodEstimate]:
        if self.spec.num_bins is None or not isinstance(self.space, PixelSpace) or not self.objective.trains_denoiser:
            return {}
        return {
            name: LikelihoodEstimate(
                method.kind, partial(self._likelihood_terms, method), method.method(self.data_likelihood)
            )
            for name, method in self.likelihood_methods.items()
        }

    def _likelihood_terms(
        self, method: LikelihoodMethod, x: Tensor, cond: Cond, generator: torch.Generator
    ) -> dict[str, Tensor]:
        if self._has_learned_schedule:
            self.schedule.check()  # the bound does not hold if the log-SNR increases
        return method.terms(self.denoiser, x, self.select_conditions(cond), self.data_likelihood, generator)

    def noise_schedule(self) -> dict[str, list[float]]:
        curve = schedule_curve(self.schedule)
        return {name: [round(float(value), 4) for value in curve[name]] for name in ("t", "log_snr")}

    @property
    def perceptual_networks(self) -> list[str]:
        return self.space.perceptual_networks if isinstance(self.space, Latents) else []

    def autoencoder(self) -> SupportsReconstruction | None:
        return self.space if isinstance(self.space, Latents) else None

    def nfe_networks(self) -> dict[str, nn.Module]:
        decoder = {"decoder": self.space.coder.decoder} if isinstance(self.space, Latents) else {}
        return {"network": self.network, **decoder, **self._guides()}

    def _guides(self) -> dict[str, nn.Module]:
        """Return the guiding models. They are not submodules, so they are not trained, averaged or saved."""
        return {} if self.guidance is None else self.guidance.guides()

    def other_modules(self) -> Iterable[nn.Module]:
        """Return the guiding models, which move to the device of this model."""
        return self._guides().values()


def check_composition(model: Diffusion) -> None:
    """Check that the parts of a new model fit together.

    A learned schedule or variance that the objective does not train causes a warning; such a schedule is frozen.

    Raises:
        UserError: if two parts are incompatible; the message suggests an alternative.
    """
    _check_training(model.schedule, model.parameterization, model.objective)
    check_sampling_start(model.schedule, model.sampler)
    check_sampler(model.objective, model.sampler)
    _check_latents(model)
    _check_decoder(model)
    _check_noise_levels(model.network, model.schedule, model.parameterization)
    _check_label_dropout(model)
    _check_dynamic_threshold(model)
    if model.augmentation is not None and "low_res" in model.spec.conditions:
        raise UserError(
            "model.augmentation transforms the training images, but not their low-resolution images: use"
            " model/augmentation=null."
        )
    if model.patches is not None:
        _check_patches(model, model.patches)
    if model.guidance is not None:
        _check_guidance(model, model.guidance)


def _check_training(schedule: NoiseSchedule, parameterization: Parameterization, objective: Objective) -> None:
    schedule.check()
    parameterization.check(schedule)
    objective.check(schedule, parameterization)
    if not objective.trains_schedule and any(True for _ in schedule.parameters()):
        warnings.warn(
            f"{type(objective).__name__} does not train the schedule: {type(schedule).__name__} keeps its initial"
            " values. Use a variational bound (model/objective=vlb, or vlb_discrete with"
            " model.objective.num_timesteps=50).",
            stacklevel=4,
        )
        schedule.requires_grad_(False)
    if not objective.trains_variance and parameterization.learns_variance:
        warnings.warn(
            f"{type(objective).__name__} does not train the variance of the reverse steps, which keeps its initial"
            " values. Use model/objective=hybrid or vlb_discrete, or a parameterisation without a learned variance"
            " (eps, v, ...).",
            stacklevel=4,
        )


def check_sampling_start(schedule: NoiseSchedule, sampler: Sampler) -> None:
    """Raise `UserError` if the sampler would not start from pure noise.

    A schedule that is being trained only causes a warning, since its end may still move and the bound accounts for the
    remaining image.
    """
    mismatch = schedule.prior_mismatch(sampler.times(schedule)[0])
    if mismatch is None:
        return
    if not any(parameter.requires_grad for parameter in schedule.parameters()):
        raise UserError(mismatch)
    warnings.warn(mismatch, stacklevel=4)


def check_sampler(objective: Objective, sampler: Sampler) -> None:
    """Raise `UserError` if the sampler does not suit what the objective trains the network to predict."""
    if sampler.needs_interval and not objective.needs_interval:
        raise UserError(
            f"{type(sampler).__name__} needs a network that predicts the average velocity of a step, which"
            f" {type(objective).__name__} does not train: use model=meanflow, or model/sampler=euler."
        )
    if not objective.trains_denoiser and not isinstance(sampler, MultistepConsistency):
        raise UserError(
            f"{type(sampler).__name__} needs a denoiser, but {type(objective).__name__} trains a consistency function,"
            " which maps noise to an image in one step: use model/sampler=consistency."
        )


def _check_latents(model: Diffusion) -> None:
    if not isinstance(model.space, Latents):
        return
    sigma_data = getattr(model.parameterization, "sigma_data", 1.0)
    if sigma_data != 1:
        warnings.warn(
            f"model.parameterization.sigma_data={sigma_data:g}, but whitened latents have a standard deviation of 1:"
            " use model.parameterization.sigma_data=1.",
            stacklevel=4,
        )
    if "low_res" in model.spec.conditions:
        raise UserError(
            "Low-resolution images can only condition models of pixels, but this model works on latents: use"
            " model/latent=null."
        )


def _check_decoder(model: Diffusion) -> None:
    """Check that objective and likelihoods can use the decoder."""
    likelihood = model.data_likelihood
    if likelihood.decoder.needs_pixels and likelihood.num_bins is None:
        raise UserError(
            f"The {likelihood.decoder.name} decoder needs discrete pixels, but this model works on continuous values:"
            " use model/pixel_decoder=gaussian."
        )
    model.objective.check_likelihood(likelihood, model.schedule)
    for method in model.likelihood_methods.values():
        method.check(likelihood, model.schedule)


def _check_noise_levels(network: nn.Module, schedule: NoiseSchedule, parameterization: Parameterization) -> None:
    """Check that a network with separate parameters for each noise level receives the index of the level."""
    num_levels = getattr(network, "num_noise_levels", 1)
    if num_levels > 1 and parameterization.noise_conditioning.num_levels(schedule) != num_levels:
        times = schedule.discrete_times
        schedule_levels = "is a continuous-time schedule" if times is None else f"has {len(times)} levels"
        raise UserError(
            f"{type(network).__name__} has parameters for {num_levels} noise levels and needs their index: use a"
            f" schedule of {num_levels} levels and the noise conditioning LevelIndexConditioning, as in model=ncsn."
            f" {type(schedule).__name__} {schedule_levels}, and the noise conditioning is"
            f" {type(parameterization.noise_conditioning).__name__}."
        )


def _check_label_dropout(model: Diffusion) -> None:
    check_number("model.label_dropout", model.label_dropout)
    if not 0 <= model.label_dropout <= 1:
        raise UserError(f"model.label_dropout={model.label_dropout} must be in [0, 1].")
    if model.label_dropout and not model.has_droppable_cond:
        raise UserError(
            f"model.label_dropout={model.label_dropout} needs labels or embeddings: add model.conditional=true."
        )
    model.objective.check_conditions(is_conditional=model.has_droppable_cond, has_null_cond=model.label_dropout > 0)


def _check_dynamic_threshold(model: Diffusion) -> None:
    threshold = model.dynamic_threshold
    if threshold is None:
        return
    check_number("model.dynamic_threshold", threshold)
    if not 0 < threshold <= 1:
        raise UserError(f"model.dynamic_threshold={threshold} must be a quantile in (0, 1], such as 0.995.")
    if not model.clips_x0:
        raise UserError(
            f"model.dynamic_threshold={threshold} needs a model of pixels with model.clip_x0=true: latents are not"
            " clipped."
        )


def _check_patches(model: Diffusion, patches: RandomPatches) -> None:
    model.objective.check_patches()
    if "low_res" in model.spec.conditions:
        raise UserError(
            "model.patches crops the training images, but not their low-resolution images: use model/patches=null."
        )
    _, height, width = model.space.latent_shape
    multiple = getattr(model.network, "size_multiple", None)
    if multiple is None:
        raise UserError(
            f"model.patches trains on crops of {height}x{width} images, but {type(model.network).__name__} takes only"
            " whole images: use model/network=unet, or model/patches=null."
        )
    for divisor in patches.divisors:
        if height % (divisor * multiple) or width % (divisor * multiple):
            raise UserError(
                f"model.patches.divisors={list(patches.divisors)}: {height}x{width} images divided by {divisor} give no"
                f" crops whose sides are multiples of {multiple}, which this network needs: use other divisors, or"
                " a network with fewer levels."
            )


def _check_guidance(model: Diffusion, guidance: Guidance) -> None:
    spec, space = model.spec, model.space
    if not model.objective.trains_denoiser:
        raise UserError(
            f"{type(guidance).__name__} changes the score, which a consistency model does not predict: use"
            " model/guidance=null."
        )
    for name, guide in guidance.guides().items():
        guide_space = getattr(guide, "space", None)
        shape = spec.shape if guide_space is None else guide_space.latent_shape
        if shape != space.latent_shape or isinstance(guide_space, Latents) != isinstance(space, Latents):
            raise UserError(
                f"model.guidance.{name} and this model must both work on pixels or both on latents, of the same shape;"
                f" their shapes are {shape} and {space.latent_shape}."
            )
    incompatibility = guidance.incompatibility(
        is_conditional=model.has_droppable_cond, has_null_cond=model.label_dropout > 0
    )
    if incompatibility is not None:
        raise UserError(incompatibility)
    if guidance.needs_label and not spec.num_classes:
        raise UserError(f"{type(guidance).__name__} needs labels, but data set '{spec.name}' has none.")
    for name, guide in guidance.guides().items():
        guide_spec = getattr(guide, "spec", spec)
        if (guide_spec.shape, guide_spec.num_classes) != (spec.shape, spec.num_classes):
            raise UserError(
                f"model.guidance.{name} was trained on data set '{guide_spec.name}', whose image shape or number of"
                f" classes differs from that of '{spec.name}'."
            )
        if getattr(guide, "conditional", False) and not (model.conditional or guidance.needs_label):
            raise UserError(
                f"model.guidance.{name} needs a class for each image, but this model is unconditional: train both with"
                " model.conditional=true, or both without."
            )
        if missing := sorted(getattr(guide_spec, "conditions", {}).keys() - spec.conditions.keys()):
            raise UserError(
                f"model.guidance.{name} was trained with the condition '{missing[0]}', which the data of this model do"
                f" not have: add +data/condition={missing[0]}."
            )
    if not any(True for _ in model.schedule.parameters()):  # a learned schedule is known once its weights are loaded
        check_same_schedule(model.schedule, guidance)


def check_same_latents(space: Latents | PixelSpace, guidance: Guidance) -> None:
    """Raise `UserError` if a guiding model works on the latents of a different autoencoder.

    This is known only once weights are loaded, since autoencoders with the same latent shape have different latents.
    """
    for name, guide in guidance.guides().items():
        guide_space = getattr(guide, "space", None)
        if (
            isinstance(guide_space, Latents)
            and isinstance(space, Latents)
            and not guide_space.has_same_whitening(space)
        ):
            raise UserError(
                f"model.guidance.{name} works on the latents of another autoencoder: train both models on the same"
                " one (model.latent.autoencoder_run=DIR)."
            )
