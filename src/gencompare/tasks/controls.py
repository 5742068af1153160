"""task=controls: what the figures of a protocol say of images whose faults are known."""

from __future__ import annotations

from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from gencompare.evaluation.controls import controls
from gencompare.files import write_text
from gencompare.records import Metric, Result, RunRecord, now
from gencompare.tasks.build import build_data, build_protocol
from gencompare.tasks.environment import environment
from gencompare.tasks.others import refuse_second_run
from gencompare.tasks.progress import stages
from gencompare.tasks.show import described, print_end

BESIDE_THE_DISTANCE = ("precision", "recall", "density", "coverage", "memorization", "authenticity")
NONE = Metric(value=None)


def measure_controls(cfg: DictConfig) -> None:
    """Measure the controls and the fitted baseline of ``cfg.task``; their record lies in ``cfg.out``, with a table."""
    folder = Path(cfg.out)
    refuse_second_run(folder)
    data = build_data(cfg)
    protocol = build_protocol(cfg)
    protocol.check(data)
    baseline = instantiate(cfg.task.baseline, _partial_=True)(spec=data.spec)
    baseline.fit_to(data.batches("train"), data.batches("val"))
    with stages(cfg.callbacks.progress) as progress:
        found = controls(data, protocol, baseline=baseline, progress=progress)
    RunRecord(
        name=cfg.name or "controls", family="controls", data=described(data), seed=cfg.seed, state="samples",
        created=now(), config={"choices": {k: cfg.choices[k] for k in ("data", "evaluation")}},
        overrides=list(cfg.command), environment=environment(torch.device("cpu")), results=list(found.values()),
    ).save(folder)  # fmt: skip
    text = table(found)
    write_text(folder / "controls.md", text)
    print_end(RunRecord.load(folder), folder)
    print(f"\n{text}")


def table(found: dict[str, Result]) -> str:
    """Markdown: a row of figures for each control, below those of real images (of the test split), the floors."""
    first = next(iter(found.values()))
    names = [first.headline, *BESIDE_THE_DISTANCE]
    rows = {"real": [first.metrics.get(name, NONE).floor for name in names]}
    rows |= {control: [result.metrics.get(name, NONE).value for name in names] for control, result in found.items()}
    lines = [["images", *names], ["---"] * (len(names) + 1)]
    lines += [[title, *("" if value is None else f"{value:.3g}" for value in values)] for title, values in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
