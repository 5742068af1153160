"""task=export: the weights of a run as safetensors, which hold no code, for this project or for diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save

from gencompare.errors import UserError
from gencompare.files import atomic_write, write_json
from gencompare.generative_model import TrainedModel
from gencompare.networks.diffusers_weights import SAME_NETWORK, to_diffusers
from gencompare.networks.unet import UNet
from gencompare.tasks.evaluate_run import run_folder
from gencompare.tasks.runs import diffusers_scheduler
from gencompare.tasks.runs.build import build_data, build_model
from gencompare.tasks.runs.loading import load_weights

FORMATS = ("safetensors", "diffusers")


def export(cfg: DictConfig) -> None:
    """Write the run's weights: one file, or with ``format=diffusers`` a folder that a ``DDPMPipeline`` loads."""
    folder = run_folder(cfg)
    if cfg.format not in FORMATS:
        raise UserError(f"format={cfg.format}: choose {' or '.join(FORMATS)}.")
    model = build_model(cfg, build_data(cfg))
    step = load_weights(model, folder, checkpoint=cfg.checkpoint, weights=cfg.weights)["step"]
    if cfg.format == "diffusers":
        out = Path(cfg.task.out or folder / "diffusers")
        write_pipeline(cfg, model, out)
    else:
        out = Path(cfg.task.out or folder / "weights.safetensors")
        config = OmegaConf.to_container(cfg.model, resolve=True)
        metadata = {"model": json.dumps(config), "data": cfg.data._target_, "step": str(step), "weights": cfg.weights}
        write_tensors(model.state_dict(), out, metadata)
    print(f"Weights of {folder} at step {step}: {out}")


ONLY = {
    "heads": 1, "head_channels": None, "decoder_attention_once": False, "resample_filter": None, "scale_shift": False,
    "skip_rescale": False, "progressive_input": None, "progressive_output": None, "fourier_input": (),
    "add_input": False,
}  # fmt: skip
"""Options of `UNet` and the values with which it is diffusers' ``UNet2DModel``."""


def write_tensors(state: dict[str, Any], path: Path, metadata: dict[str, str]) -> None:
    with atomic_write(path) as file:
        file.write(save({name: value.contiguous() for name, value in state.items()}, metadata))


def write_pipeline(cfg: DictConfig, model: TrainedModel, out: Path) -> None:
    """A folder as ``diffusers.DDPMPipeline.from_pretrained`` reads it: U-Net, scheduler, and the list of both.

    Raises `UserError` for a model that diffusers has no words for: another network, or a schedule that is no table of
    betas, or a network that is not told the timestep.
    """
    network = getattr(model, "network", None)
    scheduler = diffusers_scheduler.scheduler_config(model)
    if not isinstance(network, UNet) or scheduler is None:
        raise UserError(
            "format=diffusers writes DDPMs: a U-Net that is told the timestep, under a table of betas of so many"
            " steps, with parameterization eps, x0 or v. Leave format out to write one file of weights."
        )
    if model.autoencoder() is not None:
        raise UserError("format=diffusers writes models of pixels, and this one works on latents: leave format out.")
    changed = [name for name, usual in ONLY.items() if cfg.model.network.get(name, usual) != usual]
    if changed:
        raise UserError(f"format=diffusers: UNet2DModel has nothing like model.network.{changed[0]} of this run.")
    state = to_diffusers(network.state_dict(), levels=network.levels, blocks=network.blocks)
    write_tensors(state, out / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    write_json(out / "unet" / "config.json", unet_config(cfg.model.network, model))
    write_json(out / "scheduler" / diffusers_scheduler.FILE, scheduler)
    parts = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
    write_json(out / "model_index.json", {"_class_name": "DDPMPipeline", **parts})


def unet_config(network: DictConfig, model: TrainedModel) -> dict[str, Any]:
    """The arguments of the ``UNet2DModel`` that is the same network."""
    channels, height, width = model.spec.shape
    heights = [height >> level for level in range(len(network.multipliers))]
    attends = ["Attn" * (h in network.attention) for h in heights]
    return {
        "_class_name": "UNet2DModel", "sample_size": height if height == width else [height, width],
        "in_channels": channels, "out_channels": channels,
        "block_out_channels": [network.channels * m for m in network.multipliers], "layers_per_block": network.blocks,
        "down_block_types": [f"{kind}DownBlock2D" for kind in attends],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(attends)],
        "norm_num_groups": network.groups, "dropout": network.dropout, **SAME_NETWORK,
    }  # fmt: skip
