"""What every family of model promises, and what the trainer and the evaluator may rely on.

The trainer and the evaluator ask for these capabilities; they never ask for a family's name.
"""

from __future__ import annotations

import inspect
import os
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.hyperparameters import (
    AVERAGED,
    as_config,
    as_path,
    constructor_arguments,
    from_config,
    object_at,
    read_checkpoint,
)
from gencompare.rng import RandomSource, default_generator, generator

Cond = Mapping[str, Tensor]
"""Conditions of a batch by name, each (n, ...): ``label`` (n,) int64, and whatever else a data set gives."""


@dataclass(frozen=True)
class DataSpec:
    """What a model must know of the data it will be trained on."""

    name: str
    shape: tuple[int, int, int]
    """(C, H, W) of the tensors that the datamodule gives, padding included."""
    num_classes: int = 0
    """0 where the images carry no labels."""
    num_levels: int | None = 256
    """How many values a pixel can take (bits/dim dequantises at this number); None for continuous data."""
    padding: int = 0
    """Pixels added on each side of the real image, always -1 (black)."""
    conditions: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    """Shape of one row of each condition beside the label: ``low_res`` (c, h, w), ``embedding`` (d,)."""

    def __post_init__(self) -> None:
        # From a checkpoint they come as lists.
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "conditions", {name: tuple(shape) for name, shape in self.conditions.items()})

    def mask(self, device: torch.device | str | None = None) -> Tensor:
        """(1, H, W) float: 1 on real pixels, 0 on padding."""
        mask = torch.ones(1, *self.shape[1:], device=device)
        if self.padding:
            p = self.padding
            mask[:] = 0
            mask[:, p:-p, p:-p] = 1
        return mask

    def crop(self, x: Tensor) -> Tensor:
        """(n, C, H, W) without the padding: what would be written to disk."""
        p = self.padding
        return x[..., p:-p, p:-p] if p else x

    @property
    def dims(self) -> int:
        """Number of real values in one image: the divisor of bits/dim."""
        c, h, w = self.shape
        return c * (h - 2 * self.padding) * (w - 2 * self.padding)


@dataclass(frozen=True)
class LikelihoodEstimate:
    """A way in which a model can score images.

    ``terms(x, cond, generator) -> {name: (n,)}``: what adds up to -log2 p per real dimension of the discrete data
    (``num_levels`` values a pixel). ``kind`` says how far to trust it: ``exact``, ``bound`` (never better than the
    truth) or ``estimate``.
    """

    kind: str
    terms: Callable[[Tensor, Cond, torch.Generator], dict[str, Tensor]]

    def bits_per_dim(self, x: Tensor, cond: Cond, generator: torch.Generator) -> Tensor:
        """The sum of the terms, (n,)."""
        return torch.stack(list(self.terms(x, cond, generator).values())).sum(0)


@runtime_checkable
class SupportsReconstruction(Protocol):
    """A model with an encoder: ``reconstruct`` maps (n, C, H, W) to the same shape."""

    def reconstruct(self, x: Tensor, cond: Cond, *, generator: torch.Generator) -> Tensor: ...


@runtime_checkable
class LatentSpace(Protocol):
    """A frozen autoencoder whose whitened latents another model may be trained on."""

    latent_shape: tuple[int, int, int]

    def encode(self, x: Tensor) -> Tensor: ...

    def decode(self, z: Tensor) -> Tensor: ...


@runtime_checkable
class SupportsClassification(Protocol):
    """A model that gives class logits (n, num_classes) and features (n, d) of images."""

    def logits(self, x: Tensor) -> Tensor: ...

    def features(self, x: Tensor) -> Tensor: ...


@runtime_checkable
class SupportsVisualization(Protocol):
    """A model that can show more than samples: interpolation, reconstruction, what it does on the way."""

    def pictures(self, x: Tensor, cond: Cond, *, generator: torch.Generator) -> dict[str, Tensor]:
        """Pictures by name, each (rows, columns, C, H, W); about images ``x`` (n, C, H, W) where it needs some.

        Values beyond [-1, 1] are cut off when they are shown.
        """
        ...


@runtime_checkable
class SupportsNoising(Protocol):
    """A model that has a noise schedule, which comparisons draw."""

    def noise_schedule(self) -> dict[str, list[float]]:
        """``t`` in [0, 1] and ``log_snr`` there, as plain numbers."""
        ...


