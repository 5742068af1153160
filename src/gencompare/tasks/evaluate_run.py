"""task=evaluate samples=PATH or pretrained=PATH: the work of others under the same protocol, in the same comparison."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from gencompare.data.datamodule import ImageData
from gencompare.data.generated_samples import read_samples
from gencompare.errors import UserError
from gencompare.evaluation import evaluate as evaluation
from gencompare.evaluation.evaluate import EvaluationProtocol, evaluate
from gencompare.evaluation.sampling import tensor_sha256
from gencompare.files import sha256
from gencompare.generative_model import GenerativeModel, SupportsNoising
from gencompare.records import RECORD_FILE, RunRecord, SampleSettings, now
from gencompare.tasks.runs import autoencoder_stage, dependency_costs, run_config
from gencompare.tasks.runs.build import build_data, build_model, build_protocol, build_trainer, chosen_device
from gencompare.tasks.runs.console import describe_config, print_end, stage_progress, store_result
from gencompare.tasks.runs.environment import environment
from gencompare.tasks.runs.loading import check_generative, load_weights
from gencompare.tasks.runs.pretrained import load_pretrained, located
from gencompare.tasks.runs.processes import JOB, children_of, several_processes, wait_for_children
from gencompare.tasks.runs.sweep import job_identity, measured

DRAWN = ".drawn"
"""Folder for the samples of an evaluation that is under way."""


def evaluate_run(cfg: DictConfig) -> None:
    """Evaluate the checkpoint ``cfg.checkpoint`` of the run in ``cfg.run_dir``; the result joins its record.

    With ``samples=PATH`` or ``pretrained=PATH`` the work of others is measured instead, in a run folder of its own.
    """
    if cfg.samples is not None or cfg.pretrained is not None:
        evaluate_external(cfg)
        return
    folder = run_folder(cfg)
    data = build_data(cfg)
    model = check_generative(build_model(cfg, data), "evaluate")
    measure_run(cfg, model, data, folder, job=folder / JOB, checkpoints=[cfg.checkpoint], weights=cfg.weights)


def measure_trained(cfg: DictConfig) -> None:
    """Measure the run in ``cfg.trained_in``, which has the weights that ``cfg`` would train, as ``cfg`` says.

    The results join that run's record. The config is then kept beside it, so that the job is known to be done.
    """
    folder = Path(cfg.trained_in)
    config = measured(folder, job_identity(cfg).job)
    cfg = autoencoder_stage.use_autoencoder_settings(cfg)
    data = build_data(cfg)
    model = build_model(cfg, data)
    if isinstance(model, GenerativeModel):
        job = folder / f".{Path(cfg.out).name}.yaml"  # others may measure the same run at once
        measure_run(cfg, model, data, folder, job=job, checkpoints=cfg.evaluation.checkpoints, weights="ema")
    if rank_zero_only.rank == 0:
        run_config.save(run_config.without_place(cfg), config)


def measure_run(
    cfg: DictConfig, model: GenerativeModel, data: ImageData, folder: Path, *, job: Path, checkpoints: list[str],
    weights: str,
) -> None:  # fmt: skip
    """`measure` in as many processes as ``cfg.trainer`` says, which read ``cfg`` from the file ``job``."""
    protocol = build_protocol(cfg)
    protocol.check(data)
    RunRecord.load(folder)
    if several_processes(cfg):
        run_config.save(cfg, job)
    trainer = build_trainer(cfg, model, {}, [], folder)
    with children_of(job):
        start_processes(trainer)
    device = trainer.strategy.root_device
    measure(cfg, model.to(device), data, protocol, folder, checkpoints=checkpoints, weights=weights)
    if rank_zero_only.rank == 0:
        print_end(RunRecord.load(folder), folder)
    wait_for_children(trainer)


def run_folder(cfg: DictConfig) -> Path:
    """The folder that ``run_dir=DIR`` names."""
    if cfg.run_dir is None:
        raise UserError(f"task={cfg.task.label} needs run_dir=DIR, the folder of a trained run.")
    return Path(cfg.run_dir)


def start_processes(trainer: pl.Trainer) -> None:
    """Start the further processes of a job that evaluates without training, and connect them."""
    strategy = trainer.strategy
    if strategy.launcher is not None:
        strategy.launcher.launch(strategy.setup_environment, trainer=trainer)


def measure(
    cfg: DictConfig,
    model: GenerativeModel,
    data: ImageData,
    protocol: EvaluationProtocol,
    folder: Path,
    *,
    checkpoints: list[str],
    weights: str,
) -> None:
    """Measure each of ``checkpoints`` and put the results, with a picture each, into the folder's record.

    All processes take part; the first one writes. Left out are a checkpoint of the same step as one before it, and
    ``best`` of a run that never looked for it. What is drawn is kept until its result is in the record, so an
    evaluation that is broken off goes on where it was.
    """
    guides = dependency_costs.guides(cfg)
    steps: set[int] = set()
    for checkpoint in checkpoints:
        if checkpoint == "best" and len(checkpoints) > 1 and not (folder / "checkpoints" / "best.ckpt").exists():
            continue
        seen = load_weights(model, folder, checkpoint=checkpoint, weights=weights)
        step = seen["step"]
        if step in steps:
            continue
        steps.add(step)
        if isinstance(model, SupportsNoising) and rank_zero_only.rank == 0:
            schedule = model.noise_schedule()
            RunRecord.update(folder, lambda r, schedule=schedule: r.model.update(noise_schedule=schedule))
        for name in with_samplers(cfg, model):
            generation = SampleSettings(
                weights=weights if model.averaged_parameters() else "raw",
                checkpoint=checkpoint,
                step=step,
                images_seen=seen["images"],
                sampler=model.sampling_description(),
                seed=protocol.seed,
            )
            kept = folder / DRAWN / drawing(cfg, data, protocol, folder, checkpoint, weights, name)
            drawn: list[Tensor] = []
            with stage_progress(cfg.callbacks.progress_bar) as progress:
                result = evaluate(
                    model,
                    data,
                    protocol,
                    generation=generation,
                    progress=progress,
                    on_samples=drawn.append,
                    chunk_dir=kept,
                )
            if rank_zero_only.rank == 0:
                if guides:
                    result = replace(result, details={**result.details, "guides": guides})
                store_result(folder, result, drawn[0], data)
                shutil.rmtree(kept, ignore_errors=True)


def with_samplers(cfg: DictConfig, model: GenerativeModel) -> Iterator[str]:
    """Gives ``model`` one way of sampling after another: its own, then those of ``evaluation.samplers`` and
    ``evaluation.guidance``; yields their names.

    A further sampler is a whole one (with ``_target_``), or what is to be changed in the model's own; of its guidance,
    the scale and the like are changed.
    """
    further = cfg.evaluation.get("samplers") or {}
    guidances = cfg.evaluation.get("guidance") or {}
    own: dict[str, Any] = {"sampler": getattr(model, "sampler", None), "guidance": getattr(model, "guidance", None)}
    for option, part, wanted in (("samplers", "sampler", further), ("guidance", "guidance", guidances)):
        if wanted and own[part] is None:
            raise UserError(f"evaluation.{option}: {type(model).__name__} has no {part} here that could be changed.")
    yield "own"
    try:
        for name, change in further.items():
            model.sampler = instantiate(changed(cfg.model.sampler, change), _convert_="all")
            yield str(name)
            model.sampler = own["sampler"]
        for name, change in guidances.items():
            model.guidance = with_guidance(own["guidance"], change)
            yield f"guidance {name}"
    finally:
        for part, value in own.items():
            if value is not None:
                setattr(model, part, value)


def with_guidance(own: Any, change: DictConfig) -> Any:
    """The guidance ``own`` with another scale or interval; the models that take part are the same."""
    known = [field.name for field in fields(own) if field.name not in own.guides()]
    unknown = [str(key) for key in change if key not in known]
    if unknown:
        raise UserError(
            f"evaluation.guidance: {type(own).__name__} has no {unknown[0]} that could be changed, but"
            f" {', '.join(known)}."
        )
    return replace(own, **{str(key): value for key, value in change.items()})


def changed(own: DictConfig, change: DictConfig) -> DictConfig:
    """``own`` with the values of ``change``; a part that names its own ``_target_`` takes the place of the other."""
    if "_target_" in change:
        return change
    parts = {key: value for key, value in own.items() if key not in change}
    for key, value in change.items():
        nested = OmegaConf.is_dict(value) and OmegaConf.is_dict(own.get(key))
        parts[key] = changed(own[key], value) if nested else value
    return OmegaConf.create(parts)


def drawing(
    cfg: DictConfig,
    data: ImageData,
    protocol: EvaluationProtocol,
    folder: Path,
    checkpoint: str,
    weights: str,
    sampler: str,
) -> str:
    """A name for the samples of one evaluation: a hash of all that decides what is drawn."""
    kept = {name: tensor_sha256(rows) for name, rows in data.split(protocol.condition_split).extra_conditions.items()}
    decides = {
        "sampler": [sampler, str(cfg.evaluation.get("samplers")), str(cfg.evaluation.get("guidance"))],
        "model": OmegaConf.to_container(cfg.model, resolve=True),
        "weights": [sha256(folder / "checkpoints" / f"{checkpoint}.ckpt"), weights],
        "chunks": [protocol.seed, protocol.chunk_size, protocol.n, protocol.reference, data.hash("train")],
        "conditions": [protocol.condition_split, str(cfg.data.get("conditions")), kept],
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:16]


def evaluate_external(cfg: DictConfig) -> None:
    """Measure images (``cfg.samples``), or the model of ``cfg.model`` with published weights (``cfg.pretrained``).

    They get a record in ``cfg.out``, so that ``task=compare`` finds them beside one's own runs.
    """
    given = [place for place in (cfg.samples, cfg.pretrained) if place is not None]
    if len(given) > 1:
        raise UserError("samples= and pretrained= are two evaluations: give one of them.")
    folder = Path(cfg.out)
    refuse_second_run(folder)
    data = build_data(cfg)
    protocol = build_protocol(cfg)
    protocol.check(data)
    labels = None
    drawn: list[Tensor] = []
    path = Path(given[0]) if cfg.samples is not None else located(given[0])
    if cfg.samples is not None:
        source, labels = read_samples(path, data.spec, cache=Path(cfg.paths.cache))
        generation, details = SampleSettings(), {}
    else:
        source = check_generative(build_model(cfg, data), "evaluate").eval()
        load_pretrained(source, path)
        source = source.to(chosen_device(cfg))
        generation = SampleSettings(weights="as published", checkpoint="as published")
        details = {"parameters": sum(p.numel() for p in source.parameters()), "conditional": source.conditional}
    with stage_progress(cfg.callbacks.progress_bar) as progress:
        result = evaluation.evaluate(
            source, data, protocol, generation=generation, labels=labels, progress=progress, on_samples=drawn.append
        )
    begin_external_run(cfg, data, Path(given[0]), details).save(folder)
    store_result(folder, result, drawn[0], data)
    print_end(RunRecord.load(folder), folder)


def refuse_second_run(folder: Path) -> None:
    """Raises `UserError` where ``folder`` holds a record already: two runs would become one."""
    if (folder / RECORD_FILE).exists():
        raise UserError(f"{folder} holds a run already: choose another hydra.run.dir.")


def begin_external_run(cfg: DictConfig, data: ImageData, path: Path, model: dict[str, object]) -> RunRecord:
    """The record of work that was not trained here."""
    name = cfg.name or path.stem
    return RunRecord(
        name=name, family=name if cfg.samples else cfg.family, data=describe_config(data), seed=cfg.seed,
        state="samples",
        created=now(), config={"choices": {k: cfg.choices[k] for k in ("data", "evaluation")}}, model=model,
        overrides=list(cfg.command), environment=environment(torch.device("cpu")),
    )  # fmt: skip
