"""Every metric of an evaluation as a `torchmetrics.Metric`, for a user's own loop.

    metric = MaximumMeanDiscrepancy()
    metric.update(real_images, real=True)          # uint8 (n, C, H, W), as often as needed
    metric.update(generated_images, real=False)
    metric.compute()

The interface is that of torchmetrics' ``FrechetInceptionDistance``: images are uint8, or floats in [0, 1] with
``normalize=True``; ``feature`` is a module or function from uint8 images to features (n, d), by default that of
EfficientNet-Lite0. torchmetrics gathers states over processes. `gencompare.evaluate` adds the protocol, the same metric
for held-out real images, and intervals.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from gencompare.errors import UserError
from gencompare.evaluation.extractors.efficientnet import efficientnet_lite0
from gencompare.evaluation.metrics.class_metrics import classifier_score, label_accuracy
from gencompare.evaluation.metrics.frechet import Jackknife, frechet_distance
from gencompare.evaluation.metrics.kernel import CubicKernel, kernel_distance, mmd
from gencompare.evaluation.metrics.neighbors import authenticity, memorization_ratio, neighbor_balls
from gencompare.generative_model import DataSpec

Feature = Callable[[Tensor], Tensor]


class _Collects(Metric):
    """Keeps features of every set of images that a metric compares."""

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
        self.feature, self.normalize, self.reset_real_features = feature, normalize, reset_real_features
        for name in self.sets:
            self.add_state(name, [], dist_reduce_fx="cat")

    def _add(self, name: str, images: Tensor) -> None:
        getattr(self, name).append(self._features(images).float().cpu())

    def _features(self, images: Tensor) -> Tensor:
        if images.dim() != 4:
            raise UserError(f"Images are (n, C, H, W), not {tuple(images.shape)}.")
        if self.normalize:
            images = (images * 255).round().clamp(0, 255).to(torch.uint8)
        if images.dtype != torch.uint8:
            raise UserError(f"Images are uint8, or floats in [0, 1] with normalize=True; these are {images.dtype}.")
        if self.feature is None:
            self.feature = efficientnet_lite0(DataSpec(name="images", shape=tuple(images.shape[1:]))).features  # type: ignore[arg-type]
        with torch.no_grad():
            return self.feature(images)

    def _set(self, name: str) -> Tensor:
        parts = getattr(self, name)
        if isinstance(parts, list):
            if not parts:
                raise UserError(f"{type(self).__name__} has no {name} images yet: update it with some.")
            parts = torch.cat(parts)
        return parts

    def reset(self) -> None:
        """Forget all images; the real ones only with ``reset_real_features``."""
        real = [name for name in self.sets if name != "generated" and not self.reset_real_features]
        kept = {name: list(getattr(self, name)) for name in real}
        super().reset()
        for name, parts in kept.items():
            setattr(self, name, parts)


class _ComparesWithReal(_Collects):
    def update(self, images: Tensor, real: bool) -> None:
        """Add images (n, C, H, W) to the real or to the generated ones."""
        self._add("real" if real else "generated", images)

    def compute(self) -> Tensor:
        """The metric of all images so far, a scalar."""
        return torch.tensor(self.value(self._set("generated"), self._set("real")))

    @abstractmethod
    def value(self, generated: Tensor, real: Tensor) -> float:
        """The metric of features (n, d) of generated images against (m, d) of real ones."""


class MaximumMeanDiscrepancy(_ComparesWithReal):
    """1000 times the unbiased squared MMD with a Gaussian kernel of median bandwidth: `evaluation.mmd.mmd`."""

    higher_is_better = False

    def value(self, generated: Tensor, real: Tensor) -> float:
        return mmd(generated, real).value


class FrechetDistance(_ComparesWithReal):
    """|m_g - m_r|^2 + tr(S_g + S_r - 2 (S_g S_r)^(1/2)) (Heusel et al. 2017): FID on the Inception network alone."""

    higher_is_better = False

    def value(self, generated: Tensor, real: Tensor) -> float:
        return frechet_distance(generated, real)


class FrechetDistanceInfinity(_ComparesWithReal):
    """The Frechet distance at an infinite number of generated images: `evaluation.frechet.Jackknife`."""

    higher_is_better = False

    def value(self, generated: Tensor, real: Tensor) -> float:
        return Jackknife(generated, real).value_at_infinity


class KernelDistance(_ComparesWithReal):
    """The unbiased squared MMD with the cubic kernel of KID over all images (Binkowski et al. 2018)."""

    higher_is_better = False

    def value(self, generated: Tensor, real: Tensor) -> float:
        return kernel_distance(generated, real, CubicKernel()).value


class Precision(_ComparesWithReal):
    """Share of generated images in the ball of a real one, k = 3 (Kynkaanniemi et al. 2019)."""

    higher_is_better = True

    def value(self, generated: Tensor, real: Tensor) -> float:
        return neighbor_balls(generated, real).precision


class Recall(_ComparesWithReal):
    """Share of real images in the ball of a generated one, k = 3 (Kynkaanniemi et al. 2019)."""

    higher_is_better = True

    def value(self, generated: Tensor, real: Tensor) -> float:
        return neighbor_balls(generated, real).recall


class Density(_ComparesWithReal):
    """Real images' balls that a generated image lies in, over k = 5 (Naeem et al. 2020)."""

    higher_is_better = True

    def value(self, generated: Tensor, real: Tensor) -> float:
        return neighbor_balls(generated, real).density


