"""The networks of torch-fidelity as extractors: Inception, DINOv2, CLIP and VGG16."""

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


def torch_fidelity_network(spec: DataSpec, name: str, weights: str | os.PathLike[str] | None = None) -> Extractor:
    """The network that torch-fidelity calls ``name``; ``weights``: a file, or None to download the published ones."""
    return TorchFidelityExtractor(spec, name, weights)


class TorchFidelityExtractor(Extractor):
    """A network of torch-fidelity's registry, with the features that it uses for its own Frechet distance.

    Images are resized inside, in the way of TensorFlow 1; grey ones are given three equal channels.

    Args:
        spec: of the data to be measured.
        registered: the network's name in torch-fidelity's registry.
        weights: a file of weights on this machine; None downloads the published one where that is allowed.

    Raises:
        UserError: weights that are missing, damaged, of another network, or that hold more than weights.
    """

    batch = 50
    cpu_batch = 10  # the Inception network takes 0.8 of the time that it takes in batches of 50

    def __init__(self, spec: DataSpec, registered: str, weights: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        self.registered = registered
        self.name = registered.replace("-", "_")
        if spec.num_levels is None or spec.shape[0] not in (1, 3):
            raise UserError(f"{registered} measures grey or RGB images; data '{spec.name}' has none.")
        path = None if weights is None else Path(weights)
        if path is not None:
            check_file(path, registered)
        self.module = self.build(path)
        self.dim = self.run(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).features.shape[1]
        side = getattr(self.module, "resolution", None) or self.module.INPUT_IMAGE_SIZE
        self.resize = f"bilinear to {side}x{side} (TensorFlow 1)"
        file = path or downloaded(self.url())
        self.hash = sha256(file) if file is not None else state_hash(self.module)
        published = published_hash(registered, self.url())
        if path is not None and published and not self.hash.startswith(published):
            self.details["flags"] = [
                f"the weights of {registered} are not the published ones: not comparable with others"
            ]

    def layers(self) -> list[str]:
        return [registered_class(self.registered).get_default_feature_layer_for_metric("fid")]

    def run(self, images: Tensor) -> Features:
        with torch.inference_mode():
            (features,) = self.module(images.expand(-1, 3, -1, -1))
        return Features(features)

    def url(self) -> str | None:
        """Where the published weights are, where torch-fidelity says so."""
        from torch_fidelity import feature_extractor_clip, feature_extractor_inceptionv3
        from torchvision.models import VGG16_Weights

        urls = {
            "inception-v3-compat": feature_extractor_inceptionv3.URL_INCEPTION_V3,
            "vgg16": VGG16_Weights.DEFAULT.url,
        }
        return (urls | feature_extractor_clip.MODEL_URLS).get(self.registered)

    def build(self, path: Path | None) -> Any:
        from torch_fidelity.utils import create_feature_extractor

        given = None if path is None else str(path)
        try:
            return create_feature_extractor(
                self.registered, self.layers(), cuda=False, verbose=False, feature_extractor_weights_path=given
            )
        except NotImplementedError as error:
            raise UserError(
                f"torch-fidelity reads {self.registered} from torch.hub alone, from no file: put the folder and the "
                f"checkpoint that torch.hub keeps into {torch.hub.get_dir()}, and leave evaluation.weights out."
            ) from error
        except OSError as error:  # URLError is one
            where = self.url() or "the repository that torch.hub names"
            raise UserError(
                f"The weights of {self.registered} cannot be downloaded here ({error}). Fetch {where} on another "
                f"machine and name the file with evaluation.weights=PATH (or put it in {checkpoints()}); "
                "evaluation=default needs no download."
            ) from error
        except (RuntimeError, KeyError, AttributeError, TypeError) as error:
            text = " ".join(str(error).split())[:120]
            raise UserError(
                f"{path or self.registered} does not hold the weights of {self.registered} ({text})."
            ) from error


def registered_class(name: str) -> Any:
    """torch-fidelity's class of a registered network. Raises `UserError` for a name that it does not know."""
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    if name not in FEATURE_EXTRACTORS_REGISTRY:
        raise UserError(
            f"torch-fidelity has no network '{name}': choose one of {', '.join(FEATURE_EXTRACTORS_REGISTRY)}."
        )
    return FEATURE_EXTRACTORS_REGISTRY[name]


def check_file(path: Path, name: str) -> None:
    """torch-fidelity runs what is in the file, so admit only tensors, and of CLIP's programs only the published one."""
    from torch_fidelity.feature_extractor_clip import MODEL_METADATA

    if not path.is_file():
        raise UserError(
            f"There is no file {path}: fetch the weights of {name}, or use evaluation=default without them."
        )
    if name in MODEL_METADATA:
        if sha256(path) != MODEL_METADATA[name]["hash"]:
            raise UserError(f"{path} is not the published file of {name}: its SHA-256 is another. Fetch it again.")
        return
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} is damaged, or holds more than weights ({type(error).__name__}).") from error


