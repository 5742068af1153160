"""The CIFAR-10 experiments agree with the published settings in `published.py`, or document the difference."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm

from composing import compose
from gencompare.command_line import conf_dir
from gencompare.tasks.runs.build import build_data
from published import DIFFERENCES, PUBLISHED


def build_on_meta(cfg: Any) -> Any:
    """Build the model of an experiment, with its networks on the meta device."""

    def on_meta(factory: Callable[..., Any]) -> Callable[..., Any]:
        def make(*args: Any, **kwargs: Any) -> Any:
            with torch.device("meta"):
                return factory(*args, **kwargs)

        return make

    factory = instantiate(cfg.model, _partial_=True, _convert_="all")
    factories = {name: on_meta(part) for name, part in factory.keywords.items() if isinstance(part, partial)}
    return factory(spec=build_data(cfg).spec, **factories)


def settings_of(cfg: Any, published: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of an experiment, for the keys of ``published``."""
    model = build_on_meta(cfg)
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    optimizer = model.build_optimizers()[0].param_groups[0]  # a GAN has two optimisers with equal settings
    schedule, sampler = getattr(model, "schedule", None), getattr(model, "sampler", None)
    noise_range = None
    if schedule is not None:
        span = torch.tensor([schedule.t_min, schedule.t_max])
        noise_range = tuple(torch.exp(-schedule.log_snr(span).double() / 2).tolist())
    table = None if schedule is None else schedule.discrete_times
    lr = cfg.model.lr_schedule
    found = {
        "parameters": {name: size for name, size in sizes.items() if size},
        "lr": optimizer["lr"],
        "betas": tuple(optimizer["betas"]),
        "weight_decay": optimizer["weight_decay"],
        "batch_size": cfg.trainer.global_batch_size
        // cfg.model.get("d_steps", 1),  # each discriminator step has its own batch
        "steps": cfg.budget.images // cfg.trainer.global_batch_size,
        "warmup_steps": lr.warmup_steps,
        "lr_decay": lr.decay,
        "grad_clip": cfg.model.grad_clip,
        "ema": cfg.callbacks.ema.decay,
        "dropout": max((m.p for m in model.modules() if isinstance(m, nn.Dropout)), default=0.0),
        "random_flip": cfg.data.random_flip,
        "num_discrete_times": None if table is None else len(table),
        "noise_range": noise_range,
        "sampler": None
        if sampler is None
        else {key: type(sampler).__name__ if key == "class" else getattr(sampler, key) for key in published["sampler"]},
    }
    return found | {key: OmegaConf.select(cfg, key, throw_on_missing=True) for key in published if key not in found}


def agree(found: Any, published: Any, *, rel: float) -> bool:
    """Compare floats up to a relative tolerance and everything else exactly."""
    if published is ...:
        return True
    if isinstance(published, Mapping):
        return found.keys() == published.keys() and all(agree(found[k], published[k], rel=rel) for k in published)
    if isinstance(published, Sequence) and not isinstance(published, str):
        return len(found) == len(published) and all(map(partial(agree, rel=rel), found, published))
    return math.isclose(found, published, rel_tol=rel) if isinstance(published, float) else found == published


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_experiments_have_published_settings_or_document_differences(
    experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Thirty power iterations per layer take seconds even on the meta device.
    monkeypatch.setattr(_SpectralNorm, "_power_method", lambda *_: None)
    published, differences = PUBLISHED[experiment], DIFFERENCES.get(experiment, {})
    found = settings_of(compose(f"experiment={experiment}"), published)
    file = (conf_dir() / "experiment" / f"{experiment}.yaml").read_text()
    comment = " ".join(line.lstrip("# ") for line in file.splitlines() if line.startswith("#"))
    assert found.keys() == published.keys(), "every entry lists all settings"
    for key, value in found.items():
        rel = 1e-3 if key == "noise_range" else 1e-6
        if key in differences:
            expected, explanation = differences[key]
            assert not agree(value, published[key], rel=rel), f"{key} does not differ from the published value"
            assert explanation in comment
        else:
            expected = published[key]
        assert agree(value, expected, rel=rel), f"{key} is {value} instead of {expected}"
