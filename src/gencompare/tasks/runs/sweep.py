"""Sweeps: a job that was done is not done again, and when the last one has ended the comparison is drawn."""

from __future__ import annotations

import hashlib
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from gencompare.errors import UserError
from gencompare.files import file_lock
from gencompare.records import RECORD_FILE, RunRecord, now
from gencompare.tasks.runs import run_config

NOT_IDENTIFYING = (
    *run_config.OF_THE_JOB, "out", "tags", "sweep_name", "command", "trained_in", "logger", "callbacks.progress_bar",
    "data.cache",
)  # fmt: skip
"""What a config holds of places, of the terminal and of other tasks: with another value it is the same job."""
SAMPLING = ("evaluation", "model.sampler", "model.guidance")
"""What decides how a trained model is sampled and measured."""
MEASURING = (
    "evaluation.n", "evaluation.checkpoints", "evaluation.samplers", "evaluation.guidance", "evaluation.protocol.n",
    "evaluation.protocol.num_likelihood_images", "evaluation.protocol.reference", "evaluation.protocol.metrics",
)  # fmt: skip
"""What of it has no part in the previews of `training.looks` either."""
IMAGE_FOLDER = "gencompare.data.image_folder.ImageFolder"


@dataclass(frozen=True)
class JobIdentity:
    """Hashes of a training job: of all that decides its figures, and of what decides its weights alone."""

    job: str
    training: str


def job_identity(cfg: DictConfig) -> JobIdentity:
    parts = kept(cfg)
    job = digest(parts)
    guides = {
        role: part["run"]
        for role, part in (parts["model"].get("guidance") or {}).items()
        if isinstance(part, dict) and part.get("run")
    }
    drop(parts, MEASURING if previews_decide(cfg) else SAMPLING)
    # A budget may have to pay for the models that guide.
    return JobIdentity(job, digest({**parts, "guides": guides}))


def job_identity_of(folder: Path) -> JobIdentity:
    """That of the run in ``folder``. Raises `UserError` where its config cannot be read."""
    path = folder / run_config.FILE
    return _read(folder.absolute(), path.stat().st_mtime_ns if path.exists() else 0)


@cache
def _read(folder: Path, changed: int) -> JobIdentity:
    return job_identity(run_config.load(folder))


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
    drop(parts, NOT_IDENTIFYING)
    # The names of what stands in the config; `debug` also decides what an autoencoder's budget is.
    parts["choices"] = (parts.get("choices") or {}).get("debug")
    latent = (parts.get("model") or {}).get("latent") or {}
    if latent.get("run"):
        latent.pop("autoencoder")  # it is what that run's folder says
    return parts


def previews_decide(cfg: DictConfig) -> bool:
    """Whether samples that are drawn while training choose a checkpoint, or end it: then they are part of it."""
    evaluation = OmegaConf.select(cfg, "callbacks.evaluation") or {}
    best = "best" in str(OmegaConf.select(cfg, "evaluation.checkpoints"))
    return bool(
        evaluation.get("num_evaluations")
        and evaluation.get("num_samples")
        and (best or evaluation.get("patience") is not None)
    )


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
    return not any(name == part or name.startswith(f"{part}.") for part in NOT_IDENTIFYING)


TRAIN = "gencompare.tasks.train.train"
LOCK = ".lock"
"""Held by the process that works in a run folder."""


def is_begun(cfg: DictConfig, sweep: Path) -> bool:
    """Whether a job of a sweep has anything left to do; what and where is then in ``cfg``.

    A job is known by the hash of its config, wherever in the sweep's folder it lies. A finished one is left alone; of
    one that broke off, ``cfg`` goes on; one that failed before it had trained anything starts anew. One that would
    train what another job has trained measures that one's run.
    """
    if cfg.task._target_ != TRAIN:
        return True
    place = Path(cfg.out)
    folder, left = (place, True) if cfg.resume is not None else is_settled(cfg, sweep)
    if folder.resolve() != place.resolve() and place.is_dir() and not any(place.iterdir()):
        place.rmdir()
    prepare_job(folder)
    return left


def is_settled(cfg: DictConfig, sweep: Path) -> tuple[Path, bool]:
    """The run folder of a job that is not resumed by hand, and whether there is anything left to do in it."""
    who = job_identity(cfg)
    runs = runs_of(sweep, lambda other: other.job == who.job)
    for folder, record in sorted(runs, key=lambda run: run[1].state != "finished")[:1]:
        if record.state == "finished":
            print(f"[{folder.name}] finished before: left as it is.", flush=True)
            return folder, False
        if at_work(folder):
            print(f"[{folder.name}] another process is at work in it: left to that.", flush=True)
            return folder, False
        with open_dict(cfg):
            cfg.out = str(folder.absolute())
        if (folder / "checkpoints" / "last.ckpt").exists():
            print(f"[{folder.name}] broke off before: goes on.", flush=True)
            with open_dict(cfg):
                cfg.resume = cfg.out
            return folder, True
        print(f"[{folder.name}] did not get to train before: starts anew.", flush=True)
        (folder / RECORD_FILE).unlink()
    place, others = Path(cfg.out), 1
    while (Path(cfg.out) / RECORD_FILE).exists():
        # Another job of an earlier sitting has this number.
        others += 1
        cfg.out = f"{place}_{others}"
    trained = trained_alike(sweep, who)
    if trained is None:
        return Path(cfg.out), True
    if measured(trained, who.job).exists():
        print(f"[{place.name}] measured before, in {trained.name}: left as it is.", flush=True)
        return trained, False
    print(f"[{place.name}] trained before, in {trained.name}: that run is measured.", flush=True)
    with open_dict(cfg):
        cfg.trained_in = str(trained.absolute())
    return trained, True


