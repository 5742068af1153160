"""Create the ``scheduler_config.json`` of a diffusers pipeline for a model, or check a model against it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from gencompare.diffusion.discrete_schedules import (
    BetaTable,
    CosineBetas,
    LinearBetas,
    SigmoidBetas,
    rescale_to_zero_terminal_snr,
)
from gencompare.diffusion.parameterizations import X0, Eps, TimestepConditioning, V
from gencompare.diffusion.samplers import Sampler
from gencompare.diffusion.schedules import NoiseSchedule
from gencompare.errors import UserError
from gencompare.generative_model import TrainedModel
from gencompare.models.diffusion import Diffusion
from gencompare.safe_files import read_json_object

FILE = "scheduler_config.json"
PREDICTION_TYPES = {Eps: "epsilon", X0: "sample", V: "v_prediction"}
"""The diffusers ``prediction_type`` of each supported parameterisation."""
PARAMETERIZATIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
"""The option of model/parameterization for each ``prediction_type``."""
SCHEDULES = {
    "linear": ("linear", LinearBetas),
    "scaled_linear": ("scaled_linear", lambda start, end, T: LinearBetas(start, end, T, power=2)),
    "sigmoid": ("sigmoid", SigmoidBetas),
    "squaredcos_cap_v2": ("cosine", lambda start, end, T: CosineBetas(num_train_timesteps=T)),
}
"""For each ``beta_schedule``, the option of model/schedule and a factory ``(beta_start, beta_end, T) -> schedule``."""
DDPM_BETAS = (1e-4, 0.02)
"""The first and last beta of DDPM."""
NOISE_KEY = "model.parameterization.noise_conditioning"
TIMESTEP = f"{TimestepConditioning.__module__}.{TimestepConditioning.__qualname__}"
UNLIMITED = 1e6
"""Stands for no upper limit of the threshold of dynamic thresholding."""
LOG_SNR_TOLERANCE = 1e-3
"""Rounding error of log-SNRs computed from float32 betas."""


def scheduler_config(model: TrainedModel) -> dict[str, Any] | None:
    """Return the config of the ``DDPMScheduler`` that is equivalent to ``model``.

    Return None if diffusers cannot represent the model, because its schedule has no table of betas, its network is not
    conditioned on the timestep, or its parameterisation is not eps, x_0 or v.
    """
    if not isinstance(model, Diffusion) or not isinstance(model.schedule, BetaTable):
        return None
    T = model.schedule.num_train_timesteps
    prediction_type = PREDICTION_TYPES.get(type(model.parameterization))
    if prediction_type is None or model.parameterization.noise_conditioning != TimestepConditioning(T):
        return None
    return {
        "_class_name": "DDPMScheduler", "num_train_timesteps": T, "trained_betas": betas(model.schedule).tolist(),
        "prediction_type": prediction_type, **clipping(model),
        "variance_type": variance_type(model.sampler),
        **({"timestep_spacing": "trailing"} if model.schedule.ends_in_pure_noise else {}),
    }  # fmt: skip


def clipping(model: Diffusion) -> dict[str, Any]:
    """Return the settings of clipping or dynamic thresholding."""
    if model.dynamic_threshold is None:
        return {"clip_sample": model.clip_x0}
    ratio = {"dynamic_thresholding_ratio": model.dynamic_threshold}
    return {"clip_sample": False, "thresholding": True, **ratio, "sample_max_value": UNLIMITED}


def betas(schedule: BetaTable) -> Tensor:
    r"""Compute :math:`\beta_1, \dots, \beta_T`, (T,) float64.

    They follow from :math:`\bar\alpha_t = \prod_{s \le t} (1 - \beta_s)`, the sigmoid of the log-SNR.
    """
    log_alpha_bar = logsigmoid(schedule.table.double())
    return -torch.expm1(log_alpha_bar.diff(prepend=log_alpha_bar.new_zeros(1)))


def variance_type(sampler: Sampler) -> str:
    """Return the diffusers ``variance_type`` for the ``variance`` of a sampler (0 if the sampler has none)."""
    variance = getattr(sampler, "variance", 0.0)
    names = {0.0: "fixed_small", 1.0: "fixed_large"}
    if variance not in names:
        raise UserError(
            f"format=diffusers: DDPMScheduler does not support model.sampler.variance={variance}: use 0 or 1."
        )
    return names[variance]


def check_scheduler(model: Diffusion, weights: Path) -> None:
    """Check a model against the scheduler that was published with the file ``weights``, if there is one.

    Betas, ``prediction_type`` and timestep conditioning must match. Sampling options, such as the variance and
    clipping, may differ.

    Raises:
        UserError: the scheduler is corrupted or not supported, or does not match the model.
    """
    folder = weights.parent
    candidates = (folder / FILE, folder / "scheduler" / FILE, folder.parent / "scheduler" / FILE)
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        return
    try:
        config = read_json_object(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is corrupted ({error}).") from error
    published, prediction_type = read_schedule(config, path), config.get("prediction_type", "epsilon")
    if prediction_type not in PARAMETERIZATIONS:
        raise UserError(f"{path}: prediction_type={prediction_type} is not supported.")
    parameterization, T = model.parameterization, published.num_train_timesteps
    overrides = []
    if not is_same_schedule(model.schedule, published):
        overrides.append(schedule_overrides(config, published))
    if PREDICTION_TYPES.get(type(parameterization)) != prediction_type:
        overrides.append(f"model/parameterization={PARAMETERIZATIONS[prediction_type]}")
    if parameterization.noise_conditioning != TimestepConditioning(T):
        overrides.append(f"++{NOISE_KEY}._target_={TIMESTEP} ++{NOISE_KEY}.num_train_timesteps={T}")
    if overrides:
        raise UserError(
            f"{path} is for a network that predicts {prediction_type} from one of {T} timesteps; this model has"
            f" {type(parameterization).__name__}, {type(parameterization.noise_conditioning).__name__} and"
            f" {type(model.schedule).__name__}, so its samples would be wrong. Add {' '.join(overrides)}"
        )


def is_same_schedule(schedule: NoiseSchedule, published: BetaTable) -> bool:
    """Return whether two schedules have the same log-SNRs, up to rounding."""
    if not isinstance(schedule, BetaTable) or schedule.num_train_timesteps != published.num_train_timesteps:
        return False
    return torch.allclose(schedule.table, published.table, rtol=0, atol=LOG_SNR_TOLERANCE)


def read_schedule(config: dict[str, Any], path: Path) -> BetaTable:
    """Read the schedule of a scheduler config, with the defaults of ``DDPMScheduler``."""
    if not config.keys() & {"beta_schedule", "trained_betas"}:
        raise UserError(f"{path} ({config.get('_class_name')}) has no betas.")
    if config.get("trained_betas") is not None:
        schedule = BetaTable(config["trained_betas"])
    elif (name := config["beta_schedule"]) in SCHEDULES:
        schedule = SCHEDULES[name][1](*beta_range(config))
    else:
        raise UserError(f"{path}: beta_schedule={name} is not supported.")
    return with_zero_terminal_snr(schedule) if config.get("rescale_betas_zero_snr") else schedule


def with_zero_terminal_snr(schedule: BetaTable) -> BetaTable:
    """Rescale a schedule as ``rescale_betas_zero_snr`` of diffusers does."""
    return BetaTable(rescale_to_zero_terminal_snr(betas(schedule)))


def beta_range(config: dict[str, Any]) -> tuple[float, float, int]:
    """Return the first beta, the last beta and the number of betas."""
    trained = config.get("trained_betas")
    if trained is not None:
        return trained[0], trained[-1], len(trained)
    start, end = config.get("beta_start", DDPM_BETAS[0]), config.get("beta_end", DDPM_BETAS[1])
    return start, end, config.get("num_train_timesteps", 1000)


def schedule_overrides(config: dict[str, Any], published: BetaTable) -> str:
    """Return the overrides that select the published schedule."""
    *ends, T = beta_range(config)
    for start, end in (ends, DDPM_BETAS):  # the ends of a sigmoid schedule are not among its trained betas
        for option, make in SCHEDULES.values() if end < 1 else ():
            schedule, rescale = make(start, end, T), ""
            if published.ends_in_pure_noise and isinstance(schedule, LinearBetas):
                schedule, rescale = with_zero_terminal_snr(schedule), " +model.schedule.zero_terminal_snr=true"
            if is_same_schedule(schedule, published):
                chosen = f"model/schedule={option} model.schedule.num_train_timesteps={T}{rescale}"
                if option == "cosine":
                    return chosen
                return f"{chosen} model.schedule.beta_start={start:.4g} model.schedule.beta_end={end:.4g}"
    return "model/schedule=betas 'model.schedule.betas=[...]' with its trained_betas"
