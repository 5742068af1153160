"""Every option of every group composes, and every experiment runs."""

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

NOT_OPTIONS = ("hydra",)
PRESETS = ("model", "experiment")
"""Groups whose options compose in a test of their own."""


def every_option() -> list[tuple[str, str]]:
    found = set()
    for root in roots():
        for path in root.rglob("*.yaml"):
            group = str(path.parent.relative_to(root))
            if group != "." and group.split("/")[0] not in NOT_OPTIONS:
                found.add((group, path.stem))
    return sorted(found)


def bundles() -> list[list[str]]:
    """Every option once. Parts of one model are chosen together, the k-th of each group: a config takes its time."""
    single, together = [], defaultdict(lambda: defaultdict(list))
    for group, option in every_option():
        if group in PRESETS:
            continue
        if carrier := carrier_of(group):
            together[carrier][group].append(f"{group}={option}")
        else:
            single.append([f"{'' if group in usual_groups() else '+'}{group}={option}"])
    rows = ([c, *filter(None, row)] for c, groups in together.items() for row in zip_longest(*groups.values()))
    return single + list(rows)


@pytest.mark.parametrize("words", bundles(), ids=",".join)
def test_every_option_composes(words: list[str]) -> None:
    assert OmegaConf.missing_keys(compose(*words)) <= {"data.root"}, f"{words} leave values open"


@pytest.mark.parametrize("base", [f"{group}={name}" for group in PRESETS for name in options(group)])
def test_another_sampler_is_a_choice_for_every_preset(base: str) -> None:
    """What a preset sets of its own sampler, another one may not know: it stands in an option of that sampler."""
    try:
        cfg = compose(base, "model/sampler=rk45")
        instantiate(cfg.model.sampler, _convert_="all")
    except ConfigCompositionException as error:
        assert "Could not override 'model/sampler'" in str(error), "a model without a sampler"
        cfg = compose(base)
    assert not OmegaConf.missing_keys(cfg), f"{base} leaves values open"


def test_groups_of_the_issue_are_there() -> None:
    for group, expected in {
        "model": {"gaussian", "vae", "gan", "ddpm"},
        "data": {"digits", "fashion_mnist", "mnist", "cifar10", "eurosat64", "image_folder", "toy2d"},
        "trainer": {"auto", "cpu", "gpu", "ddp"},
        "logger": {"default", "wandb", "tensorboard", "csv", "none"},
        "debug": {"fast", "overfit", "profile"},
        "task": {"train", "evaluate", "sample", "compare"},
    }.items():
        assert expected <= set(options(group)), group


def test_the_wheel_would_hold_the_same_tree() -> None:
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert '"conf" = "gencompare/conf"' in pyproject


def test_edms_weighting_is_for_data_of_the_same_size_as_its_preconditioning() -> None:
    """What is set in one place holds in both; an objective by itself goes by the published 0.5."""
    for words, expected in (
        (["model=edm", "model.parameterization.sigma_data=0.8"], 0.8),
        (["model=edm", "model.parameterization.sigma_data=0.8", "model.objective.weighting.sigma_data=0.6"], 0.6),
        (["model=flow", "model/objective=edm"], 0.5),
    ):
        assert compose(*words).model.objective.weighting.sigma_data == expected


BUILT: dict[str, ImageData] = {}


def once_built(cfg: DictConfig) -> ImageData:
    """The data of ``cfg``, read and decoded once for all experiments on it."""
    return BUILT.setdefault(OmegaConf.to_yaml(cfg.data), build_data(cfg))


def reduced(name: str, *words: str) -> DictConfig:
    """The config of an experiment with narrow networks."""
    cfg = compose(
        f"experiment={name}", "trainer.accelerator=cpu", "trainer.global_batch_size=5", "budget.images=null",
        "budget.steps=1", "callbacks.looks.count=0", "callbacks.progress=false", *words,
    )  # fmt: skip
    for network in ("network", "generator", "discriminator"):
        if cfg.model.get(network, {}).get("channels"):
            cfg.model[network].channels = 32
        if isinstance(cfg.model.get(network, {}).get("blocks"), int):
            cfg.model[network].blocks = 1
    if cfg.model.get("latent"):
        cfg.model.latent.autoencoder.encoder.channels = cfg.model.latent.autoencoder.decoder.channels = 8
    if channels := cfg.model.get("energy", {}).get("channels"):
        cfg.model.energy.channels = 8 if isinstance(channels, int) else [8, 12]
        cfg.model.steps = 2
    if "ladder" in cfg.model:
        cfg.model.ladder.channels = cfg.model.ladder.max_channels = 16
    return cfg


@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment_takes_a_step_at_reduced_size(name: str, data_root: Path, tmp_path: Path, cache: Path) -> None:
    places = f"paths.data={data_root}", f"paths.cache={cache}"
    cfg = reduced(name, *places)
    data = once_built(cfg)
    model = build_model(cfg, data)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    callbacks = build_callbacks(cfg, model, data, None, tmp_path)
    build_trainer(cfg, model, callbacks, [], tmp_path).fit(model, datamodule=data)
    assert callbacks[0].step == 1  # type: ignore[attr-defined]
    assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items())
    if isinstance(model, GenerativeModel) and not model.conditional:
        conditional = build_model(reduced(name, *places, "model.conditional=true"), data)
        parameters = [sum(p.numel() for p in each.parameters()) for each in (model, conditional)]
        assert conditional.conditional and parameters[0] < parameters[1], "the label has weights of its own"
        if type(conditional).losses is not TrainedModel.losses:
            x, cond = next(iter(data.batches("val", 2)))
            losses = conditional.losses(x, cond, RandomSource.whole(torch.Generator().manual_seed(0), 2))
            assert losses["loss"].isfinite().all()
