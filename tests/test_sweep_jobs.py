"""Tests of which configs are the same job or the same training, and which folder a sweep uses."""

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


def identity(cfg: DictConfig, **changed: Any) -> JobIdentity:
    """Return the identity of a config with changed values, given by key with double underscores for dots."""
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    for key, value in changed.items():
        assert OmegaConf.select(cfg, key.replace("__", "."), default="none") != value
        OmegaConf.update(cfg, key.replace("__", "."), value, merge=False, force_add=True)
    return job_identity(cfg)


def test_paths_and_loggers_do_not_change_the_job() -> None:
    elsewhere = compose("data=cifar10", "paths.data=/else", "paths.cache=/where", "logger=none", "num_images=3")
    assert identity(elsewhere) == identity(compose("data=cifar10"))
    assert identity(elsewhere, data__train_subset_size=9) != identity(elsewhere)


def test_compilation_for_sampling_does_not_change_the_job() -> None:
    """Nor does a config that is older than the option, so a sweep does not train its finished jobs again."""
    cfg = compose("data=digits")
    old = cfg.copy()
    OmegaConf.set_struct(old, False)
    del old.evaluation.protocol.compile
    assert identity(old) == identity(cfg) == identity(cfg, evaluation__protocol__compile=True)


@pytest.mark.parametrize(
    "changed", [{"model__optimizer__lr": 3e-5}, {"seed": 1}, {"budget__images": 9}, {"data__random_flip": True}]
)
def test_settings_of_training_change_job_and_training(changed: dict[str, Any]) -> None:
    one, two = identity(compose(LAST)), identity(compose(LAST), **changed)
    assert one.job != two.job and one.training != two.training


def test_a_folder_of_images_is_identified_by_its_path() -> None:
    cfg = compose("data=image_folder")
    same = [identity(cfg, data__root=f"/{name}").training for name in "ab"]
    same += [identity(cfg, data__root=f"/{name}", paths__data=f"/{name}").training for name in "cd"]
    assert len({*same}) == 4


@pytest.mark.parametrize(
    "changed",
    [
        {"model__sampler__num_steps": 7},
        {"model__sampler": {"_target_": "x"}},
        {"evaluation__num_images": 9},
        {"evaluation": {}},
    ],
)
def test_sampling_and_evaluation_change_the_job_but_not_the_training(changed: dict[str, Any]) -> None:
    one, two = identity(compose(LAST)), identity(compose(LAST), **changed)
    assert one.job != two.job and one.training == two.training


@pytest.mark.parametrize(
    "dependence", [{"evaluation__checkpoints": ["last", "best"]}, {"callbacks__evaluation__patience": 2}]
)
def test_sampling_counts_as_training_if_training_depends_on_it(dependence: dict[str, Any]) -> None:
    """If samples choose the best checkpoint or end training early, the sampler and the protocol affect training."""
    cfg = compose(LAST)
    own = identity(cfg, **dependence).training
    assert identity(cfg, **dependence, evaluation__num_images=9).training == own
    assert identity(cfg, **dependence, model__sampler__num_steps=7).training != own
    assert identity(cfg, **dependence, evaluation__protocol__chunk_size=9).training != own
    without = {**dependence, "callbacks__evaluation__num_samples": 0}
    assert identity(cfg, **without, model__sampler__num_steps=7).training == identity(cfg, **without).training


def test_guides_and_trials_are_part_of_the_training() -> None:
    cfg, guidance = compose(LAST), {"scale": 2.0, "weak": {"run": "a"}}
    own = identity(cfg, model__guidance=guidance).training
    assert identity(cfg, model__guidance={**guidance, "scale": 3.0}).training == own
    assert identity(cfg, model__guidance={**guidance, "weak": {"run": "b"}}).training != own
    assert len({identity(cfg, trial={"study": "a", "number": number}).training for number in range(2)}) == 2


def folder(*overrides: str) -> str:
    return sweep_folder(OmegaConf.create([*overrides]), "now")


def test_the_same_sweep_uses_the_same_folder() -> None:
    own = folder("model=flow", "model.optimizer.lr=1e-3,2e-3", "seed=0,1")
    assert own.startswith("sweep_flow_lr_")
    for overrides in (
        ["model=flow", "seed=0", "model.optimizer.lr=1e-3,2e-3"],
        [
            "model.optimizer.lr=choice(1e-3,5)",
            "model=flow",
            "logger=none",
            "paths.data=/else",
            "+logger.wandb.project=x",
        ],
    ):
        assert folder(*overrides) == own, overrides
    others = [
        own, folder("model=vae", "model.optimizer.lr=1,2"), folder("model=flow", "model.optimizer.lr=1"),
        folder("model=flow", "model.optimizer.lr=1,2", "budget.images=9"), folder("model=flow", "model/sampler=a,b"),
        folder("model=flow"),
    ]  # fmt: skip
    assert len({*others}) == len(others)
    assert folder("task=validate_metrics", "data=digits,mnist") == "now_sweep", "only training can be resumed"


@pytest.mark.parametrize("preset", ["+sweep=families", "+search=optuna"])
def test_another_budget_of_a_preset_uses_another_folder(preset: str) -> None:
    def sweep_dir(*overrides: str) -> str:
        compose(preset, *overrides)
        return str(HydraConfig.get().sweep.dir)

    own = sweep_dir("logger=none")
    assert own.endswith("_50000_images") and sweep_dir("seed=7") == own
    assert sweep_dir("budget=flops", "budget.flops=2e12").endswith("_2e+12_flops")


def test_every_preset_names_its_folder_by_budget() -> None:
    files = [*(conf_dir() / "sweep").glob("*.yaml"), *(conf_dir() / "search").glob("*.yaml")]
    assert len(files) > 5 and all("_${limits:${budget}}" in f.read_text() for f in files)
