"""The Python API: compose configs, build data and models, train, sample and compare, like the command line."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor

from gencompare.command_line import conf_dir
from gencompare.comparison.load_runs import ComparisonOptions, LoadedRuns, RunFolder, find_run_folders, load_runs
from gencompare.comparison.notebook import Comparison
from gencompare.comparison.ranking import ranking_tables
from gencompare.data.datamodule import ImageData
from gencompare.errors import UserError
from gencompare.evaluation.reference import SupportsSampling
from gencompare.evaluation.sampling import Samples, choose_conditions, draw_samples
from gencompare.generative_model import TrainedModel
from gencompare.records import Result, RunRecord
from gencompare.tasks import train as tasks_train
from gencompare.tasks.runs.build import build_data, build_model
from gencompare.tasks.runs.loading import LoadedRun, load_run
from gencompare.tasks.runs.processes import leave_process_group
from gencompare.tasks.runs.run_config import complete_config, opener
from gencompare.trust import opened_by


def compose(*overrides: str, folder: str | os.PathLike[str] | None = None) -> DictConfig:
    """Compose the resolved config of ``python run.py`` with ``overrides``.

    Args:
        overrides: Hydra overrides, such as ``"model=ddpm"`` and ``"model.optimizer.lr=1e-3"``.
        folder: the run folder; None uses a folder in ``paths.runs`` named by date and time.

    Raises:
        hydra.errors.HydraException: an override is invalid.
    """
    if not all(isinstance(each, str) for each in overrides):
        raise UserError('Pass overrides as separate arguments: compose("model=ddpm", "data=digits").')
    GlobalHydra.instance().clear()
    extra = os.environ.get("GENCOMPARE_CONF")
    arguments = [*overrides, *([f"hydra.searchpath=[file://{Path(extra).absolute()}]"] if extra else [])]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        whole = hydra_compose("config", overrides=[*arguments, "hydra.job.num=0"], return_hydra_config=True)
        HydraConfig.instance().set_config(copy.deepcopy(whole))
        OmegaConf.set_readonly(whole.hydra, False)
        with open_dict(whole):
            whole.hydra.runtime.output_dir = str(folder or whole.hydra.run.dir)
            whole.hydra.overrides.task = list(overrides)
            hydra = whole.pop("hydra")
        OmegaConf.set_struct(whole, True)
        return complete_config(whole, hydra)


def build(cfg: DictConfig) -> tuple[ImageData, TrainedModel]:
    """Build the datamodule and the untrained model from a config. The initial weights depend only on ``cfg.seed``."""
    with opened_by(opener(cfg)):
        data = build_data(cfg)
        return data, build_model(cfg, data)


def train(cfg: DictConfig) -> LoadedRun:
    """Train and evaluate the model of a config from `compose`, like ``python run.py``, and return the finished run."""
    try:
        with opened_by(opener(cfg)):
            tasks_train.train(cfg)
    finally:
        leave_process_group()
    return load_run(cfg.out, trust=True)  # the config is the user's own


def sample(
    model: SupportsSampling,
    num_images: int = 64,
    *,
    labels: Tensor | None = None,
    data: ImageData | None = None,
    seed: int = 0,
) -> Samples:
    """Draw images from a model. A notebook displays them as a grid.

    Args:
        model: a model of this package, or any object with ``sample(n, cond, *, generator)``.
        num_images: number of images.
        labels: (num_images,) the class of each image; None cycles through the classes for a conditional model.
        data: data set with a test split that provides the conditions, for a model with conditions other than the class.
        seed: seed of the samples.

    Raises:
        UserError: an argument is invalid, or the model needs ``data``.
    """
    names = set(getattr(model, "condition_names", ())) - {"label"}
    if names and data is None:
        raise UserError(f"This model needs the condition '{min(names)}': call sample(model, data=...).")
    source = choose_conditions(model, data, num_images, seed=seed, split="test") if data is not None else None
    return draw_samples(
        model, num_images, seed=seed, labels=labels, condition_source=source, spec=None if data is None else data.spec
    )


def compare(
    runs: str | os.PathLike[str] | LoadedRun | Iterable[str | os.PathLike[str] | LoadedRun] | Mapping[str, Result],
    *,
    group_by: str | Iterable[str] = (),
    rank_by: str | None = None,
) -> Comparison:
    """Compare runs, or results of `gencompare.evaluate`, as ``task=compare`` does.

    Args:
        runs: a glob of run folders, one or several folders or loaded runs, or a mapping of names to results. Results
            have no training cost.
        group_by: config keys, such as ``model.schedule``; runs with the same values share a row. By default, runs that
            differ only in their seeds share a row.
        rank_by: the metric to rank by; None uses the primary metric of each result.

    Raises:
        UserError: no run folder matches, or a key or metric is unknown.
    """
    options = ComparisonOptions((group_by,) if isinstance(group_by, str) else tuple(group_by), rank_by)
    if isinstance(runs, Mapping):
        loaded = LoadedRuns(options=options)
        for name, result in cast("Mapping[str, Result]", runs).items():
            record = RunRecord(name, family="", data={"name": result.measurement.data}, state="samples", curve="")
            record.add_result(result)
            record.results = [replace(each, images={}) for each in record.results]  # without a folder to find them in
            loaded.runs.append(RunFolder(Path(), record, name))
    else:
        folders = [runs] if isinstance(runs, os.PathLike | LoadedRun) else runs
        folders = find_run_folders(folders) if isinstance(folders, str) else folders
        loaded = load_runs([run.folder if isinstance(run, LoadedRun) else run for run in folders], options)
    ranking_tables(loaded)  # raises errors in the options
    return Comparison(loaded)
