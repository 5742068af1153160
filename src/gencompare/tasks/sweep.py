"""Sweeps: a job that was done is not done again, and when the last one has ended the comparison is drawn."""

from __future__ import annotations

import hashlib
import sys
import uuid
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from gencompare.errors import UserError
from gencompare.locks import locked
from gencompare.records import FILE, RunRecord, now
from gencompare.tasks import frozen

TRAIN = "gencompare.tasks.train.train"
LOCK = ".lock"
"""Held by the process that works in a run folder."""
NO_PART = (
    "out",
    "paths",
    "sweep_name",
    "command",
    "logger",
    "resume",
    "trial",
    "by",
    "metric",
    "callbacks.progress",
    "evaluation.protocol.cache",
)
"""What a config holds of places and of the terminal: with another value it is the same job."""


def begun(cfg: DictConfig, sweep: Path) -> bool:
    """Whether a job of a sweep has anything left to do.

    A job is known by the hash of its config, wherever in the sweep's folder it lies. A finished one is left alone; of
    one that broke off, ``cfg`` goes on; one that failed before it had trained anything starts anew.
    """
    if cfg.task._target_ != TRAIN or cfg.resume is not None:
        return True
    place = Path(cfg.out)
    for folder, record in runs_of(sweep, job_hash(cfg)):
        if folder.resolve() != place.resolve() and place.is_dir() and not any(place.iterdir()):
            place.rmdir()
        if record.state == "finished":
            print(f"[{folder.name}] finished before: left as it is.", flush=True)
            return False
        if at_work(folder):
            print(f"[{folder.name}] another process is at work in it: left to that.", flush=True)
            return False
        with open_dict(cfg):
            cfg.out = str(folder.absolute())
        if (folder / "checkpoints" / "last.ckpt").exists():
            print(f"[{folder.name}] broke off before: goes on.", flush=True)
            with open_dict(cfg):
                cfg.resume = cfg.out
        else:
            print(f"[{folder.name}] did not get to train before: starts anew.", flush=True)
            (folder / FILE).unlink()
        return True
    others = 1
    while (Path(cfg.out) / FILE).exists():
        # Another job of an earlier sitting has this number.
        others += 1
        cfg.out = f"{place}_{others}"
    return True


def runs_of(sweep: Path, job: str) -> Iterator[tuple[Path, RunRecord]]:
    """The runs in the folder of a sweep whose config has the hash ``job``; damaged ones are left out."""
    for path in sorted(sweep.glob(f"*/{FILE}")):
        try:
            if job_hash(frozen.load(path.parent)) == job:
                yield path.parent, RunRecord.load(path.parent)
        except UserError:
            continue


def fail(cfg: DictConfig, why: str) -> None:
    """Record that a job of a sweep failed, also one that had not come to its own record."""
    folder = Path(cfg.out)
    if cfg.task._target_ != TRAIN:
        return
    with suppress(BlockingIOError), locked(folder / LOCK, wait=False):
        if (folder / FILE).exists():
            RunRecord.update(folder, partial(_failed, why=why))
            return
        cfg = frozen.without_place(cfg)
        frozen.save(cfg, folder / frozen.FILE)
        RunRecord(
            name=folder.name, family=cfg.family, data={"name": cfg.choices.data}, seed=cfg.seed, state="failed",
            created=now(), config=OmegaConf.to_container(cfg, resolve=True),  # type: ignore[arg-type]
            overrides=list(cfg.command), environment={"run_id": uuid.uuid4().hex[:12], "sweep": cfg.sweep_name},
            training={"error": why},
        ).save(folder)  # fmt: skip


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


def _failed(record: RunRecord, *, why: str) -> None:
    record.state = "failed"
    record.training["error"] = why


def unfinished(folders: list[Path]) -> dict[str, str]:
    """By folder name: why a run did not finish. One with a damaged record, done again beside, is not among them."""
    found = {}
    for folder in folders:
        try:
            record = RunRecord.load(folder)
        except UserError as error:
            if not done_again(folder):
                found[folder.name] = str(error)
            continue
        error = str(record.training.get("error") or "")
        if record.state in ("failed", "interrupted"):
            found[folder.name] = ": ".join(part for part in (record.state, error) if part)
        elif record.state == "running" and not at_work(folder):
            found[folder.name] = "broke off"
    return found


def done_again(folder: Path) -> bool:
    """Whether another run of the sweep finished the job of ``folder``, whose own record cannot be read."""
    try:
        job = job_hash(frozen.load(folder))
    except UserError:
        return False
    return any(record.state == "finished" for _, record in runs_of(folder.parent, job))


def at_work(folder: Path) -> bool:
    """Whether a living process on this machine holds the run folder."""
    if not (folder / LOCK).exists():
        return False
    try:
        with locked(folder / LOCK, wait=False):
            return False
    except BlockingIOError:
        return True
    except OSError:
        # Somebody else's folder.
        return False


class CompareAtEnd(Callback):
    """Says what of a sweep did not finish, and draws the comparison of its runs in its folder."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if config.task._target_ != TRAIN:
            return
        from gencompare.tasks import main
        from gencompare.tasks.compare import draw

        sweep = Path(config.hydra.sweep.dir)
        folders = sorted(path.parent for path in sweep.glob(f"*/{FILE}"))
        if not folders:
            return
        try:
            draw(folders, sweep)
        except UserError as error:
            print(f"There is no comparison: {error}", file=sys.stderr)
        left = unfinished(folders)
        if left:
            if not main.failures:
                main.failures.append(1)  # of jobs that ran elsewhere
            print(f"{len(left)} of {len(folders)} runs did not finish. The same command tries them again.")
            for name, why in left.items():
                print(f"  [{name}] {why}")
            sys.stdout.flush()
