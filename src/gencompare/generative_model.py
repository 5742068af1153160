"""Base classes of all models, and the optional capabilities that training and evaluation query.

Training and evaluation test for capabilities (`SupportsReconstruction`, `GenerativeModel.likelihoods`, ...), never for
a model class.
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

from gencompare.batch_splitting import micro_batches
from gencompare.checkpoint_files import EMA_KEY, read_checkpoint
from gencompare.distributed import average_gradients
from gencompare.errors import UserError, check_non_negative, check_positive
from gencompare.hyperparameters import (
    constructor_arguments,
    from_config,
    import_object,
    qualified_name,
    to_config,
)
from gencompare.rng import RandomSource, default_generator, generator
from gencompare.sharding import is_sharded, local_tensor, shard, total_norm

Cond = Mapping[str, Tensor]
"""Conditions of a batch by name, each (n, ...): ``label`` (n,) int64, and others that the data module provides."""


@dataclass(frozen=True)
class DataSpec:
    """Shapes and value ranges of the data that a model is trained on."""

    name: str
    shape: tuple[int, int, int]
    """Shape (C, H, W) of the images that the data module returns, including padding."""
    num_classes: int = 0
    """Number of classes; 0 if the images have no labels."""
    num_bins: int | None = 256
    """Number of values that a pixel can take, 256 for uint8 images; None for continuous data."""
    padding: int = 0
    """Pixels added on each side of the image, always -1 (black)."""
    conditions: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    """Per-sample shape of each condition other than the label: ``low_res`` (c, h, w), ``embedding`` (d,)."""

    def __post_init__(self) -> None:
        # A checkpoint stores tuples as lists.
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "conditions", {name: tuple(shape) for name, shape in self.conditions.items()})

    def mask(self, device: torch.device | str | None = None) -> Tensor:
        """Return a mask (1, H, W) float: 1 inside the image, 0 on padding."""
        mask = torch.ones(1, *self.shape[1:], device=device)
        if self.padding:
            p = self.padding
            mask[:] = 0
            mask[:, p:-p, p:-p] = 1
        return mask

    def crop(self, x: Tensor) -> Tensor:
        """Remove the padding of images (n, C, H, W)."""
        p = self.padding
        return x[..., p:-p, p:-p] if p else x

    def pad(self, x: Tensor) -> Tensor:
        """Add the padding to images without it, the inverse of `crop`."""
        return nn.functional.pad(x, (self.padding,) * 4, value=-1.0) if self.padding else x

    @property
    def num_values(self) -> int:
        """Number of values in one image without padding, the divisor in bits/dim."""
        c, h, w = self.shape
        return c * (h - 2 * self.padding) * (w - 2 * self.padding)


@dataclass(frozen=True)
class LikelihoodEstimate:
    r"""A method to compute the bits/dim of discrete data, :math:`-\log_2 p(x) / d` with d = ``spec.num_values``."""

    kind: str
    """``exact``, ``bound`` (an upper bound on the true bits/dim) or ``estimate``. The density of a model of continuous
    variables is exact even if discrete pixels have to be dequantised (see `gencompare.dequantization`)."""
    terms: Callable[[Tensor, Cond, torch.Generator], dict[str, Tensor]]
    """``(x, cond, generator) -> {name: (n,)}``: the terms that add up to bits/dim."""
    method: str = "discrete"
    """How pixels are treated, in a few words: ``discrete`` if the model has probabilities of their values,
    ``uniform dequantisation``, ``softmax decoder``, or ``continuous`` if the data are."""

    def bits_per_dim(self, x: Tensor, cond: Cond, generator: torch.Generator) -> Tensor:
        """Sum the terms, (n,)."""
        return torch.stack(list(self.terms(x, cond, generator).values())).sum(0)


@runtime_checkable
class SupportsReconstruction(Protocol):
    """A model with an encoder and a decoder."""

    def reconstruct(self, x: Tensor, cond: Cond, *, generator: torch.Generator) -> Tensor:
        """Encode and decode images (n, C, H, W). Return images of the same shape."""
        ...


@runtime_checkable
class LatentSpace(Protocol):
    """A frozen autoencoder that provides whitened latents for training another model."""

    latent_shape: tuple[int, int, int]
    """Shape (c, h, w) of the latents."""

    def encode(self, x: Tensor) -> Tensor:
        """Encode images (n, C, H, W) to latents (n, c, h, w)."""
        ...

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents (n, c, h, w) to images (n, C, H, W)."""
        ...


