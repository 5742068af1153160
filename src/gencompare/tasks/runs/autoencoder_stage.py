"""The autoencoder under a latent model: found, or trained before it, and put into it."""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor

from gencompare.command_line import shell_override
from gencompare.data.conditions import ConditionedData
from gencompare.data.datamodule import ImageData
from gencompare.errors import UserError
from gencompare.files import file_lock
from gencompare.generative_model import TrainedModel
from gencompare.models.latents import Latents
from gencompare.records import RECORD_FILE, RunRecord
from gencompare.resources import FlopCounter
from gencompare.tasks.runs import run_config
from gencompare.tasks.runs.build import build_model, chosen_device
from gencompare.tasks.runs.loading import load_weights
from gencompare.tasks.runs.processes import leave_process_group

AUTOENCODER_GROUP = "model@model.latent.autoencoder"
"""The group in which the autoencoder of a latent model is chosen."""


DECIDES = ("model", "budget", "seed", "data", "trainer.global_batch_size", "trainer.precision", "callbacks.ema")
"""Parts of a config that decide what is trained on given images."""
PLACES = ("root", "cache", "eval_batch_size")
"""What the part for the data holds beside that."""


def use_autoencoder_settings(cfg: DictConfig) -> DictConfig:
    """``cfg`` with the settings of the autoencoder that ``model.latent.run`` names, which are what its weights fit."""
    run = OmegaConf.select(cfg, "model.latent.run")
    if run is None or cfg.resume is not None or cfg.run_dir is not None:
        return cfg
    theirs = run_config.load(Path(run))
    if "bottleneck" not in theirs.model:
        raise UserError(
            f"{run} holds a run of model={theirs.family}, and no autoencoder: model.latent.run wants one of"
            " model=autoencoder or vqvae."
        )
    if not is_finished(Path(run)):
        raise UserError(
            f"The autoencoder in {run} was not trained to its end: finish it by"
            f" {shell_override('resume', str(run))}, and give it again then."
        )
    cfg = cfg.copy()
    with open_dict(cfg):
        cfg.model.latent.autoencoder = OmegaConf.merge(theirs.model, {"_partial_": True})
    return cfg


def train_autoencoder(cfg: DictConfig, data: ImageData, train: Callable[[DictConfig], None]) -> DictConfig:
    """``cfg`` with the folder of the autoencoder's run as ``autoencoder_run``, where its model works on latents.

    The run is ``model.latent.run``, or one of the same config and data from before, or it is trained here and now. Jobs
    that want the same one at once wait for the first of them.
    """
    latent = cfg.model.get("latent")
    if latent is None or cfg.get("autoencoder_run"):
        return cfg
    folder = Path(latent.run) if latent.run is not None else autoencoder_folder(autoencoder_config(cfg), data)
    if latent.run is None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 or cfg.trainer.num_nodes > 1:
            raise UserError(
                "Several nodes, or processes that were not started by this one, cannot train a first stage: train it"
                " alone (model=autoencoder), and give model.latent.run=DIR."
            )
        with file_lock(folder.with_name(f".{folder.name}.lock")):
            if not is_finished(folder):
                stage = autoencoder_config(cfg)
                stage.out = str(folder.absolute())
                stage.resume = stage.out if (folder / RECORD_FILE).exists() else None
                print(f"First the autoencoder, in {folder}.", flush=True)
                try:
                    train(stage)
                except (SystemExit, KeyboardInterrupt):
                    print("It was stopped in its first stage: the same command goes on from there.", flush=True)
                    raise
                leave_process_group()
                print("Now the model on its latents.", flush=True)
            else:
                print(f"The autoencoder was trained before: {folder}", flush=True)
    cfg = cfg.copy()
    with open_dict(cfg):
        cfg.autoencoder_run = str(folder.absolute())
    return cfg


def autoencoder_config(cfg: DictConfig) -> DictConfig:
    """The config of the autoencoder's own training: that of its latent model, but for model and budget."""
    latent = cfg.model.latent
    stage = cfg.copy()
    OmegaConf.set_struct(stage, False)
    stage.model = OmegaConf.masked_copy(latent.autoencoder, [str(k) for k in latent.autoencoder if k != "_partial_"])
    stage.data.pop("conditions", None)
    if cfg.choices.get("debug") is None:
        stage.budget = OmegaConf.merge(cfg.budget, latent.budget)
    stage.callbacks.evaluation.patience = None  # nothing is drawn that could get better or worse
    stage.choices = autoencoder_choices(cfg)
    stage.family = stage.choices["model"]
    stage.sweep_name = None
    stage.command = [f"model={stage.family}", f"data={cfg.choices.data}"]
    return stage


