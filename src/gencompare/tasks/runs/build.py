"""Build the objects of a run from its config: data, model, protocol, callbacks, loggers, trainer."""

from __future__ import annotations

import inspect
import logging
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import EarlyStopping, GradientAccumulationScheduler, Timer
from pytorch_lightning.loggers import Logger

from gencompare.command_line import conf_dir
from gencompare.compilation import check_compiler
from gencompare.data.conditions import ConditionedData
from gencompare.data.datamodule import ImageData
from gencompare.errors import UserError
from gencompare.evaluation.evaluate import EvaluationProtocol
from gencompare.generative_model import GenerativeModel, TrainedModel
from gencompare.records import RECORD_FILE, RunRecord
from gencompare.rng import derive_seed
from gencompare.tasks.runs.config_keys import callback_without_class, check_trainer
from gencompare.tasks.runs.launched_ranks import check_devices
from gencompare.tasks.runs.trainer_options import (
    check_model,
    compiled_mode,
    complete_options,
    full_precision_name,
)
from gencompare.training.budget import Budget
from gencompare.training.device_settings import DeviceSettings
from gencompare.training.lightning_plugins import AtomicCheckpointIO, ShardedStrategy, UnwrappedDDPStrategy
from gencompare.training.loggers import MetricLogger, fail_safe


def build_data(cfg: DictConfig) -> ImageData:
    """Build the data set from ``cfg.data``, with the extra conditions in ``cfg.data.conditions``, if any."""
    options = OmegaConf.masked_copy(cfg.data, [str(key) for key in cfg.data if key != "conditions"])
    data = instantiate_checked("data", options)
    conditions = instantiate(cfg.data.get("conditions") or {}, _convert_="all")
    return ConditionedData(data, conditions) if conditions else data


def build_model(cfg: DictConfig, data: ImageData) -> TrainedModel:
    """Build the model from ``cfg.model`` for ``data``, in the precision of ``cfg.trainer``.

    Its initial weights depend only on the seed: in float64, they are the weights of float32.
    """
    torch.manual_seed(derive_seed(cfg.seed, "weights"))
    # Hydra would convert the data spec (a dataclass) into a config, so it is passed in a second call.
    factory = instantiate_checked("model", cfg.model, _partial_=True)
    try:
        model = factory(spec=data.spec)
        return model.double() if is_float64(cfg) else model
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None or unknown[1] not in cfg.model or not inspect.isclass(factory.func):
            raise
        known = {name for cls in factory.func.__mro__ for name in inspect.signature(cls.__init__).parameters}
        known -= {"self", "spec", "args", "kwargs"}
        if unknown[1] in known:  # another class does not accept it
            raise
        close = get_close_matches(unknown[1], known, 1)
        advice = f" Did you mean model.{close[0]}?" if close else ""
        raise UserError(f"{cfg.model._target_} has no argument '{unknown[1]}' (model.{unknown[1]}).{advice}") from error


def is_float64(cfg: DictConfig) -> bool:
    """Return whether the model computes in float64 (``trainer.precision=64-true``)."""
    return full_precision_name(cfg.trainer.get("precision")) == "64-true"


def build_protocol(cfg: DictConfig) -> EvaluationProtocol:
    """Build the evaluation protocol from ``cfg.evaluation``, with its extractors."""
    if "extractors" not in cfg.evaluation:
        raise UserError("The evaluation settings of this run are from an earlier version: add evaluation=default.")
    for name, options in (cfg.evaluation.protocol.get("metrics") or {}).items():
        try:
            instantiate_checked(f"metric {name}", options)
        except UserError as error:
            advice = " Add _partial_: true to its YAML file." if "positional argument" in str(error) else ""
            raise UserError(f"{error}{advice}") from error
    protocol = instantiate_checked("evaluation.protocol", cfg.evaluation.protocol)
    names, available = cfg.evaluation.extractors, cfg.evaluation.available
    if names is None:
        return protocol
    unknown = [name for name in names if name not in available]
    if unknown:
        raise UserError(
            f"evaluation.extractors: unknown extractor {unknown[0]}; choose from {', '.join(map(str, available))}, "
            f"or define it with +evaluation.available.{unknown[0]}._target_=FUNCTION."
        )
    factories = tuple(instantiate(available[name], _convert_="all") for name in names)
    return replace(protocol, extractors=factories)


