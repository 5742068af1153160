"""Start training from the weights of another diffusion model, the teacher."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from gencompare.data.conditions import ConditionedData
from gencompare.data.datamodule import ImageData
from gencompare.diffusion.schedules import is_same_schedule
from gencompare.errors import UserError
from gencompare.generative_model import TrainedModel
from gencompare.hyperparameters import to_config
from gencompare.models.diffusion import Diffusion
from gencompare.models.latents import Latents
from gencompare.networks.conditioning import AUGMENT_WEIGHT, INTERVAL_WEIGHT
from gencompare.records import RunRecord
from gencompare.tasks.runs import run_config
from gencompare.tasks.runs.build import build_model
from gencompare.tasks.runs.loading import load_weights


def load_teacher(cfg: DictConfig, model: TrainedModel, data: ImageData) -> DictConfig:
    """Copy the weights of the teacher's network into ``model``, and return ``cfg`` with its run folder as
    ``teacher_run``. If there is no teacher, ``cfg`` is returned unchanged.

    The weights become part of the model's own checkpoints, so the teacher is needed only once.

    Raises:
        UserError: the teacher is missing, or was trained on other images, on other latents, under another schedule,
            with another parameterisation or with another network.
    """
    run = OmegaConf.select(cfg, "model.teacher.run")
    if run is None or not isinstance(model, Diffusion):
        return cfg
    folder = Path(run)
    if not folder.is_dir():
        raise UserError(f"The teacher of this model is not at {run}: set its folder (model.teacher.run=DIR).")
    record = RunRecord.load(folder)
    images = data.data if isinstance(data, ConditionedData) else data
    if (record.data["hash"], tuple(record.data["shape"])) != (images.hash("train"), images.spec.shape):
        raise UserError(
            f"The teacher in {run} was trained on other images ('{record.data['name']}'): use a run on the same data."
        )
    with torch.random.fork_rng(devices=[]):
        # Built on the data of this run, since the images may have been moved after the teacher was trained.
        teacher = build_model(run_config.load_checked(folder), data)
    load_weights(teacher, folder, checkpoint=cfg.model.teacher.checkpoint, weights=cfg.model.teacher.weights)
    copy_network(teacher, model, run)
    cfg = cfg.copy()
    with open_dict(cfg):
        cfg.teacher_run = str(folder.absolute())
    return cfg


def copy_network(teacher: TrainedModel, model: Diffusion, run: str) -> None:
    """Copy the weights of the network of ``teacher``, loaded from the folder ``run``, into ``model``.

    A network that receives time intervals may start from one that does not: it ignores them at first. A network without
    the parameters of an augmentation may start from one with them.

    Raises:
        UserError: the predictions of the two networks have different meanings, or different weights.
    """
    if not isinstance(teacher, Diffusion):
        raise UserError(f"The teacher in {run} is a {type(teacher).__name__}, not a diffusion model.")
    if not is_same_schedule(teacher.schedule, model.schedule):
        raise UserError(
            f"The teacher in {run} was trained under {type(teacher.schedule).__name__}, and this model has"
            f" {type(model.schedule).__name__} or other settings of it: use the same model/schedule and its settings."
        )
    theirs, own = to_config(teacher.parameterization), to_config(model.parameterization)
    if theirs != own:
        raise UserError(
            f"The teacher in {run} has the parameterisation {theirs}, and this model {own}: use the same"
            " model/parameterization and its settings."
        )
    if isinstance(model.space, Latents) and not (
        isinstance(teacher.space, Latents) and teacher.space.has_same_whitening(model.space)
    ):
        raise UserError(
            f"The teacher in {run} does not work on the latents of this model's autoencoder: train both on the same one"
            " (model.latent.autoencoder_run=DIR)."
        )
    weights, expected = teacher.network.state_dict(), model.network.state_dict()
    if INTERVAL_WEIGHT in expected:
        weights.setdefault(INTERVAL_WEIGHT, expected[INTERVAL_WEIGHT])
    if AUGMENT_WEIGHT not in expected:
        weights.pop(AUGMENT_WEIGHT, None)
    for name in sorted(weights.keys() | expected.keys()):
        shapes = [tuple(each[name].shape) if name in each else "missing" for each in (weights, expected)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"The teacher in {run} has another network: '{name}' is {shapes[0]} there and {shapes[1]} here. Use the"
                " same model/network, its settings and model.conditional."
            )
    model.network.load_state_dict(weights)
