"""Recognise jobs of a sweep that are finished, were interrupted, or share their training with another job."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from gencompare.errors import CorruptedFileError, UserError, printable
from gencompare.files import file_lock
from gencompare.records import RECORD_FILE, RunRecord, now
from gencompare.tasks.runs import run_config
from gencompare.tasks.runs.interpolations import escape, map_strings, plain
from gencompare.tasks.runs.run_folder import LOCK_FILE, has_checkpoint, is_active, touch_lock, wait_until_inactive

NON_IDENTIFYING_KEYS = (
    *run_config.JOB_KEYS, "out", "tags", "paper", "sweep_name", "command", "trained_run", "logger",
    "callbacks.progress_bar", "callbacks.checkpoints", "callbacks.divergence", "callbacks.energy", "data.cache",
    "data.download", "evaluation.protocol.compile",
)  # fmt: skip
"""Config keys that do not change the identity of a job: locations, output, safeguards and options of other tasks."""
SAMPLING_KEYS = ("evaluation", "model.sampler", "model.guidance")
"""Config keys that determine how a trained model is sampled and evaluated."""
FINAL_EVALUATION_KEYS = (
    "evaluation.num_images", "evaluation.checkpoints", "evaluation.samplers", "evaluation.guidance",
    "evaluation.protocol.num_images", "evaluation.protocol.num_likelihood_images", "evaluation.protocol.reference",
    "evaluation.protocol.metrics",
)  # fmt: skip
"""Keys within `SAMPLING_KEYS` that evaluations during training do not use."""
IMAGE_FOLDER = "gencompare.data.image_folder.ImageFolder"
TRAIN_TASK = "gencompare.tasks.train.train"
EVALUATE_TASK = "gencompare.tasks.evaluate_run.evaluate_run"


@dataclass(frozen=True)
class JobIdentity:
    """Hashes of the settings of a training job."""

    job: str
    """Hash of all settings that affect the results."""
    training: str
    """Hash of the settings that affect the trained weights."""


def job_identity(cfg: DictConfig) -> JobIdentity:
    """Return the identity of the job that a config defines."""
    settings = identifying_settings(cfg)
    job = _hash(settings)
    guides = {
        role: part["run"]
        for role, part in (settings["model"].get("guidance") or {}).items()
        if isinstance(part, dict) and part.get("run")
    }
    _remove_keys(settings, FINAL_EVALUATION_KEYS if evaluation_affects_training(cfg) else SAMPLING_KEYS)
    # Keep the guides, since their cost may count against the budget.
    return JobIdentity(job, _hash({**settings, "guides": guides}))


def identity_of_run(folder: Path) -> JobIdentity:
    """Return the identity of the run in ``folder``. Raise `UserError` if its config cannot be read."""
    path = folder / run_config.FILE
    return _cached_identity(folder.absolute(), path.stat().st_mtime_ns if path.exists() else 0)


@cache
def _cached_identity(folder: Path, mtime_ns: int) -> JobIdentity:
    return job_identity(run_config.load(folder))


def identifying_settings(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings of a config that affect the results of its job."""
    settings: Any = plain(cfg)
    data = settings.get("data") or {}
    # The folder of all data sets does not matter, but an image folder is identified only by its path.
    if data.get("root") == (settings.get("paths") or {}).get("data") and data.get("_target_") != IMAGE_FOLDER:
        data.pop("root", None)
    _remove_keys(settings, NON_IDENTIFYING_KEYS)
    # Choices only name settings in the config, except debug, which also determines the budget of an autoencoder.
    settings["choices"] = (settings.get("choices") or {}).get("debug")
    latent = (settings.get("model") or {}).get("latent")
    if isinstance(latent, dict) and latent.get("autoencoder_run"):
        latent.pop("autoencoder")  # the config of that run replaces it
    return settings


def evaluation_affects_training(cfg: DictConfig) -> bool:
    """Return whether samples drawn during training select a checkpoint or may end training."""
    options = OmegaConf.select(cfg, "callbacks.evaluation") or {}
    uses_best = "best" in str(OmegaConf.select(cfg, "evaluation.checkpoints"))
    return bool(
        options.get("num_evaluations")
        and options.get("num_samples")
        and (uses_best or options.get("patience") is not None)
    )


def _remove_keys(settings: dict[str, Any], keys: Iterable[str]) -> None:
    """Remove the values at dotted ``keys``."""
    for key in keys:
        *parents, last = key.split(".")
        node: Any = settings
        for name in parents:
            node = node.get(name) or {}
        node.pop(last, None)


def _hash(settings: dict[str, Any]) -> str:
    config = OmegaConf.create(map_strings(settings, escape))
    return hashlib.sha256(OmegaConf.to_yaml(config, sort_keys=True).encode()).hexdigest()


def is_identifying(override: str) -> bool:
    """Return whether an override affects the results of a job, rather than locations, logging or other tasks."""
    name = override.lstrip("+~").partition("=")[0].partition("@")[0].replace("/", ".")
    return not any(name == key or name.startswith(f"{key}.") for key in NON_IDENTIFYING_KEYS)


def evaluated_config_path(folder: Path, job: str) -> Path:
    """Return the config path of a job that reused the weights of the run in ``folder`` and was only evaluated."""
    return folder / "measured" / f"{job[:16]}.yaml"


