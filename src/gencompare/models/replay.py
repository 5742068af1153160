"""The replay buffer: Langevin chains that go on where they stopped."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gencompare.contract import DataSpec
from gencompare.errors import UserError
from gencompare.models.processes import gathered
from gencompare.seeds import Draws


class ReplayBuffer(nn.Module):
    """``size`` chains, of which each batch takes as many as it has images, and puts back what became of them.

    Du and Mordatch (2019), "Implicit generation and modeling with energy-based models", algorithm 1, and Tieleman
    (2008), "Training restricted Boltzmann machines using approximations to the likelihood gradient", whose chains
    persist: what a chain became takes its place. Chains of a batch are drawn without replacement.

    With classes, an equal part of the chains belongs to each, and an image's chain is one of its own class. So the
    samples of a batch have just the classes of its images, and the gradient compares like with like.

    There is one buffer for the whole batch: each process holds all of it, and gets the rows of the others. Images with
    levels are kept as bytes (a quarter of the room in memory and in checkpoints: 31 MB for 10,000 of 3x32x32), and
    spread evenly over their byte when they are taken, as in the authors' code: rounded alone, a chain whose batch moves
    it by less than half a byte would stand still. Continuous data are kept as they are.

    Args:
        size: chains in all.
        classes: 1 for a model without labels.
    """

    images: Tensor
    started: Tensor

    def __init__(self, spec: DataSpec, size: int, classes: int = 1) -> None:
        super().__init__()
        self.per_class = size // classes
        if self.per_class < 1:
            raise UserError(f"model.buffer_size={size}: give at least one chain a class, so {classes}.")
        kept = torch.float32 if spec.num_levels is None else torch.uint8
        self.register_buffer("images", torch.zeros(classes * self.per_class, *spec.shape, dtype=kept))
        # A chain that was never taken starts from noise when it is.
        self.register_buffer("started", torch.zeros(classes * self.per_class, dtype=torch.bool))

    def places(self, label: Tensor | None, draws: Draws) -> Tensor:
        """Where the chains of the whole batch stand, (total,), no place twice. ``label`` is of this process's rows."""
        if draws.total > self.per_class:
            raise UserError(
                f"A batch of {draws.total} images needs as many chains of a class, and there are {self.per_class}:"
                " raise model.buffer_size or lower trainer.global_batch_size."
            )
        # Not through `draws`, whose calls draw row by row: all processes make the same permutation.
        order = torch.randperm(self.per_class, generator=draws.generator, device=draws.device)[: draws.total]
        order = order.to(self.started.device)
        return order if label is None else gathered(label) * self.per_class + order

    def take(self, places: Tensor, within: Tensor) -> tuple[Tensor, Tensor]:
        """The chains' states (n, C, H, W) float32, and which of them are under way (n,).

        Args:
            within: where in its byte each value lies, uniform in [0, 1), (n, C, H, W).
        """
        images = self.images[places]
        states = images if images.is_floating_point() else (images + (within - 0.5)).mul_(2 / 255).sub_(1)
        return states, self.started[places]

    def put(self, places: Tensor, states: Tensor) -> None:
        """Keep what became of the chains of the whole batch."""
        if not self.images.is_floating_point():
            states = states.add(1).mul_(255 / 2).round_()
        self.images[places] = states.to(self.images.dtype)
        self.started[places] = True