def unpack_batch(batch: Any, spec: DataSpec) -> tuple[Tensor, Cond]:
    """Images (n, C, H, W), float in [-1, 1], and their conditions, of a batch in any of the usual forms.

    ``x`` alone; ``(x, y)`` with class indices y (n,), or with a mapping of conditions in place of y; a mapping with the
    images as ``image`` and conditions by name, the class as ``label``. Raises `UserError` for any other.
    """
    cond: Any = {}
    if isinstance(batch, Mapping):
        cond = {name: value for name, value in batch.items() if name != "image"}
        x = batch.get("image")
    elif isinstance(batch, Tensor):
        x = batch
    else:
        x, *rest = batch
        cond = rest[0] if rest else {}
    if isinstance(cond, Tensor):
        cond = {"label": cond}
    if not (isinstance(x, Tensor) and isinstance(cond, Mapping)):
        raise UserError(
            "A batch is images x, (x, class indices), (x, {condition: tensor}) or {'image': x, 'label': class indices};"
            f" this one is {type(batch).__name__}."
        )
    if x.dim() != 4 or tuple(x.shape[1:]) != spec.shape or not x.is_floating_point():
        raise UserError(
            f"Images of '{spec.name}' are float tensors (n, {', '.join(map(str, spec.shape))}) in [-1, 1]; this batch"
            f" holds {x.dtype} of shape {tuple(x.shape)}."
        )
    if "label" in cond and (cond["label"].shape != (len(x),) or cond["label"].is_floating_point()):
        raise UserError(
            f"Labels are class indices, int64 of shape ({len(x)},); this batch has {cond['label'].dtype} of shape"
            f" {tuple(cond['label'].shape)}."
        )
    return x, cond


