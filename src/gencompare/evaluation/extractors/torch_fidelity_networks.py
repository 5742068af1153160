"""The torch-fidelity networks as extractors: Inception, DINOv2, CLIP and VGG16."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gencompare.errors import UserError
from gencompare.evaluation.extractors.extractor import Extractor, Features
from gencompare.files import sha256
from gencompare.generative_model import DataSpec
from gencompare.safe_files import check_torch_file


def torch_fidelity_network(spec: DataSpec, name: str, weights: str | os.PathLike[str] | None = None) -> Extractor:
    """Create a `TorchFidelityExtractor` for the torch-fidelity network ``name``."""
    return TorchFidelityExtractor(spec, name, weights)


class TorchFidelityExtractor(Extractor):
    """A network from torch-fidelity's registry, with the features that its Frechet distance uses by default.

    The network itself resizes images, as TensorFlow 1 does. Greyscale images are repeated to three channels.

    Args:
        spec: shape and value range of the data to measure.
        registered: the network's name in torch-fidelity's registry.
        weights: a weights file; None downloads the published one.

    Raises:
        UserError: the weights are missing, corrupted or from a different network, or the file contains more than
            weights.
    """

    batch_size = 50
    cpu_batch_size = 10  # Inception is 20 % faster than with 50

    def __init__(self, spec: DataSpec, registered: str, weights: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        self.registered = registered
        self.name = registered.replace("-", "_")
        if spec.num_bins is None or spec.shape[0] not in (1, 3):
            raise UserError(f"{registered} needs 8-bit greyscale or RGB images, but data set '{spec.name}' has none.")
        path = None if weights is None else Path(weights)
        if path is not None:
            _check_file(path, registered)
        self.module = self.build_network(path)
        self.dim = self.extract_batch(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).features.shape[1]
        side = getattr(self.module, "resolution", None) or self.module.INPUT_IMAGE_SIZE
        self.resize = f"bilinear to {side}x{side} (TensorFlow 1)"
        file = path or _downloaded_file(self.weights_url())
        self.hash = sha256(file) if file is not None else state_hash(self.module)
        published = _published_hash(registered, self.weights_url())
        if path is not None and published and not self.hash.startswith(published):
            self.details["warnings"] = [
                f"the weights of {registered} are not the published ones, so its values are not comparable with others"
            ]

    def layers(self) -> list[str]:
        """Return the names of the outputs that the network returns."""
        return [_registered_class(self.registered).get_default_feature_layer_for_metric("fid")]

    def extract_batch(self, images: Tensor) -> Features:
        with torch.inference_mode():
            (features,) = self.module(images.expand(-1, 3, -1, -1))
        return Features(features)

    def weights_url(self) -> str | None:
        """Return the URL of the published weights, or None if it is unknown."""
        from torch_fidelity import feature_extractor_clip, feature_extractor_inceptionv3
        from torchvision.models import VGG16_Weights

        urls = {
            "inception-v3-compat": feature_extractor_inceptionv3.URL_INCEPTION_V3,
            "vgg16": VGG16_Weights.DEFAULT.url,
        }
        return (urls | feature_extractor_clip.MODEL_URLS).get(self.registered)

    def build_network(self, path: Path | None) -> Any:
        """Build the network with the weights in ``path``, or with the published weights if None."""
        from torch_fidelity.utils import create_feature_extractor

        given = None if path is None else str(path)
        try:
            return create_feature_extractor(
                self.registered, self.layers(), cuda=False, verbose=False, feature_extractor_weights_path=given
            )
        except NotImplementedError as error:
            raise UserError(
                f"torch-fidelity reads {self.registered} only from torch.hub, not from a file: copy the folder and the "
                f"checkpoint of torch.hub to {torch.hub.get_dir()}, and omit evaluation.weights."
            ) from error
        except OSError as error:  # includes URLError
            source = self.weights_url() or "the repository that torch.hub names"
            raise UserError(
                f"The weights of {self.registered} cannot be downloaded here ({error}). Download {source} on another "
                f"machine and set evaluation.weights=PATH (or copy it to {_checkpoint_dir()}); "
                "evaluation=default needs no download."
            ) from error
        except (RuntimeError, KeyError, AttributeError, TypeError) as error:
            text = " ".join(str(error).split())[:120]
            raise UserError(
                f"{path or self.registered} does not contain the weights of {self.registered} ({text})."
            ) from error


def _registered_class(name: str) -> Any:
    """Return torch-fidelity's class of a registered network. Raise `UserError` for an unknown name."""
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    if name not in FEATURE_EXTRACTORS_REGISTRY:
        raise UserError(
            f"torch-fidelity has no network '{name}': choose from {', '.join(FEATURE_EXTRACTORS_REGISTRY)}."
        )
    return FEATURE_EXTRACTORS_REGISTRY[name]