@runtime_checkable
class SupportsClassification(Protocol):
    """A classifier of images (n, C, H, W)."""

    def logits(self, x: Tensor) -> Tensor:
        """Compute class logits, (n, num_classes)."""
        ...

    def features(self, x: Tensor) -> Tensor:
        """Compute the features before the logits, (n, d)."""
        ...


@runtime_checkable
class SupportsVisualization(Protocol):
    """A model that can render interpolations, reconstructions or sampling trajectories."""

    def visualize(self, x: Tensor, cond: Cond, *, generator: torch.Generator) -> dict[str, Tensor]:
        """Return image grids by name, each (rows, columns, C, H, W). Values are clipped to [-1, 1] for display.

        Args:
            x: images (n, C, H, W) to reconstruct, interpolate or compare with.
            cond: conditions of ``x``.
            generator: source of all random numbers.
        """
        ...


@runtime_checkable
class SupportsNoising(Protocol):
    """A model with a noise schedule that comparisons can plot."""

    def noise_schedule(self) -> dict[str, list[float]]:
        """Return times ``t`` in [0, 1] and ``log_snr`` at these times."""
        ...


def unpack_batch(batch: Any, spec: DataSpec) -> tuple[Tensor, Cond]:
    """Split a batch into images (n, C, H, W), float in [-1, 1], and conditions.

    Args:
        batch: one of ``x``; ``(x, y)`` with class indices y (n,); ``(x, cond)`` with a mapping of conditions; or a
            mapping with the key ``image`` and conditions by name, the class as ``label``.
        spec: specification of the expected data.

    Raises:
        UserError: the batch has a different form, or its images or labels have a different shape or dtype.
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
            "A batch must be images x, (x, class indices), (x, {condition: tensor}) or"
            " {'image': x, 'label': class indices};"
            f" got {type(batch).__name__}."
        )
    if x.dim() != 4 or tuple(x.shape[1:]) != spec.shape or not x.is_floating_point():
        raise UserError(
            f"Images of '{spec.name}' must be float tensors (n, {', '.join(map(str, spec.shape))}) in [-1, 1]; got"
            f" {x.dtype} of shape {tuple(x.shape)}."
        )
    if "label" in cond and (cond["label"].shape != (len(x),) or cond["label"].is_floating_point()):
        raise UserError(
            f"Labels must be class indices, int64 of shape ({len(x)},); got {cond['label'].dtype} of shape"
            f" {tuple(cond['label'].shape)}."
        )
    return x, cond


class TrainedModel(pl.LightningModule):
    """Base class of all models, generative or not.

    A model with a single optimiser implements `losses`. A model with manual optimisation (a GAN) or a closed-form
    solution overrides `fit_batch`. Both train under any Lightning Trainer, with any batch that `unpack_batch` accepts.

    Args:
        spec: shape, number of classes and value range of the data.
        conditional: whether the model is conditioned on ``cond["label"]``.
        optimizer: a factory ``parameters -> Optimizer``.
        lr_schedule: ``(step, progress in [0, 1]) -> factor`` that multiplies the learning rate of the optimiser; None
            keeps the learning rate constant.
        grad_clip: maximum global gradient norm; None disables clipping.
    """

    supported_conditions: ClassVar[frozenset[str]] = frozenset()
    """Conditions other than the label that this model supports."""

    closed_form = False
    """Whether the first step fits the whole training split and ends training, regardless of the budget."""

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
            raise UserError(f"model.conditional={conditional} must be true or false.")
        if conditional and not spec.num_classes:
            raise UserError(
                f"model.conditional=true needs labels, but data set '{spec.name}' has none: use"
                " model.conditional=false."
            )
        if unsupported := sorted(spec.conditions.keys() - self.supported_conditions):
            raise UserError(
                f"{type(self).__name__} does not support the condition '{unsupported[0]}' in data.conditions: "
                + (
                    f"it supports {' and '.join(sorted(self.supported_conditions))}."
                    if self.supported_conditions
                    else "use a diffusion model."
                )
            )
        check_positive("model.grad_clip", grad_clip, null="no clipping")
        self.spec = spec
        self.conditional = conditional
        self.optimizer_factory = optimizer
        self.lr_schedule = lr_schedule
        self.grad_clip = grad_clip
        self.rng: RandomSource | None = None
        """Random numbers of the current step, set by `TrainingClock`; None uses PyTorch's default generator."""
        self.num_micro_batches = 1
        """Number of parts in which `micro_batched_networks` process a batch in training."""
        self.fused_optimizer = False
        """Whether optimisers that have a fused kernel use it, see `new_optimizer`."""
        self._progress: float | None = None
        arguments = constructor_arguments(self, inspect.currentframe())
        # Plain data, so that a checkpoint can be read without unpickling; `save_hyperparameters` would store objects.
        self.hparams.update({"_target_": qualified_name(type(self)), **to_config(arguments)})

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Type of the weights: float32, or float64 under ``trainer.precision=64-true``."""
        return super().dtype  # type: ignore[return-value]

    @property
    def step_kind(self) -> str:
        """Kind of the next step, for models whose steps differ in FLOPs, which are counted once per kind.

        It depends only on the state of the model, on `progress` and on `rng`.
        """
        return ""

    @property
    def skips_bad_gradients(self) -> bool:
        """Whether the model itself skips steps whose gradient is not finite or too large."""
        return False

    @property
    def possibly_collapsed(self) -> bool:
        """Whether the last steps look like the start of a collapse. If so, no checkpoint is overwritten before the end
        of the budget."""
        return False

    def check_batch_size(self, batch_size: int, processes: int) -> None:
        """Raise `UserError` unless the model can train on batches of this size in total, before training starts."""

    def losses(self, x: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        """Compute per-sample metrics.

        Args:
            x: images (n, C, H, W) in [-1, 1].
            cond: conditions of the images, already restricted to `condition_names`.
            rng: the only source of random numbers to use.

        Returns:
            Metrics by name, each (n,). The mean of ``loss`` is minimised; the others are logged.
        """
        raise NotImplementedError(f"{type(self).__name__} implements neither losses() nor fit_batch()")

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | os.PathLike[str], map_location: Any = "cpu", **arguments: Any
    ) -> Self:
        """Load a model in eval mode, with its EMA weights if the checkpoint has them.

        Args:
            checkpoint_path: a checkpoint of this project, or of any Trainer that trained one of its models.
            map_location: device of the weights.
            arguments: constructor arguments that replace those in the checkpoint.

        Raises:
            UserError: the file is missing or corrupted, contains a different class, or names code from other packages.
        """
        stored = read_checkpoint(checkpoint_path, map_location)
        model = build_from_config(stored.get("hyper_parameters") or {}, str(checkpoint_path), **arguments)
        if not isinstance(model, cls):
            raise UserError(f"{checkpoint_path} contains a {type(model).__name__}, not a {cls.__name__}.")
        model.on_load_checkpoint(stored)
        model.load_state_dict({**stored["state_dict"], **stored.get(EMA_KEY, {})})
        return model.eval()

    def on_fit_start(self) -> None:
        # Lightning does not switch to train mode, and a loaded model is in eval mode.
        self.train()

    @property
    def progress(self) -> float:
        """Fraction of training that is done, in [0, 1].

        This is the spent fraction of the budget if `TrainingClock` sets it, otherwise the larger of the fractions of
        the Trainer's ``max_steps`` and ``max_epochs``. It is 0 outside training or without a limit.
        """
        if self._progress is not None:
            return self._progress
        if not self.has_trainer or not self.trainer.training:
            return 0.0
        trainer, done = self.trainer, 0.0
        if trainer.max_steps > 0:  # counts the steps of all optimisers, like global_step
            done = trainer.global_step / trainer.max_steps
        if trainer.max_epochs and trainer.max_epochs > 0 and trainer.num_training_batches:
            batch = trainer.fit_loop.epoch_loop.batch_progress.current.ready
            done = max(done, (trainer.current_epoch + batch / trainer.num_training_batches) / trainer.max_epochs)
        return min(1.0, done)

    @progress.setter
    def progress(self, value: float | None) -> None:
        self._progress = value

    @property
    def has_trainer(self) -> bool:
        """Whether the model is attached to a Trainer."""
        return isinstance(self._trainer, pl.Trainer)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Call `fit_batch` and log each of its metrics as ``train/<name>``."""
        x, cond = unpack_batch(batch, self.spec)
        rng = self.rng or RandomSource.for_batch(default_generator(x.device), len(x))
        with micro_batches(self.micro_batched_networks(), self.num_micro_batches):
            metrics = self.fit_batch(x, self.select_conditions(cond), rng)
        self._log(metrics, "train", len(x))
        if not self.automatic_optimization:
            self._step_lr_schedulers()
        return metrics

    def fit_batch(self, x: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        """Run one training step on images (n, C, H, W) and return scalar metrics by name.

        By default, return the batch means of `losses`, of which Lightning minimises ``loss``. A model with manual
        optimisation takes its optimiser steps here and returns detached means.
        """
        losses = self.losses(x, cond, rng)
        method = f"{type(self).__name__}.losses"
        if "loss" not in losses:
            raise UserError(f"{method} must return 'loss', which is minimised; it returned {', '.join(losses)}.")
        for name, value in losses.items():
            if value.shape != (len(x),):
                raise UserError(
                    f"{method} must return one value per image, ({len(x)},), but '{name}' has shape"
                    f" {tuple(value.shape)}."
                )
        return {name: value.mean() for name, value in losses.items()}

    def validation_metrics(self, x: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        """Compute per-sample metrics (n,) on held-out images, by name. The result may be empty."""
        return self.losses(x, self.select_conditions(cond), rng)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the means of `validation_metrics` as ``val/<name>``, with the same random numbers in each epoch."""
        self._evaluation_step(batch, batch_idx, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the means of `validation_metrics` as ``test/<name>``."""
        self._evaluation_step(batch, batch_idx, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the logits if the model is a classifier, or reconstructions if it has an encoder and a decoder."""
        x, cond = unpack_batch(batch, self.spec)
        if isinstance(self, SupportsClassification):
            return self.logits(x)
        if isinstance(self, SupportsReconstruction):
            return self.reconstruct(
                x, self.select_conditions(cond), generator=generator(x.device, "predict", batch_idx)
            )
        raise UserError(f"{type(self).__name__} cannot predict: it does not sample, classify or reconstruct images.")

    def _evaluation_step(self, batch: Any, batch_idx: int, stage: str) -> None:
        x, cond = unpack_batch(batch, self.spec)
        rng = RandomSource.for_batch(generator(x.device, stage, batch_idx), len(x))
        metrics = {name: value.mean() for name, value in self.validation_metrics(x, cond, rng).items()}
        self._log(metrics, stage, len(x))

    def _log(self, metrics: Mapping[str, Tensor], stage: str, batch_size: int) -> None:
        if self.has_trainer:
            prefixed = {f"{stage}/{name}": value.detach().float() for name, value in metrics.items()}
            # If `TrainingClock` sets `rng`, `MetricLogger` logs means over several steps instead.
            logger = stage != "train" or self.rng is None
            self.log_dict(prefixed, batch_size=batch_size, sync_dist=stage != "train", logger=logger)

    def build_optimizers(self) -> list[torch.optim.Optimizer]:
        """Create the optimisers, in the order of `fit_batch`. Return an empty list if there is no optimiser factory."""
        if self.optimizer_factory is None:
            return []
        factors = self.lr_factors()
        parameters = {name: p for name, p in self.named_parameters() if p.requires_grad}
        if not factors:
            return [self.new_optimizer(parameters.values())]
        check_adam(self.optimizer_factory)
        values = sorted({1.0, *factors.values()}, reverse=True)
        groups = [[p for name, p in parameters.items() if factors.get(name, 1.0) == value] for value in values]
        optimizer = self.new_optimizer([{"params": group} for group in groups])
        for group, value in zip(optimizer.param_groups, values, strict=True):
            group["lr"] *= value
        return [optimizer]

    def lr_factors(self) -> dict[str, float]:
        """Return a factor of the learning rate by name of the parameter, where it is not 1."""
        return {}

    def new_optimizer(self, parameters: Iterable[Any]) -> torch.optim.Optimizer:
        """Create an optimiser with the optimiser factory, with its fused kernel if it has one and `fused_optimizer`.

        Args:
            parameters: parameters, or groups of them.
        """
        factory = self.optimizer_factory
        assert factory is not None
        options = getattr(factory, "keywords", {})
        if not self.fused_optimizer or "fused" in options or options.get("foreach") or options.get("differentiable"):
            return factory(parameters)
        has_fused = "fused" in inspect.signature(factory).parameters
        return factory(parameters, **({"fused": True} if has_fused else {}))

    def check_optimizers(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Raise `UserError` for settings that torch accepts although they reverse or disable learning."""
        if self.closed_form:
            return
        optimizers = list(optimizers)
        for name, step in ((type(each).__name__, inspect.signature(each.step)) for each in optimizers):
            closure = step.parameters.get("closure")
            if closure is not None and closure.default is inspect.Parameter.empty:
                raise UserError(
                    f"model.optimizer: {name} evaluates the loss several times in a step, each time with other noise:"
                    " use an optimiser that does not need a closure, such as torch.optim.Adam."
                )
            if name == "SparseAdam":
                raise UserError(
                    "model.optimizer: SparseAdam takes sparse gradients, which no model here has: use torch.optim.Adam."
                )
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            check_positive("model.optimizer.lr", float(group["lr"]))
            check_non_negative("model.optimizer.weight_decay", group.get("weight_decay") or 0)
            for name in ("momentum", "dampening"):
                if not 0 <= (group.get(name) or 0) < 1:
                    raise UserError(f"model.optimizer.{name}={group[name]} must be in [0, 1).")
            if group.get("maximize"):
                raise UserError("model.optimizer.maximize=true would maximise the loss: use maximize=false.")

    def configure_optimizers(self) -> Any:
        """Create the optimisers and their learning-rate schedulers, which are updated after every training step."""
        optimizers = self.build_optimizers()
        if not optimizers:
            return None
        self.check_optimizers(optimizers)
        lr_schedule = self.lr_schedule
        if lr_schedule is None:
            return optimizers if len(optimizers) > 1 else optimizers[0]

        def factor(step: int) -> float:
            return lr_schedule(step, self.progress)

        schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
        return optimizers, [{"scheduler": scheduler, "interval": "step"} for scheduler in schedulers]

    def _step_lr_schedulers(self) -> None:
        """Step the schedulers under manual optimisation, where Lightning does not."""
        schedulers = self.lr_schedulers() if self.has_trainer else None
        with warnings.catch_warnings():
            # The optimiser of a discriminator that starts late has not taken a step yet.
            warnings.filterwarnings("ignore", r".*`lr_scheduler.step\(\)` before.*")
            for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
                if scheduler is not None:
                    scheduler.step()  # type: ignore[call-arg]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.grad_clip is not None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            factor = (self.grad_clip / (total_norm(gradients) + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                local_tensor(gradient).mul_(factor.to(gradient.device))

    def configure_model(self) -> None:
        """Divide the weights of `sharded_network` among the processes, under ``trainer=fsdp``."""
        network = self.sharded_network()
        if self.device_mesh is not None and network is not None and not self.is_sharded:
            shard(network, self.device_mesh["data_parallel"])

    def on_after_backward(self) -> None:
        if self.is_sharded:
            average_gradients(p for p in self.parameters() if not is_sharded(p))

    def sharded_network(self) -> nn.Module | None:
        """Return the network whose weights ``trainer=fsdp`` divides among processes, or None.

        It computes everything in ``forward``, and lists the parts that do most of the work as ``blocks``.
        """
        return None

    def blocks(self) -> list[nn.Module]:
        """Return the blocks of `sharded_network`, which ``trainer.compile`` compiles, or an empty list."""
        network: Any = self.sharded_network()
        return [] if network is None else list(network.blocks)

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are divided among processes."""
        network = self.sharded_network()
        return network is not None and is_sharded(network)

    def micro_batched_networks(self) -> list[nn.Module]:
        """Return the networks whose calls in training may be split along the batch, to save memory.

        They map each sample on its own: without batch normalisation, and not in functions of the caller. Empty if the
        model has no such networks.
        """
        return []

    def averaged_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters, by state-dict name, whose exponential moving average is used for sampling."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def autoencoder(self) -> SupportsReconstruction | None:
        """Return the model if it reconstructs images, or the frozen autoencoder of its latent space, or None."""
        return self if isinstance(self, SupportsReconstruction) else None

    @property
    def perceptual_networks(self) -> list[str]:
        """Names and SHA-256 of pretrained networks in the loss. Metrics of their features are not ranked."""
        return []

    @property
    def condition_names(self) -> tuple[str, ...]:
        """Names of the conditions that the model uses: the label if `conditional`, and those of ``spec.conditions``."""
        return (*(["label"] if self.conditional else []), *self.spec.conditions)

    def select_conditions(self, cond: Cond | None) -> Cond:
        """Restrict conditions to those that the model uses, and cast float64 models' conditions to float64."""
        used = {name: value for name, value in (cond or {}).items() if name in self.condition_names}
        if self.dtype != torch.float64:
            return used
        return {name: value.double() if value.is_floating_point() else value for name, value in used.items()}

    def label(self, cond: Cond) -> Tensor | None:
        """Return the class of each image, (n,), or None for an unconditional model.

        Raises:
            UserError: the model is conditional and ``cond`` has no label.
        """
        if not self.conditional:
            return None
        if "label" not in cond:
            raise UserError(
                f"This {type(self).__name__} is conditional: it needs cond['label'], the class of each image."
            )
        return cond["label"]


class GenerativeModel(TrainedModel):
    """Base class of generative models of images in [-1, 1]: a `TrainedModel` that can `sample`."""

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Draw one sample per image of the batch, under the same conditions."""
        x, cond = unpack_batch(batch, self.spec)
        # Lightning predicts in inference mode, but some models need gradients to sample.
        with torch.inference_mode(False):
            cond = {name: value.clone() for name, value in self.select_conditions(cond).items()}
            return self.sample(len(x), cond, generator=generator(x.device, "predict", batch_idx))

    @abstractmethod
    def sample(self, n: int, cond: Cond | None = None, *, generator: torch.Generator) -> Tensor:
        """Draw ``n`` images (n, C, H, W), float32 in [-1, 1].

        Args:
            n: number of images.
            cond: conditions, each (n, ...).
            generator: the only source of random numbers to use; equal generators give equal samples.

        Returns:
            The images, on the device of the model.
        """

    def sampling_description(self) -> str:
        """Describe the sampler and its settings, for tables."""
        return "one pass"

    def likelihoods(self) -> dict[str, LikelihoodEstimate]:
        """Return the methods to compute bits/dim, by name. Empty if the model has none."""
        return {}

    def nfe_networks(self) -> dict[str, nn.Module]:
        """Return the networks whose calls during sampling are counted (NFE), by name."""
        return {}


def check_adam(factory: Callable[..., torch.optim.Optimizer]) -> None:
    """Raise `UserError` unless ``factory`` creates Adam or AdamW, for which learning rates scale with the width."""
    target = getattr(factory, "func", factory)
    if target not in (torch.optim.Adam, torch.optim.AdamW):
        raise UserError(
            f"model.network.base_width scales learning rates for Adam: use model.optimizer._target_=torch.optim.Adam or"
            f" AdamW, not {getattr(target, '__name__', target)}, or model.network.base_width=null."
        )


def build_from_config(config: Mapping[str, Any], source: str, **arguments: Any) -> TrainedModel:
    """Build a model from the config that `TrainedModel` stores in its ``hparams``. The weights are random.

    Args:
        config: the class as ``_target_``, and the constructor arguments as plain data.
        source: the file or folder that the config comes from, for error messages.
        arguments: constructor arguments that replace those in the config.

    Raises:
        UserError: there is no config, or it names code from other packages or a class that is not a model.
    """
    if "_target_" not in config:
        raise UserError(f"{source} does not contain the config of its model: load its run folder instead.")
    model_class = import_object(config["_target_"])
    if not (isinstance(model_class, type) and issubclass(model_class, TrainedModel)):
        raise UserError(f"{source} contains {config['_target_']}, which is not a model.")
    built = {
        name: from_config(value, name) for name, value in config.items() if name != "_target_" and name not in arguments
    }
    return model_class(**built, **arguments)


load_from_checkpoint = TrainedModel.load_from_checkpoint
"""Load a model of any class from a checkpoint."""
