"""Langevin dynamics on an energy, and the replay buffer of its chains."""

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
    r"""Langevin steps on an energy, with optional gradient clipping.

    .. math:: x' = x - \eta \nabla E(x) + \tau z, \quad z \sim N(0, I),

    with :math:`\eta` = ``step_size``, :math:`\tau` = ``noise_std`` and each entry of the gradient clipped to
    [-grad_clip, grad_clip].

    Without clipping this is the unadjusted Langevin algorithm (Roberts and Tweedie 1996, "Exponential convergence of
    Langevin distributions and their discrete approximations") for :math:`p(x) \propto \exp(-E(x) / T)` at temperature

    .. math:: T = \tau^2 / (2 \eta),

    which is stationary in the limit :math:`\eta \to 0` at fixed T. For :math:`E(x) = x^T L x / 2` the step is affine.
    If :math:`\eta < 2 / \lambda_{max}`, the variance along an eigenvector of L converges to
    :math:`(T / \lambda) / (1 - \eta \lambda / 2)`, so the bias is of first order in :math:`\eta`.

    :math:`\eta = \epsilon^2 / 2` and :math:`\tau = \epsilon` give T = 1. Du and Mordatch (2019), "Implicit generation
    and modeling with energy-based models", https://arxiv.org/abs/1903.08689, choose step 10 and noise 0.005 for images
    u = (x + 1) / 2 in [0, 1], so T = 1.25e-6, which is gradient descent with little noise. Since
    :math:`\nabla_u E = 2 \nabla_x E`, the same chain in x has 4 times their step (40), twice their noise (0.01), half
    their clipping (0.005), and the same T.

    Args:
        step_size: :math:`\eta`, positive.
        noise_std: :math:`\tau`, positive.
        grad_clip: maximum absolute value of gradient entries; None disables clipping. Clipped steps do not have
            :math:`\exp(-E / T)` as their stationary distribution.
    """

    step_size: float
    noise_std: float
    grad_clip: float | None = None

    def __post_init__(self) -> None:
        if not self.step_size > 0:
            raise UserError(f"model.langevin.step_size={self.step_size} must be positive.")
        if not self.noise_std > 0:
            raise UserError(
                f"model.langevin.noise_std={self.noise_std} must be positive; without noise, Langevin steps are"
                " gradient descent."
            )
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise UserError(f"model.langevin.grad_clip={self.grad_clip} must be positive, or null.")

    @property
    def temperature(self) -> float:
        r"""T = noise_std^2 / (2 step_size): the steps sample from :math:`\exp(-E / T)` up to discretisation error."""
        return self.noise_std**2 / (2 * self.step_size)

    def trajectory(
        self,
        energy: Callable[[Tensor], Tensor],
        x: Tensor,
        num_steps: int,
        normal: Callable[[], Tensor],
        project: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """Yield the state (n, ...) after each of ``num_steps`` steps from ``x``, without gradient.

        Args:
            energy: (n, ...) -> (n,); energy i depends on entry i alone.
            x: initial state, (n, ...).
            num_steps: number of steps.
            normal: returns new standard normal noise shaped like x at each call.
            project: function that is applied to the state after each step; None disables it.
        """
        for _ in range(num_steps):
            gradient = input_gradient(energy, x)
            if self.grad_clip is not None:
                gradient = gradient.clamp(-self.grad_clip, self.grad_clip)
            x = x - self.step_size * gradient + self.noise_std * normal().to(x)
            yield (x := x if project is None else project(x))

    def describe(self) -> str:
        clipped = "" if self.grad_clip is None else f", gradients within {self.grad_clip:g}"
        return f"Langevin, step {self.step_size:g}, noise {self.noise_std:g}{clipped}"


def input_gradient(energy: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    r"""Compute the gradient :math:`\nabla_x E(x)` of each entry, shaped like x; also works inside `torch.no_grad`."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(energy(x).sum(), x)
    return gradient


def last_state(states: Iterable[Tensor]) -> Tensor:
    """Return the last state of a trajectory of at least one step."""
    return deque(states, maxlen=1).pop()


class ReplayBuffer(nn.Module):
    """A buffer of persistent chains; each batch takes one chain per image and writes its new state back.

    Du and Mordatch (2019), "Implicit generation and modeling with energy-based models", algorithm 1,
    https://arxiv.org/abs/1903.08689, and Tieleman (2008), "Training restricted Boltzmann machines using approximations
    to the likelihood gradient". The chains of a batch are drawn without replacement, and the final state of a chain
    replaces its entry.

    With classes, each class has an equal part of the buffer, and an image takes a chain of its own class, so the chains
    of a batch have the same classes as its images.

    Every process holds the whole buffer and gathers the chains of the other processes. Discrete images are stored as
    uint8 (31 MB for 10,000 images of 3x32x32, a quarter of float32) and dequantised with uniform noise when read, as in
    the authors' code. With rounding alone, a chain that moves by less than half a pixel level between reads would never
    move. Continuous data are stored as float32.

    Args:
        spec: shape and value range of the data.
        size: total number of chains.
        num_classes: number of classes; 1 for an unconditional model.
    """

    images: Tensor
    started: Tensor

    def __init__(self, spec: DataSpec, size: int, num_classes: int = 1) -> None:
        super().__init__()
        self.size_per_class = size // num_classes
        if self.size_per_class < 1:
            raise UserError(f"model.buffer_size={size} must be at least one chain per class ({num_classes}).")
        dtype = torch.float32 if spec.num_bins is None else torch.uint8
        self.register_buffer("images", torch.zeros(num_classes * self.size_per_class, *spec.shape, dtype=dtype))
        # Whether each entry was ever written; chains of other entries start from noise.
        self.register_buffer("started", torch.zeros(num_classes * self.size_per_class, dtype=torch.bool))

    def check_batch_size(self, batch_size: int) -> None:
        """Raise `UserError` unless each image of a batch can have a chain of its own class."""
        if batch_size > self.size_per_class:
            raise UserError(
                f"A batch of {batch_size} images needs at least that many chains per class, but there are only"
                f" {self.size_per_class}: raise model.buffer_size or lower trainer.global_batch_size."
            )

    def sample_indices(self, label: Tensor | None, rng: RandomSource) -> Tensor:
        """Draw distinct buffer indices (total,), one for each image of the global batch.

        Args:
            label: class of each image on this process, or None if the model is unconditional.
            rng: source of random numbers, in the same state on all processes.
        """
        self.check_batch_size(rng.total)
        # `rng` draws only for the images of this process, but the permutation must be the same on all processes.
        order = torch.randperm(self.size_per_class, generator=rng.generator, device=rng.device)[: rng.total]
        order = order.to(self.started.device)
        return order if label is None else all_gather_rows(label) * self.size_per_class + order

    def get(self, indices: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Read chains.

        Args:
            indices: buffer indices, (n,).
            noise: dequantisation noise, uniform in [0, 1), (n, C, H, W).

        Returns:
            States (n, C, H, W) in float32, and whether each chain has been written, (n,).
        """
        images = self.images[indices]
        states = images if images.is_floating_point() else (images + (noise - 0.5)).mul_(2 / 255).sub_(1)
        return states, self.started[indices]

    def put(self, indices: Tensor, states: Tensor) -> None:
        """Write the chains of the global batch."""
        if not self.images.is_floating_point():
            states = states.add(1).mul_(255 / 2).round_()
        self.images[indices] = states.to(self.images.dtype)
        self.started[indices] = True
