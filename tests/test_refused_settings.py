"""Settings that would silently reverse, disable or destroy learning are refused before anything is written."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from composing import compose, options
from gencompare import compilation
from gencompare.data.datamodule import ImageData
from gencompare.data.digits import Digits
from gencompare.errors import UserError
from gencompare.generative_model import TrainedModel
from gencompare.tasks.runs.build import (
    build_data,
    build_model,
    build_trainer,
    check_trainer_for_model,
    check_trainer_settings,
)
from gencompare.tasks.runs.trainer_options import CHOICES, PRECISIONS
from gencompare.tasks.train import check_optimizer
from gencompare.training.budget import Budget
from gencompare.training.clock import TrainingClock
from gencompare.training.ema import EMA
from parts import VARIANTS, slow_if

DOCS = Path(__file__).parents[1] / "docs"
FAMILIES = options("model")
SLOW = VARIANTS | {"flow", "edm", "ncsn", "meanflow", "consistency", "ldm", "hvae"}
"""Families whose numbers are tested in ``make test-slow``."""
MEANINGFUL_BELOW_ZERO = {"attention_resolutions", "gamma_max", "gamma_min", "log_snr_end", "mean"}
"""Settings for which -1 has a meaning."""
OF_ANOTHER_RUN = {"budget", "discriminator", "optimizer"}
"""Settings in ``model.latent`` that only the run of the autoencoder uses. It checks them before it starts."""


def numbers(node: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the paths of all numbers in a config."""
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from numbers(value, (*path, key))
    elif isinstance(node, int | float) and not isinstance(node, bool):
        yield path


def changed(cfg: DictConfig, path: tuple[str | int, ...], value: float) -> DictConfig:
    copy = cfg.copy()
    node: Any = copy.model
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return copy


@pytest.mark.parametrize("family", slow_if(SLOW, FAMILIES))
def test_no_number_of_a_model_may_be_negative_or_nan(family: str) -> None:
    """-1 and NaN are refused for every number in the config of every family, unless -1 has a meaning."""
    cfg = compose(f"model={family}", "data=digits", "trainer=cpu")
    data, accepted = build_data(cfg), []
    for path in numbers(OmegaConf.to_container(cfg.model)):
        name = next(key for key in reversed(path) if isinstance(key, str))
        for value in (-1, math.nan):
            if value == -1 and (
                name in MEANINGFUL_BELOW_ZERO or (path[0] == "latent" and OF_ANOTHER_RUN.intersection(path))
            ):
                continue
            try:
                check_optimizer(build_model(changed(cfg, path, value), data))
            except UserError as error:
                text = str(error)
                assert "\n" not in text and (name in text or "model.optimizer: " in text), text
            else:
                accepted.append((path, value))
    assert not accepted