def trained_alike(sweep: Path, who: JobIdentity) -> Path | None:
    """The finished run of another job with the same training; one that is under way is waited for."""
    for folder, record in runs_of(sweep, lambda other: other.training == who.training):
        done = record.state == "finished" or (wait_for(folder) and RunRecord.load(folder).state == "finished")
        if done and (folder / "checkpoints" / "last.ckpt").exists():
            return folder
    return None


def prepare_job(folder: Path) -> None:
    """Note that a sweep has come to a run folder now: see `CompareAtEnd`."""
    (folder / LOCK).parent.mkdir(parents=True, exist_ok=True)
    (folder / LOCK).touch()
    moment = time.time_ns()
    os.utime(folder / LOCK, ns=(moment, moment))


def runs_of(sweep: Path, wanted: Callable[[JobIdentity], bool]) -> Iterator[tuple[Path, RunRecord]]:
    """The runs in the folder of a sweep that are ``wanted`` by their config; damaged ones are left out."""
    for path in sorted(sweep.glob(f"*/{RECORD_FILE}")):
        try:
            if wanted(job_identity_of(path.parent)):
                yield path.parent, RunRecord.load(path.parent)
        except UserError:
            continue


def fail(cfg: DictConfig, why: str) -> None:
    """Record that a job of a sweep failed, also one that had not come to its own record."""
    folder = Path(cfg.out)
    if cfg.task._target_ != TRAIN:
        return
    prepare_job(folder)
    with suppress(BlockingIOError), file_lock(folder / LOCK, wait=False):
        if (folder / RECORD_FILE).exists():
            RunRecord.update(folder, partial(_failed, why=why))
            return
        cfg = run_config.without_place(cfg)
        run_config.save(cfg, folder / run_config.FILE)
        RunRecord(
            name=folder.name, family=cfg.family, data={"name": cfg.choices.data}, seed=cfg.seed, state="failed",
            created=now(), config=OmegaConf.to_container(cfg, resolve=True),  # type: ignore[arg-type]
            overrides=list(cfg.command), environment={"run_id": uuid.uuid4().hex[:12], "sweep": cfg.sweep_name},
            training={"error": why},
        ).save(folder)  # fmt: skip


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
        job = job_identity_of(folder).job
    except UserError:
        return False
    return any(record.state == "finished" for _, record in runs_of(folder.parent, lambda other: other.job == job))


def at_work(folder: Path) -> bool:
    """Whether a living process on this machine holds the run folder."""
    if not (folder / LOCK).exists():
        return False
    try:
        with file_lock(folder / LOCK, wait=False):
            return False
    except BlockingIOError:
        return True
    except OSError:
        # Somebody else's folder.
        return False


def wait_for(folder: Path) -> bool:
    """Wait until no other process is at work in a run folder; whether there was one."""
    busy = at_work(folder)
    if busy:
        print(f"[{folder.name}] waiting for the process that is at work in it.", flush=True)
        with file_lock(folder / LOCK):
            pass
    return busy


class CompareAtEnd(Callback):
    """Says what of a sweep did not finish, and draws the comparison of the runs in its folder."""

    def __init__(self) -> None:
        self.since = 0
        """When this sitting began: run folders that were attended to since are those of its jobs."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.since = time.time_ns()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if config.task._target_ != TRAIN:
            return
        from gencompare.tasks import main
        from gencompare.tasks.compare_runs import draw, log_to_wandb

        sweep = Path(config.hydra.sweep.dir)
        folders = sorted(path.parent for path in sweep.glob(f"*/{RECORD_FILE}"))
        if not folders:
            return
        own = [folder for folder in folders if self.attended(folder)]
        for folder in own:
            wait_for(folder)
        try:
            log_to_wandb(draw(folders, sweep), config.logger, group=sweep.name)
        except UserError as error:
            print(f"There is no comparison: {error}", file=sys.stderr)
        left = unfinished(own)
        if left:
            if not main.failures:
                main.failures.append(1)  # of jobs that ran elsewhere
            print(f"{len(left)} of {len(own)} runs did not finish. The same command tries them again.")
            print_each(left)
        earlier = unfinished([folder for folder in folders if folder not in own])
        if earlier:
            print(f"Of other commands in this folder, {len(earlier)} did not finish:")
            print_each(earlier)

    def attended(self, folder: Path) -> bool:
        lock = folder / LOCK
        return lock.exists() and lock.stat().st_mtime_ns >= self.since


def print_each(why: dict[str, str]) -> None:
    for name, reason in why.items():
        print(f"  [{name}] {reason}")
    sys.stdout.flush()
