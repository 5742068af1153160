"""Find run folders locally or in W&B, and load their models."""

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

from gencompare.checkpoint_files import EMA_KEY, LAST, read_checkpoint
from gencompare.command_line import shell_override
from gencompare.comparison.load_runs import find_run_folders
from gencompare.data.datamodule import ImageData
from gencompare.errors import CorruptedFileError, UserError
from gencompare.generative_model import GenerativeModel, TrainedModel
from gencompare.records import RECORD_FILE, RunRecord
from gencompare.tasks.runs import run_config
from gencompare.tasks.runs.build import build_data, build_model
from gencompare.tasks.runs.run_folder import checkpoint_names
from gencompare.training.posthoc_ema import posthoc_length, synthesize

WANDB_PREFIX = "wandb:"
WANDB_FILES = re.compile(rf"{re.escape(RECORD_FILE)}|curve\.csv|samples/[\w.-]+\.png")
"""Files of a W&B run that make up a run folder, uploaded by `tasks.runs.result_logging.log_results`."""


def locate_runs(pattern: str, cache: Path) -> list[Path]:
    """Return the run folders that match the option ``runs``.

    Args:
        pattern: a glob, which may also match W&B's offline folders, or ``wandb:ENTITY/PROJECT``.
        cache: folder for downloaded W&B files.
    """
    if pattern.startswith(WANDB_PREFIX):
        return fetch_wandb_runs(pattern.removeprefix(WANDB_PREFIX), cache / "wandb")
    return drop_nested(find_run_folders(pattern))


def drop_nested(folders: list[Path]) -> list[Path]:
    """Remove folders inside other ``folders``, since a run folder may contain W&B's copy of its record."""
    unique = set(folders)
    return [folder for folder in folders if not unique.intersection(folder.parents)]


