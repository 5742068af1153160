"""A run folder back into a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from gencompare.checkpoint_files import AVERAGED, read_checkpoint
from gencompare.contract import GenerativeModel, TrainedModel
from gencompare.data.base import ImageData
from gencompare.errors import UserError
from gencompare.records import RunRecord
from gencompare.tasks import frozen
from gencompare.tasks.build import build_data, build_model


@dataclass(frozen=True)
class Run:
    """A trained model with the data and the config that it was trained with."""

    folder: Path
    model: TrainedModel
    data: ImageData
    config: DictConfig

    @property
    def record(self) -> RunRecord:
        return RunRecord.load(self.folder)


def load_run(folder: str | os.PathLike[str], *, checkpoint: str = "last", weights: str = "ema") -> Run:
    """The model of a run folder, with weights loaded and in eval mode; needs nothing but the folder and its data set.

    Args:
        checkpoint: ``last`` or ``best``.
        weights: ``ema`` or ``raw``.
    """
    folder = Path(folder)
    config = frozen.load(folder)
    data = build_data(config)
    model = build_model(config, data)
    load_weights(model, folder, checkpoint=checkpoint, weights=weights)
    return Run(folder, model.eval(), data, config)


def guide(run: str | None, checkpoint: str = "last", weights: str = "ema") -> TrainedModel:
    """The frozen model of a run, to guide another: what ``_target_: gencompare.tasks.load.guide`` in a YAML stands for.

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
        state.update(stored.get(AVERAGED, {}))
    check_fits(model, state, path)
    model.load_state_dict(state)
    clock = stored["callbacks"]["Clock"]
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


def generative(model: TrainedModel, task: str) -> GenerativeModel:
    """``model``, if it can sample; `UserError` otherwise."""
    if not isinstance(model, GenerativeModel):
        raise UserError(f"task={task} needs a model that generates images; {type(model).__name__} does not.")
    return model
