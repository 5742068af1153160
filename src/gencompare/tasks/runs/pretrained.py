"""Published weights into a model of this suite."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gencompare.errors import UserError
from gencompare.generative_model import TrainedModel
from gencompare.models.diffusion import Diffusion
from gencompare.networks.diffusers_weights import SAME_NETWORK, from_diffusers
from gencompare.networks.unet import UNet
from gencompare.tasks.runs.diffusers_scheduler import FILE, check_scheduler
from gencompare.tasks.runs.loading import check_fits

FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "weights.safetensors")
"""Names that weights have in a published folder."""
WANTED = (*FILES, "config.json", FILE)
WHOSE = (
    "pretrained= takes model and data from the rest of the command: give experiment=NAME (cifar10_ddpm is the DDPM of"
    " Ho et al.), or model= and data= with the sizes of that network (model=ddpm model.network.channels=128 ...)."
)
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def load_pretrained(model: TrainedModel, path: Path) -> None:
    """Put the weights of ``path`` into ``model``, whose config must describe the model that they are of.

    Read are what ``task=export`` writes, and the ``UNet2DModel`` of a diffusers DDPM: a file, or the folder that it was
    published in. Nothing in a file is run. Raises `UserError` for weights that are missing, damaged or others, and
    where the scheduler in that folder is of another schedule or parameterisation than the model's.
    """
    file = found(path)
    state = read(file)
    try:
        if "conv_in.weight" in state:
            state = from_diffusers_folder(model, state, file)
        check_fits(model, state, file)
    except UserError as error:
        raise UserError(f"{error} {WHOSE}") from error
    if isinstance(model, Diffusion):
        check_scheduler(model, file)
    model.load_state_dict(state)


def from_diffusers_folder(model: TrainedModel, state: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The state of ``model`` with its network's weights from ``state``, that of a ``UNet2DModel``."""
    check_published(file.with_name("config.json"))
    network = getattr(model, "network", None)
    if not isinstance(network, UNet):
        raise UserError(f"{file} holds a U-Net of diffusers, and this model has none.")
    return {
        **{name: value for name, value in model.state_dict().items() if not name.startswith("network.")},
        **{f"network.{name}": value for name, value in converted(network, state).items()},
    }


def located(place: str) -> Path:
    """The file or folder at ``place``, or where no such path is, the weights of the hub's repository of that name.

    Raises `UserError` where the hub cannot be asked.
    """
    path = Path(place)
    if path.exists() or not HUB_NAME.fullmatch(place):
        return path
    offer = f"download {FILES[0]} by other means and give its folder: pretrained=DIR"
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f"There is no file {place}. To ask the Hugging Face hub for it: pip install 'gencompare[hub]'; or {offer}."
        ) from error
    try:
        wanted = [*WANTED, *(f"unet/{name}" for name in WANTED), f"scheduler/{FILE}"]
        return Path(huggingface_hub.snapshot_download(place, allow_patterns=wanted))
    except Exception as error:  # of many kinds: no network, no such repository, a gated one
        why = " ".join(str(error).split())[:200]
        raise UserError(f"There is no file {place}, and the hub did not give it ({why}): {offer}.") from error


def check_published(config: Path) -> None:
    """Raises `UserError` where the published ``config.json``, if there is one, tells of another network than `UNet`."""
    if not config.is_file():
        return
    try:
        said = json.loads(config.read_text())
    except ValueError as error:
        raise UserError(f"{config} is damaged ({error}).") from error
    for name, usual in SAME_NETWORK.items():
        if said.get(name, usual) != usual:
            raise UserError(
                f"{config} says {name}={said[name]}, and the U-Net here is the one with {name}={usual}: the weights"
                " would fit, and give other images."
            )


def converted(network: UNet, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return from_diffusers(state, levels=network.levels, blocks=network.blocks)


def found(path: Path) -> Path:
    """The file of weights at ``path``, or in the folder there or its ``unet``."""
    if path.is_file():
        return path
    for folder in (path, path / "unet"):
        for name in FILES:
            if (folder / name).is_file():
                return folder / name
    raise UserError(f"There are no weights at {path}: name a .safetensors file, or a folder with {FILES[0]}.")


def read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        loaded: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged, or no file of weights ({type(error).__name__}).") from error
    except Exception as error:
        raise UserError(f"{file} is damaged, or holds more than weights ({type(error).__name__}).") from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"{file} holds no weights by name.")
    return loaded