def autoencoder_choices(cfg: DictConfig) -> dict[str, Any]:
    """The choices of groups as a run of the autoencoder alone would have made them."""
    at = AUTOENCODER_GROUP.partition("@")[2]
    own, others = {}, {}
    for group, choice in cfg.choices.items():
        name, _, place = str(group).partition("@")
        if place == at or place.startswith(f"{at}."):
            usual = name.replace("/", ".") == "model" + place.removeprefix(at)
            own[name if usual else f"{name}@model{place.removeprefix(at)}"] = choice
        elif not name.startswith("model") and name not in ("experiment", "sweep", "debug"):
            others[str(group)] = choice
    return {"model": "autoencoder", **others, **own}


def autoencoder_folder(stage: DictConfig, data: ImageData) -> Path:
    """Named by a hash of all that decides what the autoencoder becomes, its data included."""
    decides = OmegaConf.masked_copy(stage, list({name.split(".")[0] for name in DECIDES}))
    parts: dict[str, Any] = {name: OmegaConf.select(decides, name) for name in DECIDES}
    parts["data"] = {str(key): value for key, value in stage.data.items() if key not in PLACES}
    parts = OmegaConf.to_container(OmegaConf.create(parts), resolve=True)  # type: ignore[assignment]
    perceptual = parts["model"].get("perceptual") or {}
    if perceptual.get("weights") and Path(perceptual["weights"]).is_file():
        # What the file holds decides, wherever it lies.
        perceptual["weights"] = hashlib.sha256(Path(perceptual["weights"]).read_bytes()).hexdigest()
    text = json.dumps([parts, data.hash("train")], sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:10]
    return Path(stage.paths.runs) / f"{data.spec.name}_{stage.family}_{key}"


def is_finished(folder: Path) -> bool:
    return (folder / RECORD_FILE).exists() and RunRecord.load(folder).state == "finished"


def load_autoencoder(cfg: DictConfig, model: TrainedModel, data: ImageData, processes: int) -> DictConfig:
    """Give a model on latents its trained autoencoder, and whiten by the training images.

    Returns ``cfg`` with the cost of that as ``whitening``, an entry of what a model needed (as `costs.entry` makes).
    Each of the ``processes`` encodes all images; the time is that of the first, times their number.
    """
    space = getattr(model, "space", None)
    if not isinstance(space, Latents):
        return cfg
    folder = Path(cfg.autoencoder_run)
    record = RunRecord.load(folder)
    images = data.data if isinstance(data, ConditionedData) else data
    refuse_other_data(folder, record, images)
    # Built for the images at hand, which are its own: those need not lie any more where they lay when it was trained.
    first: Any = build_model(run_config.load(folder), images)
    load_weights(first, folder, checkpoint="last", weights="ema")
    space.to(chosen_device(cfg))
    with FlopCounter() as counter:
        start = time.monotonic()
        space.take(first.eval().coder, training_images(data))
        seconds = time.monotonic() - start
    space.to("cpu")  # where the trainer expects a model
    space.perceptual_networks = record.training.get("perceptual_networks", [])
    if cfg.get("whitening"):
        return cfg
    cfg = cfg.copy()
    with open_dict(cfg):
        cfg.whitening = {
            "role": "whitening", "run": record.name, "id": uuid.uuid4().hex[:12], "family": record.family,
            "images_seen": 0, "steps": 0, "flops": float(counter.get_total_flops() * processes),
            "device_seconds": seconds * processes,
        }  # fmt: skip
    return cfg


def refuse_other_data(folder: Path, record: RunRecord, data: ImageData) -> None:
    """Raises `UserError` unless the run was trained on these very images, whatever they are called and lie in."""
    own, theirs = data.spec, record.data
    if (theirs["hash"], tuple(theirs["shape"])) == (data.hash("train"), own.shape):
        return
    known = f"'{theirs['name']}' of {image_sides(theirs['shape'])}"
    at_hand = f"'{own.name}' of {image_sides(own.shape)}"
    raise UserError(
        f"The autoencoder in {folder} was trained on data {known}, not on"
        f" {at_hand if at_hand != known else 'these images of the same name and size'}: give model.latent.run=DIR of"
        " the same data, or leave it out to train one."
    )


def image_sides(shape: Sequence[int]) -> str:
    return "x".join(str(side) for side in shape)


def training_images(data: ImageData) -> Iterator[Tensor]:
    """All training images, as a model sees them, in order."""
    return (x for x, _ in data.batches("train"))


def summary(folder: Path) -> dict[str, Any]:
    """What a record says of the autoencoder that its model works on: where it is from, and what it cost."""
    record = RunRecord.load(folder)
    cost = {name: record.training.get(name) for name in ("images_seen", "seconds", "flops")}
    return {"run": folder.name, "family": record.family, "parameters": record.model.get("averaged_parameters"), **cost}