def build_callbacks(
    cfg: DictConfig, model: TrainedModel, data: ImageData, protocol: EvaluationProtocol | None, folder: Path
) -> dict[str, pl.Callback]:
    """Build the callbacks from ``cfg.callbacks``, by name, sorted by their attribute ``order``.

    Each is configured by a mapping with ``_target_``, or by the name of a file in conf/callbacks. Constructor arguments
    that the config does not set come from the run: ``seed``, ``global_batch_size``, ``budget``, ``data``, ``protocol``,
    ``folder``, and ``dirpath`` (of the checkpoints).

    Raises:
        UserError: a class does not exist, is not a callback or rejects its arguments.
    """
    run = {
        "seed": cfg.seed, "global_batch_size": cfg.trainer.global_batch_size, "budget": build_budget(cfg), "data": data,
        "protocol": protocol if isinstance(model, GenerativeModel) else None, "folder": folder,
        "dirpath": folder / "checkpoints",
    }  # fmt: skip
    callbacks: dict[str, pl.Callback] = {}
    for key, value in cfg.callbacks.items():
        if not value and value != "":
            continue
        name = str(key)
        options = OmegaConf.load(callback_file(name, value)) if isinstance(value, str) else value
        assert isinstance(options, DictConfig)
        if "_target_" not in options:
            raise callback_without_class(name)
        callback = instantiate_for_run(f"callbacks.{name}", options, run)
        if not isinstance(callback, pl.Callback):
            raise UserError(f"callbacks.{name}: {options._target_} is not a Lightning callback.")
        for refused, reason in REFUSED_CALLBACKS.items():
            if isinstance(callback, refused):
                raise UserError(f"callbacks.{name}: {refused.__name__} {reason}.")
        callbacks[name] = callback
    if "clock" not in callbacks:
        raise UserError("callbacks.clock=null is not allowed: without the clock, training would never end.")
    return dict(sorted(callbacks.items(), key=lambda item: order_of(item[1])))


def order_of(callback: pl.Callback) -> int:
    """Return the attribute ``order`` of a callback: callbacks run in ascending order."""
    return getattr(callback, "order", DEFAULT_ORDER)


REFUSED_CALLBACKS: dict[type[pl.Callback], str] = {
    EarlyStopping: "needs validation epochs, which do not exist here. Use callbacks.evaluation.patience=N",
    GradientAccumulationScheduler: "would go unseen by the budget and the record. Use trainer.global_batch_size=N"
    " and trainer.num_micro_batches=M",
    Timer: "ends training before the budget is spent. Use budget=device_minutes budget.device_minutes=N",
}
"""Lightning callbacks that act like arguments in `config_keys.TRAINER_EQUIVALENTS`, and what is wrong with them."""
DEFAULT_ORDER = 7
"""The ``order`` of callbacks without this attribute: after the evaluation of a step, and before its checkpoint."""


def instantiate_for_run(place: str, options: DictConfig, run: dict[str, Any]) -> Any:
    """Instantiate ``options``, with arguments from ``run`` that its class accepts and ``options`` does not set.

    Args:
        place: config key for error messages.
        options: a mapping with ``_target_``.
        run: arguments by name. Only classes of this package receive them.
    """
    if not str(options._target_).startswith("gencompare."):
        return instantiate_checked(place, options)
    factory = instantiate_checked(place, options, _partial_=True)
    try:
        parameters = inspect.signature(factory.func).parameters
    except ValueError:  # a class without a Python signature
        parameters = {}
    arguments = {name: value for name, value in run.items() if name in parameters and name not in options}
    try:
        return factory(**arguments)
    except TypeError as error:
        raise UserError(f"{place}={options._target_}: {' '.join(str(error).split())}.") from error


