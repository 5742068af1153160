"""The autoencoder stage of latent diffusion: find or train the autoencoder, then load it into the latent model."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor

from gencompare.checkpoint_files import LAST, find_checkpoint, read_checkpoint
from gencompare.command_line import shell_override
from gencompare.data.conditions import ConditionedData
from gencompare.data.datamodule import ImageData
from gencompare.errors import UserError, printable
from gencompare.files import file_lock, sha256
from gencompare.generative_model import TrainedModel
from gencompare.models.latents import FrozenAutoencoder
from gencompare.records import RECORD_FILE, RunRecord
from gencompare.resources import FlopCounter
from gencompare.tasks.runs import run_config
from gencompare.tasks.runs.build import build_model, choose_device
from gencompare.tasks.runs.interpolations import plain
from gencompare.tasks.runs.loading import load_weights
from gencompare.tasks.runs.processes import leave_process_group
from gencompare.tasks.runs.run_folder import has_checkpoint
from gencompare.training.energy_use import EnergyMeter

AUTOENCODER_GROUP = "model@model.latent.autoencoder"
"""Config group that selects the autoencoder of a latent model."""
IDENTIFYING_KEYS = (
    "model", "budget", "seed", "data", "trainer.global_batch_size", "trainer.precision", "callbacks.ema",
)  # fmt: skip
"""Config keys that affect the weights of the autoencoder."""
IGNORED_DATA_KEYS = ("root", "cache", "eval_batch_size")
"""Keys below ``data`` that do not affect the weights of the autoencoder."""


def use_autoencoder_settings(cfg: DictConfig) -> DictConfig:
    """Return ``cfg`` with the autoencoder settings of the run in ``model.latent.autoencoder_run``, if set."""
    run = OmegaConf.select(cfg, "model.latent.autoencoder_run")
    if run is None or cfg.resume is not None or cfg.run_dir is not None:
        return cfg
    stored = run_config.load_checked(Path(run))
    if "bottleneck" not in stored.model:
        raise UserError(
            f"{run} is a run of model={stored.family}, not an autoencoder: model.latent.autoencoder_run needs a run of"
            " model=autoencoder or model=vqvae."
        )
    if not is_finished(Path(run)):
        raise UserError(
            f"The training of the autoencoder in {run} did not finish: continue it first with"
            f" {shell_override('resume', str(run))}."
        )
    cfg = cfg.copy()
    with open_dict(cfg):
        cfg.model.latent.autoencoder = OmegaConf.merge(stored.model, {"_partial_": True})
    return cfg


def train_autoencoder(cfg: DictConfig, data: ImageData, train: Callable[[DictConfig], None]) -> DictConfig:
    """Find or train the autoencoder of a latent model, and return ``cfg`` with its run folder as ``autoencoder_run``.

    The run is the one in ``model.latent.autoencoder_run``, else an earlier run with the same settings and data, else a
    new run that is trained first. If several jobs need the same autoencoder at the same time, one trains it and the
    others wait. If the model is not a latent model, ``cfg`` is returned unchanged.

    Args:
        train: function that trains the run defined by a config.
    """
    latent = cfg.model.get("latent")
    # A family of the user may have an argument of the same name.
    if not isinstance(latent, DictConfig) or "autoencoder_run" not in latent or cfg.get("autoencoder_run"):
        return cfg
    if latent.autoencoder_run is not None:
        folder = Path(latent.autoencoder_run)
    else:
        folder = autoencoder_folder(autoencoder_config(cfg), data)
        with file_lock(folder.with_name(f".{folder.name}.lock")):
            if not is_trained(folder):
                stage = autoencoder_config(cfg)
                stage.out = str(folder.absolute())
                stage.resume = stage.out if (folder / RECORD_FILE).exists() or has_checkpoint(folder) else None
                print(printable(f"Stage 1 of 2: training the autoencoder in {folder}."), flush=True)
                try:
                    train(stage)
                except (SystemExit, KeyboardInterrupt):
                    print("Stopped while training the autoencoder. Repeat the command to resume.", flush=True)
                    raise
                except UserError as error:
                    if not is_unreadable(folder):
                        raise
                    raise UserError(
                        f"{error} To train this autoencoder from the start, delete {folder} and repeat the command."
                    ) from error
                leave_process_group()
                print("Stage 2 of 2: training the latent model.", flush=True)
            else:
                print(printable(f"The autoencoder is already trained: {folder}"), flush=True)
    cfg = cfg.copy()
    with open_dict(cfg):
        cfg.autoencoder_run = str(folder.absolute())
    return cfg


def autoencoder_config(cfg: DictConfig) -> DictConfig:
    """Derive the config of the autoencoder run from that of the latent model, with the autoencoder as model and its own
    budget."""
    latent = cfg.model.latent
    stage = cfg.copy()
    OmegaConf.set_struct(stage, False)
    stage.model = OmegaConf.masked_copy(latent.autoencoder, [str(k) for k in latent.autoencoder if k != "_partial_"])
    stage.data.pop("conditions", None)
    if cfg.choices.get("debug") is None:
        stage.budget = OmegaConf.merge(cfg.budget, latent.budget)
    # These settings are for the denoiser.
    stage.trainer.compile, stage.trainer.num_micro_batches = None, 1
    stage.callbacks.evaluation.patience = None  # autoencoders draw no samples to compare with validation images
    stage.choices = autoencoder_choices(cfg)
    stage.family = stage.choices["model"]
    stage.sweep_name = None
    stage.command = [f"model={stage.family}", f"data={cfg.choices.data}"]
    return stage


def autoencoder_choices(cfg: DictConfig) -> dict[str, Any]:
    """Return the config group choices that a separate run of the autoencoder would have."""
    key = AUTOENCODER_GROUP.partition("@")[2]
    own, others = {}, {}
    for group, choice in cfg.choices.items():
        name, _, package = str(group).partition("@")
        if package == key or package.startswith(f"{key}."):
            default_package = name.replace("/", ".") == "model" + package.removeprefix(key)
            own[name if default_package else f"{name}@model{package.removeprefix(key)}"] = choice
        elif not name.startswith("model") and name not in ("experiment", "sweep", "debug"):
            others[str(group)] = choice
    return {"model": "autoencoder", **others, **own}


def autoencoder_folder(stage: DictConfig, data: ImageData) -> Path:
    """Return the run folder of the autoencoder, named by a hash of its settings and training images."""
    masked = OmegaConf.masked_copy(stage, list({key.split(".")[0] for key in IDENTIFYING_KEYS}))
    settings: dict[str, Any] = {key: OmegaConf.select(masked, key) for key in IDENTIFYING_KEYS}
    settings["data"] = {str(key): value for key, value in stage.data.items() if key not in IGNORED_DATA_KEYS}
    settings = OmegaConf.to_container(OmegaConf.create(settings), resolve=True)  # type: ignore[assignment]
    perceptual = settings["model"].get("perceptual") or {}
    if perceptual.get("weights") and Path(perceptual["weights"]).is_file():
        # The content of the file matters, not its path.
        perceptual["weights"] = sha256(perceptual["weights"])
    text = json.dumps([settings, data.hash("train")], sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:10]
    return Path(stage.paths.runs) / f"{data.spec.name}_{stage.family}_{key}"


def is_finished(folder: Path) -> bool:
    """Return whether ``folder`` contains a finished run."""
    return (folder / RECORD_FILE).exists() and RunRecord.load(folder).state == "finished"


def is_unreadable(folder: Path) -> bool:
    """Return whether all checkpoints in ``folder`` are corrupted."""
    try:
        find_checkpoint(folder / "checkpoints")
        return False
    except UserError:
        return True


def is_trained(folder: Path) -> bool:
    """Return whether ``folder`` contains a finished run whose record and last checkpoint are intact."""
    try:
        finished = is_finished(folder)
        if finished:
            read_checkpoint(folder / "checkpoints" / LAST)
        return finished
    except UserError as error:
        print(error, flush=True)
        return False


def load_autoencoder(cfg: DictConfig, model: TrainedModel, data: ImageData, processes: int) -> DictConfig:
    """Load the trained autoencoder into a latent model, with a pass over the training images (such as the whitening).

    Return ``cfg`` with an added entry ``whitening``, the cost of this pass in the format of
    `dependency_costs.cost_entry`. Every process encodes all images, so the cost of one process is multiplied by
    ``processes``.
    """
    space = getattr(model, "space", None)
    if not isinstance(space, FrozenAutoencoder):
        return cfg
    folder = Path(cfg.autoencoder_run)
    record = RunRecord.load(folder)
    images = data.data if isinstance(data, ConditionedData) else data
    check_same_images(folder, record, images)
    # Build it on the data of this run, since the images may have been moved after the autoencoder was trained.
    autoencoder: Any = build_model(stored_autoencoder(cfg, folder), images)
    load_weights(autoencoder, folder, checkpoint="last", weights="ema")
    space.to(choose_device(cfg))
    with FlopCounter() as counter:
        start, meter = time.monotonic(), EnergyMeter([0] if choose_device(cfg).type == "cuda" else ())
        space.load_autoencoder(autoencoder.eval().coder, training_images(data))
        seconds, joules = time.monotonic() - start, meter.read()
    space.to("cpu")  # where the Trainer expects the model
    space.perceptual_networks = record.training.get("perceptual_networks", [])
    if cfg.get("whitening"):
        return cfg
    cfg = cfg.copy()
    with open_dict(cfg):
        cfg.whitening = {
            "role": space.pass_over_images, "run": record.name, "id": uuid.uuid4().hex[:12], "family": record.family,
            "images_seen": 0, "steps": 0, "flops": float(counter.get_total_flops() * processes),
            "device_seconds": seconds * processes,
            "energy_joules": joules if processes == 1 else None,
        }  # fmt: skip
    return cfg


def stored_autoencoder(cfg: DictConfig, folder: Path) -> DictConfig:
    """Load the config of the autoencoder's run. It is checked, unless its model is the one in ``cfg``."""
    stored, latent = run_config.load(folder), cfg.model.latent
    own = OmegaConf.masked_copy(latent.autoencoder, [str(key) for key in latent.autoencoder if key != "_partial_"])
    if plain(OmegaConf.create({"model": own})) != plain(OmegaConf.create({"model": stored.get("model")})):
        return run_config.load_checked(folder)
    stored.model = own
    return stored


