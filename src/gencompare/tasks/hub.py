"""Model folders in the style of the Hugging Face hub: write, upload and load them."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import yaml

from gencompare.checksums import read_checked_json, write_checked_json
from gencompare.command_line import run_command
from gencompare.comparison import formatting
from gencompare.comparison.load_runs import RunFolder
from gencompare.errors import UserError
from gencompare.files import atomic_write, write_text
from gencompare.generative_model import TrainedModel, build_from_config
from gencompare.records import Result, RunRecord, newest
from gencompare.tensor_files import read_tensors, write_tensors
from gencompare.version import __version__

FILES = WEIGHTS_FILE, CONFIG_FILE, CARD_FILE, SAMPLES_FILE = (
    "model.safetensors", "config.json", "README.md", "samples.png",
)  # fmt: skip
LOCATIONS = ("paths.", "hydra.", "data.root=", "logger", "trainer", "run_dir=", "resume=")
"""Prefixes of overrides that depend on the machine, and are not published."""


def write_model_folder(
    model: TrainedModel, record: RunRecord, run: Path, out: Path, *, checkpoint: str, weights: str
) -> None:
    """Write weights, config, model card and samples of a run to the folder ``out``, for `from_pretrained`.

    Args:
        model: the model with its weights.
        record: the record of the run.
        run: the run folder.
        out: the folder to write.
        checkpoint: ``last`` or ``best``, whose results the card shows.
        weights: ``ema``, ``raw`` or ``posthoc:LENGTH``, likewise.
    """
    write_tensors(model.state_dict(), out / WEIGHTS_FILE, {"format": "pt"})
    facts = {
        "library": f"gencompare {__version__}",
        "family": record.family,
        "data": record.data,
        "checkpoint": checkpoint,
        "weights": weights,
    }
    write_checked_json(out / CONFIG_FILE, _encode({**facts, "model": dict(model.hparams)}))
    result = result_of(record, checkpoint, weights)
    picture = RunFolder(run, record, "").read_png(result.images.get("samples", "")) if result is not None else None
    (out / SAMPLES_FILE).unlink(missing_ok=True)
    if picture is not None:
        with atomic_write(out / SAMPLES_FILE) as file:
            file.write(picture)
    write_text(out / CARD_FILE, model_card(record, result, checkpoint, weights, with_samples=picture is not None))


def result_of(record: RunRecord, checkpoint: str, weights: str) -> Result | None:
    """Return the first result of these weights at their newest step, or None if they were not evaluated."""
    weights = weights if record.model.get("averaged_parameters") else "raw"
    wanted = (checkpoint, weights)
    return newest(each for each in record.results if (each.generation.checkpoint, each.generation.weights) == wanted)


def _encode(value: Any) -> Any:
    """Replace infinite numbers, which JSON does not have, by a mapping that `_decode` converts back."""
    if isinstance(value, dict):
        return {name: _encode(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(each) for each in value]
    return {"_float_": str(value)} if isinstance(value, float) and not math.isfinite(value) else value


def _decode(value: dict[str, Any]) -> Any:
    return float(value["_float_"]) if list(value) == ["_float_"] else value


def model_card(record: RunRecord, result: Result | None, checkpoint: str, weights: str, *, with_samples: bool) -> str:
    """Return the model card of a run in Markdown, with the metadata that the hub reads.

    Args:
        record: the record of the run.
        result: the result of the exported weights; None omits the evaluation.
        checkpoint: the exported checkpoint.
        weights: the exported weights.
        with_samples: whether there is a picture of samples.
    """
    data = str(record.data.get("name"))
    metadata: dict[str, Any] = {
        "library_name": "gencompare", "pipeline_tag": "unconditional-image-generation",
        "tags": ["gencompare", record.family, "image-generation"], "datasets": [data],
    }  # fmt: skip
    if result is not None:
        metrics = [
            {"type": name, "value": metric.value, "name": formatting.title(name)}
            for name, metric in result.metrics.items()
            if metric.value is not None
        ]
        task = {"type": "image-generation", "name": "Image generation"}
        results = [{"task": task, "dataset": {"type": data, "name": data}, "metrics": metrics}]
        metadata["model-index"] = [{"name": f"{record.family} on {data}", "results": results}]
    training = record.training
    names = {"ema": "averaged", "raw": "online"}
    facts = {
        "parameters": formatting.format_count(formatting.as_number(record.model.get("parameters"))),
        "training images seen": formatting.format_count(formatting.as_number(training.get("images_seen"))),
        "training time": formatting.format_duration(formatting.as_number(training.get("seconds"))),
        "training FLOPs": formatting.format_count(formatting.as_number(training.get("flops"))),
        "weights": f"{checkpoint}, {names.get(weights, weights.replace('posthoc:', 'post-hoc EMA '))}",
    }
    command = run_command(*(each for each in record.overrides if not each.lstrip("+").startswith(LOCATIONS)))
    lines = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n",
        f"# {record.family} on {data}\n",
        f"A model of {data} ({', '.join(map(str, record.data.get('shape', [])))}), trained with gencompare.\n",
        *(["![Samples](samples.png)\n"] if with_samples else []),
        "```python\nimport gencompare\n\nmodel = gencompare.from_pretrained(FOLDER_OR_REPOSITORY)\n"
        'gencompare.sample(model, 64).grid().save("samples.png")\n```\n',
        "## Training\n\n| | |\n|---|---|",
        *(f"| {name} | {text} |" for name, text in facts.items()),
        f"\n```\n{command}\n```",
    ]
    if result is not None:
        lines += ["\n## Evaluation\n", formatting.describe_protocol(result.measurement), _sampling(result)]
        lines += ["| metric | value | 95 % interval | real data |\n|---|---|---|---|"]
        for name, metric in result.metrics.items():
            heading = f"{formatting.title(name)} {formatting.direction_arrow(metric)}"
            values = [formatting.format_metric(value) for value in (metric.value, metric.baseline)]
            lines.append(f"| {heading} | {values[0]} | {formatting.format_interval(metric)} | {values[1]} |")
        lines += [f"\nWarning: {warning}." for warning in result.details.get("warnings", [])]
    return "\n".join(lines) + "\n"


def _sampling(result: Result) -> str:
    generation = result.generation
    nfe = formatting.total_nfe(generation.nfe)
    calls = f", {formatting.format_rate(nfe)} network evaluations per image" if nfe else ""
    return f"Sampler: {generation.sampler}{calls}.\n"


def push_model_folder(folder: Path, name: str) -> str:
    """Upload a folder to the repository ``USER/NAME`` on the Hugging Face hub, and return its address.

    Raises:
        UserError: huggingface_hub is missing, or the upload failed.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError("task.push needs the hub extra: pip install 'gencompare[hub]'.") from error
    try:
        hub = huggingface_hub.HfApi()
        repository = hub.create_repo(name, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=str(folder), allow_patterns=[*FILES])
    except Exception as error:  # no network, no token, no such user, ...
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder} was written, but not uploaded to {name}: {reason}") from error
    return str(repository)


def from_pretrained(source: str | os.PathLike[str]) -> TrainedModel:
    """Load a model, in eval mode, from a folder of ``task=export format=hub`` or from the Hugging Face hub.

    No code from the folder is executed, and it may name only classes of this package and of torch.

    Args:
        source: the folder, or the name of a repository, ``USER/NAME``, which needs the hub extra.

    Raises:
        UserError: the folder is missing or corrupted, or the download failed.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _download(str(source))
    try:
        config = read_checked_json(folder / CONFIG_FILE, object_hook=_decode)["model"]
        state = read_tensors(folder / WEIGHTS_FILE)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} is not a folder of task=export format=hub, or it is corrupted"
            f" ({type(error).__name__}: {' '.join(str(error).split())})."
        ) from error
    model = build_from_config(config, str(folder))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{folder / WEIGHTS_FILE} does not fit {folder / CONFIG_FILE}.") from error
    return model.eval()


def _download(name: str) -> Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f"There is no folder {name}. To download it from the Hugging Face hub: pip install 'gencompare[hub]'."
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=[WEIGHTS_FILE, CONFIG_FILE]))
    except Exception as error:  # no network, no such repository, a gated repository, ...
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"There is no folder {name}, and the download from the hub failed ({reason}).") from error
