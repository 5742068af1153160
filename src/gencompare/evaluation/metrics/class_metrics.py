"""Metrics of a classifier's predictions on samples, as pure functions of logits (n, classes)."""

from __future__ import annotations

import torch
from torch import Tensor

CONFIDENCE = 0.7
"""Threshold of `confident_share`. It is below 0.82, the probability that the bundled classifiers were trained to
predict (ten classes, label smoothing 0.2)."""
NUM_SPLITS = 10


def classifier_score(logits: Tensor) -> tuple[float, float]:
    r"""Compute the Inception score with any classifier, as the mean and standard deviation over 10 splits of

    .. math:: \exp \mathbb{E}_x\, \mathrm{KL}\big(p(y \mid x) \,\|\, p(y)\big)

    (Salimans et al. 2016, "Improved Techniques for Training GANs", section 4, https://arxiv.org/abs/1606.03498). The
    score is 1 if all predictions are equal, and at most the number of classes. Images are split as in torch-fidelity,
    so the value is the same.
    """
    # Imported on use, since training may never need it.
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    scores = isc_features_to_metric(logits, splits=NUM_SPLITS)
    return scores[KEY_METRIC_ISC_MEAN], scores[KEY_METRIC_ISC_STD]


def confident_share(logits: Tensor) -> float:
    """Return the fraction of images for which one class has a probability of at least `CONFIDENCE`."""
    return float((logits.softmax(1).amax(1) >= CONFIDENCE).double().mean())


def class_shares(logits: Tensor) -> list[float]:
    """Return the fraction of images that the classifier assigns to each class."""
    counts = torch.bincount(logits.argmax(1), minlength=logits.shape[1])
    return (counts.double() / len(logits)).tolist()


def label_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the fraction of images that the classifier assigns to their class in ``labels`` (n,)."""
    return float((logits.argmax(1) == labels.to(logits.device)).double().mean())
