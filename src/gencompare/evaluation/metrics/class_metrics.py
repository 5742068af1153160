"""What a classifier sees in samples: pure functions of logits (n, classes)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

CONFIDENCE = 0.7
"""Below 0.82, the probability that the shipped classifiers were trained to give (label smoothing 0.2, ten classes)."""
SPLITS = 10


def classifier_score(logits: Tensor) -> tuple[float, float]:
    """(mean, standard deviation) over 10 parts of exp of the mean KL(p(y | x) || p(y)) (Salimans et al. 2016, "Improved
    Techniques for Training GANs", section 4).

    From 1, where all images look alike to the classifier, to the number of classes. On the Inception network this is
    the Inception score; the split into parts, and so the figure, is that of torch-fidelity.
    """
    figures = isc_features_to_metric(logits, splits=SPLITS)
    return figures[KEY_METRIC_ISC_MEAN], figures[KEY_METRIC_ISC_STD]


def confident(logits: Tensor) -> float:
    """Share of images to which the classifier gives one class with probability `CONFIDENCE` or more."""
    return float((logits.softmax(1).amax(1) >= CONFIDENCE).double().mean())


def class_shares(logits: Tensor) -> list[float]:
    """Share of images that the classifier assigns to each class."""
    counts = torch.bincount(logits.argmax(1), minlength=logits.shape[1])
    return (counts.double() / len(logits)).tolist()


def label_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of images that the classifier assigns to the class that was asked for."""
    return float((logits.argmax(1) == labels.to(logits.device)).double().mean())
