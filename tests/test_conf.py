"""Every option of every group composes, and every experiment trains."""

from __future__ import annotations

from collections import defaultdict
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
from hydra.errors import ConfigCompositionException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from composing import carrier_of, compose, options, roots, usual_groups
from gencompare.data.datamodule import ImageData
from gencompare.generative_model import GenerativeModel, TrainedModel
from gencompare.rng import RandomSource
from gencompare.tasks.runs.build import build_callbacks, build_data, build_model, build_trainer
from parts import VARIANTS, slow_if

IGNORED_GROUPS = ("hydra",)
PRESETS = ("model", "experiment")
"""Groups whose options are composed by another test."""


def every_option() -> list[tuple[str, str]]:
    options_found = set()
    for root in roots():
        for path in root.rglob("*.yaml"):
            group = str(path.parent.relative_to(root))
            if group != "." and group.split("/")[0] not in IGNORED_GROUPS:
                options_found.add((group, path.stem))
    return sorted(options_found)


def bundles() -> list[list[str]]:
    """Return overrides that contain every option once. The k-th options of all model parts are combined to save
    time."""
    single, combined = [], defaultdict(lambda: defaultdict(list))
    for group, option in every_option():
        if group in PRESETS:
            continue
        if carrier := carrier_of(group):
            combined[carrier][group].append(f"{group}={option}")
        else:
            single.append([f"{'' if group in usual_groups() else '+'}{group}={option}"])
    rows = ([c, *filter(None, row)] for c, groups in combined.items() for row in zip_longest(*groups.values()))
    return single + list(rows)


@pytest.mark.parametrize("overrides", bundles(), ids=",".join)
def test_every_option_composes(overrides: list[str]) -> None:
    assert OmegaConf.missing_keys(compose(*overrides)) <= {"data.root"}, f"{overrides} leave values missing"


REPEATED = {
    f"experiment={name}"
    for name in options("experiment")
    if name.startswith("digits_")
    or name.replace("fashion_mnist", "cifar10") in set(options("experiment")) - {name}
    or name.partition("_")[2] in VARIANTS | {"classifier"}
} - {"experiment=mnist_classifier"}
"""Experiments with the family of another one, or with one of its variants."""


@pytest.mark.parametrize("base", slow_if(REPEATED, [f"{group}={name}" for group in PRESETS for name in options(group)]))
def test_every_preset_composes(base: str) -> None:
    """Presets must not set sampler arguments that another sampler does not have."""
    try:
        cfg = compose(base, "model/sampler=rk45")
        instantiate(cfg.model.sampler, _convert_="all")
    except ConfigCompositionException as error:
        assert "Could not override 'model/sampler'" in str(error), "a model without a sampler"
        cfg = compose(base)
    assert not OmegaConf.missing_keys(cfg), f"{base} leaves values missing"


def test_the_main_options_exist() -> None:
    for group, expected in {
        "model": {"gaussian", "vae", "gan", "ddpm"},
        "data": {"digits", "fashion_mnist", "mnist", "cifar10", "eurosat64", "image_folder", "toy2d"},
        "trainer": {"auto", "cpu", "gpu", "ddp"},
        "logger": {"default", "wandb", "tensorboard", "csv", "none"},
        "debug": {"fast", "overfit", "profile"},
        "task": {"train", "evaluate", "sample", "compare"},
    }.items():
        assert expected <= set(options(group)), group


def test_the_wheel_contains_conf() -> None:
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert '"conf" = "gencompare/conf"' in pyproject


def test_the_weighting_of_edm_uses_the_sigma_data_of_its_preconditioning() -> None:
    """Without this preconditioning, the objective uses the published value, 0.5."""
    for overrides, expected in (
        (["model=edm", "model.parameterization.sigma_data=0.8"], 0.8),
        (["model=edm", "model.parameterization.sigma_data=0.8", "model.objective.weighting.sigma_data=0.6"], 0.6),
        (["model=flow", "model/objective=edm"], 0.5),
    ):
        assert compose(*overrides).model.objective.weighting.sigma_data == expected


DATA: dict[str, ImageData] = {}


def cached_data(cfg: DictConfig) -> ImageData:
    """Return the data of ``cfg``, decoded once for all experiments."""
    return DATA.setdefault(OmegaConf.to_yaml(cfg.data), build_data(cfg))


def reduced_config(name: str, *overrides: str) -> DictConfig:
    """Return the config of an experiment, with narrow networks."""
    cfg = compose(
        f"experiment={name}", "trainer.accelerator=cpu", "trainer.global_batch_size=5", "budget.images=null",
        "budget.steps=1", "callbacks.evaluation.num_evaluations=0", "callbacks.progress_bar=null", *overrides,
    )  # fmt: skip
    for network in ("network", "generator", "discriminator"):
        if cfg.model.get(network, {}).get("channels"):
            cfg.model[network].channels = 32
        if isinstance(cfg.model.get(network, {}).get("num_blocks"), int):
            cfg.model[network].num_blocks = 1
    if "hidden_size" in cfg.model.get("network", {}):
        cfg.model.network.hidden_size, cfg.model.network.depth = 64, 1
    if cfg.model.get("latent"):
        cfg.model.latent.autoencoder.encoder.channels = cfg.model.latent.autoencoder.decoder.channels = 8
    if channels := cfg.model.get("energy", {}).get("channels"):
        cfg.model.energy.channels = 8 if isinstance(channels, int) else [8, 12]
        cfg.model.num_langevin_steps = 2
    for name, size in (("depth", 1), ("width", 16)):
        if name in cfg.model.get("bijection", {}):
            cfg.model.bijection[name] = size
    if "residual_posterior" in cfg.model.get("decoder", {}):
        cfg.model.decoder.channels = cfg.model.decoder.max_channels = 16
    return cfg


@pytest.mark.parametrize("experiment", slow_if(REPEATED, [f"experiment={name}" for name in options("experiment")]))
def test_every_experiment_takes_a_step_at_reduced_size(
    experiment: str, data_root: Path, tmp_path: Path, cache: Path
) -> None:
    name = experiment.partition("=")[2]
    paths = f"paths.data={data_root}", f"paths.cache={cache}"
    cfg = reduced_config(name, *paths)
    data = cached_data(cfg)
    model = build_model(cfg, data)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    callbacks = build_callbacks(cfg, model, data, None, tmp_path)
    build_trainer(cfg, model, callbacks, [], tmp_path).fit(model, datamodule=data)
    assert callbacks["clock"].step == 1  # type: ignore[attr-defined]
    assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items())
    if isinstance(model, GenerativeModel) and not model.conditional:
        conditional = build_model(reduced_config(name, *paths, "model.conditional=true"), data)
        parameters = [sum(p.numel() for p in each.parameters()) for each in (model, conditional)]
        assert conditional.conditional and parameters[0] < parameters[1], "the network has weights for the label"
        if type(conditional).losses is not TrainedModel.losses:
            x, cond = next(iter(data.batches("val", 2)))
            losses = conditional.losses(x, cond, RandomSource.for_batch(torch.Generator().manual_seed(0), 2))
            assert losses["loss"].isfinite().all()
