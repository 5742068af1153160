"""From config to objects: data, model, callbacks, loggers, trainer."""

from __future__ import annotations

import inspect
import logging
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.loggers import Logger

from gencompare.command_line import conf_dir
from gencompare.data.conditions import ConditionedData
from gencompare.data.datamodule import ImageData
from gencompare.errors import UserError
from gencompare.evaluation.evaluate import EvaluationProtocol
from gencompare.generative_model import GenerativeModel, TrainedModel
from gencompare.rng import derive_seed
from gencompare.tasks.runs.run_config import check_trainer
from gencompare.training.budget import Budget
from gencompare.training.lightning_plugins import AtomicCheckpointIO, UnwrappedDDPStrategy


def build_data(cfg: DictConfig) -> ImageData:
    """The data set of ``cfg.data``, with the conditions of ``cfg.data.conditions`` where there are some."""
    alone = OmegaConf.masked_copy(cfg.data, [str(key) for key in cfg.data if key != "conditions"])
    data = instantiate(alone, _convert_="all")
    conditions = instantiate(cfg.data.get("conditions") or {}, _convert_="all")
    return ConditionedData(data, conditions) if conditions else data


def build_model(cfg: DictConfig, data: ImageData) -> TrainedModel:
    """The model of ``cfg.model`` for this data, with its first weights a function of the seed."""
    torch.manual_seed(derive_seed(cfg.seed, "weights"))
    # Completed by a call of its own: Hydra would turn the specification (a dataclass) into a config.
    return instantiate(cfg.model, _partial_=True, _convert_="all")(spec=data.spec)


def build_protocol(cfg: DictConfig) -> EvaluationProtocol:
    """The protocol of ``cfg.evaluation``, with the extractors that its names stand for."""
    if "extractors" not in cfg.evaluation:
        raise UserError("This run's evaluation settings are of an earlier version: add evaluation=default.")
    protocol = instantiate(cfg.evaluation.protocol, _convert_="all")
    names, available = cfg.evaluation.extractors, cfg.evaluation.available
    if names is None:
        return protocol
    unknown = [name for name in names if name not in available]
    if unknown:
        raise UserError(
            f"evaluation.extractors: there is no extractor {unknown[0]}; choose from {', '.join(map(str, available))}, "
            f"or define it with +evaluation.available.{unknown[0]}._target_=FUNCTION."
        )
    factories = tuple(instantiate(available[name], _convert_="all") for name in names)
    return replace(protocol, extractors=factories)


def build_callbacks(
    cfg: DictConfig, model: TrainedModel, data: ImageData, protocol: EvaluationProtocol | None, folder: Path
) -> dict[str, pl.Callback]:
    """The callbacks of ``cfg.callbacks`` by name, in the order in which they act on a step.

    Each has a ``_target_``, or is the name of a file of conf/callbacks. Constructor arguments that the config does not
    set are filled in from the run: ``seed``, ``global_batch_size``, ``budget``, ``data``, ``protocol``, ``folder``.

    Raises:
        UserError: for a class that is not found, is no callback or refuses its arguments.
    """
    run = {
        "seed": cfg.seed, "global_batch_size": cfg.trainer.global_batch_size, "budget": build_budget(cfg), "data": data,
        "protocol": protocol if isinstance(model, GenerativeModel) else None, "folder": folder,
    }  # fmt: skip
    found = {}
    for key, chosen in cfg.callbacks.items():
        if not chosen and chosen != "":
            continue
        name = str(key)
        options = OmegaConf.load(callback_option(name, chosen)) if isinstance(chosen, str) else chosen
        callback = instantiate_for_run(f"callbacks.{name}", options, run)
        if not isinstance(callback, pl.Callback):
            raise UserError(f"callbacks.{name}: {options._target_} is not a Lightning callback.")
        if isinstance(callback, EarlyStopping):
            raise UserError(
                f"callbacks.{name}: EarlyStopping acts after validation epochs; a run has a budget instead."
                " Use callbacks.evaluation.patience=N."
            )
        found[name] = callback
    if "clock" not in found:
        raise UserError("callbacks.clock=null: nothing would end training. Leave the clock as it is.")
    return dict(sorted(found.items(), key=lambda item: getattr(item[1], "order", BEFORE_CHECKPOINTS)))


BEFORE_CHECKPOINTS = 7
"""When callbacks without an ``order`` act: after the evaluation of a step, before the checkpoint that holds it."""


def instantiate_for_run(place: str, options: DictConfig, run: dict[str, Any]) -> Any:
    """The object that ``options`` describes, with those arguments in ``run`` that it takes and ``options`` leaves out."""
    if not str(options._target_).startswith("gencompare."):
        return instantiate_checked(place, options)
    factory = instantiate_checked(place, options, _partial_=True)
    known = inspect.signature(factory.func).parameters
    missing = {name: value for name, value in run.items() if name in known and name not in options}
    try:
        return factory(**missing)
    except TypeError as error:
        raise UserError(f"{place}={options._target_}: {' '.join(str(error).split())}.") from error


