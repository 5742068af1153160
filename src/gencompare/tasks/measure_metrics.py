"""task=measure_metrics: score each metric on faults whose distance from the data is known."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from gencompare.cache import cached_array
from gencompare.data.exact import ExactData
from gencompare.data.exact_faults import Fault, Truth, faults, truth
from gencompare.errors import UserError
from gencompare.evaluation.extractors.extractor import Extractor, Features
from gencompare.evaluation.metric_study import Cell, Losses, Share, Study, StudyScore, measure, score
from gencompare.evaluation.metrics.compute import RealFeatures
from gencompare.evaluation.reference import Reference, quantize_split
from gencompare.files import write_json, write_text
from gencompare.rng import generator
from gencompare.tasks.runs.build import build_data, build_protocol, choose_device
from gencompare.tasks.runs.console import stage_progress
from gencompare.tasks.runs.environment import environment
from gencompare.tasks.runs.run_folder import refuse_existing_run
from gencompare.tasks.validate_metrics import LOCATION_PREFIXES

MIN_REAL_SETS = 3
"""Smallest number of sets of real images for the threshold of an alarm and a false alarm."""


def measure_metrics(cfg: DictConfig) -> None:
    """Measure all faults of an exact data set with every metric of every extractor.

    Write ``study.json`` (all values) and ``scores.md`` (a table) to ``cfg.out``. Features are cached,
    so an interrupted study extracts only the missing ones.
    """
    folder = Path(cfg.out)
    refuse_existing_run(folder)
    data = build_data(cfg)
    if not isinstance(data, ExactData):
        raise UserError(
            f"task=measure_metrics needs a known distribution, which '{data.spec.name}' has not: set"
            " data=exact_mixture, exact_ising or exact_autoregressive, or use task=validate_metrics."
        )
    sizes = sorted(int(n) for n in cfg.task.num_images)
    if sizes[0] < 10 or cfg.task.num_real_images < MIN_REAL_SETS * sizes[-1]:
        raise UserError(
            f"task.num_images={sizes} needs at least 10 images, and task.num_real_images={cfg.task.num_real_images}"
            f" at least {MIN_REAL_SETS} sets of the largest number."
        )
    folder.mkdir(parents=True, exist_ok=True)
    device, protocol, studies = choose_device(cfg), build_protocol(cfg), []
    seconds: dict[str, float] = {}
    known = [(fault, truth(data.distribution, fault)) for fault in data_faults(data)]
    with stage_progress(cfg.callbacks.progress_bar) as progress:
        for extractor in protocol.build_extractors(data.spec):
            source = CachedFeatures(data, extractor, device, Path(protocol.cache) if protocol.cache else None)
            splits = {name: source.split(name) for name in ("train", "val", "test")}
            reference = Reference("train", data.hash("train"), len(splits["train"]), splits["train"])
            real = RealFeatures(**splits)

            def losses(features: Features) -> dict[int, Losses]:
                start = time.perf_counter()
                found = {n: measure(features, n, reference, real, extractor, protocol.metrics) for n in sizes}  # noqa: B023
                seconds[extractor.name] = seconds.get(extractor.name, 0) + time.perf_counter() - start  # noqa: B023
                return found

            of_real = losses(source.real(cfg.task.num_real_images))
            cells = []
            for fault, distances in known:
                found = losses(source.fault(fault, sizes[-1]))
                cells.append(Cell(fault.family, fault.strength, distances.distance, found))
                if progress is not None:
                    progress(f"faults, {extractor.name}", len(cells), len(known))
            studies.append(Study(data.spec.name, extractor.name, of_real, cells))
    scores = score(studies)
    write_json(folder / "study.json", {
        "data": data.spec.name, "hash": data.hash("train"), "bits_per_dim": asdict(data.bits_per_dim),
        "environment": environment(device), "command": [o for o in cfg.command if not o.startswith(LOCATION_PREFIXES)],
        "metric_seconds": rounded(seconds),
        "truths": [{"family": f.family, "strength": f.strength, **truth_as_json(t)} for f, t in known],
        "studies": [rounded(asdict(study)) for study in studies],
    })  # fmt: skip
    text = table(scores)
    write_text(folder / "scores.md", text)
    print(f"{text}\n{folder / 'study.json'}")


def data_faults(data: ExactData) -> Iterator[Fault]:
    """Yield the faults of a data set; its training images are those that a model may memorise."""
    return faults(data.distribution, data.split("train").images.flatten(1))


class CachedFeatures:
    """Features of real images and of faults, stored in a folder under the seeds and weights that determine them."""

    def __init__(self, data: ExactData, extractor: Extractor, device: torch.device, folder: Path | None) -> None:
        self.data, self.extractor, self.device, self.folder = data, extractor, device, folder
        with torch.inference_mode():
            example = extractor.extract_batch(quantize_split(data.split("test").images[:1], data.spec))
        self.widths = [0 if part is None else part.shape[1] for part in example.parts()]

    def split(self, name: str) -> Features:
        """Return the features of a split."""
        return self._features(name, lambda: self.data.split(name).images)

    def real(self, n: int) -> Features:
        """Return the features of ``n`` images that are in no split."""
        return self._features(f"real-{n}", lambda: self._draw(n, "real"))

    def fault(self, fault: Fault, n: int) -> Features:
        """Return the features of ``n`` images with a fault."""
        name = f"{fault.family.replace(' ', '_')}-{fault.strength:g}-{n}"
        return self._features(name, lambda: self._draw(n, name, fault))

    def _draw(self, n: int, name: str, fault: Fault | None = None) -> Tensor:
        model = self.data.distribution if fault is None else fault.model
        return self.data.distribution.images(model.sample(n, generator("cpu", self.data.spec.name, name))[0])

    def _features(self, name: str, draw: Callable[[], Tensor]) -> Features:
        def compute() -> Tensor:
            images = quantize_split(draw(), self.data.spec)
            return torch.cat([part for part in self.extractor(images, self.device).parts() if part is not None], 1)

        # The hash of the training images identifies the distribution, and changes with its sampler.
        own, weights = self.data.hash("train")[:16], self.extractor.hash[:16]
        key = f"study-{self.data.spec.name}-{own}-{name}-{self.extractor.name}-{weights}"
        columns = cached_array(self.folder, key, compute).split(self.widths, dim=1)
        parts = zip(columns, self.widths, strict=True)
        return Features(*(part.contiguous() if width else None for part, width in parts))  # type: ignore[arg-type]


def truth_as_json(truth: Truth) -> dict[str, Any]:
    """Return the known distances as JSON data, with null where they are infinite or unknown."""
    return rounded(asdict(truth))


def rounded(value: Any) -> Any:
    """Round all numbers of JSON data to six significant digits."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def table(scores: Sequence[StudyScore]) -> str:
    """Format a Markdown table with a row for each extractor, n and metric, the most faithful order first."""
    head = ["extractor", "n", "metric", "Kendall's tau", "power", "false alarms"]
    lines = [head, ["---"] * len(head)]
    for s in scores:
        lines.append([s.extractor, f"{s.n:,}", s.metric, cell(s.tau), cell(s.power), cell(s.false_alarms)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def cell(share: Share) -> str:
    """Format a mean with its interval."""
    return f"{share.mean:.2f} [{share.interval[0]:.2f}, {share.interval[1]:.2f}]"
