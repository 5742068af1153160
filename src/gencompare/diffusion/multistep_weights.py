"""The weights of multistep samplers: integrals of the polynomials through predictions of this step and earlier ones."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MAX_STEP_GROWTH = 2.0
"""Multistep samplers extrapolate from the previous step only up to this ratio of step sizes in log-SNR; beyond it they
restart with a first-order step."""

_GAUSS_POINTS, _GAUSS_WEIGHTS = (each.tolist() for each in np.polynomial.legendre.leggauss(12))


def num_usable_points(h: Tensor, maximum: int) -> Tensor:
    """Count the predictions that each step interpolates: its own, and earlier ones up to the last long step.

    Args:
        h: the step sizes, (k,).
        maximum: the largest number of points.

    Returns:
        Integers from 1 to ``maximum``, (k,).
    """
    index = torch.arange(len(h), device=h.device)
    restarts = h > MAX_STEP_GROWTH * F.pad(h[:-1], (1, 0))
    return (index - torch.where(restarts, index, 0).cummax(0).values + 1).clamp(max=maximum)


def fractions_like(h: Tensor) -> tuple[Tensor, Tensor]:
    """Return the points in [0, 1] and the weights of Gauss-Legendre quadrature, each (q, k) for step sizes h (k,)."""
    points, weights = (torch.tensor(each, dtype=h.dtype, device=h.device) for each in (_GAUSS_POINTS, _GAUSS_WEIGHTS))
    return ((points[:, None] + 1) / 2).expand(-1, len(h)), (weights[:, None] / 2).expand(-1, len(h))


def with_previous(values: Tensor, n: int) -> Tensor:
    """Stack the values of each step and of the n - 1 steps before it, (n, k). The first value precedes itself."""
    padded = torch.cat([values[:1].expand(n - 1), values])
    return torch.stack([padded[n - 1 - j : len(padded) - j] for j in range(n)])


def interpolation_weights(num_points: Tensor, nodes: Tensor, points: Tensor, measure: Tensor) -> Tensor:
    r"""Compute the weights :math:`w_j = \int L_j\, d\mu / \int d\mu` of the values at the nodes.

    :math:`L_j` are the Lagrange polynomials of the first ``num_points`` nodes of each step.

    Args:
        num_points: number of nodes that a step uses, (k,); with one, the polynomial is a constant.
        nodes: the nodes, (n, k).
        points: the quadrature points, (q, k).
        measure: their weights, (q, k).

    Returns:
        The weights, (n, k). They are 0 for unused nodes, and their sum is 1.
    """
    weights = F.pad(torch.ones_like(nodes[:1]), (0, 0, 0, len(nodes) - 1))
    for n in range(2, len(nodes) + 1):
        used = nodes[:n]
        lagrange = [
            torch.stack([(points - other) / (node - other) for i, other in enumerate(used) if i != j]).prod(0)
            for j, node in enumerate(used)
        ]
        integrals = (torch.stack(lagrange) * measure).sum(1) / measure.sum(0)
        weights = torch.where(num_points == n, F.pad(integrals, (0, 0, 0, len(nodes) - n)), weights)
    return weights
