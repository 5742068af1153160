"""The jobs of each sweep preset, which differ only in the setting under study."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from composing import compose, options
from gencompare.command_line import conf_dir
from gencompare.errors import UserError
from gencompare.tasks.evaluate_run import sampling_variants
from gencompare.tasks.runs.build import build_budget, build_data, build_model
from hydra_plugins.gencompare_sweeps.sweepers import families, with_experiment


def jobs(preset: str, *overrides: str) -> list[list[str]]:
    """Return the overrides of each job of a preset."""
    compose(f"+sweep={preset}", *overrides)
    hydra = HydraConfig.get()
    params = [f"{key}={value}" for key, value in hydra.sweeper.params.items()]
    choices = [
        [f"{o.key_or_group}={value}" for value in (o.sweep_string_iterator() if o.is_sweep_override() else [o.value()])]
        for o in OverridesParser.create().parse_overrides(params)
    ]
    all_jobs = [list(job) for job in product(*choices)]
    if preset == "families":
        assert (
            hydra.sweeper._target_.endswith(".FamiliesSweeper") and hydra.runtime.choices["hydra/sweeper"] == "families"
        )
        return [with_experiment(job, options("experiment"), hydra.runtime.choices.data) for job in all_jobs]
    return all_jobs


def differing_keys(one: Any, two: Any, prefix: str = "") -> set[str]:
    """Return the dotted keys with different values in two configs."""
    if isinstance(one, dict) and isinstance(two, dict):
        keys = one.keys() | two.keys()
        return {k for key in keys for k in differing_keys(one.get(key), two.get(key), f"{prefix}.{key}".lstrip("."))}
    return set() if one == two else {prefix}


def composed(preset: str, job: list[str], *overrides: str) -> DictConfig:
    return compose(f"+sweep={preset}", *overrides, *job)


def test_families_include_those_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built_in = families().split(",")
    assert {"gaussian", "vae", "ldm"} < {*built_in} and not {"classifier", "autoencoder"} & {*built_in}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults: [vae, _self_]\nlatent_dim: 2\n")
    monkeypatch.setenv("GENCOMPARE_CONF", str(tmp_path))
    assert families().split(",") == sorted([*built_in, "mine"])
    assert {*families("trained").split(",")} == {*built_in, "mine"} - {"gaussian"}
    (tmp_path / "model" / "mine.yaml").write_text("_target_: no_such_module.Model\n")
    with pytest.raises(UserError, match=r"mine\.yaml.*no_such_module"):
        families()
    (tmp_path / "model" / "mine.yaml").write_text("latent_dim: 2\n")
    with pytest.raises(UserError, match=r"mine\.yaml names no model"):
        families()


@pytest.mark.parametrize(("data", "names"), [("digits", ["gaussian", "vae", "ldm"]), ("fashion_mnist", ["gan", "ebm"])])
def test_families_have_own_settings_but_one_budget_and_protocol(data: str, names: list[str]) -> None:
    job_of = {next(w for w in job if w.startswith("model="))[6:]: job for job in jobs("families", f"data={data}")}
    assert {*job_of} == {name for name in options("model") if "GenerativeModel" in bases(name)}
    shared = set()
    for family in names:
        cfg = composed("families", job_of[family], f"data={data}")
        assert cfg.family == family and cfg.data._target_.lower().endswith(data.replace("_", ""))
        shared.add(OmegaConf.to_yaml(OmegaConf.create({"budget": cfg.budget, "evaluation": cfg.evaluation})))
        assert build_budget(cfg).images == 50_000 and cfg.evaluation.num_images == 500
        if f"{data}_{family}" in options("experiment"):
            own = compose(f"experiment={data}_{family}")
            assert cfg.model == own.model and cfg.trainer == own.trainer
    assert len(shared) == 1


def bases(model: str) -> set[str]:
    """Return the names of a family's base classes."""
    node: Any = OmegaConf.load(conf_dir() / "model" / f"{model}.yaml")
    while "_target_" not in node:
        node = OmegaConf.load(conf_dir() / "model" / f"{next(d for d in node.defaults if isinstance(d, str))}.yaml")
    return {kind.__name__ for kind in get_class(node._target_).__mro__}


