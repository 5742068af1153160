"""task=evaluate: evaluate a trained run again, or external samples or published weights under the same protocol."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
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
from gencompare.evaluation.evaluate import EvaluationProtocol, evaluate
from gencompare.evaluation.sampling import tensor_sha256
from gencompare.files import file_lock, remove_orphans, sha256
from gencompare.generative_model import GenerativeModel, SupportsNoising
from gencompare.records import RunRecord, SampleSettings, now
from gencompare.tasks.runs import autoencoder_stage, dependency_costs, run_config
from gencompare.tasks.runs.build import (
    build_data,
    build_loggers,
    build_model,
    build_protocol,
    build_trainer,
    choose_device,
)
from gencompare.tasks.runs.console import describe_data, print_results, stage_progress, store_result
from gencompare.tasks.runs.environment import environment
from gencompare.tasks.runs.loading import check_generative, load_weights
from gencompare.tasks.runs.pretrained import find_pretrained, load_pretrained
from gencompare.tasks.runs.processes import JOB_FILE, is_multiprocess, ranks_run, wait_for_ranks
from gencompare.tasks.runs.recovery import recover_record
from gencompare.tasks.runs.result_logging import log_config, log_results
from gencompare.tasks.runs.run_folder import refuse_existing_run, run_folder
from gencompare.tasks.runs.sweep import evaluated_config_path, job_identity
from gencompare.training.posthoc_ema import SNAPSHOT_FOLDER, posthoc_length
from gencompare.trust import check_links

SAMPLES_FOLDER = ".drawn"
"""Folder in a run folder for the samples of an unfinished evaluation."""


def evaluate_run(cfg: DictConfig) -> None:
    """Evaluate the checkpoint ``cfg.checkpoint`` of the run in ``cfg.run_dir``, and add the result to its record.

    With ``samples=PATH`` or ``pretrained=PATH``, evaluate those samples or weights instead, in a new run folder.
    """
    if cfg.samples is not None or cfg.pretrained is not None:
        evaluate_external(cfg)
        return
    folder = run_folder(cfg)
    data = build_data(cfg)
    model = check_generative(build_model(cfg, data), "evaluate")
    evaluate_on_all_ranks(
        cfg, model, data, folder, job=folder / JOB_FILE, checkpoints=[cfg.checkpoint], weights=cfg.weights
    )


def evaluate_trained_run(cfg: DictConfig) -> None:
    """Evaluate the finished run in ``cfg.trained_run``, which has the same training settings, as ``cfg`` specifies.

    The results are added to that run's record, and ``cfg`` is stored in its folder to mark the job as done.
    """
    folder = Path(cfg.trained_run)
    if not cfg.get("trust"):
        check_links(folder)
    config_path = evaluated_config_path(folder, job_identity(cfg).job)
    cfg = autoencoder_stage.use_autoencoder_settings(cfg)
    data = build_data(cfg)
    model = build_model(cfg, data)
    if isinstance(model, GenerativeModel):
        job = folder / f".{Path(cfg.out).name}.yaml"  # not JOB_FILE: other jobs may evaluate the run at the same time
        evaluate_on_all_ranks(cfg, model, data, folder, job=job, checkpoints=cfg.evaluation.checkpoints, weights="ema")
    if rank_zero_only.rank == 0:
        run_config.save(run_config.without_locations(cfg), config_path)


def evaluate_on_all_ranks(
    cfg: DictConfig,
    model: GenerativeModel,
    data: ImageData,
    folder: Path,
    *,
    job: Path,
    checkpoints: list[str],
    weights: str,
) -> None:
    """Run `evaluate_checkpoints` on all ranks of ``cfg.trainer``. Other ranks read ``cfg`` from the file ``job``."""
    protocol = build_protocol(cfg)
    protocol.check(data)
    if rank_zero_only.rank == 0:
        recover_record(model, data, folder)
        remove_orphans(folder)
    if is_multiprocess(cfg):
        run_config.save(cfg, job)
    trainer = build_trainer(cfg, model, {}, [], folder)
    with ranks_run(job):
        launch_ranks(trainer)
    model = model.to(trainer.strategy.root_device)
    evaluate_checkpoints(cfg, model, data, protocol, folder, checkpoints=checkpoints, weights=weights)
    if rank_zero_only.rank == 0:
        record = RunRecord.load(folder)
        page = print_results(record, folder)
        if run_id := record.environment.get("run_id"):
            with file_lock(folder / ".logger.lock"):  # other jobs may evaluate the run at the same time
                loggers = build_loggers(cfg, folder, run_id=run_id, start_step=0, finished=True)
                log_results(loggers, record, folder, page)
    wait_for_ranks(trainer)


def launch_ranks(trainer: pl.Trainer) -> None:
    """Start and connect the other ranks of a job that does not train."""
    strategy = trainer.strategy
    if strategy.launcher is not None:
        strategy.launcher.launch(strategy.setup_environment, trainer=trainer)
    elif trainer.world_size > 1:  # torchrun or srun has started them
        strategy.setup_environment()


def evaluate_checkpoints(
    cfg: DictConfig,
    model: GenerativeModel,
    data: ImageData,
    protocol: EvaluationProtocol,
    folder: Path,
    *,
    checkpoints: list[str],
    weights: str,
) -> None:
    """Evaluate each of ``checkpoints`` with each sampler of ``cfg``, and add the results to the record of ``folder``.

    All ranks take part, and rank 0 writes. A checkpoint is skipped if its step was already evaluated. A missing
    ``best`` is skipped if there are other checkpoints. Samples are stored until their result is recorded, so an
    interrupted evaluation can resume.
    """
    guides = dependency_costs.guide_dependencies(cfg)
    steps: set[int] = set()
    for checkpoint in checkpoints:
        if checkpoint == "best" and len(checkpoints) > 1 and not (folder / "checkpoints" / "best.ckpt").exists():
            continue
        clock = load_weights(model, folder, checkpoint=checkpoint, weights=weights)
        step = clock["step"]
        if step in steps:
            continue
        steps.add(step)
        if isinstance(model, SupportsNoising) and rank_zero_only.rank == 0:
            schedule = model.noise_schedule()
            RunRecord.update(folder, lambda r, schedule=schedule: r.model.update(noise_schedule=schedule))
        for variant in sampling_variants(cfg, model):
            generation = SampleSettings(
                weights=weights if model.averaged_parameters() else "raw",
                checkpoint=checkpoint,
                step=step,
                images_seen=clock["images"],
                sampler=model.sampling_description(),
                seed=protocol.seed,
            )
            key = samples_key(cfg, data, protocol, folder, checkpoint, weights, variant)
            chunk_dir = folder / SAMPLES_FOLDER / key
            samples: list[Tensor] = []
            with stage_progress(cfg.callbacks.progress_bar) as progress:
                result = evaluate(
                    model,
                    data,
                    protocol,
                    generation=generation,
                    progress=progress,
                    on_samples=samples.append,
                    chunk_dir=chunk_dir,
                )
            if rank_zero_only.rank == 0:
                if guides:
                    result = replace(result, details={**result.details, "guides": guides})
                store_result(folder, result, samples[0], data)
                shutil.rmtree(chunk_dir, ignore_errors=True)


def sampling_variants(cfg: DictConfig, model: GenerativeModel) -> Iterator[str]:
    """Set the sampler and guidance of ``model`` to each variant in turn, and yield the variant's name.

    The first variant is the model's own, followed by those of ``evaluation.samplers`` and ``evaluation.guidance``. A
    sampler with a ``_target_`` replaces the model's own sampler. Other variants change options of the model's own
    sampler or guidance.
    """
    samplers = cfg.evaluation.get("samplers") or {}
    guidances = cfg.evaluation.get("guidance") or {}
    own: dict[str, Any] = {"sampler": getattr(model, "sampler", None), "guidance": getattr(model, "guidance", None)}
    for option, attribute, variants in (("samplers", "sampler", samplers), ("guidance", "guidance", guidances)):
        if variants and own[attribute] is None:
            raise UserError(f"evaluation.{option}: this {type(model).__name__} has no {attribute} to change.")
    yield "own"
    try:
        for name, change in samplers.items():
            model.sampler = instantiate(merge_options(cfg.model.sampler, change), _convert_="all")
            yield str(name)
            model.sampler = own["sampler"]
        for name, change in guidances.items():
            model.guidance = change_guidance(own["guidance"], change)
            yield f"guidance {name}"
    finally:
        for attribute, value in own.items():
            if value is not None:
                setattr(model, attribute, value)


def change_guidance(guidance: Any, change: DictConfig) -> Any:
    """Return a copy of ``guidance`` with changed options, such as its scale, but the same guiding models."""
    known = [field.name for field in fields(guidance) if field.name not in guidance.guides()]
    unknown = [str(key) for key in change if key not in known]
    if unknown:
        raise UserError(
            f"evaluation.guidance cannot change {unknown[0]} of {type(guidance).__name__}: choose from"
            f" {', '.join(known)}."
        )
    return replace(guidance, **{str(key): value for key, value in change.items()})


def merge_options(options: DictConfig, change: DictConfig) -> DictConfig:
    """Update ``options`` recursively with ``change``. A node with a ``_target_`` replaces the old node."""
    if "_target_" in change:
        return change
    merged = {key: value for key, value in options.items() if key not in change}
    for key, value in change.items():
        nested = OmegaConf.is_dict(value) and OmegaConf.is_dict(options.get(key))
        merged[key] = merge_options(options[key], value) if nested else value
    return OmegaConf.create(merged)


def samples_key(
    cfg: DictConfig,
    data: ImageData,
    protocol: EvaluationProtocol,
    folder: Path,
    checkpoint: str,
    weights: str,
    variant: str,
) -> str:
    """Return a hash of everything that the samples of an evaluation depend on."""
    conditions = data.split(protocol.condition_split).extra_conditions
    weight_files = [folder / "checkpoints" / f"{checkpoint}.ckpt"]
    if posthoc_length(weights) is not None:
        weight_files += sorted((folder / SNAPSHOT_FOLDER).glob("*.safetensors"))
    settings = {
        "sampler": [variant, str(cfg.evaluation.get("samplers")), str(cfg.evaluation.get("guidance"))],
        "model": OmegaConf.to_container(cfg.model, resolve=True),
        "weights": [sha256(path) for path in weight_files] + [weights],
        "chunks": [protocol.seed, protocol.chunk_size, protocol.num_images, protocol.reference, data.hash("train")],
        "conditions": [
            protocol.condition_split, str(cfg.data.get("conditions")),
            {name: tensor_sha256(rows) for name, rows in conditions.items()},
        ],
    }  # fmt: skip
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def evaluate_external(cfg: DictConfig) -> None:
    """Evaluate the images in ``cfg.samples``, or the model from ``cfg.model`` with the weights in ``cfg.pretrained``.

    The result is recorded in ``cfg.out``, where ``task=compare`` can find it.
    """
    sources = [source for source in (cfg.samples, cfg.pretrained) if source is not None]
    if len(sources) > 1:
        raise UserError("samples= and pretrained= cannot be combined: use only one of them.")
    folder = Path(cfg.out)
    refuse_existing_run(folder)
    data = build_data(cfg)
    protocol = build_protocol(cfg)
    protocol.check(data)
    labels = None
    if cfg.samples is not None:
        source, labels = read_samples(Path(cfg.samples), data.spec, cache=Path(cfg.paths.cache))
        generation, details = SampleSettings(), {}
    else:
        path = find_pretrained(cfg.pretrained)
        source = check_generative(build_model(cfg, data), "evaluate").eval()
        load_pretrained(source, path)
        source = source.to(choose_device(cfg))
        generation = SampleSettings(weights="as published", checkpoint="as published")
        details = {"parameters": sum(p.numel() for p in source.parameters()), "conditional": source.conditional}
    samples: list[Tensor] = []
    with stage_progress(cfg.callbacks.progress_bar) as progress:
        result = evaluate(
            source, data, protocol, generation=generation, labels=labels, progress=progress, on_samples=samples.append
        )
    external_record(cfg, data, Path(sources[0]), details).save(folder)
    store_result(folder, result, samples[0], data)
    record = RunRecord.load(folder)
    page = print_results(record, folder)
    if any(override.startswith("logger=") for override in cfg.command):  # only on request: nothing was trained
        loggers = build_loggers(cfg, folder, run_id=record.environment["run_id"], start_step=0)
        log_config(loggers, record.config)
        log_results(loggers, record, folder, page)


def external_record(cfg: DictConfig, data: ImageData, path: Path, model: dict[str, object]) -> RunRecord:
    """Create the record of external samples or published weights."""
    name = cfg.name or path.stem
    return RunRecord(
        name=name, family=name if cfg.samples else cfg.family, data=describe_data(data), seed=cfg.seed,
        state="samples", created=now(), config={"choices": {k: cfg.choices[k] for k in ("data", "evaluation")}},
        model=model, overrides=list(cfg.command),
        environment={"run_id": uuid.uuid4().hex[:12], **environment(torch.device("cpu"))},
    )  # fmt: skip
