"""The experiments on CIFAR-10, composed and built, against what is published: `published.py`, with the sources."""

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
from published import HERE, PUBLISHED


def built(cfg: Any) -> Any:
    """The experiment's model, its networks without memory: factories of networks make them on the meta device."""

    def on_meta(factory: Callable[..., Any]) -> Callable[..., Any]:
        def make(*args: Any, **kwargs: Any) -> Any:
            with torch.device("meta"):
                return factory(*args, **kwargs)

        return make

    made = instantiate(cfg.model, _partial_=True, _convert_="all")
    factories = {name: on_meta(part) for name, part in made.keywords.items() if isinstance(part, partial)}
    return made(spec=build_data(cfg).spec, **factories)


def facts(cfg: Any, said: Mapping[str, Any]) -> dict[str, Any]:
    """The same of the experiment as is ``said`` of its source."""
    model = built(cfg)
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    optimizer = model.build_optimizers()[0].param_groups[0]  # of a GAN two alike
    schedule, sampler = getattr(model, "schedule", None), getattr(model, "sampler", None)
    ends = None
    if schedule is not None:
        span = torch.tensor([schedule.t_min, schedule.t_max])
        ends = tuple(torch.exp(-schedule.log_snr(span).double() / 2).tolist())
    table = None if schedule is None else schedule.discrete_times
    lr = cfg.model.lr_schedule
    found = {
        "parameters": {name: size for name, size in sizes.items() if size},
        "rate": optimizer["lr"],
        "betas": tuple(optimizer["betas"]),
        "weight_decay": optimizer["weight_decay"],
        "batch": cfg.trainer.global_batch_size // cfg.model.get("d_steps", 1),  # each discriminator step has its own
        "steps": cfg.budget.images // cfg.trainer.global_batch_size,
        "warmup": lr.warmup_steps,
        "rate_falls": lr.decay,
        "clip": cfg.model.grad_clip,
        "ema": cfg.callbacks.ema.decay,
        "dropout": max((m.p for m in model.modules() if isinstance(m, nn.Dropout)), default=0.0),
        "flip": cfg.data.flip,
        "table": None if table is None else len(table),
        "noise": ends,
        "sampler": None
        if sampler is None
        else {key: type(sampler).__name__ if key == "is" else getattr(sampler, key) for key in said["sampler"]},
    }
    return found | {key: OmegaConf.select(cfg, key, throw_on_missing=True) for key in said if key not in found}


def agree(found: Any, said: Any, *, rel: float) -> bool:
    """Counts and names exactly, other numbers nearly."""
    if said is ...:
        return True
    if isinstance(said, Mapping):
        return found.keys() == said.keys() and all(agree(found[key], said[key], rel=rel) for key in said)
    if isinstance(said, Sequence) and not isinstance(said, str):
        return len(found) == len(said) and all(agree(f, s, rel=rel) for f, s in zip(found, said, strict=True))
    return math.isclose(found, said, rel_tol=rel) if isinstance(said, float) else found == said


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_experiments_have_what_is_published_or_say_what_differs(
    experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Thirty power iterations a layer, which take seconds even of weights that are not there.
    monkeypatch.setattr(_SpectralNorm, "_power_method", lambda *_: None)
    said, here = PUBLISHED[experiment], HERE.get(experiment, {})
    found = facts(compose(f"experiment={experiment}"), said)
    file = (conf_dir() / "experiment" / f"{experiment}.yaml").read_text()
    comment = " ".join(line.lstrip("# ") for line in file.splitlines() if line.startswith("#"))
    assert found.keys() == said.keys(), "each row answers the same questions"
    for key, value in found.items():
        rel = 1e-3 if key == "noise" else 1e-6
        if key in here:
            expected, words = here[key]
            assert not agree(value, said[key], rel=rel), f"{key} is as published after all"
            assert words in comment
        else:
            expected = said[key]
        assert agree(value, expected, rel=rel), f"{key} is {value}, not {expected}"
