"""The scheduler config of a diffusers pipeline is checked against the model that loads its weights."""

from __future__ import annotations

import json
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from hydra.utils import instantiate

from composing import compose
from gencompare.diffusion.discrete_schedules import BetaTable
from gencompare.errors import UserError
from gencompare.generative_model import DataSpec
from gencompare.models.diffusion import Diffusion
from gencompare.networks.mlp import DenoisingMLP
from gencompare.tasks.runs.diffusers_scheduler import check_scheduler, scheduler_config
from gencompare.tasks.runs.pretrained import find_pretrained

DEFAULT_BETAS = {"beta_start": 1e-4, "beta_end": 0.02}
PUBLISHED: list[dict[str, Any]] = [
    {"beta_schedule": "linear", **DEFAULT_BETAS},
    {"beta_schedule": "linear", "num_train_timesteps": 400, "beta_start": 1e-4, "beta_end": 0.05},
    {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195, "prediction_type": "v_prediction"},
    {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"},
    {"beta_schedule": "sigmoid", **DEFAULT_BETAS},
    {
        "beta_schedule": "linear",
        **DEFAULT_BETAS,
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    },
]


def build_model(*overrides: str) -> Diffusion:
    # The loss that trains a last step of pure noise also trains every other schedule.
    v = any("parameterization=v" in override for override in overrides)
    cfg = compose("model=ddpm", "data=toy2d", *overrides, *(["model/objective=uniform_v"] if v else []))
    network = partial(DenoisingMLP, width=8, depth=1)
    return instantiate(cfg.model, _partial_=True, _convert_="all")(
        spec=DataSpec(name="x", shape=(2, 1, 1)), network=network
    )


@pytest.fixture(scope="module")
def mismatched() -> Diffusion:
    """Build a model whose schedule differs from all published ones."""
    return build_model("model/schedule=steep", "model/parameterization=velocity")


@pytest.mark.parametrize("settings", PUBLISHED, ids=str)
@pytest.mark.parametrize("subfolder", ["scheduler", "."])
def test_suggested_overrides_give_the_schedule_of_diffusers(
    settings: dict[str, Any], subfolder: str, mismatched: Diffusion, tmp_path: Path
) -> None:
    theirs = diffusers.DDPMScheduler(**settings)
    theirs.save_pretrained(tmp_path / subfolder)
    weights = tmp_path / ("unet" if subfolder == "scheduler" else ".") / "diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match="its samples would be wrong") as error:
        check_scheduler(mismatched, weights)
    model = build_model(*shlex.split(str(error.value).split(" Add ")[1]))
    check_scheduler(model, weights)
    assert isinstance(model.schedule, BetaTable)
    alpha_bar = model.schedule.at(model.schedule.discrete_times).alpha ** 2
    torch.testing.assert_close(alpha_bar, theirs.alphas_cumprod, rtol=1e-3, atol=1e-7)

    # Our exported config lists the betas one by one and leads to the same suggestion.
    config = tmp_path / subfolder / "scheduler_config.json"
    config.write_text(json.dumps(scheduler_config(model)))
    check_scheduler(model, weights)
    with pytest.raises(UserError) as error_for_export:
        check_scheduler(mismatched, weights)
    assert str(error_for_export.value).split(" Add ")[1] == str(error.value).split(" Add ")[1]


def test_small_differences_of_the_schedule_are_detected(tmp_path: Path) -> None:
    """A last beta of 0.0201, one more step and another prediction type are detected, one at a time."""
    model = build_model("model/schedule=linear")
    matching = {"beta_schedule": "linear", **DEFAULT_BETAS, "num_train_timesteps": 1000, "prediction_type": "epsilon"}
    config = tmp_path / "scheduler_config.json"
    for change, suggestion in (
        ({}, None),
        (
            {"beta_end": 0.0201},
            "Add model/schedule=linear model.schedule.num_train_timesteps=1000 model.schedule.beta_start=0.0001"
            " model.schedule.beta_end=0.0201",
        ),
        ({"num_train_timesteps": 1001}, "++model.parameterization.noise_conditioning.num_train_timesteps=1001"),
        ({"prediction_type": "v_prediction"}, "Add model/parameterization=v"),  # the only override
        ({"trained_betas": [0.1, 0.2, 0.5, 0.9]}, "model.schedule.betas="),
        ({"beta_schedule": "laplace"}, "beta_schedule=laplace is not supported"),
        ({"prediction_type": "flow_prediction"}, "prediction_type=flow_prediction is not supported"),
        ({"rescale_betas_zero_snr": True}, "+model.schedule.zero_terminal_snr=true"),
    ):
        config.write_text(json.dumps(matching | change))
        if suggestion is None:
            check_scheduler(model, config.with_name("weights.bin"))
            continue
        with pytest.raises(UserError) as error:
            check_scheduler(model, config.with_name("weights.bin"))
        assert suggestion in str(error.value)


def test_scheduler_config_is_downloaded_from_the_hub_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    patterns: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, allow_patterns: patterns.extend(allow_patterns) or str(tmp_path),
    )
    find_pretrained("someone/ddpm")
    assert {"scheduler/scheduler_config.json", "scheduler_config.json"} <= set(patterns)
