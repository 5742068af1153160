"""task=export: write the weights of a run as a safetensors file, a diffusers pipeline, or a folder for the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from gencompare.diffusion.objectives import Objective
from gencompare.errors import UserError, printable
from gencompare.files import write_json
from gencompare.generative_model import TrainedModel
from gencompare.networks.diffusers_weights import REQUIRED_CONFIG, to_diffusers
from gencompare.networks.unet import UNet
from gencompare.records import RunRecord
from gencompare.tasks.hub import push_model_folder, write_model_folder
from gencompare.tasks.runs import diffusers_scheduler
from gencompare.tasks.runs.build import build_data, build_model
from gencompare.tasks.runs.interpolations import plain
from gencompare.tasks.runs.loading import load_weights
from gencompare.tasks.runs.run_folder import run_folder
from gencompare.tensor_files import write_tensors

FORMATS = ("safetensors", "diffusers", "hub")


def export(cfg: DictConfig) -> None:
    """Write the weights of a run to a file, or to a folder.

    ``format=diffusers`` writes a folder for ``DDPMPipeline``, and ``format=hub`` one with a model card, which
    ``task.push=USER/NAME`` uploads.
    """
    folder = run_folder(cfg)
    if cfg.format not in FORMATS:
        raise UserError(f"format={cfg.format}: choose from {', '.join(FORMATS)}.")
    if cfg.task.get("push") and cfg.format != "hub":
        raise UserError("task.push needs format=hub.")
    model = build_model(cfg, build_data(cfg))
    step = load_weights(model, folder, checkpoint=cfg.checkpoint, weights=cfg.weights)["step"]
    if cfg.format == "diffusers":
        out = Path(cfg.task.out or folder / "diffusers")
        write_pipeline(cfg, model, out)
    elif cfg.format == "hub":
        out = Path(cfg.task.out or folder / "hub")
        write_model_folder(model, RunRecord.load(folder), folder, out, checkpoint=cfg.checkpoint, weights=cfg.weights)
        if cfg.task.get("push"):
            print(f"Uploaded to {push_model_folder(out, cfg.task.push)}")
    else:
        out = Path(cfg.task.out or folder / "weights.safetensors")
        config = plain(cfg)["model"]
        metadata = {"model": json.dumps(config), "data": cfg.data._target_, "step": str(step), "weights": cfg.weights}
        write_tensors(model.state_dict(), out, metadata)
    print(printable(f"Weights of {folder} at step {step}: {out}"))


UNET2D_OPTIONS = {
    "num_heads": 1, "head_channels": None, "decoder_attention_once": False, "resample_filter": None,
    "scale_shift_norm": False, "skip_rescale": False, "progressive_input": None, "progressive_output": None,
    "fourier_exponents": (), "add_input": False,
}  # fmt: skip
"""`UNet` options with the values for which it is equivalent to ``UNet2DModel`` from diffusers."""


def write_pipeline(cfg: DictConfig, model: TrainedModel, out: Path) -> None:
    """Write a folder for ``diffusers.DDPMPipeline.from_pretrained``, with U-Net, scheduler and index.

    Raises:
        UserError: diffusers cannot represent the model, because of its network, schedule or noise conditioning.
    """
    network = getattr(model, "network", None)
    scheduler = diffusers_scheduler.scheduler_config(model)
    if not isinstance(network, UNet) or scheduler is None:
        raise UserError(
            "format=diffusers needs a DDPM: a U-Net conditioned on the timestep, a schedule with a beta per timestep,"
            " and parameterisation eps, x0 or v. Omit format to write one file of weights."
        )
    if model.autoencoder() is not None:
        raise UserError("format=diffusers does not support latent diffusion: omit format.")
    objective = getattr(model, "objective", None)
    if isinstance(objective, Objective) and not objective.trains_denoiser:
        raise UserError("format=diffusers does not support consistency models: omit format.")
    if network.conditions.image_channels:
        raise UserError(
            "format=diffusers: UNet2DModel takes only the noisy image, but this U-Net takes more input channels (a"
            " low-resolution image, or coordinates from model/patches): omit format."
        )
    changed = [name for name, value in UNET2D_OPTIONS.items() if cfg.model.network.get(name, value) != value]
    if changed:
        raise UserError(f"format=diffusers: UNet2DModel does not support this run's model.network.{changed[0]}.")
    state = to_diffusers(network.state_dict(), num_levels=network.num_levels, num_blocks=network.num_blocks)
    write_tensors(state, out / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    write_json(out / "unet" / "config.json", unet_config(cfg.model.network, model))
    write_json(out / "scheduler" / diffusers_scheduler.FILE, scheduler)
    index = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
    write_json(out / "model_index.json", {"_class_name": "DDPMPipeline", **index})


def unet_config(network: DictConfig, model: TrainedModel) -> dict[str, Any]:
    """Return the arguments of the equivalent ``UNet2DModel``."""
    channels, height, width = model.spec.shape
    heights = [height >> level for level in range(len(network.channel_mult))]
    attention = ["Attn" * (h in network.attention_resolutions) for h in heights]
    return {
        "_class_name": "UNet2DModel", "sample_size": height if height == width else [height, width],
        "in_channels": channels, "out_channels": channels,
        "block_out_channels": [network.channels * m for m in network.channel_mult],
        "layers_per_block": network.num_blocks,
        "down_block_types": [f"{kind}DownBlock2D" for kind in attention],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(attention)],
        "norm_num_groups": network.num_groups, "dropout": network.dropout, **REQUIRED_CONFIG,
    }  # fmt: skip
