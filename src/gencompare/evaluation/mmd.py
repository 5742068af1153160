"""Maximum mean discrepancy (MMD) between samples and real images: a distance without bias in the number of samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from scipy.stats import t as student
from torch import Tensor

from gencompare.errors import UserError
from gencompare.evaluation.frechet import LEVEL

BLOCK = 1000
"""Rows of a kernel matrix that are held at a time."""
MOST = 10_000
"""Reference images that samples are compared with; of more, as many spread evenly over them."""
FOR_BANDWIDTH = 2_000
SCALE = 1000.0
"""MMD^2 is given in thousandths, as in Jayasumana et al. 2024 ("Rethinking FID", section 4)."""
UNDERFLOW = -80.0
"""Smallest exponent: below it exp() gives denormal numbers, which take a processor a hundred times as long."""


@dataclass(frozen=True)
class Estimate:
    value: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class KernelReference:
    r"""The real side of a squared MMD with the Gaussian kernel k(x, y) = exp(-|x - y|^2 / (2 b^2)).

    $$ \widehat{\mathrm{MMD}}^2 = \frac{1}{n (n - 1)} \sum_{i \ne j} k(x_i, x_j)
       + \frac{1}{m (m - 1)} \sum_{i \ne j} k(y_i, y_j) - \frac{2}{n m} \sum_{i, j} k(x_i, y_j) $$

    (Gretton et al. 2012, "A Kernel Two-Sample Test", equation 3, https://jmlr.org/papers/v13/gretton12a.html), times
    1,000. It assumes no Gaussian features, and is unbiased at every n: real images give 0 on average, on either side
    of it. The kernel is bounded, so no single image can decide the result, and its error is known for any features.
    """

    images: Tensor
    """Features (m, d), float32, centred."""
    centre: Tensor
    bandwidth: float
    """b: the median distance between two of the reference images."""
    within: float
    """Mean kernel over pairs of different reference images."""

    @classmethod
    def of(cls, features: Tensor, bandwidth: float | None = None) -> KernelReference:
        """Of real images' features (m, d), m at least 2. Deterministic. Raises `UserError` where they are not finite."""
        check_finite(features)
        rows = torch.arange(min(len(features), MOST)) * len(features) // min(len(features), MOST)
        centre = features.double().mean(0).float()
        images = features[rows].float() - centre
        if bandwidth is None:
            some = images[:: max(1, len(images) // FOR_BANDWIDTH)]
            bandwidth = float(torch.pdist(some).median()) or 1.0
        sums = row_sums(images, images, bandwidth)[0]
        n = len(images)
        return cls(images, centre, bandwidth, float((sums - 1).sum()) / (n * (n - 1)))

    def distance(self, features: Tensor) -> Estimate:
        r"""The estimate for features (n, d), n at least 3, and its 95 % interval over draws of n samples.

        The variance of a U-statistic with kernel h(x, x') = k(x, x') - m(x) - m(x'), m(x) = mean_j k(x, y_j), is

        $$ \frac{4 \zeta_1}{n} + \frac{2 \zeta_2}{n (n - 1)}, \qquad \zeta_1 = \mathrm{Var}\, E[h \mid x], \quad
           \zeta_2 = \mathrm{Var}\big(k - E[k \mid x] - E[k \mid x'] \big) $$

        (Hoeffding 1948, section 5). Both are estimated from row sums of the kernel matrix, and the share of the second
        in the sample variance of the row means is taken off; near the real images, where the first vanishes, the second
        is what remains. The reference is fixed.
        """
        check_finite(features)
        x = features.float() - self.centre
        n = len(x)
        if n < 3:
            raise UserError(f"{n} samples carry no kernel distance: give at least 3.")
        sums, squares = row_sums(x, x, self.bandwidth)
        own = (sums - 1) / (n - 1)  # k(x, x) = 1 is left out
        cross = row_sums(x, self.images, self.bandwidth)[0] / len(self.images)
        value = float(own.mean() + self.within - 2 * cross.mean())
        variance = float((squares.sum() - n) / (n * (n - 1)) - own.mean() ** 2)
        second = max(0.0, (variance - 2 * float(own.var())) / (1 - 2 / (n - 1))) if n > 3 else max(0.0, variance)
        first = max(0.0, float((own - cross).var()) - second / (n - 1))
        error = math.sqrt(4 * first / n + 2 * second / (n * (n - 1)))
        reach = float(student.ppf((1 + LEVEL) / 2, n - 1)) * error
        return Estimate(SCALE * value, (SCALE * (value - reach), SCALE * (value + reach)))


def row_sums(x: Tensor, y: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
    """Sums over the rows of ``y`` of k(x_i, y_j) and of its square, each (n,) in float64."""
    sums, squares = [], []
    norms = y.square().sum(1)
    for rows in x.split(BLOCK):
        distance = torch.addmm(norms, rows, y.T, alpha=-2).add_(rows.square().sum(1, keepdim=True)).clamp_min_(0)
        k = distance.div_(-2 * bandwidth**2).clamp_min_(UNDERFLOW).exp_()
        sums.append(k.sum(1, dtype=torch.float64))
        squares.append(k.square_().sum(1, dtype=torch.float64))
    return torch.cat(sums), torch.cat(squares)


def check_finite(features: Tensor) -> None:
    if not torch.isfinite(features).all():
        raise UserError("Features hold NaN or infinite values: the extractor's weights or the images are not finite.")


@dataclass(frozen=True)
class GaussianMMD:
    """`KernelReference` as a further metric, for ``+evaluation/metric=mmd``.

    On CLIP's features scaled to length 1, with b = 10, this is CMMD (Jayasumana et al. 2024, "Rethinking FID", section
    4, https://arxiv.org/abs/2401.09603).

    Args:
        bandwidth: b, in units of the features; None takes the median distance of real images.
        normalize: scale each image's features to length 1 first.
    """

    bandwidth: float | None = None
    normalize: bool = False
    better: ClassVar[str] = "lower"

    def __call__(self, generated: Tensor, reference: Tensor) -> float:
        """Features (n, d) and (m, d)."""
        if self.normalize:
            generated, reference = (torch.nn.functional.normalize(f, dim=1) for f in (generated, reference))
        return KernelReference.of(reference, self.bandwidth).distance(generated).value
