"""task=visualize: draw interpolations, reconstructions and sampling trajectories of a trained model."""

from __future__ import annotations

import torch
from omegaconf import DictConfig

from gencompare.errors import UserError, printable
from gencompare.evaluation.reference import to_uint8
from gencompare.generative_model import SupportsVisualization
from gencompare.image_grid import grid, save_png
from gencompare.rng import full_precision, generator
from gencompare.tasks.runs.build import build_data, build_model, choose_device
from gencompare.tasks.runs.loading import load_weights
from gencompare.tasks.runs.run_folder import run_folder


def visualize(cfg: DictConfig) -> None:
    """Visualise some test images with the model of a run, and write the result to ``visualize/`` in the run folder."""
    if not isinstance(cfg.task.num_images, int) or cfg.task.num_images < 2:
        raise UserError(f"task.num_images={cfg.task.num_images} must be a whole number of at least 2.")
    folder = run_folder(cfg)
    data = build_data(cfg)
    model = build_model(cfg, data).eval()
    if not isinstance(model, SupportsVisualization):
        raise UserError(f"task=visualize: {type(model).__name__} has no visualisations: use task=sample.")
    load_weights(model, folder, checkpoint=cfg.checkpoint, weights=cfg.weights)
    device = choose_device(cfg)
    model = model.to(device)
    x, cond = next(iter(data.batches("test", cfg.task.num_images)))
    cond = {name: value.to(device) for name, value in cond.items()}
    with torch.no_grad():
        x = x.to(device, full_precision(model.dtype))
        visualizations = model.visualize(x, cond, generator=generator(device, cfg.seed, "explore"))
    for name, images in visualizations.items():
        path = folder / "visualize" / f"{name}.png"
        shown = to_uint8(images.flatten(0, 1).clamp(-1, 1), data.spec)
        save_png(grid(shown.numpy(), columns=images.shape[1]), path)
        print(printable(f"{name}: {path}"))