class TrainedModel(pl.LightningModule):
    """What the trainer needs of a model, generative or not.

    A model with one optimiser writes ``losses``; the rest has a default. One that optimises by hand (a GAN) or in
    closed form overrides ``fit_batch``. It works under any Trainer, with batches of any usual form (`unpack_batch`).

    Args:
        spec: shape, classes and levels of the data.
        conditional: whether ``cond["label"]`` steers the model.
        optimizer: a factory ``parameters -> Optimizer``.
        lr_schedule: ``(step, progress in [0, 1]) -> factor`` on the optimiser's own rate; None keeps it constant.
        grad_clip: the largest global norm of a gradient; None leaves gradients alone.
    """

    takes: ClassVar[frozenset[str]] = frozenset()
    """The conditions beside the label that can steer this family."""

    closed_form = False
    """Whether the first step fits the whole training split, which ends training whatever the budget."""

    def __init__(
        self,
        spec: DataSpec,
        *,
        conditional: bool = False,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        lr_schedule: Callable[[int, float], float] | None = None,
        grad_clip: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(conditional, bool):
            raise UserError(f"model.conditional={conditional}: choose true or false.")
        if conditional and not spec.num_classes:
            raise UserError(
                f"model.conditional=true needs labels, and data '{spec.name}' has none: use model.conditional=false."
            )
        if unfit := sorted(spec.conditions.keys() - self.takes):
            raise UserError(
                f"{type(self).__name__} takes no condition '{unfit[0]}', which data.conditions gives:"
                + (f" it takes {' and '.join(sorted(self.takes))}." if self.takes else " use a diffusion model for it.")
            )
        self.spec = spec
        self.conditional = conditional
        self.optimizer_factory = optimizer
        self.lr_schedule = lr_schedule
        self.grad_clip = grad_clip
        self.draws: RandomSource | None = None
        """Random numbers of the step, if a callback (`TrainingClock`) sets them; None: those of the global generator."""
        self._progress: float | None = None
        given = constructor_arguments(self, inspect.currentframe())
        # Plain data, so that a checkpoint needs no unpickling (`save_hyperparameters` would keep the objects).
        self.hparams.update({"_target_": as_path(type(self)), **as_config(given)})

    @property
    def step_kind(self) -> str:
        """The kind of the step that comes next, where kinds cost unlike FLOPs; told by `progress` and the state."""
        return ""

    @property
    def doubtful(self) -> bool:
        """Whether the last step may be the start of a collapse: no good checkpoint is replaced while it is."""
        return False

    def losses(self, x: Tensor, cond: Cond, draws: RandomSource) -> dict[str, Tensor]:
        """Per-sample figures (n,), of which ``loss`` is minimised; the rest is logged."""
        raise NotImplementedError(f"{type(self).__name__} writes neither losses() nor fit_batch()")

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | os.PathLike[str], map_location: Any = "cpu", **arguments: Any
    ) -> Self:
        """The model of a checkpoint, in eval mode, with its averaged weights where it holds some.

        Args:
            checkpoint_path: written by this project, or by any Trainer that ran one of its models.
            map_location: where the weights go.
            arguments: constructor arguments to use in place of those in the checkpoint.

        Raises:
            UserError: for a missing or damaged file, one of another class, or arguments of foreign classes.
        """
        stored = read_checkpoint(checkpoint_path, map_location)
        config = dict(stored.get("hyper_parameters") or {})
        if "_target_" not in config:
            raise UserError(f"{checkpoint_path} does not say how to build its model: open its run folder instead.")
        found = object_at(config.pop("_target_"))
        if not issubclass(found, cls):
            raise UserError(f"{checkpoint_path} holds a {found.__name__}, not a {cls.__name__}.")
        built = {name: from_config(each, name) for name, each in config.items() if name not in arguments}
        model = found(**built, **arguments)
        model.on_load_checkpoint(stored)
        model.load_state_dict({**stored["state_dict"], **stored.get(AVERAGED, {})})
        return model.eval()

    def on_fit_start(self) -> None:
        # Lightning trains a model in the mode that it finds it in, and a loaded one is in eval mode.
        self.train()

    @property
    def progress(self) -> float:
        """The share of training that is done, 0 to 1: of the budget where a callback (`TrainingClock`) sets it, else
        ``global_step / max_steps`` of the Trainer; 0 without one and where it has no end."""
        if self._progress is not None:
            return self._progress
        if not self.attached or not self.trainer.training:
            return 0.0
        return min(1.0, self.trainer.global_step / self.trainer.estimated_stepping_batches)

    @progress.setter
    def progress(self, value: float | None) -> None:
        self._progress = value

    @property
    def attached(self) -> bool:
        """Whether a Trainer runs this model."""
        return isinstance(self._trainer, pl.Trainer)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """One step on a batch (`unpack_batch` has its forms): logs every metric of `fit_batch` as ``train/<name>``."""
        x, cond = unpack_batch(batch, self.spec)
        draws = self.draws or RandomSource.whole(default_generator(x.device), len(x))
        metrics = self.fit_batch(x, self.used(cond), draws)
        self._log(metrics, "train", len(x))
        if not self.automatic_optimization:
            self._step_schedules()
        return metrics

    def fit_batch(self, x: Tensor, cond: Cond, draws: RandomSource) -> dict[str, Tensor]:
        """What a training step does with images (n, C, H, W) and the conditions that steer this model.

        By default the means over the batch of `losses`, of which Lightning minimises ``loss``. A family with several
        optimisers takes its steps here and returns detached means.
        """
        return {name: value.mean() for name, value in self.losses(x, cond, draws).items()}

    def validation_figures(self, x: Tensor, cond: Cond, draws: RandomSource) -> dict[str, Tensor]:
        """Per-sample figures (n,) on held-out images; empty for a model that has none."""
        return self.losses(x, self.used(cond), draws)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs the means of `validation_figures` over the split as ``val/<name>``, with the same noise each time."""
        self._evaluation_step(batch, batch_idx, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """As `validation_step`, as ``test/<name>``."""
        self._evaluation_step(batch, batch_idx, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Reconstructions of a batch, or logits; samples of a model that draws them."""
        x, cond = unpack_batch(batch, self.spec)
        if isinstance(self, SupportsClassification):
            return self.logits(x)
        if isinstance(self, SupportsReconstruction):
            return self.reconstruct(x, self.used(cond), generator=generator(x.device, "predict", batch_idx))
        raise UserError(f"{type(self).__name__} neither draws, classifies nor reconstructs images: nothing to predict.")

    def _evaluation_step(self, batch: Any, batch_idx: int, stage: str) -> None:
        x, cond = unpack_batch(batch, self.spec)
        draws = RandomSource.whole(generator(x.device, stage, batch_idx), len(x))
        metrics = {name: value.mean() for name, value in self.validation_figures(x, cond, draws).items()}
        self._log(metrics, stage, len(x))

    def _log(self, metrics: Mapping[str, Tensor], stage: str, batch_size: int) -> None:
        if self.attached:
            named = {f"{stage}/{name}": value.detach().float() for name, value in metrics.items()}
            # Where the callbacks of a run set the draws, `Curve` logs means over many steps.
            logger = stage != "train" or self.draws is None
            self.log_dict(named, batch_size=batch_size, sync_dist=stage != "train", logger=logger)

    def build_optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimisers in the order in which `fit_batch` uses them; none of a model that is fitted in closed form."""
        if self.optimizer_factory is None:
            return []
        return [self.optimizer_factory(p for p in self.parameters() if p.requires_grad)]

    def configure_optimizers(self) -> Any:
        """The optimisers, each with the learning-rate schedule of the model, stepped after every training step."""
        optimizers = self.build_optimizers()
        if not optimizers:
            return None
        rule = self.lr_schedule
        if rule is None:
            return optimizers if len(optimizers) > 1 else optimizers[0]

        def factor(step: int) -> float:
            return rule(step, self.progress)

        schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
        return optimizers, [{"scheduler": schedule, "interval": "step"} for schedule in schedules]

    def _step_schedules(self) -> None:
        """Lightning steps the schedules of models with automatic optimisation alone."""
        schedules = self.lr_schedulers() if self.attached else None
        with warnings.catch_warnings():
            # A discriminator that joins late has taken no step yet.
            warnings.filterwarnings("ignore", r".*`lr_scheduler.step\(\)` before.*")
            for schedule in schedules if isinstance(schedules, list) else [schedules]:
                if schedule is not None:
                    schedule.step()  # type: ignore[call-arg]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.grad_clip is not None:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(params, self.grad_clip)

    def averaged_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters, by their state-dict name, of which the trainer keeps a moving average for sampling."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def autoencoder(self) -> SupportsReconstruction | None:
        """What encodes images and gives them back: the model itself, or the frozen autoencoder that it works on."""
        return self if isinstance(self, SupportsReconstruction) else None

    @property
    def trained_against(self) -> list[str]:
        """Names and SHA-256 of networks from elsewhere that the loss looks at: they may not measure the model."""
        return []

    @property
    def uses(self) -> tuple[str, ...]:
        """Names of the conditions that steer this model: the label of a conditional one, and what the data give
        beside it."""
        return (*(["label"] if self.conditional else []), *self.spec.conditions)

    def used(self, cond: Cond | None) -> Cond:
        """The conditions that steer this model."""
        return {name: value for name, value in (cond or {}).items() if name in self.uses}

    def label(self, cond: Cond) -> Tensor | None:
        """The class of each image, (n,), that steers a conditional model; None for any other."""
        if not self.conditional:
            return None
        if "label" not in cond:
            raise UserError(
                f"This {type(self).__name__} is conditional: it needs a class for each image, cond['label']."
            )
        return cond["label"]


class GenerativeModel(TrainedModel):
    """A family of generative model of images in [-1, 1]: a `TrainedModel` that can also ``sample``."""

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """As many samples as the batch has images, of the same conditions."""
        x, cond = unpack_batch(batch, self.spec)
        # Some families need gradients to sample, and Lightning predicts in inference mode.
        with torch.inference_mode(False):
            cond = {name: value.clone() for name, value in self.used(cond).items()}
            return self.sample(len(x), cond, generator=generator(x.device, "predict", batch_idx))

    @abstractmethod
    def sample(self, n: int, cond: Cond | None = None, *, generator: torch.Generator) -> Tensor:
        """``n`` images (n, C, H, W), float32 in [-1, 1], a function of weights, ``cond`` and ``generator`` alone."""

    def sampling_description(self) -> str:
        """How ``sample`` works, in words for a table: the sampler and its settings."""
        return "one pass"

    def likelihoods(self) -> dict[str, LikelihoodEstimate]:
        """Ways to score images in bits/dim, by name; empty when the composition has none."""
        return {}

    def counted_networks(self) -> dict[str, nn.Module]:
        """The networks whose calls are counted while sampling (NFE), by name."""
        return {}


load_from_checkpoint = TrainedModel.load_from_checkpoint
"""The model of a checkpoint, of whatever family it is."""
