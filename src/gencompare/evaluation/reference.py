"""Features of the real images, computed once a process."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from gencompare.evaluation.features import Extractor, Features
from gencompare.evaluation.quantize import stored_split
from gencompare.evaluation.source import Data

KEPT = 8
_cache: OrderedDict[tuple[str, str, str], Features] = OrderedDict()


def split_features(data: Data, split: str, extractor: Extractor, device: torch.device | str = "cpu") -> Features:
    """Features of a whole split, kept in memory under the hash of its pixels and of the extractor (the last 8)."""
    key = (data.hash(split), extractor.hash, extractor.resize)
    if key not in _cache:
        _cache[key] = extractor(stored_split(data.split(split).images, data.spec), device)
        while len(_cache) > KEPT:
            _cache.popitem(last=False)
    _cache.move_to_end(key)
    return _cache[key]


def spaced(total: int, n: int) -> Tensor:
    """``n`` row numbers spread evenly over ``total``: of a set sorted by class, a fair part of each."""
    n = min(n, total)
    return torch.arange(n) * total // n
