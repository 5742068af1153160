"""Sweeps: a job that was done is not done again, and when the last one has ended the comparison is drawn."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from gencompare.records import FILE, RunRecord
from gencompare.tasks import frozen

TRAIN = "gencompare.tasks.train.train"
NO_PART = (
    "out",
    "paths",
    "sweep_name",
    "command",
    "logger",
    "resume",
    "callbacks.progress",
    "evaluation.protocol.cache",
)
"""What a config holds of places and of the terminal: with another value it is the same job."""


def begun(cfg: DictConfig, sweep: Path) -> bool:
    """Whether a job of a sweep has anything left to do.

    A job is known by the hash of its config, wherever in the sweep's folder it lies. A finished one is left alone; of
    one that broke off, ``cfg`` goes on.
    """
    if cfg.task._target_ != TRAIN or cfg.resume is not None:
        return True
    own = job_hash(cfg)
    place = Path(cfg.out)
    for path in sorted(sweep.glob(f"*/{FILE}")):
        folder = path.parent
        if not (folder / frozen.FILE).is_file() or job_hash(frozen.load(folder)) != own:
            continue
        if folder.resolve() != place.resolve() and place.is_dir() and not any(place.iterdir()):
            place.rmdir()
        if RunRecord.load(folder).state == "finished":
            print(f"[{folder.name}] finished before: left as it is.", flush=True)
            return False
        print(f"[{folder.name}] broke off before: goes on.", flush=True)
        with open_dict(cfg):
            cfg.out = cfg.resume = str(folder.absolute())
        return True
    others = 1
    while (Path(cfg.out) / FILE).exists():
        # Another job of an earlier sitting has this number.
        others += 1
        cfg.out = f"{place}_{others}"
    return True


def job_hash(cfg: DictConfig) -> str:
    """A name for all that decides what a training job gives."""
    kept = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(kept, dict)
    for name in NO_PART:
        *way, last = name.split(".")
        part: Any = kept
        for key in way:
            part = part.get(key) or {}
        part.pop(last, None)
    latent = (kept.get("model") or {}).get("latent") or {}
    if latent.get("run"):
        latent.pop("autoencoder")  # it is what that run's folder says
    return hashlib.sha256(OmegaConf.to_yaml(OmegaConf.create(kept), sort_keys=True).encode()).hexdigest()


class CompareAtEnd(Callback):
    """Draws the comparison of a sweep's runs in the sweep's folder."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if config.task._target_ != TRAIN:
            return
        from gencompare.tasks.compare import draw

        sweep = Path(config.hydra.sweep.dir)
        folders = sorted(path.parent for path in sweep.glob(f"*/{FILE}"))
        if folders:
            draw(folders, sweep)
