"""Every option of every group composes, and every experiment runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra.errors import ConfigCompositionException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from composing import compose, options, roots
from gencompare.data.base import ImageData
from gencompare.paths import conf_dir
from gencompare.tasks.build import build_callbacks, build_data, build_model, build_trainer

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


@pytest.mark.parametrize(("group", "option"), [o for o in every_option() if o[0] not in PRESETS], ids=lambda x: str(x))
def test_every_option_composes(group: str, option: str) -> None:
    carrier = carriers(group)
    plus = "" if carrier or group in usual_groups() else "+"
    cfg = compose(*carrier, f"{plus}{group}={option}")
    assert OmegaConf.missing_keys(cfg) <= {"data.root"}, f"{group}={option} leaves values open"


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


def usual_groups() -> set[str]:
    """Those of which every run has an option, if only null; others are added with a plus."""
    defaults = OmegaConf.load(conf_dir() / "config.yaml").defaults
    return {str(key).removeprefix("optional ") for entry in defaults if not isinstance(entry, str) for key in entry}


def carriers(group: str) -> list[str]:
    """An option in whose defaults list ``group`` stands, chosen by looking and not by name; none for an addition."""
    parts = group.split("/")
    if len(parts) == 1:
        return []
    for carrier in options(parts[0]):
        for root in roots():
            path = root / parts[0] / f"{carrier}.yaml"
            if path.is_file():
                defaults = OmegaConf.load(path).get("defaults", [])
                if any("/".join(parts[1:]) in entry for entry in defaults if not isinstance(entry, str)):
                    return [f"{parts[0]}={carrier}"]
    return []


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


BUILT: dict[str, ImageData] = {}


def once_built(cfg: DictConfig) -> ImageData:
    """The data of ``cfg``, read and decoded once for all experiments on it."""
    return BUILT.setdefault(OmegaConf.to_yaml(cfg.data), build_data(cfg))


@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment_takes_a_step_at_reduced_size(
    name: str, data_root: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = tmp_path_factory.getbasetemp().parent / "decoded"
    cfg = compose(
        f"experiment={name}", f"paths.data={data_root}", f"paths.cache={cache}", "trainer.accelerator=cpu",
        "trainer.global_batch_size=5", "budget.images=null", "budget.steps=1", "callbacks.looks.count=0",
        "callbacks.progress=false",
    )  # fmt: skip
    for network in ("network", "generator", "discriminator"):
        if cfg.model.get(network, {}).get("channels"):
            cfg.model[network].channels = 32
        if isinstance(cfg.model.get(network, {}).get("blocks"), int):
            cfg.model[network].blocks = 1
    if cfg.model.get("latent"):
        cfg.model.latent.autoencoder.encoder.channels = cfg.model.latent.autoencoder.decoder.channels = 8
    if cfg.model.get("energy", {}).get("channels"):
        cfg.model.energy.channels = [8, 12]
        cfg.model.steps = 2
    if "ladder" in cfg.model:
        cfg.model.ladder.channels = cfg.model.ladder.max_channels = 16
    data = once_built(cfg)
    model = build_model(cfg, data)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    callbacks = build_callbacks(cfg, model, data, None, tmp_path)
    build_trainer(cfg, model, callbacks, [], tmp_path).fit(model, datamodule=data)
    assert callbacks[0].step == 1  # type: ignore[attr-defined]
    assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items())