@pytest.mark.parametrize(
    ("overrides", "limit"), [("budget=flops budget.flops=1e9", "flops"), ("budget.images=9", "images")]
)
def test_families_take_their_budget_from_the_command_line(overrides: str, limit: str) -> None:
    for job in jobs("families")[1:3]:
        budget = build_budget(composed("families", job, *overrides.split()))
        assert [name for name, value in vars(budget).items() if value is not None] == [limit]
        assert getattr(budget, limit) in (9, 1e9)


def test_an_explicit_experiment_is_not_replaced() -> None:
    experiments = ["digits_vae", "mnist_vae"]
    assert with_experiment(["model=vae"], experiments, "digits") == ["experiment=digits_vae", "model=vae"]
    assert with_experiment(["data=mnist", "model=vae"], experiments, "digits")[0] == "experiment=mnist_vae"
    for job in (["experiment=other", "model=vae"], ["model=gan"], ["seed=1"]):
        assert with_experiment(job, experiments, "digits") == job


def test_presets_of_another_data_set_keep_the_data_of_the_job() -> None:
    experiments = ["digits_vae", "mnist_vae"]
    for job, data in ((["model=vae"], "mnist"), (["data=mnist", "model=vae"], "digits")):
        overrides = with_experiment(job, experiments, data, "digits")
        assert overrides == ["experiment=digits_vae", "data=mnist", "model=vae"]
    for family in families("trained").split(","):
        job = ["data=cifar10", f"model={family}"]
        cfg = compose(*with_experiment(job, options("experiment"), "digits", "fashion_mnist"))
        own = compose(f"experiment=fashion_mnist_{family}")
        assert cfg.data._target_.endswith("CIFAR10") and (cfg.model, cfg.budget) == (own.model, own.budget)
    with pytest.raises(UserError, match=r"hydra\.sweeper\.presets=cats.*cats_"):
        with_experiment(["model=vae"], experiments, "digits", "cats")


@pytest.mark.parametrize(
    ("preset", "count", "key"),
    [
        ("schedules", 27, "model.schedule"),
        ("parameterizations", 15, "model.parameterization"),
        ("samplers_nfe", 3, "seed"),
        ("guidance", 3, "seed"),
        ("seeds", 5, "seed"),
    ],
)
def test_jobs_differ_only_in_the_setting_under_study_and_seeds(preset: str, count: int, key: str) -> None:
    all_jobs = jobs(preset)
    assert len(all_jobs) == count
    first: Any = OmegaConf.to_container(composed(preset, all_jobs[0]))
    for job in (all_jobs[1], all_jobs[-1]):
        keys = differing_keys(first, OmegaConf.to_container(composed(preset, job)))
        assert keys and all(k.startswith(key) or k.split(".")[-1] == "seed" for k in keys), (job, keys)


@pytest.mark.parametrize("preset", ["schedules", "samplers_nfe", "guidance", "parameterizations"])
def test_sampling_variants_differ_and_the_own_sampler_is_restored(preset: str) -> None:
    cfg = composed(preset, jobs(preset)[0], "model.network.channels=8", "model.network.num_groups=8")
    model: Any = build_model(cfg, build_data(cfg))
    own = model.sampling_description()
    descriptions = [model.sampling_description() for _ in sampling_variants(cfg, model)]
    count = {"schedules": 3, "samplers_nfe": 11, "guidance": 7, "parameterizations": 1}[preset]
    assert len(descriptions) == len(set(descriptions)) == count
    assert descriptions[0] == own == model.sampling_description()


def test_each_guidance_scale_predicts_other_noise() -> None:
    cfg = composed(
        "guidance", ["seed=0"], "model.network.channels=8", "model.network.num_groups=8", "model.clip_x0=false"
    )
    model: Any = build_model(cfg, build_data(cfg)).eval()
    torch.manual_seed(0)
    for weight in model.network.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    x, t, label = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 0.95]), {"label": torch.tensor([3, 4])}
    with torch.no_grad():
        eps = [model.sampling_denoiser(x, t, label).eps for _ in sampling_variants(cfg, model)]
    assert all(not torch.allclose(one, two) for k, one in enumerate(eps) for two in eps[:k])
    # Guidance is off (scale 1, the model alone) outside its interval of sigma / alpha, here at 1 and 12.7.
    assert torch.allclose(eps[-1][1], eps[0][1]) and not torch.allclose(eps[-1][0], eps[0][0])
