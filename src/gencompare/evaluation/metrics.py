"""Figures of sample quality: pure functions of features (n, d) and logits (n, classes)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

SURE = 0.9
KID_SUBSETS, KID_SUBSET_SIZE, KID_SEED = 100, 1000, 2020
NEIGHBOURS = 3


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of means and covariances (Heusel et al. 2017, eq. 6).

    The plug-in estimate is biased upwards, by about 1/n: compare figures of equal n only, and read them against the
    floor. Rounding can leave equal sets a little off zero, on either side; what is below zero is returned as zero.
    """
    statistics = [fid_features_to_statistics(f.double()) for f in (features, reference)]
    return max(0.0, fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])


def kernel_distance(features: Tensor, reference: Tensor) -> tuple[float, float]:
    """(mean, standard deviation) over 100 subsets of the squared MMD with the kernel k(x, y) = (x y / d + 1)^3.

        mean of k(x, x') + mean of k(y, y') - 2 mean of k(x, y),   x' and y' other than x and y

    Unbiased, so it is near zero, on either side, for equal distributions (Binkowski et al. 2018, "Demystifying MMD
    GANs", section 4). Subsets have 1,000 images, or as many as the smaller set has; the deviation is that of the
    subsets, not the error of the mean. The subsets are those of torch-fidelity, and the figures agree with its own;
    it spends most of its time on raising to the power 3, which two products do in a fifth of it.
    """
    size = min(KID_SUBSET_SIZE, len(features), len(reference))
    source = np.random.RandomState(KID_SEED)
    figures = []
    for _ in range(KID_SUBSETS):
        x = features[torch.from_numpy(source.choice(len(features), size, replace=False))]
        y = reference[torch.from_numpy(source.choice(len(reference), size, replace=False))]
        xx, yy, xy = cubic_kernel(x, x), cubic_kernel(y, y), cubic_kernel(x, y)
        within = total(xx) - total(xx.diagonal()) + total(yy) - total(yy.diagonal())
        figures.append(within / (size * (size - 1)) - 2 * total(xy) / size**2)
    return float(np.mean(figures)), float(np.std(figures))


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x y / d + 1)^3 for all pairs of rows, (n, m)."""
    k = (x @ y.T).div_(x.shape[1]).add_(1)
    return k * k * k


def total(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64))


def precision_recall(features: Tensor, reference: Tensor) -> tuple[float, float]:
    """(precision, recall): the share of samples inside the union of real images' balls, and the other way round.

    A ball reaches to its centre's third-nearest neighbour in its own set (Kynkaanniemi et al. 2019, eqs. 1 and 2). The
    two sets should be of one size: balls shrink as a set grows.
    """
    figures = prc_features_to_metric(
        features, reference, prc_neighborhood=NEIGHBOURS, prc_batch_size=2000, save_cpu_ram=True, verbose=False
    )
    return figures[KEY_METRIC_PRECISION], figures[KEY_METRIC_RECALL]


def confident(logits: Tensor) -> float:
    """Share of images to which the classifier gives one class with probability `SURE` or more."""
    return float((logits.softmax(1).amax(1) >= SURE).double().mean())


def class_shares(logits: Tensor) -> list[float]:
    """Share of images that the classifier assigns to each class."""
    counts = torch.bincount(logits.argmax(1), minlength=logits.shape[1])
    return (counts.double() / len(logits)).tolist()


def label_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of images that the classifier assigns to the class that was asked for."""
    return float((logits.argmax(1) == labels.to(logits.device)).double().mean())