def _check_file(path: Path, name: str) -> None:
    """Raise `UserError` if a file contains anything but tensors, because torch-fidelity would execute code in it.

    CLIP's file is a program, so only the published file is accepted.
    """
    from torch_fidelity.feature_extractor_clip import MODEL_METADATA

    if not path.is_file():
        raise UserError(
            f"There is no file {path}: download the weights of {name}, or use evaluation=default (no download)."
        )
    if name in MODEL_METADATA:
        if sha256(path) != MODEL_METADATA[name]["hash"]:
            raise UserError(f"{path} is not the published {name} file: its SHA-256 differs. Download it again.")
        return
    check_torch_file(path)
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} is corrupted, or contains more than weights ({type(error).__name__}).") from error


def _published_hash(name: str, url: str | None) -> str:
    """Return the first digits of the published file's SHA-256, from torch-fidelity or the URL; empty if unknown."""
    from torch_fidelity.feature_extractor_clip import MODEL_METADATA

    if name in MODEL_METADATA:
        return MODEL_METADATA[name]["hash"]
    stem = Path(url).stem if url else ""
    last = stem.rsplit("-", 1)[-1]
    return last if len(last) == 8 and all(c in "0123456789abcdef" for c in last) else ""


def _checkpoint_dir() -> Path:
    """Return the folder where torch stores downloaded files."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def _downloaded_file(url: str | None) -> Path | None:
    """Return the file that torch downloaded from ``url``, or None if there is none."""
    path = _checkpoint_dir() / url.rsplit("/", 1)[1] if url else None
    return path if path is not None and path.is_file() else None


def state_hash(module: nn.Module) -> str:
    """Return the SHA-256 of the names and values of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


INCEPTION_NAME = "inception-v3-compat"
SPATIAL_CHANNELS = 7


def inception(spec: DataSpec, weights: str | os.PathLike[str] | None = None) -> Extractor:
    """Create an `InceptionExtractor`, which computes the features of FID."""
    return InceptionExtractor(spec, weights)


class InceptionExtractor(TorchFidelityExtractor):
    """The 2048 features of FID, from the Inception network of 2015-12-05 (Heusel et al. 2017,
    https://arxiv.org/abs/1706.08500).

    Up to rounding, the features equal those of torch-fidelity. Each batch norm is fused into the preceding convolution,
    and the memory format is channels-last. Logits are over 1008 ImageNet classes, without the bias, as for the
    Inception score. Spatial features are 7 channels of the 17 x 17 intermediate activations (sFID; Nash et al. 2021,
    https://arxiv.org/abs/2103.03841).

    Args:
        spec: shape and value range of the data to measure.
        weights: a weights file; None downloads the published one.
    """

    def __init__(self, spec: DataSpec, weights: str | os.PathLike[str] | None = None) -> None:
        super().__init__(spec, INCEPTION_NAME, weights)

    @property
    def primary(self) -> str:
        """Name of FID, the metric that papers report."""
        return self.frechet_name

    @property
    def frechet_name(self) -> str:
        return "fid"

    @property
    def kernel_name(self) -> str:
        return "kid"

    @property
    def score_name(self) -> str:
        return "inception_score"

    def layers(self) -> list[str]:
        return ["2048", "logits_unbiased"]

    def build_network(self, path: Path | None) -> Any:
        module = _fuse_batch_norms(super().build_network(path))
        module.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)
        return module

    def extract_batch(self, images: Tensor) -> Features:
        with torch.inference_mode():
            features, logits = self.module(images.expand(-1, 3, -1, -1))
        return Features(features, logits, self._spatial[:, :SPATIAL_CHANNELS].flatten(1))

    def _keep_spatial(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._spatial = output


def _fuse_batch_norms(network: Any) -> Any:
    r"""Fuse each (convolution, batch norm) pair of ``network`` into one convolution, in place, and use channels-last.

    The fused weights are :math:`W' = W \gamma / \sqrt{v + \epsilon}` and
    :math:`b' = (b - m) \gamma / \sqrt{v + \epsilon} + \beta`. In inference they compute the same map with less memory
    traffic.
    """
    for block in network.modules():
        if isinstance(getattr(block, "conv", None), nn.Conv2d) and isinstance(
            getattr(block, "bn", None), nn.BatchNorm2d
        ):
            block.conv = fuse_conv_bn_eval(block.conv, block.bn)
            block.bn = nn.Identity()
    return network.to(memory_format=torch.channels_last)
