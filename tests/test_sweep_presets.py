"""What the presets of sweeps stand for: which jobs they make, and that these differ in what the question is about."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from composing import compose, options
from gencompare.command_line import conf_dir
from gencompare.tasks.evaluate_run import with_samplers
from gencompare.tasks.runs.build import build_budget, build_data, build_model
from hydra_plugins.gencompare_sweeps.sweepers import with_experiment


def jobs(preset: str, *words: str) -> list[list[str]]:
    """The words of each job that Hydra makes of a preset."""
    compose(f"+sweep={preset}", *words)
    hydra = HydraConfig.get()
    params = [f"{key}={value}" for key, value in hydra.sweeper.params.items()]
    choices = [
        [f"{o.key_or_group}={value}" for value in (o.sweep_string_iterator() if o.is_sweep_override() else [o.value()])]
        for o in OverridesParser.create().parse_overrides(params)
    ]
    made = [list(job) for job in product(*choices)]
    if preset == "families":
        assert hydra.sweeper._target_.endswith(".Families") and hydra.runtime.choices["hydra/sweeper"] == "families"
        return [with_experiment(job, options("experiment"), hydra.runtime.choices.data) for job in made]
    return made


def differing(one: Any, two: Any, way: str = "") -> set[str]:
    """Paths at which two configs hold different values."""
    if isinstance(one, dict) and isinstance(two, dict):
        keys = one.keys() | two.keys()
        return {path for key in keys for path in differing(one.get(key), two.get(key), f"{way}.{key}".lstrip("."))}
    return set() if one == two else {way}


def composed(preset: str, job: list[str], *words: str) -> DictConfig:
    return compose(f"+sweep={preset}", *words, *job)


@pytest.mark.parametrize(("data", "some"), [("digits", ["gaussian", "vae", "ldm"]), ("fashion_mnist", ["gan", "ebm"])])
def test_families_get_their_own_settings_one_budget_and_one_protocol(data: str, some: list[str]) -> None:
    made = {next(w for w in job if w.startswith("model="))[6:]: job for job in jobs("families", f"data={data}")}
    assert {*made} == {name for name in options("model") if "GenerativeModel" in bases(name)}, "all there are"
    shared = set()
    for family in some:
        cfg = composed("families", made[family], f"data={data}")
        assert cfg.family == family and cfg.data._target_.lower().endswith(data.replace("_", ""))
        shared.add(OmegaConf.to_yaml(OmegaConf.create({"budget": cfg.budget, "evaluation": cfg.evaluation})))
        assert build_budget(cfg).images == 10_000 and cfg.evaluation.n == 500
        if f"{data}_{family}" in options("experiment"):
            own = compose(f"experiment={data}_{family}")
            assert cfg.model == own.model and cfg.trainer == own.trainer
    assert len(shared) == 1


def bases(model: str) -> set[str]:
    """Names of the classes that a family derives from."""
    node: Any = OmegaConf.load(conf_dir() / "model" / f"{model}.yaml")
    while "_target_" not in node:
        node = OmegaConf.load(conf_dir() / "model" / f"{next(d for d in node.defaults if isinstance(d, str))}.yaml")
    return {kind.__name__ for kind in get_class(node._target_).__mro__}


@pytest.mark.parametrize(
    ("words", "limit"), [("budget=flops budget.flops=1e9", "flops"), ("budget.images=9", "images")]
)
def test_families_take_another_budget_from_the_command_line(words: str, limit: str) -> None:
    for job in jobs("families")[1:3]:
        budget = build_budget(composed("families", job, *words.split()))
        assert [name for name, value in vars(budget).items() if value is not None] == [limit]
        assert getattr(budget, limit) in (9, 1e9)


def test_an_experiment_that_is_named_is_not_replaced() -> None:
    experiments = ["digits_vae", "mnist_vae"]
    assert with_experiment(["model=vae"], experiments, "digits") == ["experiment=digits_vae", "model=vae"]
    assert with_experiment(["data=mnist", "model=vae"], experiments, "digits")[0] == "experiment=mnist_vae"
    for job in (["experiment=other", "model=vae"], ["model=gan"], ["seed=1"]):
        assert with_experiment(job, experiments, "digits") == job


@pytest.mark.parametrize(
    ("preset", "count", "about"),
    [
        ("schedules", 12, "model.schedule"),
        ("parameterizations", 15, "model.parameterization"),
        ("samplers_nfe", 3, "seed"),
        ("guidance", 3, "seed"),
        ("seeds", 5, "seed"),
    ],
)
def test_jobs_differ_in_what_the_question_is_about_and_in_seeds(preset: str, count: int, about: str) -> None:
    made = jobs(preset)
    assert len(made) == count
    first: Any = OmegaConf.to_container(composed(preset, made[0]))
    for job in (made[1], made[-1]):
        paths = differing(first, OmegaConf.to_container(composed(preset, job)))
        assert paths and all(path.startswith(about) or path.split(".")[-1] == "seed" for path in paths), (job, paths)


@pytest.mark.parametrize("preset", ["schedules", "samplers_nfe", "guidance", "parameterizations"])
def test_each_way_of_sampling_is_another_and_the_model_gets_its_own_back(preset: str) -> None:
    cfg = composed(preset, jobs(preset)[0], "model.network.channels=8", "model.network.groups=8")
    model: Any = build_model(cfg, build_data(cfg))
    own = model.sampling_description()
    said = [model.sampling_description() for _ in with_samplers(cfg, model)]
    count = {"schedules": 3, "samplers_nfe": 11, "guidance": 7, "parameterizations": 1}[preset]
    assert len(said) == len(set(said)) == count and said[0] == own == model.sampling_description()


def test_each_scale_of_guidance_says_something_else_of_the_noise() -> None:
    cfg = composed("guidance", ["seed=0"], "model.network.channels=8", "model.network.groups=8", "model.clip_x0=false")
    model: Any = build_model(cfg, build_data(cfg)).eval()
    torch.manual_seed(0)
    for weight in model.network.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    x, t, label = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 0.95]), {"label": torch.tensor([3, 4])}
    with torch.no_grad():
        said = [model.sampling_denoiser(x, t, label).eps for _ in with_samplers(cfg, model)]
    assert all(not torch.allclose(one, two) for k, one in enumerate(said) for two in said[:k])
    # Where sigma / alpha is beyond its interval, guidance is off: scale 1, as the model's own. (Here: 1 and 12.7.)
    assert torch.allclose(said[-1][1], said[0][1]) and not torch.allclose(said[-1][0], said[0][0])
