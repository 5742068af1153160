"""The metrics of an evaluation as `torchmetrics.Metric` subclasses, for use in any loop.

    metric = MaximumMeanDiscrepancy()
    metric.update(real_images, real=True)          # uint8 (n, C, H, W), any number of times
    metric.update(generated_images, real=False)
    metric.compute()

The interface is that of torchmetrics' ``FrechetInceptionDistance``. Images are uint8, or floats in [0, 1] with
``normalize=True``. ``feature`` is a module or function from uint8 images to features (n, d); the default is
EfficientNet-Lite0, the default network of `evaluate`. torchmetrics gathers the states of all processes. Use `evaluate`
for a whole protocol, real-data baselines and intervals.

Reconstructions are compared by torchmetrics' own ``PeakSignalNoiseRatio`` and ``StructuralSimilarityIndexMeasure``,
which this module also exports. With ``data_range=255.0`` and images converted to float, they give the values of
`evaluate`. Bits/dim are means over images, so use torchmetrics' ``MeanMetric`` with a model's `likelihoods`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.image import PeakSignalNoiseRatio as PeakSignalNoiseRatio
from torchmetrics.image import StructuralSimilarityIndexMeasure as StructuralSimilarityIndexMeasure

from gencompare.errors import UserError
from gencompare.evaluation.extractors.efficientnet import efficientnet_lite0
from gencompare.evaluation.extractors.extractor import Extractor
from gencompare.evaluation.metrics.class_metrics import (
    class_shares,
    classifier_score,
    confident_share,
    label_accuracy,
)
from gencompare.evaluation.metrics.frechet import Jackknife, class_frechet_distance, frechet_distance
from gencompare.evaluation.metrics.kernel import CubicKernel, kernel_distance, mmd
from gencompare.evaluation.metrics.neighbors import authenticity, compute_prdc, memorization_ratio
from gencompare.generative_model import DataSpec

Feature = Callable[[Tensor], Tensor]


class _FeatureMetric(Metric):
    """Base class that stores the features of the image sets that a metric compares.

    Args:
        feature: maps uint8 images (n, C, H, W) to features (n, d); None uses EfficientNet-Lite0.
        normalize: whether images are floats in [0, 1] instead of uint8.
        reset_real_features: whether `reset` also discards the real images.
        kwargs: further arguments of `torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False
    sets: tuple[str, ...] = ("real", "generated")

    def __init__(
        self,
        feature: Feature | None = None,
        *,
        normalize: bool = False,
        reset_real_features: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if feature is not None and not callable(feature):
            raise UserError(
                f"feature={feature!r} must be a function from uint8 images (n, C, H, W) to features (n, d), such as"
                " inception(spec).features; None uses EfficientNet-Lite0."
            )
        self.feature, self.normalize, self.reset_real_features = feature, normalize, reset_real_features
        for name in self.sets:
            self.add_state(name, [], dist_reduce_fx="cat")

    def reset(self) -> None:
        """Discard the generated images and, if ``reset_real_features`` is set, the real images."""
        kept_names = [name for name in self.sets if not name.startswith("generated") and not self.reset_real_features]
        kept = {name: list(getattr(self, name)) for name in kept_names}
        super().reset()
        for name, parts in kept.items():
            setattr(self, name, parts)

    def _add(self, name: str, images: Tensor) -> None:
        self._append(name, self._features(images).float())

    def _append(self, name: str, values: Tensor) -> None:
        getattr(self, name).append(values.cpu())

    def _features(self, images: Tensor) -> Tensor:
        if images.dim() != 4:
            raise UserError(f"Images must be (n, C, H, W), not {tuple(images.shape)}.")
        if images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
            raise UserError(f"Images {tuple(images.shape)} look like (n, H, W, C): pass images.permute(0, 3, 1, 2).")
        if self.normalize:
            # Resizing may overshoot slightly.
            in_range = not len(images) or -1e-3 <= images.min() <= images.max() <= 1 + 1e-3
            if not images.is_floating_point() or not in_range:
                raise UserError(
                    "With normalize=True, images must be floats in [0, 1]: pass (x + 1) / 2 for images in [-1, 1], or"
                    " uint8 images without normalize."
                )
            images = (images * 255).round().clamp(0, 255).to(torch.uint8)
        if images.dtype != torch.uint8:
            raise UserError(f"Images must be uint8, or floats in [0, 1] with normalize=True, not {images.dtype}.")
        if self.feature is None:
            spec = DataSpec(name="images", shape=tuple(images.shape[1:]))  # type: ignore[arg-type]
            self.feature = self._default_feature(efficientnet_lite0(spec))
        with torch.no_grad():
            features = self.feature(images)
        if features.dim() != 2 or len(features) != len(images):
            raise UserError(f"feature must return (n, d) for n = {len(images)} images, not {tuple(features.shape)}.")
        return features

    def _default_feature(self, extractor: Extractor) -> Feature:
        return extractor.features

    def _set(self, name: str) -> Tensor:
        parts = getattr(self, name)
        if isinstance(parts, list):
            if not parts:
                raise UserError(f"{type(self).__name__} has no {name} images yet: call update first.")
            parts = torch.cat(parts)
        return parts


class _RealComparison(_FeatureMetric):
    """A metric of generated images against real images."""

    def update(self, images: Tensor, real: bool) -> None:
        """Add images (n, C, H, W) to the real images if ``real``, otherwise to the generated images."""
        self._add("real" if real else "generated", images)

    def compute(self) -> Tensor:
        """Compute the metric of all images so far, a scalar."""
        return torch.tensor(self.compute_from_features(self._set("generated"), self._set("real")))

    @abstractmethod
    def compute_from_features(self, generated: Tensor, real: Tensor) -> float:
        """Compute the metric of features (n, d) of generated images against features (m, d) of real images."""


class MaximumMeanDiscrepancy(_RealComparison):
    """1000 times the unbiased squared MMD with a Gaussian kernel of median bandwidth (see `mmd`)."""

    higher_is_better = False

    def compute_from_features(self, generated: Tensor, real: Tensor) -> float:
        return mmd(generated, real).value


class FrechetDistance(_RealComparison):
    """The Frechet distance (see `frechet_distance`). On Inception features it is FID (Heusel et al. 2017)."""

    higher_is_better = False

    def compute_from_features(self, generated: Tensor, real: Tensor) -> float:
        return frechet_distance(generated, real)


class FrechetDistanceInfinity(_RealComparison):
    """The Frechet distance extrapolated to infinitely many generated images (see `Jackknife.infinity`)."""

    higher_is_better = False

    def compute_from_features(self, generated: Tensor, real: Tensor) -> float:
        return Jackknife(generated, real).value_at_infinity


class SpatialFrechetDistance(FrechetDistance):
    """The Frechet distance of spatial features (sFID; Nash et al. 2021).

    ``feature`` flattens an early layer's activations instead of averaging them. Use more images than features.
    """

    def _default_feature(self, extractor: Extractor) -> Feature:
        return partial(_spatial_features, extractor)


def _spatial_features(extractor: Extractor, images: Tensor) -> Tensor:
    spatial = extractor(images).spatial
    assert spatial is not None
    return spatial


class ClassFrechetDistance(_FeatureMetric):
    """The Frechet distance averaged over classes (see `class_frechet_distance`).

    On Inception features it is intra-FID (Miyato and Koyama 2018).
    """

    higher_is_better = False
    sets = ("real", "generated", "real_labels", "generated_labels")

    def update(self, images: Tensor, labels: Tensor, real: bool) -> None:
        """Add images (n, C, H, W) with classes ``labels`` (n,) to the real images if ``real``, otherwise to the
        generated images."""
        name = "real" if real else "generated"
        self._add(name, images)
        self._append(f"{name}_labels", labels)

    def compute(self) -> Tensor:
        """Compute the mean distance of all images so far, a scalar."""
        names = ("generated", "generated_labels", "real", "real_labels")
        return torch.tensor(class_frechet_distance(*(self._set(name) for name in names)))


class KernelDistance(_RealComparison):
    """The unbiased squared MMD with the cubic kernel of KID, over all images (Binkowski et al. 2018)."""

    higher_is_better = False

    def compute_from_features(self, generated: Tensor, real: Tensor) -> float:
        return kernel_distance(generated, real, CubicKernel()).value


class _NeighborMetric(_RealComparison):
    """A k-nearest-neighbour metric. The ball of an image reaches to its k-th nearest neighbour in the same set.

    Precision and recall: Kynkaanniemi et al. (2019), https://arxiv.org/abs/1904.06991. Density and coverage: Naeem et
    al. (2020), https://arxiv.org/abs/2002.09797.
    """

    higher_is_better = True
    field: ClassVar[str]

    def compute_from_features(self, generated: Tensor, real: Tensor) -> float:
        return getattr(compute_prdc(generated, real), self.field)


class Precision(_NeighborMetric):
    """k-NN precision (k = 3): fraction of generated images in the ball of at least one real image."""

    field = "precision"


class Recall(_NeighborMetric):
    """k-NN recall (k = 3): fraction of real images in the ball of at least one generated image."""

    field = "recall"


class Density(_NeighborMetric):
    """k-NN density (k = 5): mean number of real images whose ball contains a generated image, divided by k."""

    field = "density"


class Coverage(_NeighborMetric):
    """k-NN coverage (k = 5): fraction of real images whose ball contains at least one generated image."""

    field = "coverage"


class Authenticity(_RealComparison):
    """Fraction of generated images that are not near copies of the real (training) images (Alaa et al. 2022)."""

    higher_is_better = True

    def compute_from_features(self, generated: Tensor, real: Tensor) -> float:
        return authenticity(generated, real)


class MemorizationRatio(_FeatureMetric):
    """How much closer samples are to training images than to held-out images (see `memorization_ratio`).

    The ratio is about 1 without memorisation and 0 for copies.
    """

    higher_is_better = None
    sets = ("generated", "train", "val", "test")

    def update(self, images: Tensor, split: str) -> None:
        """Add images (n, C, H, W) to ``generated``, ``train``, ``val`` or ``test``."""
        if split not in self.sets:
            raise UserError(f"split={split}: choose one of {', '.join(self.sets)}.")
        self._add(split, images)

    def compute(self) -> Tensor:
        """Compute the ratio, a scalar. It is NaN if the ratio is undefined because a mean distance is 0."""
        ratio = memorization_ratio(*(self._set(name) for name in ("generated", "train", "test", "val")))
        return torch.tensor(float("nan") if ratio is None else ratio)


class _ClassifierMetric(_FeatureMetric):
    """A metric of a classifier's logits (n, classes) for generated images."""

    sets = ("generated",)

    def __init__(self, classifier: Feature, **kwargs: Any) -> None:
        super().__init__(classifier, **kwargs)

    def update(self, images: Tensor) -> None:
        """Add generated images (n, C, H, W)."""
        self._add("generated", images)


class ClassifierScore(_ClassifierMetric):
    """Exponential of the mean KL(p(y | x) || p(y)), averaged over ten splits (see `classifier_score`).

    With the Inception network it is the Inception score (Salimans et al. 2016).
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """Compute the score of all images so far, a scalar."""
        return torch.tensor(classifier_score(self._set("generated"))[0])


class ConfidentShare(_ClassifierMetric):
    """Fraction of generated images for which one class has a probability of at least 0.7 (see `confident_share`)."""

    higher_is_better = True

    def compute(self) -> Tensor:
        """Compute the fraction for all images so far, a scalar."""
        return torch.tensor(confident_share(self._set("generated")))


class ClassShares(_ClassifierMetric):
    """Fraction of generated images that the classifier assigns to each class (0 for missing classes)."""

    higher_is_better = None

    def compute(self) -> Tensor:
        """Compute the fractions for all images so far, (classes,)."""
        return torch.tensor(class_shares(self._set("generated")))


class LabelAccuracy(_ClassifierMetric):
    """Fraction of generated images that the classifier assigns to the class that the model was given."""

    higher_is_better = True
    sets = ("generated", "labels")

    def update(self, images: Tensor, labels: Tensor) -> None:
        """Add generated images (n, C, H, W) and the classes (n,) that the model was given."""
        self._add("generated", images)
        self._append("labels", labels)

    def compute(self) -> Tensor:
        """Compute the fraction for all images so far, a scalar."""
        return torch.tensor(label_accuracy(self._set("generated"), self._set("labels")))
