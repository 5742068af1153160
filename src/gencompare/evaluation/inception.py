"""The standard FID network, ``inception-v3-compat``, through torch-fidelity."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gencompare.contract import DataSpec
from gencompare.errors import UserError
from gencompare.evaluation.features import Extractor, Features
from gencompare.files import sha256

NAME = "inception-v3-compat"
LAYER = "2048"
PUBLISHED = "6726825d"
"""First digits of the published weights' SHA-256; they stand in the file's name as well."""


def inception(spec: DataSpec, weights: str | os.PathLike[str] | None = None) -> Extractor:
    """The FID network. ``weights``: a file on this machine; None downloads the published one where that is allowed."""
    return Inception(spec, weights)


class Inception(Extractor):
    """2048 features of the Inception network of 2015-12-05 (Heusel et al. 2017), as torch-fidelity computes them.

    Images are resized inside, to 299 x 299 in the way of TensorFlow 1; grey ones are given three equal channels.
    """

    name = NAME
    dim = 2048
    resize = "bilinear to 299x299 (TensorFlow 1)"
    batch = 50

    def __init__(self, spec: DataSpec, weights: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        if spec.num_levels is None or spec.shape[0] not in (1, 3):
            raise UserError(f"evaluation=inception measures grey or RGB images; data '{spec.name}' has none.")
        path = None if weights is None else Path(weights)
        if path is not None:
            check_file(path)
        self.module = build(path)
        self.hash = sha256(path or downloaded_to())
        if not self.hash.startswith(PUBLISHED):
            self.details["flags"] = ["the Inception weights are not the published ones: not comparable with other FIDs"]

    @property
    def frechet_name(self) -> str:
        return "fid"

    @property
    def kernel_name(self) -> str:
        return "kid"

    def run(self, images: Tensor) -> Features:
        (features,) = self.module(images.expand(-1, 3, -1, -1))
        return Features(features)


def build(path: Path | None) -> Any:
    from torch_fidelity.utils import create_feature_extractor

    try:
        return create_feature_extractor(
            NAME, [LAYER], cuda=False, verbose=False, feature_extractor_weights_path=None if path is None else str(path)
        )
    except RuntimeError as error:
        raise UserError(
            f"{path} does not hold the weights of {NAME} ({' '.join(str(error).split())[:120]})."
        ) from error
    except OSError as error:  # URLError is one
        raise UserError(
            f"The weights of {NAME} cannot be downloaded here ({error}). Fetch {url()} on another machine and name the "
            f"file with evaluation.weights=PATH (or put it in {downloaded_to().parent}); "
            "evaluation=default needs no download."
        ) from error


def check_file(path: Path) -> None:
    """torch-fidelity unpickles the file whole; so admit only one that holds nothing but tensors."""
    if not path.is_file():
        raise UserError(f"There is no file {path}: fetch it from {url()}, or use evaluation=default without it.")
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} is damaged, or holds more than weights ({type(error).__name__}).") from error


def url() -> str:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return URL_INCEPTION_V3


def downloaded_to() -> Path:
    """Where torch keeps the downloaded file."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url().rsplit("/", 1)[1]
