"""task=export_extractor: write a trained classifier as a feature extractor, in one safetensors file."""

from __future__ import annotations

import shlex
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from gencompare.data.datamodule import ImageData
from gencompare.errors import UserError, printable
from gencompare.evaluation.extractors.shipped_classifiers import (
    WEIGHTS_DIR,
    save_classifier,
    to_float16,
    write_checksums,
)
from gencompare.generative_model import SupportsClassification, TrainedModel
from gencompare.networks.residual_classifier import ResidualClassifier
from gencompare.records import RunRecord
from gencompare.tasks.runs.build import build_data, build_model
from gencompare.tasks.runs.loading import load_weights
from gencompare.tasks.runs.run_folder import run_folder

LOCATION_PREFIXES = ("hydra.", "paths.", "logger", "task")
"""Prefixes of overrides that do not affect the weights."""


def export_extractor(cfg: DictConfig) -> None:
    """Write the classifier of the run in ``run_dir`` and its test accuracy to a file for ``evaluation.weights``."""
    folder = run_folder(cfg)
    data = build_data(cfg)
    model = build_model(cfg, data)
    network = getattr(model, "net", None)
    if not isinstance(model, SupportsClassification) or not isinstance(network, ResidualClassifier):
        raise UserError(
            f"task=export_extractor needs a run of model=classifier; {folder} is a run of {type(model).__name__}."
        )
    load_weights(model, folder, checkpoint=cfg.checkpoint, weights=cfg.weights)
    # The weights are stored as float16, so measure their accuracy after rounding.
    network.load_state_dict({name: to_float16(value) for name, value in network.state_dict().items()})
    settings = OmegaConf.to_container(cfg.model.network, resolve=True)
    assert isinstance(settings, dict)
    overrides = [o for o in RunRecord.load(folder).overrides if not o.startswith(LOCATION_PREFIXES)]
    out = Path(cfg.task.out or folder / "extractor.safetensors")
    score = accuracy(model, data)
    digest = save_classifier(
        out, network.state_dict(), data.spec, accuracy=score, recipe=shlex.join(["python", "run.py", *overrides]),
        network={str(key): value for key, value in settings.items() if not str(key).startswith("_")},
    )  # fmt: skip
    if out.resolve().parent == WEIGHTS_DIR.resolve():
        write_checksums()
    num_images = len(data.split("test"))
    print(printable(f"{out}: accuracy {score:.4f} on {num_images} test images, SHA-256 {digest}"))


@torch.inference_mode()
def accuracy(model: TrainedModel, data: ImageData) -> float:
    """Return the fraction of test images that the model classifies correctly."""
    assert isinstance(model, SupportsClassification)
    model.eval()
    correct = sum(int((model.logits(x).argmax(1) == cond["label"]).sum()) for x, cond in data.batches("test"))
    return correct / len(data.split("test"))
