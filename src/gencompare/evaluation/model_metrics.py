"""Metrics of a model on real images: bits/dim, reconstruction, super-resolution."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from gencompare.distributed import distribute
from gencompare.evaluation.extractors.extractor import Extractor
from gencompare.evaluation.metrics.frechet import frechet_distance
from gencompare.evaluation.reference import (
    EvaluationData,
    as_stored,
    batch_of,
    evenly_spaced_indices,
    levels_of,
    to_uint8,
)
from gencompare.evaluation.sampling import ConditionSource, evaluating
from gencompare.generative_model import Cond, SupportsReconstruction, TrainedModel
from gencompare.records import Metric
from gencompare.rng import generator

WINDOW = 11
"""Pixels on a side of the window in which structural similarity is taken."""
BATCH = 100
"""Images scored from one generator: a part of the protocol, so that figures do not depend on processes."""


def bits_per_dim(
    model: Any, data: EvaluationData, n: int, seed: int, progress: Callable[[int, int], None] | None = None
) -> dict[str, Metric]:
    """``bpd_<name>`` for each entry of ``model.likelihoods()``: mean of ``n`` test images, its terms in the note."""
    likelihoods = getattr(model, "likelihoods", dict)()
    rows = test_rows(data, n)
    metrics = {}
    for name, likelihood in likelihoods.items():

        def score(k: int, name: str = name, likelihood: Any = likelihood) -> dict[str, Tensor]:
            x, cond = test_batch(model, data, rows[k * BATCH : (k + 1) * BATCH])
            with evaluating(model), torch.no_grad():
                terms = likelihood.terms(x, cond, generator(x.device, seed, "likelihood", name, k))
            if progress is not None:
                progress(min(len(rows), (k + 1) * BATCH), len(rows))
            return {term: bits.cpu() for term, bits in terms.items()}

        parts = distribute(batches(rows), score)
        terms = {term: torch.cat([part[term] for part in parts]).double() for term in parts[0]}
        bits = torch.stack(list(terms.values())).sum(0)
        value = float(bits.mean())
        bad = int((~torch.isfinite(bits)).sum())
        note = f"{likelihood.kind}, {counted_images(rows, data)}"
        if len(terms) > 1:
            note += "; " + " + ".join(f"{term} {float(each.mean()):.3g}" for term, each in terms.items())
        metrics[f"bpd_{name}"] = Metric(
            None if bad else value, better="lower", unit="bits/dim",
            note=note + (f"; {bad} of them came out as not finite" if bad else ""),
        )  # fmt: skip
    return metrics


def reconstruction(
    model: Any, data: EvaluationData, n: int, seed: int, extractor: Extractor, device: torch.device
) -> dict[str, Metric]:
    """How well a model with an encoder gives ``n`` test images back: all of them, where a distance takes so many.

    ``psnr`` = 10 log10(255^2 / mean squared error) of bytes; ``ssim``, structural similarity (Wang et al. 2004), for
    images of 11 pixels and more; and ``r<frechet>``, the Frechet distance of reconstructions from the images that they
    are of. That needs more images than the extractor has features, and is None where the test split has no more.
    """
    autoencoder = model.autoencoder() if isinstance(model, TrainedModel) else model
    if not isinstance(autoencoder, SupportsReconstruction) or data.spec.num_levels is None:
        return {}
    total = len(data.split("test"))
    rows = test_rows(data, n if n > extractor.dim or total <= extractor.dim else total)

    def rebuild(k: int) -> tuple[Tensor, Tensor]:
        x, cond = test_batch(model, data, rows[k * BATCH : (k + 1) * BATCH])
        with evaluating(model), torch.no_grad():
            again = autoencoder.reconstruct(x, cond, generator=generator(x.device, seed, "reconstruct", k))
        return to_uint8(x, data.spec), to_uint8(again.clamp(-1, 1), data.spec)

    pairs = distribute(batches(rows), rebuild)
    real, rebuilt = (torch.cat(images) for images in zip(*pairs, strict=True))
    note = f"reconstruction, {counted_images(rows, data)}"
    if len(rows) > extractor.dim:
        distance = frechet_distance(*(extractor(images, device).features for images in (rebuilt, real)))
        frechet = Metric(distance, better="lower", note=note)
    else:
        frechet = Metric(None, better="lower", note=f"{note}: too few for {extractor.dim} features")
    return {f"r{extractor.frechet_name}": frechet} | reconstruction_similarity(real, rebuilt, note)


def reconstruction_similarity(real: Tensor, rebuilt: Tensor, note: str) -> dict[str, Metric]:
    """``psnr`` and, where images are large enough, ``ssim`` of uint8 images (n, C, H, W) in place of ``real`` ones."""
    real, rebuilt, found = real.float(), rebuilt.float(), {}
    psnr = float(peak_signal_noise_ratio(rebuilt, real, data_range=255.0))
    found["psnr"] = Metric(psnr if math.isfinite(psnr) else None, better="higher", unit="dB", note=note)
    if min(real.shape[2:]) >= WINDOW:
        pairs = zip(rebuilt.split(BATCH), real.split(BATCH), strict=True)
        of_each = [structural_similarity_index_measure(*pair, reduction="none", data_range=255.0) for pair in pairs]
        found["ssim"] = Metric(float(torch.cat(of_each).mean()), better="higher", note=note)  # type: ignore[arg-type]
    return found


def test_rows(data: EvaluationData, n: int) -> Tensor:
    return evenly_spaced_indices(len(data.split("test")), n)


def batches(rows: Tensor) -> int:
    return -(-len(rows) // BATCH)


def test_batch(model: Any, data: EvaluationData, rows: Tensor) -> tuple[Tensor, Cond]:
    """Test images as the model was trained on them, and the conditions that it uses."""
    x, cond = batch_of(data, "test", rows, torch.device(getattr(model, "device", "cpu")))
    return x, model.used(cond) if hasattr(model, "used") else cond


def counted_images(rows: Tensor, data: EvaluationData) -> str:
    total = len(data.split("test"))
    return f"{len(rows)} test images" if len(rows) == total else f"{len(rows)} of {total} test images"


ROWS = 500
"""Images in one step of what is computed about all samples."""


def super_resolution(images: Tensor, asked: ConditionSource) -> dict[str, Metric]:
    """How samples (as `quantize.as_stored` gives them) agree with the low-resolution images that they were asked for.

    ``consistency`` is the mean squared difference between the low-resolution image and what the sample becomes when it
    is made smaller in the same way, for pixels in [0, 1] (Saharia et al. 2021, "Image super-resolution via iterative
    refinement", section 4). ``psnr`` and ``ssim`` compare sample and original, so both reward a blurred guess between
    all originals that are possible: the note says what plain resizing of the low-resolution image gets.
    """
    data, spec = asked.data, asked.data.spec
    if "low_res" not in spec.conditions or spec.num_levels is None:
        return {}
    errors, originals, resized = [], [], []
    for start in range(0, len(images), ROWS):
        places = slice(start, start + ROWS)
        x, cond = asked.batch(places)
        part = data.split(asked.split)[asked.rows[places]]
        own = data.cond(data.normalize(levels_of(images[places], spec)), part)["low_res"]
        errors.append((own - cond["low_res"]).div(2).square().flatten(1).mean(1))
        originals.append(as_stored(x, spec))
        plain = F.interpolate(cond["low_res"], x.shape[2:], mode="bicubic", align_corners=False)
        resized.append(as_stored(plain.clamp(-1, 1), spec))
    original = torch.cat(originals)
    note = f"sample against original, {len(images)} {asked.split} images"
    found = reconstruction_similarity(original, images, note)
    blurred = reconstruction_similarity(original, torch.cat(resized), "")
    for name, metric in blurred.items():
        if name in found and metric.value is not None:
            found[name] = replace(found[name], note=f"{note}; resized low_res: {metric.value:.4g}")
    consistency = Metric(
        float(torch.cat(errors).double().mean()), better="lower", note="squared, pixels in [0, 1]; low_res of samples"
    )
    return {"consistency": consistency} | found


def with_low_res(images: Tensor, asked: ConditionSource | None) -> tuple[Tensor, int | None]:
    """Samples for a picture, (images uint8, columns): each between its low-resolution image and its original.

    Samples that were asked for none are left as they are, in a square.
    """
    if asked is None or "low_res" not in asked.data.spec.conditions or asked.data.spec.num_levels is None:
        return images, None
    x, cond = asked.batch(slice(len(images)))
    spec = asked.data.spec
    small = as_stored(F.interpolate(cond["low_res"], x.shape[2:], mode="nearest"), spec)
    rows = torch.stack([small, images, as_stored(x, spec)], dim=1).flatten(0, 1)
    return rows, 3 * max(1, round((len(images) / 3) ** 0.5))