class Coverage(_ComparesWithReal):
    """Share of real images whose ball, k = 5, holds a generated one (Naeem et al. 2020)."""

    higher_is_better = True

    def value(self, generated: Tensor, real: Tensor) -> float:
        return neighbor_balls(generated, real).coverage


class Authenticity(_ComparesWithReal):
    """Share of generated images that are no near copies of the real ones, the training images (Alaa et al. 2022)."""

    higher_is_better = True

    def value(self, generated: Tensor, real: Tensor) -> float:
        return authenticity(generated, real)


class MemorizationRatio(_Collects):
    """How much closer samples are to training than to held-out images; about 1 without memorization, 0 for copies."""

    higher_is_better = None
    sets = ("generated", "train", "val", "test")

    def update(self, images: Tensor, split: str) -> None:
        """Add images (n, C, H, W) to ``generated``, ``train``, ``val`` or ``test``."""
        if split not in self.sets:
            raise UserError(f"split={split}: choose one of {', '.join(self.sets)}.")
        self._add(split, images)

    def compute(self) -> Tensor:
        """The ratio, a scalar; NaN where a mean distance to held-out images is 0."""
        ratio = memorization_ratio(*(self._set(name) for name in ("generated", "train", "test", "val")))
        return torch.tensor(float("nan") if ratio is None else ratio)


class _OfLogits(_Collects):
    sets = ("generated",)

    def __init__(self, classifier: Feature, **kwargs: Any) -> None:
        super().__init__(classifier, **kwargs)


class ClassifierScore(_OfLogits):
    """exp of the mean KL(p(y | x) || p(y)), the mean over ten parts (Salimans et al. 2016); the Inception score on the
    Inception network alone."""

    higher_is_better = True

    def update(self, images: Tensor) -> None:
        """Add generated images (n, C, H, W)."""
        self._add("generated", images)

    def compute(self) -> Tensor:
        """The score of all images so far, a scalar."""
        return torch.tensor(classifier_score(self._set("generated"))[0])


class LabelAccuracy(_OfLogits):
    """Share of generated images that the classifier assigns to the class that the model was given."""

    higher_is_better = True

    def __init__(self, classifier: Feature, **kwargs: Any) -> None:
        super().__init__(classifier, **kwargs)
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, images: Tensor, labels: Tensor) -> None:
        """Add generated images (n, C, H, W) and the classes (n,) that the model was given."""
        self._add("generated", images)
        self.labels.append(labels.cpu())  # type: ignore[union-attr,operator]

    def compute(self) -> Tensor:
        """The share, a scalar."""
        return torch.tensor(label_accuracy(self._set("generated"), self._set("labels")))
