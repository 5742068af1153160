"""task=export: the weights of a run as one safetensors file, which holds no code."""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save

from gencompare.files import atomic
from gencompare.tasks.build import build_data, build_model
from gencompare.tasks.evaluate import run_folder
from gencompare.tasks.load import load_weights


def export(cfg: DictConfig) -> None:
    """Write the state dict of the run's model, with its config as JSON in the file's metadata."""
    folder = run_folder(cfg)
    model = build_model(cfg, build_data(cfg))
    step = load_weights(model, folder, checkpoint=cfg.checkpoint, weights=cfg.weights)["step"]
    out = Path(cfg.task.out or folder / "weights.safetensors")
    config = OmegaConf.to_container(cfg.model, resolve=True)
    metadata = {"model": json.dumps(config), "data": cfg.data._target_, "step": str(step), "weights": cfg.weights}
    with atomic(out) as file:
        file.write(save({name: value.contiguous() for name, value in model.state_dict().items()}, metadata))
    print(f"Weights of {folder} at step {step}: {out}")
