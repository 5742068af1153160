"""Metrics that are not part of the suite, measured by the study of metrics to decide whether they should be.

    PYTHONPATH=benchmarks python run.py task=measure_metrics data=exact_mixture \\
        +evaluation.protocol.metrics.vendi={_target_:candidate_metrics.vendi,_partial_:true}
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from gencompare.evaluation.indices import evenly_spaced_indices
from gencompare.evaluation.metrics.kernel import GaussianKernel, KernelReference, kernel_distance

NUM_PROJECTIONS = 128


def sliced_wasserstein(features: Tensor, reference: Tensor) -> float:
    r"""Compute the mean squared Wasserstein-2 distance of 128 random projections (Bonneel et al. 2015, "Sliced and
    Radon Wasserstein Barycenters of Measures", https://doi.org/10.1007/s10851-014-0506-3).

    In Inception features this is close to MIND.
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


for _metric in (sliced_wasserstein, vendi, energy_distance, narrow_mmd, wide_mmd, normalized_mmd):
    _metric.higher_is_better = False  # type: ignore[attr-defined]
del _metric
