"""What is one job of a sweep, or one training, and which folder a command's sweep is in."""

from __future__ import annotations

from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from composing import compose
from gencompare.command_line import conf_dir
from gencompare.tasks.runs.sweep import JobIdentity, job_identity
from hydra_plugins.gencompare_sweeps.sweepers import sweep_folder

LAST = "evaluation=quick"


def ids(cfg: DictConfig, **changed: Any) -> JobIdentity:
    """Those of a config with other values at some places, where a key's dots are written as two underscores."""
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    for key, value in changed.items():
        assert OmegaConf.select(cfg, key.replace("__", "."), default="none") != value
        OmegaConf.update(cfg, key.replace("__", "."), value, merge=False, force_add=True)
    return job_identity(cfg)


def test_places_and_loggers_make_no_other_job() -> None:
    elsewhere = compose("data=cifar10", "paths.data=/else", "paths.cache=/where", "logger=none", "n=3")
    assert ids(elsewhere) == ids(compose("data=cifar10"))
    assert ids(elsewhere, data__limit=9) != ids(elsewhere)


@pytest.mark.parametrize(
    "changed", [{"model__optimizer__lr": 3e-5}, {"seed": 1}, {"budget__images": 9}, {"data__flip": True}]
)
def test_what_is_trained_makes_another_job(changed: dict[str, Any]) -> None:
    one, two = ids(compose(LAST)), ids(compose(LAST), **changed)
    assert one.job != two.job and one.training != two.training


def test_a_folder_of_images_is_known_by_its_place() -> None:
    cfg = compose("data=image_folder")
    same = [ids(cfg, data__root=f"/{name}").training for name in "ab"]
    same += [ids(cfg, data__root=f"/{name}", paths__data=f"/{name}").training for name in "cd"]
    assert len({*same}) == 4


@pytest.mark.parametrize(
    "changed",
    [{"model__sampler__steps": 7}, {"model__sampler": {"_target_": "x"}}, {"evaluation__n": 9}, {"evaluation": {}}],
)
def test_sampling_and_measuring_make_another_job_of_the_same_training(changed: dict[str, Any]) -> None:
    one, two = ids(compose(LAST)), ids(compose(LAST), **changed)
    assert one.job != two.job and one.training == two.training


@pytest.mark.parametrize("deciding", [{"evaluation__checkpoints": ["last", "best"]}, {"callbacks__looks__patience": 2}])
def test_previews_that_decide_are_part_of_training(deciding: dict[str, Any]) -> None:
    """They are drawn with the model's own sampler, and measured in the features of the protocol."""
    cfg = compose(LAST)
    own = ids(cfg, **deciding).training
    assert ids(cfg, **deciding, evaluation__n=9).training == own
    assert ids(cfg, **deciding, model__sampler__steps=7).training != own
    assert ids(cfg, **deciding, evaluation__protocol__chunk=9).training != own
    without = {**deciding, "callbacks__looks__preview": 0}
    assert ids(cfg, **without, model__sampler__steps=7).training == ids(cfg, **without).training


def test_a_guide_is_paid_for_and_a_trial_is_judged_by_its_own_previews() -> None:
    cfg, guidance = compose(LAST), {"scale": 2.0, "weak": {"run": "a"}}
    own = ids(cfg, model__guidance=guidance).training
    assert ids(cfg, model__guidance={**guidance, "scale": 3.0}).training == own
    assert ids(cfg, model__guidance={**guidance, "weak": {"run": "b"}}).training != own
    assert len({ids(cfg, trial={"study": "a", "number": number}).training for number in range(2)}) == 2


def folder(*words: str) -> str:
    return sweep_folder(OmegaConf.create([*words]), "now")


def test_the_same_question_has_the_same_folder() -> None:
    own = folder("model=flow", "model.optimizer.lr=1e-3,2e-3", "seed=0,1")
    assert own.startswith("sweep_flow_lr_")
    for words in (
        ["model=flow", "seed=0", "model.optimizer.lr=1e-3,2e-3"],
        [
            "model.optimizer.lr=choice(1e-3,5)",
            "model=flow",
            "logger=none",
            "paths.data=/else",
            "+logger.wandb.project=x",
        ],
    ):
        assert folder(*words) == own, words
    others = [
        own, folder("model=vae", "model.optimizer.lr=1,2"), folder("model=flow", "model.optimizer.lr=1"),
        folder("model=flow", "model.optimizer.lr=1,2", "budget.images=9"), folder("model=flow", "model/sampler=a,b"),
        folder("model=flow"),
    ]  # fmt: skip
    assert len({*others}) == len(others)
    assert folder("task=validate_metrics", "data=digits,mnist") == "now_sweep", "what is no training cannot go on"


@pytest.mark.parametrize("preset", ["+sweep=families", "+search=optuna"])
def test_another_budget_of_a_preset_is_another_folder(preset: str) -> None:
    def place(*words: str) -> str:
        compose(preset, *words)
        return str(HydraConfig.get().sweep.dir)

    own = place("logger=none")
    assert own.endswith("_10000_images") and place("seed=7") == own
    assert place("budget=flops", "budget.flops=2e12").endswith("_2e+12_flops")


def test_every_preset_names_its_budget() -> None:
    files = [*(conf_dir() / "sweep").glob("*.yaml"), *(conf_dir() / "search").glob("*.yaml")]
    assert len(files) > 5 and all("_${limits:${budget}}" in f.read_text() for f in files)
