"""The Python API: compose configs, build data and models, and train, like the command line."""

from __future__ import annotations

import copy
import os
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from gencompare.command_line import conf_dir
from gencompare.data.datamodule import ImageData
from gencompare.generative_model import TrainedModel
from gencompare.tasks import train as tasks_train
from gencompare.tasks.runs.build import build_data, build_model
from gencompare.tasks.runs.loading import LoadedRun, load_run
from gencompare.tasks.runs.processes import leave_process_group
from gencompare.tasks.runs.run_config import complete_config


def compose(*overrides: str, folder: str | os.PathLike[str] | None = None) -> DictConfig:
    """Compose the resolved config of ``python run.py`` with ``overrides``.

    Args:
        overrides: Hydra overrides, such as ``"model=ddpm"`` and ``"model.optimizer.lr=1e-3"``.
        folder: the run folder; None uses a folder in ``paths.runs`` named by date and time.

    Raises:
        hydra.errors.HydraException: an override is invalid.
    """
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
    """Build the datamodule and the untrained model of a config. The initial weights depend only on ``cfg.seed``."""
    data = build_data(cfg)
    return data, build_model(cfg, data)


def train(cfg: DictConfig) -> LoadedRun:
    """Train and evaluate the model of a config from `compose`, like ``python run.py``, and return the finished run."""
    try:
        tasks_train.train(cfg)
    finally:
        leave_process_group()
    return load_run(cfg.out)
