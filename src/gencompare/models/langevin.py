"""Langevin dynamics on an energy, and the replay buffer that holds its chains."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gencompare.distributed import all_gather_rows
from gencompare.errors import UserError
from gencompare.generative_model import DataSpec
from gencompare.rng import RandomSource


@dataclass(frozen=True)
class Langevin:
    r"""x' = x - step g(x) + noise z,  g = grad E with each entry held within [-clip, clip],  z ~ N(0, I).

    Without clipping this is the unadjusted Langevin algorithm (Roberts and Tweedie 1996, "Exponential convergence of
    Langevin distributions and their discrete approximations") for p(x) ~ exp(-E(x) / T) at the temperature

        T = noise^2 / (2 step),

    which it leaves unchanged in the limit step -> 0 with T fixed. On E(x) = x' L x / 2 it is affine, and where
    step < 2 / lambda_max, its covariance along an eigenvector of L goes to (T / lambda) / (1 - step lambda / 2): what a
    finite step adds to the truth T / lambda is, in the first order, proportional to the step.

    step = e^2 / 2 and noise = e give T = 1. Du and Mordatch (2019) set the two apart from each other, step 10 and
    noise .005 for images in [0, 1], so T = 1.25e-6: gradient descent with a little noise. Their numbers are for
    u = (x + 1) / 2. With grad_u E = 2 grad_x E, the same chain in x has step 4 times theirs (40), noise twice theirs
    (.01) and clip half of theirs (.005), and T is the same.

    Args:
        step: factor of the gradient; above 0.
        noise: standard deviation of what is added at each step; above 0.
        clip: largest size of an entry of the gradient; None leaves it alone. A clipped step has another law, and is
            no Langevin step for exp(-E / T) where it clips.
    """

    step: float
    noise: float
    clip: float | None = None

    def __post_init__(self) -> None:
        if not self.step > 0:
            raise UserError(f"model.langevin.step={self.step}: give a positive number.")
        if not self.noise > 0:
            raise UserError(
                f"model.langevin.noise={self.noise}: give a positive number; without noise nothing is drawn."
            )
        if self.clip is not None and not self.clip > 0:
            raise UserError(f"model.langevin.clip={self.clip}: give null, or a positive number.")

    @property
    def temperature(self) -> float:
        """T = noise^2 / (2 step): the steps draw from exp(-E / T), as far as their size allows."""
        return self.noise**2 / (2 * self.step)

    def walk(
        self,
        energy: Callable[[Tensor], Tensor],
        x: Tensor,
        steps: int,
        normal: Callable[[], Tensor],
        held: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """The states after each of ``steps`` steps from ``x`` (n, ...), which are (n, ...) and carry no gradient.

        Args:
            energy: (n, ...) -> (n,), each a function of its own row.
            normal: standard normal numbers of the shape of x, fresh at each call.
            held: applied after each step: where the states may be; None lets them go anywhere.
        """
        for _ in range(steps):
            g = input_gradient(energy, x)
            if self.clip is not None:
                g = g.clamp(-self.clip, self.clip)
            x = x - self.step * g + self.noise * normal().to(x)
            yield (x := x if held is None else held(x))

    def describe(self) -> str:
        clipped = "" if self.clip is None else f", gradients within {self.clip:g}"
        return f"Langevin, step {self.step:g}, noise {self.noise:g}{clipped}"


def input_gradient(energy: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """grad_x E(x) row by row, of the shape of x, also where gradients are switched off around it."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(energy(x).sum(), x)
    return gradient


def last_state(states: Iterable[Tensor]) -> Tensor:
    """The state in which a walk of at least one step ends."""
    return deque(states, maxlen=1).pop()


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

    def places(self, label: Tensor | None, draws: RandomSource) -> Tensor:
        """Where the chains of the whole batch stand, (total,), no place twice. ``label`` is of this process's rows."""
        if draws.total > self.per_class:
            raise UserError(
                f"A batch of {draws.total} images needs as many chains of a class, and there are {self.per_class}:"
                " raise model.buffer_size or lower trainer.global_batch_size."
            )
        # Not through `draws`, whose calls draw row by row: all processes make the same permutation.
        order = torch.randperm(self.per_class, generator=draws.generator, device=draws.device)[: draws.total]
        order = order.to(self.started.device)
        return order if label is None else all_gather_rows(label) * self.per_class + order

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
