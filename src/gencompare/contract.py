"""What every family of model promises, and what the trainer and the evaluator may rely on.

The trainer and the evaluator ask for these capabilities; they never ask for a family's name.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from gencompare.errors import UserError
from gencompare.seeds import Draws

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
class Likelihood:
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
class Reconstructs(Protocol):
    """A model with an encoder: ``reconstruct`` maps (n, C, H, W) to the same shape."""

    def reconstruct(self, x: Tensor, cond: Cond, *, generator: torch.Generator) -> Tensor: ...


@runtime_checkable
class LatentSpace(Protocol):
    """A frozen autoencoder whose whitened latents another model may be trained on."""

    latent_shape: tuple[int, int, int]

    def encode(self, x: Tensor) -> Tensor: ...

    def decode(self, z: Tensor) -> Tensor: ...


@runtime_checkable
class Classifies(Protocol):
    """A model that gives class logits (n, num_classes) and features (n, d) of images."""

    def logits(self, x: Tensor) -> Tensor: ...

    def features(self, x: Tensor) -> Tensor: ...


@runtime_checkable
class Explores(Protocol):
    """A model that can show more than samples: interpolation, reconstruction, what it does on the way."""

    def pictures(self, x: Tensor, cond: Cond, *, generator: torch.Generator) -> dict[str, Tensor]:
        """Pictures by name, each (rows, columns, C, H, W); about images ``x`` (n, C, H, W) where it needs some.

        Values beyond [-1, 1] are cut off when they are shown.
        """
        ...


@runtime_checkable
class AddsNoise(Protocol):
    """A model that has a noise schedule, which comparisons draw."""

    def noise_schedule(self) -> dict[str, list[float]]:
        """``t`` in [0, 1] and ``log_snr`` there, as plain numbers."""
        ...


class TrainedModel(pl.LightningModule):
    """What the trainer needs of a model, generative or not.

    A model with one optimiser writes ``losses``; the rest has a default. One that optimises by hand (a GAN) or in
    closed form overrides ``training_step``.

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
        self.draws: Draws | None = None
        """Random numbers of the step in progress, set by the trainer's clock before each step."""
        self.progress = 0.0
        """The share of the budget that is spent, 0 to 1, set likewise."""

    @property
    def step_kind(self) -> str:
        """The kind of the step that comes next, where kinds cost unlike FLOPs; told by `progress` and the state."""
        return ""

    @property
    def doubtful(self) -> bool:
        """Whether the last step may be the start of a collapse: no good checkpoint is replaced while it is."""
        return False

    def losses(self, x: Tensor, cond: Cond, draws: Draws) -> dict[str, Tensor]:
        """Per-sample figures (n,), of which ``loss`` is minimised; the rest is logged."""
        raise NotImplementedError(f"{type(self).__name__} writes neither losses() nor training_step()")

    def training_step(self, batch: tuple[Tensor, Cond], batch_idx: int) -> dict[str, Tensor] | None:
        """Means over the batch; Lightning minimises ``loss`` and the trainer logs all of them."""
        x, cond = batch
        assert self.draws is not None, "the trainer's clock sets the draws of a step"
        return {name: value.mean() for name, value in self.losses(x, self.used(cond), self.draws).items()}

    def validation_figures(self, x: Tensor, cond: Cond, draws: Draws) -> dict[str, Tensor]:
        """Per-sample figures (n,) on held-out images; empty for a model that has none."""
        return self.losses(x, self.used(cond), draws)

    def configure_optimizers(self) -> Any:
        if self.optimizer_factory is None:
            return None
        return self.optimizer_factory(p for p in self.parameters() if p.requires_grad)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.grad_clip is not None:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(params, self.grad_clip)

    def averaged_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters, by their state-dict name, of which the trainer keeps a moving average for sampling."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def autoencoder(self) -> Reconstructs | None:
        """What encodes images and gives them back: the model itself, or the frozen autoencoder that it works on."""
        return self if isinstance(self, Reconstructs) else None

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

    @abstractmethod
    def sample(self, n: int, cond: Cond | None = None, *, generator: torch.Generator) -> Tensor:
        """``n`` images (n, C, H, W), float32 in [-1, 1], a function of weights, ``cond`` and ``generator`` alone."""

    def sampling_description(self) -> str:
        """How ``sample`` works, in words for a table: the sampler and its settings."""
        return "one pass"

    def likelihoods(self) -> dict[str, Likelihood]:
        """Ways to score images in bits/dim, by name; empty when the composition has none."""
        return {}

    def counted_networks(self) -> dict[str, nn.Module]:
        """The networks whose calls are counted while sampling (NFE), by name."""
        return {}
