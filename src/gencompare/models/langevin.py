"""Langevin steps on an energy: how an energy-based model is sampled, in training and afterwards."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gencompare.errors import UserError


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


def last(states: Iterable[Tensor]) -> Tensor:
    """The state in which a walk of at least one step ends."""
    return deque(states, maxlen=1).pop()