def fetch_wandb_runs(project: str, cache: Path) -> list[Path]:
    """Download the records, curves and sample grids of a W&B project. Finished runs are downloaded only once.

    Raises:
        UserError: there is no API key or no network, or no run of the project has a record.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", project):
        raise UserError(f"runs={WANDB_PREFIX}{project}: use {WANDB_PREFIX}ENTITY/PROJECT.")
    import wandb
    from wandb.errors import Error as WandbError

    from gencompare.training.loggers import has_api_key

    if not has_api_key():
        raise UserError(f"runs={WANDB_PREFIX}{project} needs a W&B API key: run wandb login, or set WANDB_API_KEY.")
    folders = []
    try:
        for run in wandb.Api(timeout=30).runs(project):
            folder = cache / project.replace("/", "_") / re.sub(r"[^\w-]", "_", run.id)
            if not is_complete(folder):
                fetch_wandb_run(run, folder)
            if (folder / RECORD_FILE).is_file():
                folders.append(folder)
    except (WandbError, ValueError, OSError) as error:
        raise UserError(f"W&B project {project} could not be read: {' '.join(str(error).split())}") from error
    if not folders:
        raise UserError(f"No run of the W&B project {project} has a {RECORD_FILE}.")
    return sorted(folders)


def is_complete(folder: Path) -> bool:
    """Return whether ``folder`` contains the record of a finished run."""
    try:
        return RunRecord.load(folder).state == "finished"
    except UserError:
        return False


def fetch_wandb_run(run: Any, folder: Path) -> None:
    """Download the files of one W&B run, with the record last, so a folder with a record is complete."""
    files = [file for file in run.files() if WANDB_FILES.fullmatch(file.name)]
    for file in sorted(files, key=lambda file: file.name == RECORD_FILE):
        folder.mkdir(parents=True, exist_ok=True)
        file.download(root=str(folder), replace=True)


@dataclass(frozen=True)
class LoadedRun:
    """A trained model with its data and its config."""

    folder: Path
    model: TrainedModel
    data: ImageData
    config: DictConfig

    @property
    def record(self) -> RunRecord:
        return RunRecord.load(self.folder)


def load_run(
    folder: str | os.PathLike[str], *, checkpoint: str = "last", weights: str = "ema", trust: bool = False
) -> LoadedRun:
    """Load the model of a run folder, in eval mode. Only the folder and the data set are needed.

    Args:
        folder: the run folder.
        checkpoint: ``last`` or ``best``.
        weights: ``ema`` for the averaged weights, ``raw`` for the online weights, or ``posthoc:LENGTH`` for a post-hoc
            EMA (`gencompare.training.posthoc_ema`).
        trust: whether the folder may name code of other packages, which is then called. Packages in the environment
            variable ``GENCOMPARE_TRUSTED_PACKAGES`` need no trust.

    Raises:
        UserError: the folder is missing or corrupted, or names code that it may not name (see `gencompare.trust`).
    """
    folder = Path(folder)
    config = run_config.load_checked(folder, trust=trust)
    data = build_data(config)
    model = build_model(config, data)
    load_weights(model, folder, checkpoint=checkpoint, weights=weights)
    return LoadedRun(folder, model.eval(), data, config)


def guide(run: str | None, checkpoint: str = "last", weights: str = "ema") -> TrainedModel:
    """Load the frozen model of a run as a guiding model (``_target_: gencompare.tasks.runs.loading.guide``).

    The random state is restored, so the initial weights of the guided model do not depend on the guiding model.
    """
    if run is None:
        raise UserError(
            "Guidance needs the folder of another trained run: set model.guidance.classifier.run=DIR or"
            " model.guidance.weak.run=DIR."
        )
    if not Path(run).is_dir():
        raise UserError(
            f"The run that guides this model is not at {run}: set its new folder (model.guidance...run=DIR)."
        )
    with torch.random.fork_rng(devices=[]):
        model = load_run(run, checkpoint=checkpoint, weights=weights).model
    model.requires_grad_(False)
    model.origin = f"{Path(run).resolve().name} ({checkpoint}, {weights})"  # type: ignore[assignment]
    return model


def load_weights(model: TrainedModel, folder: Path, *, checkpoint: str, weights: str) -> dict[str, int]:
    """Load the weights of a checkpoint of ``folder`` into ``model``. Return its ``step`` and number of ``images`` seen.

    Raises:
        UserError: the checkpoint or a snapshot is missing, corrupted, or from a model of a different family or size, or
            the snapshots cannot express the length of a post-hoc EMA.
    """
    if checkpoint not in ("last", "best"):
        raise UserError(f"checkpoint={checkpoint}: choose last or best.")
    length = posthoc_length(weights)
    if weights not in ("ema", "raw") and length is None:
        raise UserError(f"weights={weights}: choose ema, raw or posthoc:LENGTH, such as posthoc:0.1.")
    path = folder / "checkpoints" / f"{checkpoint}.ckpt"
    try:
        loaded = read_checkpoint(path)
    except CorruptedFileError as error:
        raise UserError(f"{error} {corrupted_checkpoint_advice(folder, path)}") from error
    state: dict[str, Tensor] = dict(loaded["state_dict"])
    if weights == "ema":
        state.update(loaded.get(EMA_KEY, {}))
    elif length is not None:
        state.update(synthesize(folder, loaded, length))
    check_state_dict(model, state, path)
    model.load_state_dict(state)
    clock = loaded["callbacks"]["TrainingClock"]
    return {"step": clock["step"], "images": clock["images"]}


def corrupted_checkpoint_advice(folder: Path, path: Path) -> str:
    """Return what to do if the checkpoint ``path`` of a run is corrupted."""
    others = [name for name in checkpoint_names(folder) if name != path.name]
    if not others:
        return "It is the only checkpoint of this run: train the run again."
    if path.name != LAST and LAST in others:
        return "Use checkpoint=last, or evaluation.checkpoints=[last] at the end of training."
    return (
        f"To continue from an earlier checkpoint: python run.py {shell_override('resume', folder)}. It trains the"
        " missing steps again and evaluates."
    )


def check_state_dict(model: TrainedModel, state: Mapping[str, Tensor], path: Path) -> None:
    """Raise `UserError` unless ``state``, from the file ``path``, matches the model in names and shapes."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    if expected != found:
        name = min(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise UserError(
            f"{path} is not a checkpoint of the model in the config: '{name}' is {found.get(name, 'missing')} in the"
            f" file and {expected.get(name, 'missing')} in the model. Use the family and sizes of the trained run."
        )


def check_generative(model: TrainedModel, task: str) -> GenerativeModel:
    """Return ``model`` if it is generative, else raise `UserError`."""
    if not isinstance(model, GenerativeModel):
        raise UserError(f"task={task} needs a model that generates images; {type(model).__name__} does not.")
    return model