def prepare_job(cfg: DictConfig, sweep: Path) -> bool:
    """Set the run folder and the run to resume in the ``cfg`` of a sweep job. Return whether anything is left to do.

    A job is recognised by the hash of its settings, in any run folder of the sweep. A finished or active job is
    skipped, an interrupted job is resumed, and a job without a checkpoint is restarted. If another job has finished the
    same training, only its weights are evaluated.
    """
    if cfg.task._target_ != TRAIN_TASK:
        return True
    default = Path(cfg.out)
    folder, has_work = (default, True) if cfg.resume is not None else _resolve_job(cfg, sweep)
    if folder.resolve() != default.resolve() and default.is_dir() and not any(default.iterdir()):
        default.rmdir()
    touch_lock(folder)
    return has_work


def _resolve_job(cfg: DictConfig, sweep: Path) -> tuple[Path, bool]:
    """Return the run folder of a job, and whether anything is left to do in it."""
    identity = job_identity(cfg)
    runs = _find_runs(sweep, lambda other: other.job == identity.job)
    for folder, record in sorted(runs, key=lambda run: (run[1].state != "finished", not has_checkpoint(run[0])))[:1]:
        if record.state == "finished":
            print(printable(f"[{folder.name}] already finished: skipped."), flush=True)
            return folder, False
        if is_active(folder):
            print(printable(f"[{folder.name}] another process is working on it: skipped."), flush=True)
            return folder, False
        with open_dict(cfg):
            cfg.out = str(folder.absolute())
        if has_checkpoint(folder):
            print(printable(f"[{folder.name}] was interrupted: resuming."), flush=True)
            with open_dict(cfg):
                cfg.resume = cfg.out
            return folder, True
        if record.checkpoints:
            lost = "its checkpoints are missing: training again in another folder"
            print(printable(f"[{folder.name}] {lost}."), flush=True)
        else:
            print(printable(f"[{folder.name}] has no checkpoint yet: restarting."), flush=True)
            (folder / RECORD_FILE).unlink()
    default, number = Path(cfg.out), 1
    while (Path(cfg.out) / RECORD_FILE).exists():
        # A job from an earlier command has this number.
        number += 1
        cfg.out = f"{default}_{number}"
    trained = _find_trained_run(sweep, identity)
    if trained is None:
        return Path(cfg.out), True
    if evaluated_config_path(trained, identity.job).exists():
        print(printable(f"[{default.name}] already evaluated in {trained.name}: skipped."), flush=True)
        return trained, False
    print(printable(f"[{default.name}] already trained in {trained.name}: evaluating those weights."), flush=True)
    with open_dict(cfg):
        cfg.trained_run = str(trained.absolute())
    return trained, True


def _find_trained_run(sweep: Path, identity: JobIdentity) -> Path | None:
    """Return a finished run with the same training, or None. If such a run is in progress, wait until it ends."""
    for folder, record in _find_runs(sweep, lambda other: other.training == identity.training):
        finished = record.state == "finished" or (
            wait_until_inactive(folder) and RunRecord.load(folder).state == "finished"
        )
        if finished and has_checkpoint(folder):
            return folder
    return None


def _find_runs(sweep: Path, matches: Callable[[JobIdentity], bool]) -> Iterator[tuple[Path, RunRecord]]:
    """Yield the runs in a sweep folder whose identity satisfies ``matches``.

    A run whose record is corrupted counts as interrupted if it has a checkpoint, from which its record can be rebuilt.
    Other runs that cannot be read are left out.
    """
    for path in sorted(sweep.glob(f"*/{RECORD_FILE}")):
        folder = path.parent
        try:
            if not matches(identity_of_run(folder)):
                continue
        except UserError:
            continue
        try:
            yield folder, RunRecord.load(folder)
        except CorruptedFileError:
            if has_checkpoint(folder):
                yield folder, RunRecord(name=folder.name, family="", data={}, state="interrupted")
        except UserError:
            continue


def record_failure(cfg: DictConfig, reason: str) -> None:
    """Record that a training job of a sweep failed, even if it has no record yet."""
    folder = Path(cfg.out)
    if cfg.task._target_ != TRAIN_TASK:
        return
    touch_lock(folder)
    with suppress(BlockingIOError), file_lock(folder / LOCK_FILE, wait=False):
        if (folder / RECORD_FILE).exists():
            RunRecord.update(folder, partial(_set_failed, reason=reason))
            return
        cfg = run_config.without_locations(cfg)
        run_config.save(cfg, folder / run_config.FILE)
        RunRecord(
            name=folder.name, family=cfg.family, data={"name": cfg.choices.data}, seed=cfg.seed, state="failed",
            created=now(), config=plain(cfg),
            overrides=list(cfg.command), environment={"run_id": uuid.uuid4().hex[:12], "sweep": cfg.sweep_name},
            training={"error": reason},
        ).save(folder)  # fmt: skip


def _set_failed(record: RunRecord, *, reason: str) -> None:
    record.state = "failed"
    record.training["error"] = reason


def unfinished_runs(folders: list[Path]) -> dict[str, str]:
    """Return the names of runs that did not finish, with the reasons, except corrupted runs that were repeated."""
    reasons = {}
    for folder in folders:
        try:
            record = RunRecord.load(folder)
        except UserError as error:
            if not _was_repeated(folder):
                reasons[folder.name] = str(error)
            continue
        error = str(record.training.get("error") or "")
        if record.state in ("failed", "interrupted"):
            reasons[folder.name] = ": ".join(part for part in (record.state, error) if part)
        elif record.state == "running" and not is_active(folder):
            reasons[folder.name] = "its process ended"
    return reasons


def _was_repeated(folder: Path) -> bool:
    """Return whether another run of the sweep finished the job of ``folder``, whose record cannot be read."""
    try:
        job = identity_of_run(folder).job
    except UserError:
        return False
    return any(record.state == "finished" for _, record in _find_runs(folder.parent, lambda other: other.job == job))
