"""Run folders: found on this machine or in W&B, and loaded into a model."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from gencompare.compare.load_runs import find_run_folders
from gencompare.data.datamodule import ImageData
from gencompare.errors import UserError
from gencompare.generative_model import GenerativeModel, TrainedModel
from gencompare.hyperparameters import EMA_KEY, read_checkpoint
from gencompare.records import RECORD_FILE, RunRecord
from gencompare.tasks.runs import run_config
from gencompare.tasks.runs.build import build_data, build_model

REMOTE = "wandb:"
WANTED = re.compile(rf"{re.escape(RECORD_FILE)}|curve\.csv|samples/[\w.-]+\.png")
"""Files of a W&B run that make a run folder: `training.loggers.finish` puts them there."""


def locate_runs(pattern: str, cache: Path) -> list[Path]:
    """The run folders that ``runs=`` names: a glob (of W&B's offline folders too), or ``wandb:ENTITY/PROJECT``.

    Args:
        cache: folder in which the files of a W&B project are kept.
    """
    if pattern.startswith(REMOTE):
        return fetch_wandb_runs(pattern.removeprefix(REMOTE), cache / "wandb")
    return drop_nested(find_run_folders(pattern))


def drop_nested(folders: list[Path]) -> list[Path]:
    """``folders`` without those inside another: a run folder holds W&B's copy of its record."""
    known = set(folders)
    return [folder for folder in folders if not known.intersection(folder.parents)]


def fetch_wandb_runs(project: str, cache: Path) -> list[Path]:
    """Bring the records, curves and sample grids of a W&B project here; what was finished is fetched once.

    Raises `UserError` without a key, without a network, and where no run of the project holds a record.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", project):
        raise UserError(f"runs={REMOTE}{project}: give {REMOTE}ENTITY/PROJECT.")
    import wandb
    from wandb.errors import Error as WandbError

    from gencompare.training.loggers import has_key

    if not has_key():
        raise UserError(f"runs={REMOTE}{project} needs an API key of W&B: wandb login, or set WANDB_API_KEY.")
    folders = []
    try:
        for run in wandb.Api(timeout=30).runs(project):
            folder = cache / project.replace("/", "_") / re.sub(r"[^\w-]", "_", run.id)
            if not is_complete(folder):
                fetch_wandb_run(run, folder)
            if (folder / RECORD_FILE).is_file():
                folders.append(folder)
    except (WandbError, ValueError, OSError) as error:
        raise UserError(f"W&B does not give {project}: {' '.join(str(error).split())}") from error
    if not folders:
        raise UserError(f"No run of the W&B project {project} holds a {RECORD_FILE}.")
    return sorted(folders)


def is_complete(folder: Path) -> bool:
    try:
        return RunRecord.load(folder).state == "finished"
    except UserError:
        return False


def fetch_wandb_run(run: Any, folder: Path) -> None:
    """The wanted files of one W&B run; the record last, so that a folder with one is whole."""
    files = [file for file in run.files() if WANTED.fullmatch(file.name)]
    for file in sorted(files, key=lambda file: file.name == RECORD_FILE):
        folder.mkdir(parents=True, exist_ok=True)
        file.download(root=str(folder), replace=True)


@dataclass(frozen=True)
class LoadedRun:
    """A trained model with the data and the config that it was trained with."""

    folder: Path
    model: TrainedModel
    data: ImageData
    config: DictConfig

    @property
    def record(self) -> RunRecord:
        return RunRecord.load(self.folder)


def load_run(folder: str | os.PathLike[str], *, checkpoint: str = "last", weights: str = "ema") -> LoadedRun:
    """The model of a run folder, with weights loaded and in eval mode; needs nothing but the folder and its data set.

    Args:
        checkpoint: ``last`` or ``best``.
        weights: ``ema`` or ``raw``.
    """
    folder = Path(folder)
    config = run_config.load(folder)
    data = build_data(config)
    model = build_model(config, data)
    load_weights(model, folder, checkpoint=checkpoint, weights=weights)
    return LoadedRun(folder, model.eval(), data, config)


def guide(run: str | None, checkpoint: str = "last", weights: str = "ema") -> TrainedModel:
    """The frozen model of a run, as a guide of another (``_target_: gencompare.tasks.runs.loading.guide``).

    Random numbers are left as they were: the guided model's first weights do not depend on its guide.
    """
    if run is None:
        raise UserError(
            "Guidance needs another trained run: name its folder (model.guidance.classifier.run=DIR or"
            " model.guidance.weak.run=DIR)."
        )
    if not Path(run).is_dir():
        raise UserError(
            f"The run that guides this model is not at {run}: say where it is now (model.guidance...run=DIR)."
        )
    with torch.random.fork_rng(devices=[]):
        model = load_run(run, checkpoint=checkpoint, weights=weights).model
    model.requires_grad_(False)
    model.origin = f"{Path(run).resolve().name} ({checkpoint}, {weights})"  # type: ignore[assignment]
    return model


def load_weights(model: TrainedModel, folder: Path, *, checkpoint: str, weights: str) -> dict[str, int]:
    """Put the weights of ``folder``'s checkpoint into ``model``; returns its ``step`` and the ``images`` seen.

    Raises `UserError` when the checkpoint is missing, damaged, or of a model of another family or size.
    """
    if checkpoint not in ("last", "best"):
        raise UserError(f"checkpoint={checkpoint}: choose last or best.")
    if weights not in ("ema", "raw"):
        raise UserError(f"weights={weights}: choose ema or raw.")
    path = folder / "checkpoints" / f"{checkpoint}.ckpt"
    stored = read_checkpoint(path)
    state: dict[str, Tensor] = dict(stored["state_dict"])
    if weights == "ema":
        state.update(stored.get(EMA_KEY, {}))
    check_fits(model, state, path)
    model.load_state_dict(state)
    clock = stored["callbacks"]["TrainingClock"]
    return {"step": clock["step"], "images": clock["images"]}


def check_fits(model: TrainedModel, state: Mapping[str, Tensor], path: Path) -> None:
    """Raises `UserError` where ``state``, of the file ``path``, is not of this model."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    if expected != found:
        odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise UserError(
            f"{path} is of another model than the config describes: '{odd[0]}' is {found.get(odd[0], 'missing')} there"
            f" and {expected.get(odd[0], 'missing')} here. Name the run's own family and sizes."
        )


def check_generative(model: TrainedModel, task: str) -> GenerativeModel:
    """``model``, if it can sample; `UserError` otherwise."""
    if not isinstance(model, GenerativeModel):
        raise UserError(f"task={task} needs a model that generates images; {type(model).__name__} does not.")
    return model
