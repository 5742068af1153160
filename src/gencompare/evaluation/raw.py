"""The values themselves as features, for data of few dimensions."""

from __future__ import annotations

import hashlib

from torch import Tensor, nn

from gencompare.contract import DataSpec
from gencompare.errors import UserError
from gencompare.evaluation.features import Extractor, Features

MOST = 64
"""Values an image may have: a distance between thousands of pixels needs tens of thousands of images."""


class RawValues(Extractor):
    """Identity: an image's values in a row."""

    name = "raw"
    hash = hashlib.sha256(b"identity").hexdigest()

    def __init__(self, spec: DataSpec) -> None:
        super().__init__()
        self.dim = spec.dims
        self.module = nn.Identity()
        if self.dim > MOST:
            raise UserError(f"Raw values serve data of at most {MOST} numbers; '{spec.name}' has {self.dim}.")

    def run(self, images: Tensor) -> Features:
        return Features(images.flatten(1).float())
