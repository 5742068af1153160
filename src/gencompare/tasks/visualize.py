"""task=visualize: what a trained run can do besides sampling, as pictures."""

from __future__ import annotations

import torch
from omegaconf import DictConfig

from gencompare.errors import UserError
from gencompare.evaluation.reference import to_uint8
from gencompare.generative_model import SupportsVisualization
from gencompare.image_grid import grid, save_png
from gencompare.rng import generator
from gencompare.tasks.evaluate_run import run_folder
from gencompare.tasks.runs.build import build_data, build_model, chosen_device
from gencompare.tasks.runs.loading import load_weights


def visualize(cfg: DictConfig) -> None:
    """Write the pictures that the run's model makes of some test images to ``explore/`` in the run folder."""
    if not isinstance(cfg.task.images, int) or cfg.task.images < 2:
        raise UserError(f"task.images={cfg.task.images}: give a whole number, at least 2.")
    folder = run_folder(cfg)
    data = build_data(cfg)
    model = build_model(cfg, data).eval()
    if not isinstance(model, SupportsVisualization):
        raise UserError(f"task=visualize: {type(model).__name__} has nothing to show besides samples: use task=sample.")
    load_weights(model, folder, checkpoint=cfg.checkpoint, weights=cfg.weights)
    device = chosen_device(cfg)
    model = model.to(device)
    x, cond = next(iter(data.batches("test", cfg.task.images)))
    cond = {name: value.to(device) for name, value in cond.items()}
    with torch.no_grad():
        pictures = model.visualize(x.to(device), cond, generator=generator(device, cfg.seed, "explore"))
    for name, images in pictures.items():
        path = folder / "explore" / f"{name}.png"
        shown = to_uint8(images.flatten(0, 1).clamp(-1, 1), data.spec)
        save_png(grid(shown.numpy(), columns=images.shape[1]), path)
        print(f"{name}: {path}")
