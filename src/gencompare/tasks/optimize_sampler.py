"""task=optimize_sampler: find the times at which a trained diffusion model is sampled best in few network calls."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

import torch
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from gencompare.data.datamodule import ImageData
from gencompare.diffusion.multistep_samplers import DPMSolverPP2M
from gencompare.diffusion.optimized_grids import (
    OptimizedSampler,
    Problem,
    check_optimizable,
    optimize_times,
    solve,
)
from gencompare.diffusion.samplers import Sampler
from gencompare.diffusion.times import LogSNRGrid, TabulatedGrid
from gencompare.errors import UserError, check_counts
from gencompare.evaluation.sampling import choose_conditions
from gencompare.files import atomic_write
from gencompare.models.diffusion import Diffusion
from gencompare.rng import derive_seed, draw_normal, full_precision, generator
from gencompare.tasks.evaluate_run import evaluate_on_all_ranks
from gencompare.tasks.runs.build import build_data, build_model, choose_device
from gencompare.tasks.runs.loading import load_weights
from gencompare.tasks.runs.processes import JOB_FILE
from gencompare.tasks.runs.run_folder import run_folder

FILE = "optimized_samplers.yaml"
GROUP = "model/sampler"


def optimize_sampler(cfg: DictConfig) -> None:
    """Optimise the times of each sampler of ``cfg.task.samplers`` for each number of network calls.

    For each number of calls, the sampler with the smallest error on validation noise is evaluated under the protocol of
    ``cfg.evaluation``, and the result is added to the record of the run. The settings of all samplers are written to
    ``cfg.task.out``, with overrides for other tasks.
    """
    counts = ("num_images", "num_val_images", "max_iterations", "target_steps")
    check_counts("task", **{name: cfg.task[name] for name in counts})
    folder = run_folder(cfg)
    samplers = build_samplers(cfg)
    data = build_data(cfg)
    model = build_model(cfg, data)
    if not isinstance(model, Diffusion):
        raise UserError(f"task=optimize_sampler needs a diffusion model, not a {type(model).__name__}.")
    if not model.objective.trains_denoiser:
        raise UserError("task=optimize_sampler needs a denoiser, which a consistency model is not.")
    load_weights(model, folder, checkpoint=cfg.checkpoint, weights=cfg.weights)
    model = model.eval().to(choose_device(cfg))
    train = build_problem(cfg, model, data, "train", cfg.task.num_images)
    validation = build_problem(cfg, model, data, "val", cfg.task.num_val_images)
    chosen: dict[int, tuple[str, OptimizedSampler]] = {}
    described: dict[str, Any] = {}
    for num_calls in cfg.task.num_calls:
        for name, sampler in samplers[num_calls].items():
            start = time.monotonic()
            found = optimize_times(sampler, train, validation, max_iterations=cfg.task.max_iterations)
            seconds = time.monotonic() - start
            best_grid = min(found.grid_errors, key=lambda grid: found.grid_errors[grid])
            print(
                f"{name}, {num_calls} calls: error {found.error:.4g}, {found.grid_errors[best_grid]:.4g} with"
                f" {best_grid}  ({seconds:.0f} s)",
                flush=True,
            )
            described[f"{name}_{num_calls}"] = describe(name, found, seconds)
            if num_calls not in chosen or found.error < chosen[num_calls][1].error:
                chosen[num_calls] = name, found
    path = Path(cfg.task.out or folder / FILE)
    with atomic_write(path) as file:
        file.write(OmegaConf.to_yaml(OmegaConf.create(described)).encode())
    print(f"Optimised samplers: {path}", flush=True)
    configs = {f"{name}_{calls}": sampler_config(found.sampler) for calls, (name, found) in chosen.items()}
    (_, first), *others = configs.items()
    with open_dict(cfg):
        cfg.model.sampler, cfg.evaluation.samplers = first, dict(others)
    evaluate_on_all_ranks(
        cfg,
        build_model(cfg, data),  # type: ignore[arg-type]
        data,
        folder,
        job=folder / JOB_FILE,
        checkpoints=[cfg.checkpoint],
        weights=cfg.weights,
    )


def build_samplers(cfg: DictConfig) -> dict[int, dict[str, Sampler]]:
    """Build the samplers of ``cfg.task``, by number of calls and name."""
    options = GlobalHydra.instance().config_loader().get_group_options(GROUP)
    samplers: dict[int, dict[str, Sampler]] = {}
    for num_calls in cfg.task.num_calls:
        samplers[num_calls] = {}
        for name in cfg.task.samplers:
            if name not in options:
                raise UserError(f"task.samplers: unknown sampler {name}; choose from {', '.join(options)}.")
            settings = OmegaConf.merge(compose(f"{GROUP}/{name}").model.sampler, {"num_steps": num_calls})
            samplers[num_calls][str(name)] = instantiate(settings, _convert_="all")
            check_optimizable(samplers[num_calls][str(name)])
    if not samplers or not cfg.task.samplers:
        raise UserError("task.num_calls and task.samplers must not be empty: task.num_calls=[10].")
    return samplers


@torch.no_grad()
def build_problem(cfg: DictConfig, model: Diffusion, data: ImageData, part: str, n: int) -> Problem:
    """Draw noise for ``n`` images, seeded with ``part``, and solve the probability-flow ODE from it."""
    shape = (n, *model.space.latent_shape)
    noise = draw_normal(
        shape, generator(model.device, cfg.seed, "optimize_sampler", part), model.device, full_precision(model.dtype)
    )
    conditions = choose_conditions(model, data, n, seed=derive_seed(cfg.seed, part), split="val")
    if conditions is not None:
        cond = conditions.batch(slice(0, n), model.device)[1]
    else:
        cond = {"label": torch.arange(n, device=model.device) % max(1, data.spec.num_classes)}
    cond, denoiser = model.select_conditions(cond), model.sampling_denoiser
    exact = DPMSolverPP2M(num_steps=cfg.task.target_steps, grid=LogSNRGrid())
    return Problem(denoiser, noise, solve(exact, denoiser, noise, cond), cond)


def sampler_config(sampler: Sampler) -> dict[str, Any]:
    """Return the config of a sampler with given times."""
    assert isinstance(sampler.grid, TabulatedGrid)
    settings = {name: value for name, value in vars(sampler).items() if name != "grid"}
    return {
        "_target_": f"{type(sampler).__module__}.{type(sampler).__qualname__}",
        **settings,
        "grid": {
            "_target_": f"{TabulatedGrid.__module__}.{TabulatedGrid.__qualname__}",
            "times": list(sampler.grid.times),
        },
    }


def describe(name: str, found: OptimizedSampler, seconds: float) -> dict[str, Any]:
    """Return what the file says about a sampler."""
    assert isinstance(found.sampler.grid, TabulatedGrid)
    times = [float(f"{t:.6g}") for t in found.sampler.grid.times]
    overrides = [
        f"model/sampler={name}",
        "model/sampler/grid=tabulated",
        f"model.sampler.num_steps={found.sampler.num_steps}",
        shlex.quote(f"model.sampler.grid.times={times}".replace(" ", "")),
    ]
    return {
        "overrides": " ".join(overrides),
        "error": round(found.error, 6),
        "grid_errors": {grid: round(error, 6) for grid, error in found.grid_errors.items()},
        "seconds": round(seconds, 1),
    }
