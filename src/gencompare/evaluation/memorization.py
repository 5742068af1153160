"""Does a model repeat its training images? Nearest neighbours in the training set against those in held-out images."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 2000


def nearest(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """(distance (n,), index (n,)) of the nearest row of ``keys`` for each row of ``queries``, Euclidean.

    Neighbours are found by the fast product form, on centred features, and their distances are then computed from the
    rows themselves: the product form loses small ones to rounding, and a copy must be at 0.
    """
    centre = keys.mean(0)
    queries, keys = queries - centre, keys - centre
    index = torch.cat(
        [torch.cdist(block, keys, compute_mode="use_mm_for_euclid_dist").argmin(1) for block in queries.split(BLOCK)]
    )
    return (queries - keys[index]).norm(dim=1), index


def closest(queries: Tensor, keys: Tensor, k: int) -> Tensor:
    """Rows (n, k) of the ``k`` nearest ``keys`` of each query, nearest first, Euclidean; for few queries."""
    centre = keys.mean(0)
    distance = torch.cdist(queries - centre, keys - centre, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.topk(min(k, len(keys)), largest=False).indices


def nearest_other(rows: Tensor, keys: Tensor) -> Tensor:
    """Distance (r,) from ``keys[rows]`` to the nearest key that is another row."""
    keys = keys - keys.mean(0)
    found = []
    for part in rows.split(BLOCK):
        distance = torch.cdist(keys[part], keys, compute_mode="use_mm_for_euclid_dist")
        distance[torch.arange(len(part)), part] = torch.inf
        found.append((keys[part] - keys[distance.argmin(1)]).norm(dim=1))
    return torch.cat(found)


def memorization_ratio(samples: Tensor, train: Tensor, test: Tensor, val: Tensor) -> float | None:
    """How much closer samples are to training than to held-out images, in units of what real images show.

        r = [d(samples, train) / d(samples, test)] / [d(val, train) / d(val, test)],   d(a, b) = mean nearest distance

    A training set is larger than a test set, so anything is closer to it. The second factor takes that out: validation
    images are real, and neither in ``train`` nor in ``test``. So r is about 1 for samples that know no training image
    from a fresh one, 1 - s when a share s of them are copies, and 0 for copies alone. (Equal sets by taking parts of
    the training set in turn would miss most copies: a copy is found in one part only.)

    Features are those of the distance: pixels would call a dull image near to everything.

    Args: features, each (n, d). Returns None where a mean distance is 0 and the ratio means nothing.
    """
    d = {
        (i, j): float(nearest(a, b)[0].double().mean())
        for i, a in enumerate((samples, val))
        for j, b in enumerate((train, test))
    }
    if not (d[0, 1] and d[1, 0] and d[1, 1]):
        return None
    return (d[0, 0] / d[0, 1]) / (d[1, 0] / d[1, 1])


def authenticity(samples: Tensor, train: Tensor) -> float:
    """Share of samples that lie further from their nearest training image than that image lies from any other one.

    Alaa et al. (2022), "How Faithful is your Synthetic Data?", section 3.3. Copies give 0. Fresh images of the same
    distribution give one half to three quarters, not 1: read it beside the floor, the same share of test images.
    """
    distance, index = nearest(samples, train)
    rows, place = index.unique(return_inverse=True)
    return float((distance > nearest_other(rows, train)[place]).double().mean())
