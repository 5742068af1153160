"""The first record of a run, and a new one for a run whose record is corrupted or missing."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from gencompare.checkpoint_files import find_checkpoint
from gencompare.data.datamodule import ImageData
from gencompare.errors import CorruptedFileError, UserError, printable
from gencompare.generative_model import TrainedModel
from gencompare.models.latents import FrozenAutoencoder
from gencompare.records import RECORD_FILE, RunRecord, now
from gencompare.tasks.runs import autoencoder_stage, dependency_costs, run_config
from gencompare.tasks.runs.build import stored_budget
from gencompare.tasks.runs.console import describe_data
from gencompare.tasks.runs.interpolations import plain
from gencompare.training.clock import TrainingClock
from gencompare.training.energy_use import TrainingEnergy


def initial_record(
    cfg: DictConfig, model: TrainedModel, data: ImageData, folder: Path, dependencies: list[dict[str, Any]]
) -> RunRecord:
    """Create the record of a run that has not trained yet."""
    autoencoder = None
    if "autoencoder_run" in cfg:
        autoencoder = autoencoder_stage.autoencoder_summary(Path(cfg.autoencoder_run))
    cfg = run_config.without_locations(cfg)
    return RunRecord(
        name=folder.name,
        family=cfg.family,
        data=describe_data(data),
        seed=cfg.seed,
        created=now(),
        config=plain(cfg),
        overrides=list(cfg.get("command") or []),
        environment={"run_id": new_run_id(folder, cfg.get("sweep_name")), "sweep": cfg.get("sweep_name")},
        model={
            "class": type(model).__name__,
            "conditional": model.conditional,
            "parameters": sum(p.numel() for p in model.parameters()),
            "averaged_parameters": sum(p.numel() for p in model.averaged_parameters().values()),
            **({"autoencoder": autoencoder} if autoencoder else {}),
        },
        training={"dependencies": dependencies},
    )


def new_run_id(folder: Path, sweep: str | None) -> str:
    """Return a random id for a W&B run or, in a W&B sweep, the id that its agent has chosen.

    That id is for the run of the command alone, not for its autoencoder stage and not for several jobs.
    """
    chosen = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ and sweep is None else None
    own = OmegaConf.select(HydraConfig.get(), "runtime.output_dir") if chosen and HydraConfig.initialized() else None  # type: ignore[arg-type]
    return chosen if chosen and own and folder.absolute() == Path(own).absolute() else uuid.uuid4().hex[:12]


def list_checkpoints(folder: Path) -> dict[str, str]:
    """Return the paths of ``last`` and ``best``, relative to the run folder, as far as they exist."""
    paths = {name: f"checkpoints/{name}.ckpt" for name in ("last", "best")}
    return {name: path for name, path in paths.items() if (folder / path).exists()}


def recover_record(model: TrainedModel, data: ImageData, folder: Path) -> None:
    """Write a new record if that of a run is corrupted or missing, from its config, data and checkpoint.

    The corrupted record is kept as ``record.json.corrupted``. The earlier results are lost. The cost of training is in
    the checkpoint; that of an autoencoder or a teacher is not, so the total cost is unknown.

    Raises:
        UserError: there is no checkpoint that can be read.
    """
    path = folder / RECORD_FILE
    try:
        RunRecord.load(folder)
        return
    except CorruptedFileError:
        state = f"corrupted and kept as {RECORD_FILE}.corrupted"
    except UserError:
        if path.exists():
            raise
        state = "missing"
    found = find_checkpoint(folder / "checkpoints")
    if found is None:
        raise UserError(f"{path} is {state.split()[0]}, and there is no checkpoint: train again in another folder.")
    cfg = run_config.load(folder)
    dependencies = dependency_costs.dependencies(cfg)
    if isinstance(getattr(model, "space", None), FrozenAutoencoder):
        dependencies.append({"role": "autoencoder", "run": "unknown", "id": None, "family": "unknown"})
    if OmegaConf.select(cfg, "model.teacher.run"):
        dependencies.append({"role": "teacher", "run": "unknown teacher", "id": None, "family": "unknown"})
    record = initial_record(cfg, model, data, folder, dependencies)
    clock = found.content["callbacks"][TrainingClock.__name__]
    record.training |= {
        "steps": clock["step"], "images_seen": clock["images"], "seconds": clock["seconds"],
        "device_seconds": clock.get("device_seconds"), "flops": clock["flops"],
        "energy_joules": found.content["callbacks"].get(TrainingEnergy.__name__, {}).get("joules"),
        "images_per_second": clock["images"] / clock["seconds"] if clock["seconds"] else None,
        "flops_per_image": clock["flops"] / clock["images"] if clock["images"] else None,
        "flops_per_second": clock["flops"] / clock["seconds"] if clock["seconds"] else None,
    }  # fmt: skip
    dependency_costs.update_total_cost(record)
    record.checkpoints = list_checkpoints(folder)
    record.state = "finished" if stored_budget(cfg).progress(**clock) >= 1 or model.closed_form else "interrupted"
    if path.exists():
        path.replace(path.with_name(f"{RECORD_FILE}.corrupted"))
    record.save(folder)
    print(printable(f"{path} is {state}: a new record is written, without the earlier results."), flush=True)
