"""Load published weights into a model."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from gencompare.checksums import check_safetensors, check_zip
from gencompare.errors import UserError
from gencompare.generative_model import TrainedModel
from gencompare.models.diffusion import Diffusion
from gencompare.networks.diffusers_weights import REQUIRED_CONFIG, from_diffusers
from gencompare.networks.unet import UNet
from gencompare.safe_files import check_torch_file, read_bytes, read_json_object
from gencompare.tasks.runs.diffusers_scheduler import FILE, check_scheduler
from gencompare.tasks.runs.loading import check_state_dict

WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "weights.safetensors")
"""File names of weights in a published folder."""
HUB_FILES = (*WEIGHT_FILES, "config.json", FILE)
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
CONFIG_HINT = (
    "With pretrained=, the rest of the command sets model and data: use experiment=NAME (cifar10_ddpm is the DDPM of"
    " Ho et al.), or model= and data= with the sizes of the network (model=ddpm model.network.channels=128 ...)."
)


def load_pretrained(model: TrainedModel, path: Path) -> None:
    """Load the weights at ``path`` into ``model``, whose config must describe the published model.

    The weights may be a file written by ``task=export``, or the ``UNet2DModel`` of a diffusers DDPM as a file or a
    published folder. No code in a file is executed.

    Raises:
        UserError: the weights are missing, corrupted or from a different model, or the published scheduler does not
            match the model.
    """
    file = find_weights(path)
    state = read_weights(file)
    try:
        if "conv_in.weight" in state:
            state = convert_from_diffusers(model, state, file)
        check_state_dict(model, state, file)
    except UserError as error:
        raise UserError(f"{error} {CONFIG_HINT}") from error
    if isinstance(model, Diffusion):
        check_scheduler(model, file)
    model.load_state_dict(state)


def find_pretrained(source: str) -> Path:
    """Return the file or folder ``source``. If there is none, download the Hugging Face repository of that name.

    Raises:
        UserError: the repository could not be downloaded.
    """
    path = Path(source)
    if path.exists():
        return path
    if not HUB_NAME.fullmatch(source):
        raise UserError(f"There is no file or folder {source}: set pretrained= to a folder of weights.")
    advice = f"download {WEIGHT_FILES[0]} manually and pass its folder: pretrained=DIR"
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f"There is no file {source}. To download it from the Hugging Face hub, pip install 'gencompare[hub]', or"
            f" {advice}."
        ) from error
    try:
        patterns = [*HUB_FILES, *(f"unet/{name}" for name in HUB_FILES), f"scheduler/{FILE}"]
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=patterns))
    except Exception as error:  # no network, no such repository, a gated repository, ...
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"There is no file {source}, and the download from the hub failed ({reason}): {advice}."
        ) from error


def find_weights(path: Path) -> Path:
    """Return the weights file ``path``, or the weights file in the folder ``path`` or its subfolder ``unet``."""
    if path.is_file():
        return path
    for folder in (path, path / "unet"):
        for name in WEIGHT_FILES:
            if (folder / name).is_file():
                return folder / name
    raise UserError(f"There are no weights at {path}: use a .safetensors file, or a folder with {WEIGHT_FILES[0]}.")


def read_weights(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a file by name. No code in the file is executed."""
    try:
        if file.suffix == ".safetensors":
            payload = read_bytes(file)
            check_safetensors(file, payload)
            return load(payload)
        check_torch_file(file)
        with file.open("rb") as opened:
            if zipfile.is_zipfile(opened):  # earlier versions of torch wrote another format
                check_zip(file, opened)
            opened.seek(0)
            loaded: Any = torch.load(opened, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is corrupted, or not a weights file ({type(error).__name__}).") from error
    except Exception as error:
        raise UserError(f"{file} is corrupted, or contains more than weights ({type(error).__name__}).") from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"{file} does not contain named weights.")
    return loaded


def convert_from_diffusers(model: TrainedModel, state: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Return the state dict of ``model`` with network weights from ``state``, the state dict of a ``UNet2DModel``."""
    check_published_config(file.with_name("config.json"))
    network = getattr(model, "network", None)
    if not isinstance(network, UNet):
        raise UserError(f"{file} contains a diffusers U-Net, but this model has no U-Net.")
    converted = from_diffusers(state, num_levels=network.num_levels, num_blocks=network.num_blocks)
    return {
        **{name: value for name, value in model.state_dict().items() if not name.startswith("network.")},
        **{f"network.{name}": value for name, value in converted.items()},
    }


def check_published_config(path: Path) -> None:
    """Raise `UserError` if the published ``config.json`` exists and contradicts `REQUIRED_CONFIG`."""
    if not path.is_file():
        return
    try:
        config = read_json_object(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is corrupted ({error}).") from error
    for name, required in REQUIRED_CONFIG.items():
        if config.get(name, required) != required:
            raise UserError(
                f"{path} has {name}={config[name]}, but the U-Net here has {name}={required}: the weights would load,"
                " but the samples would be wrong."
            )
