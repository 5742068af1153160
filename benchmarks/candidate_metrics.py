"""Metrics that are not part of the suite, measured by the study of metrics to decide whether they should be.

    PYTHONPATH=benchmarks python run.py task=measure_metrics data=exact_mixture \\
        +evaluation.protocol.metrics.vendi={_target_:candidate_metrics.vendi,_partial_:true}
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from gencompare.evaluation.indices import evenly_spaced_indices
from gencompare.evaluation.metrics.kernel import GaussianKernel, KernelReference, kernel_distance

NUM_PROJECTIONS = 128
EM_STEPS = 30


def sliced_wasserstein(features: Tensor, reference: Tensor) -> float:
    r"""Compute the mean squared Wasserstein-2 distance of 128 random projections (Bonneel et al. 2015, "Sliced and
    Radon Wasserstein Barycenters of Measures", https://doi.org/10.1007/s10851-014-0506-3).

    In Inception features this is MIND (Berthet et al. 2026, "MIND: Monge Inception Distance for Generative Models
    Evaluation", https://arxiv.org/abs/2605.06797).
    """
    reference = reference[evenly_spaced_indices(len(reference), len(features))]
    features = features[evenly_spaced_indices(len(features), len(reference))]
    directions = torch.randn(features.shape[1], NUM_PROJECTIONS, generator=torch.Generator().manual_seed(0))
    directions = torch.nn.functional.normalize(directions, dim=0)
    a, b = ((x @ directions).sort(0).values for x in (features, reference))
    return float((a - b).square().mean())


def vendi(features: Tensor, reference: Tensor) -> float:
    r"""Compute the absolute log ratio of the Vendi scores of samples and of as many real images.

    The score is the exponential of the entropy of the eigenvalues of K / n, with cosine similarities K (Friedman and
    Dieng 2023, "The Vendi Score", eq. 1, https://arxiv.org/abs/2210.02410).
    """
    reference = reference[evenly_spaced_indices(len(reference), len(features))]
    center = reference.mean(0)
    return abs(_log_vendi(features - center) - _log_vendi(reference - center))


def _log_vendi(x: Tensor) -> float:
    x = torch.nn.functional.normalize(x.double(), dim=1)
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    return float(torch.special.entr(torch.linalg.eigvalsh(gram / len(x)).clamp_min(0)).sum())


def fld(features: Tensor, reference: Tensor) -> float:
    r"""Compute the feature likelihood divergence up to its constant: :math:`-100 / d` times the mean log density of
    real images under Gaussians around the samples (Jiralerspong et al. 2023, "Feature Likelihood Divergence for
    Evaluating the Generalization of Generative Models", section 3, https://arxiv.org/abs/2302.04440).

    .. math:: p(x) = \frac{1}{n} \sum_j N(x; y_j, \sigma_j^2 I)

    The variances maximise the likelihood of the first half of the real images, and the second half is scored. Here EM
    finds them, in the paper Adam.
    """
    half = reference[::2].double()
    mean, scale = half.mean(0), half.std(0).clamp_min(1e-6)
    fit, test, centers = ((x.double() - mean) / scale for x in (reference[::2], reference[1::2], features))
    d = fit.shape[1]
    squares = torch.cdist(fit, centers).square()
    variance = squares.min(0).values / d + 1e-6

    def log_densities(squares: Tensor) -> Tensor:
        return -squares / (2 * variance) - d / 2 * (2 * torch.pi * variance).log()

    for _ in range(EM_STEPS):
        shares = log_densities(squares).softmax(1)
        weight = shares.sum(0)
        fitted = (shares * squares).sum(0) / (d * weight.clamp_min(1e-12))
        variance = torch.where(weight > 1e-8, fitted, variance).clamp_min(1e-6)
    log_p = log_densities(torch.cdist(test, centers).square()).logsumexp(1) - math.log(len(centers))
    return float(-100 / d * log_p.mean())


def energy_distance(features: Tensor, reference: Tensor) -> float:
    """Compute the energy distance without pairs of an image with itself (Szekely and Rizzo 2013, "Energy statistics",
    https://doi.org/10.1016/j.jspi.2013.03.018)."""
    return (
        2 * float(torch.cdist(features, reference).double().mean()) - _spread(features) - _reference_spread(reference)
    )


def _spread(x: Tensor) -> float:
    return float(torch.pdist(x).double().mean())


_reference_spread, _kernel_reference = cache(_spread), cache(KernelReference.from_features)
"""The terms of the reference, computed once."""


def narrow_mmd(features: Tensor, reference: Tensor) -> float:
    """Compute the squared MMD with half the median bandwidth."""
    return 1000 * kernel_distance(features, _kernel_reference(reference, GaussianKernel(median_factor=0.5))).value


def wide_mmd(features: Tensor, reference: Tensor) -> float:
    """Compute the squared MMD with twice the median bandwidth."""
    return 1000 * kernel_distance(features, _kernel_reference(reference, GaussianKernel(median_factor=2.0))).value


def normalized_mmd(features: Tensor, reference: Tensor) -> float:
    """Compute the squared MMD of features of unit length, as CMMD, with the median bandwidth."""
    return 1000 * kernel_distance(features, _kernel_reference(reference, GaussianKernel(normalize=True))).value


for _metric in (sliced_wasserstein, vendi, fld, energy_distance, narrow_mmd, wide_mmd, normalized_mmd):
    _metric.higher_is_better = False  # type: ignore[attr-defined]
del _metric