def check_same_images(folder: Path, record: RunRecord, data: ImageData) -> None:
    """Raise `UserError` unless a run was trained on the images of ``data``, regardless of file name or location."""
    own, stored = data.spec, record.data
    if (stored["hash"], tuple(stored["shape"])) == (data.hash("train"), own.shape):
        return
    trained_on = f"'{stored['name']}' data of shape {format_shape(stored['shape'])}"
    given = f"'{own.name}' data of shape {format_shape(own.shape)}"
    raise UserError(
        f"The autoencoder in {folder} was trained on {trained_on}, not on"
        f" {given if given != trained_on else 'these images of the same name and size'}: set"
        " model.latent.autoencoder_run=DIR to a run on the same data, or omit it to train an autoencoder."
    )


def format_shape(shape: Sequence[int]) -> str:
    """Format a shape, such as ``1x8x8``."""
    return "x".join(str(size) for size in shape)


def training_images(data: ImageData) -> Iterator[Tensor]:
    """Iterate over batches of all training images, in order."""
    return (x for x, _ in data.batches("train"))


def autoencoder_summary(folder: Path) -> dict[str, Any]:
    """Return the autoencoder entry in the record of a latent model: run, number of parameters and cost."""
    record = RunRecord.load(folder)
    cost = {name: record.training.get(name) for name in ("images_seen", "seconds", "flops")}
    return {"run": folder.name, "family": record.family, "parameters": record.model.get("averaged_parameters"), **cost}