@pytest.mark.parametrize("value", [-1.0, 0.0, math.inf, math.nan, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_clipping_to_a_norm_that_is_not_positive_is_refused(family: str, value: float) -> None:
    """A negative norm reverses the gradient, and 0 removes it."""
    cfg = compose(f"model={family}", "data=digits", "trainer=cpu")
    OmegaConf.set_struct(cfg, False)
    cfg.model.grad_clip = None
    build_model(cfg, Digits())
    cfg.model.grad_clip = value
    with pytest.raises(UserError, match=r"model\.grad_clip"):
        build_model(cfg, Digits())


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (partial(torch.optim.SGD, lr=0.0), "model.optimizer.lr=0.0 must be a positive number"),
        (partial(torch.optim.SGD, lr=math.nan), "model.optimizer.lr=nan"),
        (partial(torch.optim.Adam, lr=math.inf), "model.optimizer.lr=inf"),
        (partial(torch.optim.Adam, lr=torch.tensor(0.0)), "model.optimizer.lr=0.0"),
        (partial(torch.optim.SGD, lr=0.1, weight_decay=math.inf), "model.optimizer.weight_decay=inf"),
        (partial(torch.optim.SGD, lr=0.1, momentum=1.0), "model.optimizer.momentum=1.0"),
        (partial(torch.optim.SGD, lr=0.1, momentum=0.5, dampening=1.0), "model.optimizer.dampening=1.0"),
        (partial(torch.optim.Adam, lr=0.1, maximize=True), "model.optimizer.maximize=true"),
    ],
)  # fmt: skip
def test_optimisers_that_torch_accepts_although_nothing_is_learned(optimizer: Any, message: str) -> None:
    """They are refused by a run, and under a plain Trainer."""
    model = build_model(compose("model=vae", "data=digits", "trainer=cpu"), Digits())
    model.optimizer_factory = optimizer
    for check in (lambda: check_optimizer(model), model.configure_optimizers):
        with pytest.raises(UserError) as error:
            check()
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.grad_clip=-1"], "model.grad_clip=-1 must be a positive number, or null for no clipping."),
        (["model.optimizer.lr=0"], "model.optimizer.lr=0.0 must be a positive number."),
        (["model.optimizer.lr=-1e-3"], "model.optimizer"),
        (["model.optimizer.weight_decay=-0.1"], "model.optimizer"),
        (["+model.optimizer.maximize=true"], "model.optimizer.maximize=true"),
        (["model.lr_schedule.warmup_steps=-5"], "warmup_steps=-5"),
        (["model.beta=-1"], "model.beta=-1"),
        (["model.beta=nan"], "model.beta=nan"),
        (["callbacks.ema.decay=1"], "callbacks.ema.decay=1 must be in [0, 1)."),
        (["callbacks.checkpoints.every_minutes=nan"], "callbacks.checkpoints.every_minutes=nan"),
        (["budget.images=-1"], "budget.images=-1 must be positive."),
        (["model=ldm", "model.latent.autoencoder.optimizer.lr=0"], "model.optimizer.lr=0.0"),
        (["model=ldm", "model.latent.autoencoder.grad_clip=-1"], "model.grad_clip=-1"),
        (["model=ldm", "model.latent.budget.images=-1"], "budget.images=-1"),
        (["budget=device_minutes", "budget.device_minutes=nan"], "budget.device_minutes=nan is not a number"),
    ],
)  # fmt: skip
def test_the_command_line_refuses_them_before_it_writes(
    overrides: list[str], message: str, cli: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = [] if overrides[0].startswith("model=") else ["model=vae"]
    assert cli(*family, "trainer=cpu", "logger=none", "hydra.run.dir=runs/run", *overrides) == 1
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1, error
    assert not [path for path in tmp_path.glob("runs/*") if path.is_dir()]


# The table of settings that each family takes

TABLE = (DOCS / "training_options.md").read_text().split("| setting | taken by | else |")[1]
ROWS = re.findall(r"^\| (`.+?) \| (.+?) \| (.*)\|$", TABLE, flags=re.MULTILINE)
"""Settings, the families that take them, and parts of the message to the others."""


def takes(text: str, family: str) -> bool:
    """Return whether a cell such as "all but `gaussian`" includes a family."""
    named = f"`{family}`" in text
    return text == "all" or (not named if text.startswith("all but") else named)


def with_settings(cfg: DictConfig, settings: str) -> DictConfig:
    """Return a copy of a config with settings of the command line."""
    cfg = cfg.copy()
    for setting in settings.split():
        key, _, value = setting.lstrip("+").partition("=")
        if key.endswith("_target_"):  # other optimisers have other arguments
            cfg.model.optimizer = {"_partial_": True, "lr": cfg.model.optimizer.lr}
        OmegaConf.update(cfg, key, yaml.safe_load(value), force_add=True)
    return cfg


def check_settings(cfg: DictConfig, data: ImageData, model: TrainedModel | None = None) -> TrainedModel:
    """Check a config like a run does before it writes anything, with a model that differs in its optimiser only."""
    check_trainer_settings(cfg)
    if model is None or "Missing" in str(cfg.model.get("optimizer")):
        model = build_model(cfg, data)
    if "optimizer" in cfg.model:
        model.optimizer_factory = instantiate(cfg.model.optimizer)
    check_optimizer(model)
    check_trainer_for_model(cfg, model)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_setting_of_the_table_is_taken_or_refused_in_one_line(family: str) -> None:
    data, model = Digits(), None
    cfg = compose(f"model={family}", "data=digits", "trainer=cpu")
    cfg = OmegaConf.masked_copy(cfg, ["seed", "model", "trainer"])
    part = cfg.copy()  # which is quicker to copy
    part.model = OmegaConf.masked_copy(cfg.model, [name for name in ("optimizer",) if name in cfg.model])
    for row, families, parts in ROWS:
        settings = row.strip("`")
        if "model.optimizer" in settings and "optimizer" not in cfg.model:
            assert not takes(families, family)  # there is no such option
            continue
        try:
            whole = model is None or "Missing" in settings
            model = check_settings(with_settings(cfg if whole else part, settings), data, model)
            text = None
        except UserError as error:
            text = str(error)
        assert (text is None) == takes(families, family), (settings, text)
        if text is not None:
            assert "\n" not in text, text
            assert all(part in text for part in re.findall("`(.+?)`", parts)), (settings, text)
            names = [re.sub(r"^\+|=.*|\._target_", "", setting) for setting in settings.split()]
            assert any(name in text for name in names), (settings, text)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_setting_of_the_table_that_is_taken_trains(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "eager")  # which traces the blocks, but generates no code
    for settings, families, _ in ROWS:
        if not takes(families, family) or "strategy" in settings:  # other tests train with several processes
            continue
        cfg = with_settings(compose(f"model={family}", "data=digits", "trainer=cpu"), settings.strip("`"))
        cfg.data.batch_size = cfg.trainer.global_batch_size = 8
        data = build_data(cfg)
        model = check_settings(cfg, data)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        callbacks = {"clock": TrainingClock(0, 8, Budget(steps=2)), "ema": EMA(0.9)}
        build_trainer(cfg, model, callbacks, [], tmp_path).fit(model, datamodule=data)
        after = model.state_dict()
        assert any(not torch.equal(before[name].to(value), value) for name, value in after.items()), settings
        assert all(value.isfinite().all() for value in after.values()), settings


def test_every_value_of_a_setting_is_in_the_table() -> None:
    listed = [settings.strip("`") for settings, _, _ in ROWS]
    for name, values in CHOICES.items():
        assert f"trainer.{name}=nonsense" in listed or name == "strategy"
        assert all(f"trainer.{name}={str(value).lower()}" in listed for value in values[1:])
    assert {f"trainer.precision={value}" for value in PRECISIONS} < set(listed)
