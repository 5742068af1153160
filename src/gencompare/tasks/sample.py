"""task=sample: draw images from a trained run and write them to files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from gencompare.errors import UserError, printable
from gencompare.evaluation.model_metrics import with_low_res
from gencompare.evaluation.sampling import choose_conditions, draw_samples
from gencompare.files import atomic_write
from gencompare.image_grid import grid, save_png, to_image
from gencompare.tasks.runs.build import build_data, build_model, choose_device
from gencompare.tasks.runs.loading import check_generative, load_weights
from gencompare.tasks.runs.run_folder import run_folder


def sample(cfg: DictConfig) -> None:
    """Draw ``cfg.num_images`` images, and write a grid and PNG files or an npz file (``arr_0``: uint8 (n, H, W, C))."""
    if cfg.num_images < 1:
        raise UserError(f"num_images={cfg.num_images} must be at least 1.")
    if cfg.task.format not in ("png", "npz"):
        raise UserError(f"task.format={cfg.task.format}: choose png or npz.")
    folder = run_folder(cfg)
    out = Path(cfg.task.out or folder / "drawn")
    data = build_data(cfg)
    model = check_generative(build_model(cfg, data), "sample").eval()
    load_weights(model, folder, checkpoint=cfg.checkpoint, weights=cfg.weights)
    device = choose_device(cfg)
    conditions = choose_conditions(
        model, data, cfg.num_images, seed=cfg.seed, split=cfg.evaluation.protocol.get("condition_split", "test")
    )
    samples = draw_samples(
        model.to(device), cfg.num_images, seed=cfg.seed, compile=cfg.evaluation.protocol.get("compile", False),
        condition_source=conditions,
    ).images  # fmt: skip
    shown, columns = with_low_res(samples, conditions)
    save_png(grid(shown.numpy(), columns), out / "grid.png")
    images = samples.numpy()
    if cfg.task.format == "npz":
        with atomic_write(out / "samples.npz") as file:
            buffer = io.BytesIO()
            np.savez(buffer, arr_0=images.transpose(0, 2, 3, 1))
            file.write(buffer.getvalue())
    elif data.spec.num_values > 2:
        for old in out.glob("[0-9]" * 6 + ".png"):
            old.unlink()  # from an earlier command
        for k, image in enumerate(images):
            save_png(to_image(image), out / f"{k:06d}.png")
    print(printable(f"{cfg.num_images} images from {folder}: {out}"))
