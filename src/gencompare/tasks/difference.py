"""task=difference: which of two runs is better, from no more samples than the answer needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from omegaconf import DictConfig
from torch import Tensor

from gencompare.comparison import formatting
from gencompare.data.datamodule import ImageData
from gencompare.errors import UserError, printable
from gencompare.evaluation.evaluate import EvaluationProtocol, sample_for_protocol
from gencompare.evaluation.indices import evenly_spaced_indices
from gencompare.evaluation.model_metrics import BATCH_SIZE, likelihood_terms
from gencompare.evaluation.reference import load_reference
from gencompare.evaluation.sequential import Look, difference_looks, first_look, mean_looks, sign_is_known
from gencompare.generative_model import GenerativeModel
from gencompare.rng import generator
from gencompare.tasks.runs.build import build_protocol, choose_device
from gencompare.tasks.runs.loading import check_generative, load_run
from gencompare.tasks.runs.run_config import trusts_folders
from gencompare.tasks.runs.run_folder import run_folder


def difference(cfg: DictConfig) -> None:
    """Compare the kernel distances and bits/dim of the runs ``cfg.run_dir`` and ``cfg.task.other``.

    Both are sampled in chunks, under the protocol ``cfg.evaluation`` of the first, until a confidence sequence knows
    the sign of the difference or all ``evaluation.num_images`` are drawn. The answer is printed and not recorded: it is
    about these two checkpoints, not about other training seeds, and has another number of images than an evaluation.
    """
    first = run_folder(cfg)
    if cfg.task.other is None:
        raise UserError("task=difference needs a second run: task.other=RUN_FOLDER.")
    device = choose_device(cfg)
    models, sets = [], []
    for folder in (first, Path(cfg.task.other)):
        run = load_run(folder, checkpoint=cfg.checkpoint, weights=cfg.weights, trust=trusts_folders(cfg))
        models.append(check_generative(run.model, "difference").to(device))
        sets.append(run.data)
    if sets[0].hash("train") != sets[1].hash("train"):
        raise UserError(f"{first} and {cfg.task.other} were trained on different data, so they cannot be compared.")
    protocol = build_protocol(cfg)
    names = [printable(Path(folder).resolve().name) for folder in (first, cfg.task.other)]
    _report("MMD", names, _distances(models, sets[0], protocol, device))
    likelihoods = [getattr(model, "likelihoods", dict)() for model in models]
    shared = [name for name in likelihoods[0] if name in likelihoods[1]]
    for name in shared:
        _report(f"bits/dim {name}", names, _likelihoods(models, likelihoods, name, sets[0], protocol))


def _distances(
    models: list[GenerativeModel], data: ImageData, protocol: EvaluationProtocol, device: torch.device
) -> Iterator[Look]:
    """Yield the difference of the kernel distances of two models."""
    extractor = protocol.check(data)[0]
    if extractor.primary != extractor.mmd_name:
        raise UserError(
            f"task=difference compares kernel distances, and {extractor.name} ranks by {extractor.primary}: use"
            " evaluation=default."
        )
    reference = load_reference(data, protocol.reference, extractor, device, protocol.cache_dir)
    total = protocol.resolve_num_images(data, extractor)
    with TemporaryDirectory() as scratch:

        def features(k: int) -> Callable[[int], Tensor]:
            folder = Path(scratch) / str(k)  # each look reads the chunks of the last one
            folder.mkdir()

            def draw(n: int) -> Tensor:
                images = sample_for_protocol(models[k], total, data, protocol, chunk_dir=folder, first=n).images
                return extractor(images, device).features

            return draw

        yield from difference_looks(features(0), features(1), reference.gaussian_kernel, total, protocol.chunk_size)


def _likelihoods(
    models: list[GenerativeModel], likelihoods: list[dict], name: str, data: ImageData, protocol: EvaluationProtocol
) -> Iterator[Look]:
    """Yield the mean difference of the bits/dim of two models on the same test images, in random order."""
    rows = evenly_spaced_indices(len(data.split("test")), protocol.num_likelihood_images)
    rows = rows[torch.randperm(len(rows), generator=generator("cpu", protocol.seed, "likelihood order"))]
    found: list[Tensor] = []

    def bits(n: int) -> Tensor:
        start = sum(map(len, found))
        chunk = rows[start:n]
        each = [
            torch.stack([*likelihood_terms(model, name, own[name], data, chunk, protocol.seed + start).values()]).sum(0)
            for model, own in zip(models, likelihoods, strict=True)
        ]
        found.append(each[0] - each[1])
        return torch.cat(found)

    yield from mean_looks(bits, len(rows), BATCH_SIZE)


def _report(metric: str, names: list[str], looks: Iterator[Look]) -> None:
    """Print every look, and which run is better."""

    def is_known(look: Look) -> bool:
        low, high = look.estimate.interval or (float("nan"), float("nan"))
        value, *ends = map(formatting.format_metric, (look.estimate.value, low, high))
        print(f"{metric}, {look.num_images:,} images: {names[0]} - {names[1]} = {value} [{', '.join(ends)}]")
        return sign_is_known(look)

    look = first_look(looks, is_known)
    if sign_is_known(look):
        better = names[0] if look.estimate.value < 0 else names[1]
        print(f"{metric}: {better} is better (a wrong answer has a probability of at most 5 %).")
    else:
        print(f"{metric}: not known after {look.num_images:,} images.")