def instantiate_checked(place: str, options: DictConfig, **keywords: Any) -> Any:
    """Instantiate ``options``.

    Raises:
        UserError: its class does not exist or rejects its arguments, or a setting is not a number (NaN).
    """
    for key in _nan_keys(OmegaConf.to_container(options, resolve=True)):
        raise UserError(f"{place}.{key}=nan is not a number: set it to a number.")
    try:
        return instantiate(options, _convert_="all", **keywords)
    except InstantiationException as error:
        cause: BaseException = error
        while (deeper := cause.__cause__ or cause.__context__) is not None:
            cause = deeper
        if isinstance(cause, UserError):
            raise UserError(str(cause)) from error
        missing = re.search(r"Error locating target '(.+?)'.*full_key: (\S+)", str(error), flags=re.DOTALL)
        setting = f"{missing[2]}._target_={missing[1]}" if missing else f"{place}={options._target_}"
        if isinstance(cause, ModuleNotFoundError):
            raise UserError(f"{setting}: {cause.msg}. If it is your own, set PYTHONPATH to its folder.") from error
        raise UserError(f"{setting}: {' '.join(str(cause).split())}.") from error


def _nan_keys(node: Any, path: str = "") -> Iterator[str]:
    """Yield the keys whose value is NaN, which passes comparisons such as ``value < 0``."""
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _nan_keys(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, float) and math.isnan(node):
        yield path


def callback_file(name: str, option: str) -> Path:
    """Return the config file of an option of the group ``callbacks``."""
    path = conf_dir() / "callbacks" / f"{option}.yaml"
    if not path.is_file():
        options = ", ".join(sorted(each.stem for each in path.parent.glob("*.yaml") if each.stem != "default"))
        raise UserError(f"callbacks.{name}={option}: unknown option. Choose from {options}.")
    return path


def build_budget(cfg: DictConfig) -> Budget:
    """Build the budget from ``cfg.budget``."""
    return instantiate_checked("budget", cfg.budget)


def stored_budget(cfg: DictConfig) -> Budget:
    """Return the budget in an unchecked config of a run folder, without building what it names."""
    return Budget(**{name: cfg.budget.get(name) for name in Budget.__dataclass_fields__})


APPENDING_LOGGERS = ("gencompare.training.loggers.wandb_logger", "gencompare.training.loggers.tensorboard_logger")
"""Loggers that can add to a finished run."""


def build_loggers(
    cfg: DictConfig, folder: Path, *, run_id: str, start_step: int, finished: bool = False
) -> list[Logger]:
    """Build the loggers from ``cfg.logger``. In W&B, each job is a run, and runs are grouped by sweep.

    Args:
        cfg: the config.
        folder: the run folder.
        run_id: the id of the run in W&B.
        start_step: the step that training resumes from.
        finished: build only loggers that can add to a finished run.
    """
    if not re.fullmatch(r"\w[\w.-]*", str(run_id)):  # W&B makes it part of a path
        raise UserError(f"{folder / RECORD_FILE} is corrupted: its run_id is {run_id}.")
    group = RunRecord.load(folder).environment.get("sweep") if finished else cfg.get("sweep_name")
    run = {
        "folder": str(folder), "name": folder.name, "id": run_id, "group": group,
        "start_step": start_step, "tags": list(cfg.get("tags") or []),
    }  # fmt: skip
    return [
        fail_safe(build_logger(str(name), options, run))
        for name, options in (cfg.logger or {}).items()
        if not finished or options._target_ in APPENDING_LOGGERS
    ]


def build_logger(name: str, options: DictConfig, run: dict[str, Any]) -> Logger:
    """Build a logger from ``options``.

    Loggers of this package get the arguments in ``run`` that ``options`` does not set. Other Lightning loggers get the
    run folder as ``save_dir``, if they have this argument and ``options`` does not set it.
    """
    place = f"logger.{name}"
    if str(options._target_).startswith("gencompare."):
        factory = instantiate_checked(place, options, _partial_=True)
        return factory(**{key: value for key, value in run.items() if key not in options})
    factory = instantiate_checked(place, options, _partial_=True)
    needs_folder = "save_dir" in inspect.signature(factory).parameters and "save_dir" not in options
    logger = factory(**({"save_dir": run["folder"]} if needs_folder else {}))
    if not isinstance(logger, Logger):
        raise UserError(f"{place}: {options._target_} is not a Lightning logger.")
    return logger


def check_trainer_settings(cfg: DictConfig) -> None:
    """Raise `UserError` for settings in ``cfg.trainer`` that no model takes."""
    options: Any = OmegaConf.to_container(cfg.trainer, resolve=True)
    check_trainer(options, [*inspect.signature(pl.Trainer).parameters, "_target_"])
    complete_options(options)