def instantiate_checked(place: str, options: DictConfig, **more: Any) -> Any:
    """The object that ``options`` describes. Raises `UserError` where its class is missing or refuses its arguments."""
    try:
        return instantiate(options, _convert_="all", **more)
    except InstantiationException as error:
        cause: BaseException = error
        while following := cause.__cause__ or cause.__context__:
            cause = following
        raise UserError(f"{place}={options._target_}: {' '.join(str(cause).split())}.") from error


def callback_option(name: str, option: str) -> Path:
    """The file of an option of conf/callbacks."""
    path = conf_dir() / "callbacks" / f"{option}.yaml"
    if not path.is_file():
        options = ", ".join(sorted(each.stem for each in path.parent.glob("*.yaml") if each.stem != "default"))
        raise UserError(f"callbacks.{name}={option}: there is no such option. Choose from {options}.")
    return path


def build_budget(cfg: DictConfig) -> Budget:
    return instantiate(cfg.budget)


def build_loggers(cfg: DictConfig, folder: Path, *, run_id: str, start_step: int) -> list[Logger]:
    """The loggers of ``cfg.logger``; W&B gets one run per job, grouped by sweep."""
    run = {
        "folder": str(folder), "name": folder.name, "id": run_id, "group": cfg.get("sweep_name"),
        "start_step": start_step, "tags": list(cfg.get("tags") or []),
    }  # fmt: skip
    return [build_logger(str(name), options, run) for name, options in (cfg.logger or {}).items()]


def build_logger(name: str, options: DictConfig, run: dict[str, Any]) -> Logger:
    """A logger of this project, with the arguments in ``run``, or any other Lightning logger, with the run folder as
    its ``save_dir``."""
    place = f"logger.{name}"
    if str(options._target_).startswith("gencompare."):
        return instantiate(options, _partial_=True, _convert_="all")(**run)
    factory = instantiate_checked(place, options, _partial_=True)
    takes_folder = "save_dir" in inspect.signature(factory).parameters and "save_dir" not in options
    logger = factory(**({"save_dir": run["folder"]} if takes_folder else {}))
    if not isinstance(logger, Logger):
        raise UserError(f"{place}: {options._target_} is not a Lightning logger.")
    return logger


def check_trainer_settings(cfg: DictConfig) -> None:
    """Refuse settings of the Trainer that are not there or are made here: `check_trainer`."""
    check_trainer(
        {str(key): value for key, value in cfg.trainer.items()}, [*inspect.signature(pl.Trainer).parameters, "_target_"]
    )


def chosen_device(cfg: DictConfig) -> torch.device:
    """Where a task that does not train works: a GPU where there is one and ``trainer`` does not say otherwise."""
    return torch.device("cuda" if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu" else "cpu")


def build_trainer(
    cfg: DictConfig, model: TrainedModel, callbacks: dict[str, pl.Callback], loggers: list[Logger], folder: Path
) -> pl.Trainer:
    """The Trainer of ``cfg.trainer``, with what this project does itself switched off."""
    _quiet()
    options: dict[str, Any] = OmegaConf.to_container(cfg.trainer, resolve=True)  # type: ignore[assignment]
    del options["global_batch_size"]
    trainer_class = get_class(options.pop("_target_", "pytorch_lightning.Trainer"))
    if str(options.get("precision")) in ("16-true", "bf16-true"):
        raise UserError(
            f"trainer.precision={options['precision']} would round noise schedules and averages to 16 bits: use"
            f" {str(options['precision']).replace('true', 'mixed')}."
        )
    several = options["strategy"] == "ddp" or (
        options["strategy"] == "auto" and (options["devices"] != 1 or options["num_nodes"] != 1)
    )
    if several and not model.automatic_optimization:
        options["strategy"] = UnwrappedDDPStrategy()
    if options["profiler"] is not None:
        options["profiler"] = build_profiler(options["profiler"], folder)
    own: dict[str, Any] = {
        "plugins": [AtomicCheckpointIO()],
        "default_root_dir": str(folder),
        # The budget ends training; EvaluationCallback validates; some families need gradients when they sample.
        "max_epochs": -1,
        "limit_val_batches": 0,
        "inference_mode": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    try:
        return trainer_class(callbacks=list(callbacks.values()), logger=loggers or False, **(own | options))
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error


def build_profiler(name: str, folder: Path) -> Any:
    """Lightning's profiler, with its table as ``profile.txt`` in the run folder."""
    from pytorch_lightning.profilers import PyTorchProfiler, SimpleProfiler

    known = {"simple": SimpleProfiler, "pytorch": PyTorchProfiler}
    if name not in known:
        raise UserError(f"trainer.profiler={name}: choose null, simple or pytorch.")
    return known[name](dirpath=str(folder), filename="profile")


def _quiet() -> None:
    """Leave out what Lightning says of things that this project decides itself."""
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (
        ".*does not have many workers.*",
        ".*your dataloader is.*",
        ".*`training_step` returned `None`.*",
        ".*LightningModule.configure_optimizers` returned `None`.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*You are using a CUDA device.*Tensor Cores.*",
        ".*in eval mode at the start of training.*",  # frozen parts are meant to be
    ):
        warnings.filterwarnings("ignore", text)
