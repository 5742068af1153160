"""When two jobs of a sweep are the same one, or train the same: hashes of the parts of a config that count."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gencompare.tasks import frozen

NO_PART = (
    *frozen.OF_THE_JOB, "out", "tags", "sweep_name", "command", "trained_in", "logger", "callbacks.progress",
    "data.cache",
)  # fmt: skip
"""What a config holds of places, of the terminal and of other tasks: with another value it is the same job."""
SAMPLING = ("evaluation", "model.sampler", "model.guidance")
"""What decides how a trained model is sampled and measured."""
MEASURING = (
    "evaluation.n", "evaluation.checkpoints", "evaluation.samplers", "evaluation.guidance", "evaluation.protocol.n",
    "evaluation.protocol.likelihood_n", "evaluation.protocol.reference", "evaluation.protocol.metrics",
)  # fmt: skip
"""What of it has no part in the previews of `training.looks` either."""
IMAGE_FOLDER = "gencompare.data.image_folder.ImageFolder"


@dataclass(frozen=True)
class Identity:
    """Hashes of a training job: of all that decides its figures, and of what decides its weights alone."""

    job: str
    training: str


def identity(cfg: DictConfig) -> Identity:
    parts = kept(cfg)
    job = digest(parts)
    guides = {
        role: part["run"]
        for role, part in (parts["model"].get("guidance") or {}).items()
        if isinstance(part, dict) and part.get("run")
    }
    drop(parts, MEASURING if previews_decide(cfg) else SAMPLING)
    # A budget may have to pay for the models that guide.
    return Identity(job, digest({**parts, "guides": guides}))


def identity_of(folder: Path) -> Identity:
    """That of the run in ``folder``. Raises `UserError` where its config cannot be read."""
    path = folder / frozen.FILE
    return _read(folder.absolute(), path.stat().st_mtime_ns if path.exists() else 0)


@cache
def _read(folder: Path, changed: int) -> Identity:
    return identity(frozen.load(folder))


def measured(folder: Path, job: str) -> Path:
    """Where the config of another job stands that was measured on the run in ``folder``."""
    return folder / "measured" / f"{job[:16]}.yaml"


def kept(cfg: DictConfig) -> dict[str, Any]:
    """The parts of a config that decide what comes out of a job."""
    parts: Any = OmegaConf.to_container(cfg, resolve=True)
    data = parts.get("data") or {}
    # Where all data sets are looked for is a place; a folder of images is known by nothing but its own.
    if data.get("root") == (parts.get("paths") or {}).get("data") and data.get("_target_") != IMAGE_FOLDER:
        data.pop("root", None)
    drop(parts, NO_PART)
    # The names of what stands in the config; `debug` also decides what an autoencoder's budget is.
    parts["choices"] = (parts.get("choices") or {}).get("debug")
    latent = (parts.get("model") or {}).get("latent") or {}
    if latent.get("run"):
        latent.pop("autoencoder")  # it is what that run's folder says
    return parts


def previews_decide(cfg: DictConfig) -> bool:
    """Whether samples that are drawn while training choose a checkpoint, or end it: then they are part of it."""
    looks = OmegaConf.select(cfg, "callbacks.looks") or {}
    best = "best" in str(OmegaConf.select(cfg, "evaluation.checkpoints"))
    return bool(looks.get("count") and looks.get("preview") and (best or looks.get("patience") is not None))


def drop(parts: dict[str, Any], names: Iterable[str]) -> None:
    """Take the values at dotted ``names`` out of ``parts``."""
    for name in names:
        *way, last = name.split(".")
        part: Any = parts
        for key in way:
            part = part.get(key) or {}
        part.pop(last, None)


def digest(parts: dict[str, Any]) -> str:
    return hashlib.sha256(OmegaConf.to_yaml(OmegaConf.create(parts), sort_keys=True).encode()).hexdigest()


def counts(word: str) -> bool:
    """Whether a word of the command line says what is trained or measured, and not merely where, or how it is told."""
    name = word.lstrip("+~").partition("=")[0].partition("@")[0].replace("/", ".")
    return not any(name == part or name.startswith(f"{part}.") for part in NO_PART)