def check_trainer_for_model(cfg: DictConfig, model: TrainedModel) -> None:
    """Raise `UserError` for settings in ``cfg.trainer`` that the model, or this machine, does not take."""
    options = _trainer_options(cfg, model)
    if options["compile"] not in (None, "auto"):
        check_compiler(f"trainer.compile={options['compile']}", "trainer.compile=null")


def _trainer_options(cfg: DictConfig, model: TrainedModel) -> dict[str, Any]:
    """Return the complete settings of ``cfg.trainer``, checked for the model, which gets those that it needs."""
    options = complete_options(OmegaConf.to_container(cfg.trainer, resolve=True))  # type: ignore[arg-type]
    model.num_micro_batches, model.fused_optimizer = options["num_micro_batches"], options["fused_optimizer"]
    check_model(options, model)
    return options


def choose_device(cfg: DictConfig) -> torch.device:
    """Choose the device of a task that does not train: a GPU if available, unless ``trainer.accelerator`` is cpu."""
    return torch.device("cuda" if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu" else "cpu")


def build_trainer(
    cfg: DictConfig, model: TrainedModel, callbacks: dict[str, pl.Callback], loggers: list[Logger], folder: Path
) -> pl.Trainer:
    """Build the Trainer from ``cfg.trainer``, without the features that this package implements itself."""
    _silence_lightning()
    options = _trainer_options(cfg, model)
    for name in ("global_batch_size", "num_micro_batches", "fused_optimizer"):
        del options[name]
    settings = DeviceSettings(
        compile_mode=compiled_mode(options, model),
        **{name: options.pop(name) for name in ("matmul_precision", "memory_format")},
    )
    del options["compile"]
    trainer_class = get_class(options.pop("_target_", "pytorch_lightning.Trainer"))
    check_devices(options["devices"], options["num_nodes"])
    multiprocess = options["strategy"] == "ddp" or (
        options["strategy"] == "auto" and (options["devices"] != 1 or options["num_nodes"] != 1)
    )
    if options["strategy"] == "fsdp":
        options["strategy"] = ShardedStrategy(options["devices"] * options["num_nodes"])
    if multiprocess and not model.automatic_optimization:
        options["strategy"] = UnwrappedDDPStrategy()
    if options["profiler"] is not None:
        options["profiler"] = build_profiler(options["profiler"], folder)
    fixed: dict[str, Any] = {
        "plugins": [AtomicCheckpointIO()],
        "default_root_dir": str(folder),
        # The budget ends training, EvaluationCallback validates, and some families need gradients to sample.
        "max_epochs": -1,
        "limit_val_batches": 0,
        "inference_mode": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    logger = next((callback for callback in callbacks.values() if isinstance(callback, MetricLogger)), None)
    if logger is not None:
        fixed["log_every_n_steps"] = logger.log_every_n_steps  # for Lightning callbacks such as LearningRateMonitor
    try:
        return trainer_class(
            callbacks=sorted([*callbacks.values(), settings], key=order_of),
            logger=loggers or False,
            **(fixed | options),
        )
    except (MisconfigurationException, ValueError, TypeError) as error:
        advice = " Use trainer=cpu or trainer=auto." if "backend found" in str(error) else ""
        raise UserError(f"trainer: {' '.join(str(error).split())}{advice}") from error


def build_profiler(name: str, folder: Path) -> Any:
    """Build a Lightning profiler that writes ``profile.txt`` to the run folder."""
    from pytorch_lightning.profilers import PyTorchProfiler, SimpleProfiler

    profilers = {"simple": SimpleProfiler, "pytorch": PyTorchProfiler}
    if name not in profilers:
        raise UserError(f"trainer.profiler={name}: choose null, simple or pytorch.")
    return profilers[name](dirpath=str(folder), filename="profile")


def _silence_lightning() -> None:
    """Hide Lightning warnings about settings that this package chooses on purpose."""
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (
        ".*does not have many workers.*",
        ".*your dataloader is.*",
        ".*`training_step` returned `None`.*",
        ".*LightningModule.configure_optimizers` returned `None`.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*You are using a CUDA device.*Tensor Cores.*",
        ".*in eval mode at the start of training.*",  # frozen modules
    ):
        warnings.filterwarnings("ignore", text)
