"""What is published beside weights: the scheduler of a diffusers pipeline, against the model that is to be sampled."""

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
from gencompare.tasks.runs.pretrained import located

USUAL = {"beta_start": 1e-4, "beta_end": 0.02}
PUBLISHED: list[dict[str, Any]] = [
    {"beta_schedule": "linear", **USUAL},
    {"beta_schedule": "linear", "num_train_timesteps": 400, "beta_start": 1e-4, "beta_end": 0.05},
    {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195, "prediction_type": "v_prediction"},
    {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"},
    {"beta_schedule": "sigmoid", **USUAL},
]


def model_of(*words: str) -> Diffusion:
    cfg = compose("model=ddpm", "data=toy2d", *words)
    network = partial(DenoisingMLP, width=8, depth=1)
    return instantiate(cfg.model, _partial_=True, _convert_="all")(
        spec=DataSpec(name="x", shape=(2, 1, 1)), network=network
    )


@pytest.fixture(scope="module")
def other() -> Diffusion:
    """A model under a table that none of those published is."""
    return model_of("model/schedule=steep", "model/parameterization=velocity")


@pytest.mark.parametrize("settings", PUBLISHED, ids=str)
@pytest.mark.parametrize("place", ["scheduler", "."])
def test_the_words_that_are_asked_for_give_the_schedule_of_diffusers(
    settings: dict[str, Any], place: str, other: Diffusion, tmp_path: Path
) -> None:
    theirs = diffusers.DDPMScheduler(**settings)
    theirs.save_pretrained(tmp_path / place)
    weights = tmp_path / ("unet" if place == "scheduler" else ".") / "diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match="its images would be others") as refused:
        check_scheduler(other, weights)
    model = model_of(*shlex.split(str(refused.value).split(" Add ")[1]))
    check_scheduler(model, weights)
    assert isinstance(model.schedule, BetaTable)
    bar = model.schedule.at(model.schedule.discrete_times).alpha ** 2
    torch.testing.assert_close(bar, theirs.alphas_cumprod, rtol=1e-3, atol=1e-7)

    # Our own export, which gives the betas one by one, asks for the same.
    config = tmp_path / place / "scheduler_config.json"
    config.write_text(json.dumps(scheduler_config(model)))
    check_scheduler(model, weights)
    with pytest.raises(UserError) as again:
        check_scheduler(other, weights)
    assert str(again.value).split(" Add ")[1] == str(refused.value).split(" Add ")[1]


def test_a_little_off_is_another_schedule(tmp_path: Path) -> None:
    """A last beta of 0.0201, a step more, and another thing asked of the network: each by itself."""
    model = model_of("model/schedule=linear")
    right = {"beta_schedule": "linear", **USUAL, "num_train_timesteps": 1000, "prediction_type": "epsilon"}
    config = tmp_path / "scheduler_config.json"
    for change, asked in (
        ({}, None),
        (
            {"beta_end": 0.0201},
            "Add model/schedule=linear model.schedule.T=1000 model.schedule.first=0.0001 model.schedule.last=0.0201",
        ),
        ({"num_train_timesteps": 1001}, "++model.parameterization.noise.steps=1001"),
        ({"prediction_type": "v_prediction"}, "Add model/parameterization=v"),  # and nothing else
        ({"trained_betas": [0.1, 0.2, 0.5, 0.9]}, "model.schedule.betas="),
        ({"beta_schedule": "laplace"}, "no schedule here is its beta_schedule=laplace"),
        ({"prediction_type": "flow_prediction"}, "no parameterization here is its prediction_type=flow_prediction"),
        ({"rescale_betas_zero_snr": True}, "not of a table"),
    ):
        config.write_text(json.dumps(right | change))
        if asked is None:
            check_scheduler(model, config.with_name("weights.bin"))
            continue
        with pytest.raises(UserError) as refused:
            check_scheduler(model, config.with_name("weights.bin"))
        assert asked in str(refused.value)


def test_the_scheduler_is_fetched_from_the_hub_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, allow_patterns: asked.extend(allow_patterns) or str(tmp_path)
    )
    located("someone/ddpm")
    assert {"scheduler/scheduler_config.json", "scheduler_config.json"} <= set(asked)