def published_hash(name: str, url: str | None) -> str:
    """First digits of the published file's SHA-256: they stand in its name, or in its address; empty if unknown."""
    from torch_fidelity.feature_extractor_clip import MODEL_METADATA

    if name in MODEL_METADATA:
        return MODEL_METADATA[name]["hash"]
    stem = Path(url).stem if url else ""
    last = stem.rsplit("-", 1)[-1]
    return last if len(last) == 8 and all(c in "0123456789abcdef" for c in last) else ""


def checkpoints() -> Path:
    """Where torch keeps downloaded files."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def downloaded(url: str | None) -> Path | None:
    """The file that was downloaded from ``url``, if it lies there."""
    path = checkpoints() / url.rsplit("/", 1)[1] if url else None
    return path if path is not None and path.is_file() else None


def state_hash(module: nn.Module) -> str:
    """SHA-256 over names and values of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


NAME = "inception-v3-compat"
SPATIAL_CHANNELS = 7


def inception(spec: DataSpec, weights: str | os.PathLike[str] | None = None) -> Extractor:
    """The FID network. ``weights``: a file on this machine; None downloads the published one where that is allowed."""
    return InceptionExtractor(spec, weights)


class InceptionExtractor(TorchFidelityExtractor):
    """2048 features of the Inception network of 2015-12-05 (Heusel et al. 2017).

    The same function as torch-fidelity's, to rounding: each batch norm is folded into the convolution before it, and
    images lie channels last. Logits are over 1008 classes of ImageNet, without the bias, as the Inception score takes
    them. Spatial features are 7 channels of 17 x 17 activations in the middle (Nash et al. 2021: sFID).
    """

    def __init__(self, spec: DataSpec, weights: str | os.PathLike[str] | None = None) -> None:
        super().__init__(spec, NAME, weights)

    @property
    def primary(self) -> str:
        """FID, which papers quote."""
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

    def build(self, path: Path | None) -> Any:
        module = folded(super().build(path))
        module.Mixed_6d.branch1x1.register_forward_hook(self._remember)
        return module

    def run(self, images: Tensor) -> Features:
        with torch.inference_mode():
            features, logits = self.module(images.expand(-1, 3, -1, -1))
        return Features(features, logits, self._seen[:, :SPATIAL_CHANNELS].flatten(1))

    def _remember(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._seen = output


def folded(network: Any) -> Any:
    """``network`` with every (convolution, batch norm) pair as one convolution, channels last. Changes it in place.

    W' = W g / sqrt(v + e), b' = (b - m) g / sqrt(v + e) + shift: the same map in inference, with less to move.
    """
    for block in network.modules():
        if isinstance(getattr(block, "conv", None), nn.Conv2d) and isinstance(
            getattr(block, "bn", None), nn.BatchNorm2d
        ):
            block.conv = fuse_conv_bn_eval(block.conv, block.bn)
            block.bn = nn.Identity()
    return network.to(memory_format=torch.channels_last)
