"""scheduler_config.json, the noise schedule of a diffusers pipeline: ours written there, theirs held against ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from gencompare.diffusion.discrete_schedules import BetaTable, CosineBetas, LinearBetas, SigmoidBetas
from gencompare.diffusion.parameterizations import X0, Eps, TimestepConditioning, V
from gencompare.diffusion.samplers import Sampler
from gencompare.diffusion.schedules import NoiseSchedule
from gencompare.errors import UserError
from gencompare.generative_model import TrainedModel
from gencompare.models.diffusion import Diffusion

FILE = "scheduler_config.json"
PREDICTS = {Eps: "epsilon", X0: "sample", V: "v_prediction"}
"""What diffusers calls what our parameterisations ask for."""
OPTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
"""... and what they are called in conf/model/parameterization."""
TABLES = {
    "linear": ("linear", LinearBetas),
    "scaled_linear": ("scaled_linear", lambda first, last, T: LinearBetas(first, last, T, power=2)),
    "sigmoid": ("sigmoid", SigmoidBetas),
    "squaredcos_cap_v2": ("cosine", lambda first, last, T: CosineBetas(num_train_timesteps=T)),
}
"""By their ``beta_schedule``: the option of conf/model/schedule, and that table from its ends and its length."""
USUAL = (1e-4, 0.02)
"""The first and the last beta of DDPM."""
NOISE = "model.parameterization.noise_conditioning"
TIMESTEP = f"{TimestepConditioning.__module__}.{TimestepConditioning.__qualname__}"
ALIKE = 1e-3
"""How far log-SNRs of one table may be apart after rounding to float32, on the way into a file and back."""


def scheduler_config(model: TrainedModel) -> dict[str, Any] | None:
    """The ``DDPMScheduler`` that samples as ``model`` does, for JSON.

    None where there is none: of a schedule that is no table of betas, a network that is not told the timestep in it,
    or that says something else than eps, x_0 or v.
    """
    if not isinstance(model, Diffusion) or not isinstance(model.schedule, BetaTable):
        return None
    predicts = PREDICTS.get(type(model.parameterization))
    if predicts is None or model.parameterization.noise_conditioning != TimestepConditioning(model.schedule.T):
        return None
    return {
        "_class_name": "DDPMScheduler", "num_train_timesteps": model.schedule.T,
        "trained_betas": betas_of(model.schedule).tolist(), "prediction_type": predicts,
        "clip_sample": model.clip_x0, "variance_type": variance_type(model.sampler),
    }  # fmt: skip


def betas_of(schedule: BetaTable) -> Tensor:
    """beta_1 to beta_T, (T,) float64: bar alpha is a running product of 1 - beta, and sigmoid of the log-SNR."""
    log_alpha_bar = logsigmoid(schedule.table.double())
    return -torch.expm1(log_alpha_bar.diff(prepend=log_alpha_bar.new_zeros(1)))


def variance_type(sampler: Sampler) -> str:
    """diffusers' word for the variance that is sampled with; of other samplers than `Ancestral`, DDPM's."""
    variance = getattr(sampler, "variance", 0.0)
    words = {0.0: "fixed_small", 1.0: "fixed_large"}
    if variance not in words:
        raise UserError(
            f"format=diffusers: DDPMScheduler has no variance between its bounds (here {variance}): export with"
            " model.sampler.variance=0 or 1."
        )
    return words[variance]


def check_scheduler(model: Diffusion, weights: Path) -> None:
    """Raises `UserError` where the scheduler published with the file ``weights``, if there is one, is of another
    schedule than ``model``, or asks its network for something else.

    Read are the betas and ``prediction_type``. How samples are drawn, with which variance and whether clipped, is for
    ``model`` to say.
    """
    folder = weights.parent
    places = (folder / FILE, folder / "scheduler" / FILE, folder.parent / "scheduler" / FILE)
    place = next((path for path in places if path.is_file()), None)
    if place is None:
        return
    try:
        said = json.loads(place.read_text())
    except ValueError as error:
        raise UserError(f"{place} is damaged ({error}).") from error
    table, predicts = table_of(said, place), said.get("prediction_type", "epsilon")
    if predicts not in OPTIONS:
        raise UserError(f"{place}: no parameterization here is its prediction_type={predicts}.")
    words = []
    if not same(model.schedule, table):
        words.append(schedule_words(said, table))
    if PREDICTS.get(type(model.parameterization)) != predicts:
        words.append(f"model/parameterization={OPTIONS[predicts]}")
    if model.parameterization.noise_conditioning != TimestepConditioning(table.T):
        words.append(f"++{NOISE}._target_={TIMESTEP} ++{NOISE}.steps={table.T}")
    if words:
        raise UserError(
            f"{place} is of a network that says {predicts}, told the step of a table of {table.T} betas; this model has"
            f" {type(model.parameterization).__name__} with {type(model.parameterization.noise_conditioning).__name__} under"
            f" {type(model.schedule).__name__}, and its images would be others. Add {' '.join(words)}"
        )


def same(schedule: NoiseSchedule, table: BetaTable) -> bool:
    if not isinstance(schedule, BetaTable) or schedule.T != table.T:
        return False
    return torch.allclose(schedule.table, table.table, rtol=0, atol=ALIKE)


def table_of(said: dict[str, Any], place: Path) -> BetaTable:
    """The table that a scheduler's config says; what it leaves out is as in ``DDPMScheduler``."""
    if not said.keys() & {"beta_schedule", "trained_betas"} or said.get("rescale_betas_zero_snr"):
        raise UserError(f"{place} ({said.get('_class_name')}) is not of a table of betas with noise and image in each.")
    if said.get("trained_betas") is not None:
        return BetaTable(said["trained_betas"])
    kind = said["beta_schedule"]
    if kind not in TABLES:
        raise UserError(f"{place}: no schedule here is its beta_schedule={kind}.")
    return TABLES[kind][1](*sizes(said))


def sizes(said: dict[str, Any]) -> tuple[float, float, int]:
    """First and last beta, and how many there are."""
    betas = said.get("trained_betas")
    if betas is not None:
        return betas[0], betas[-1], len(betas)
    return said.get("beta_start", USUAL[0]), said.get("beta_end", USUAL[1]), said.get("num_train_timesteps", 1000)


def schedule_words(said: dict[str, Any], table: BetaTable) -> str:
    """What to add to the command line for ``table``."""
    *ends, T = sizes(said)
    for first, last in (ends, USUAL):  # betas given one by one do not tell the ends of a sigmoid
        for option, make in TABLES.values():
            if same(make(first, last, T), table):
                words = (
                    ""
                    if option == "cosine"
                    else f" model.schedule.beta_start={first:.4g} model.schedule.beta_end={last:.4g}"
                )
                return f"model/schedule={option} model.schedule.num_train_timesteps={T}{words}"
    return "model/schedule=betas 'model.schedule.betas=[...]' with its trained_betas"
