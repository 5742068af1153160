"""Settings that would silently reverse, disable or destroy learning are refused before anything is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from composing import compose, options
from gencompare.data.digits import Digits
from gencompare.errors import UserError
from gencompare.tasks.runs.build import build_data, build_model
from gencompare.tasks.train import check_optimizer

FAMILIES = options("model")
MEANINGFUL_BELOW_ZERO = {"attention_resolutions", "gamma_max", "gamma_min", "mean"}
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


@pytest.mark.parametrize("family", FAMILIES)
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
