"""task=export_extractor: a trained classifier as a feature extractor, one safetensors file."""

from __future__ import annotations

import shlex
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from gencompare.data.datamodule import ImageData
from gencompare.errors import UserError
from gencompare.evaluation.extractors.shipped_classifiers import SHIPPED, rounded, save_classifier, write_checksums
from gencompare.generative_model import SupportsClassification, TrainedModel
from gencompare.networks.residual_classifier import ResidualClassifier
from gencompare.records import RunRecord
from gencompare.tasks.evaluate_run import run_folder
from gencompare.tasks.runs.build import build_data, build_model
from gencompare.tasks.runs.loading import load_weights

PRIVATE = ("hydra.", "paths.", "logger", "task")
"""Words of a command that say where it ran, and nothing of what came out."""


def export_extractor(cfg: DictConfig) -> None:
    """Write the classifier of ``run_dir=DIR``, with its accuracy on the test split, for ``evaluation.weights=FILE``."""
    folder = run_folder(cfg)
    data = build_data(cfg)
    model = build_model(cfg, data)
    network = getattr(model, "net", None)
    if not isinstance(model, SupportsClassification) or not isinstance(network, ResidualClassifier):
        raise UserError(
            f"task=export_extractor needs a run of model=classifier; {folder} holds a {type(model).__name__}."
        )
    load_weights(model, folder, checkpoint=cfg.checkpoint, weights=cfg.weights)
    # The file holds float16: measure what it holds.
    network.load_state_dict({name: rounded(value) for name, value in network.state_dict().items()})
    settings = OmegaConf.to_container(cfg.model.network, resolve=True)
    assert isinstance(settings, dict)
    words = [word for word in RunRecord.load(folder).overrides if not word.startswith(PRIVATE)]
    out = Path(cfg.task.out or folder / "extractor.safetensors")
    score = accuracy(model, data)
    digest = save_classifier(
        out, network.state_dict(), data.spec, accuracy=score, recipe=shlex.join(["python", "run.py", *words]),
        network={str(key): value for key, value in settings.items() if not str(key).startswith("_")},
    )  # fmt: skip
    if out.resolve().parent == SHIPPED.resolve():
        write_checksums()
    print(f"{out}: accuracy {score:.4f} on {len(data.split('test'))} test images, SHA-256 {digest}")


@torch.inference_mode()
def accuracy(model: TrainedModel, data: ImageData) -> float:
    """Share of test images whose class the model names."""
    assert isinstance(model, SupportsClassification)
    model.eval()
    right = sum(int((model.logits(x).argmax(1) == cond["label"]).sum()) for x, cond in data.batches("test"))
    return right / len(data.split("test"))
