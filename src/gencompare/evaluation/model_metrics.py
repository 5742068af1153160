"""Metrics that compare a model with individual real images: bits/dim, reconstruction, super-resolution."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from gencompare.distributed import distributed_map
from gencompare.evaluation.extractors.extractor import Extractor
from gencompare.evaluation.indices import evenly_spaced_indices
from gencompare.evaluation.metrics.frechet import frechet_distance
from gencompare.evaluation.reference import EvaluationData, quantize_images, split_batch, to_levels, to_uint8
from gencompare.evaluation.sampling import ConditionSource, eval_mode
from gencompare.generative_model import Cond, SupportsReconstruction, TrainedModel
from gencompare.records import Metric
from gencompare.rng import generator

SSIM_WINDOW = 11
"""Width and height of the structural similarity window, in pixels."""
BATCH_SIZE = 100
"""Images per random generator. The size is fixed, so values do not depend on the number of ranks."""
SUPER_RESOLUTION_BATCH_SIZE = 500


def bits_per_dim(
    model: Any, data: EvaluationData, n: int, seed: int, progress: Callable[[int, int], None] | None = None
) -> dict[str, Metric]:
    """Compute ``bpd_<name>`` for each entry of ``model.likelihoods()``, as the mean over ``n`` test images.

    The note contains the kind (exact, bound or estimate) and the mean of each term.
    """
    likelihoods = getattr(model, "likelihoods", dict)()
    rows = _test_rows(data, n)
    metrics = {}
    for name, likelihood in likelihoods.items():
        terms = likelihood_terms(model, name, likelihood, data, rows, seed, progress)
        bits = torch.stack(list(terms.values())).sum(0)
        value = float(bits.mean())
        bad = int((~torch.isfinite(bits)).sum())
        note = f"{likelihood.kind}, {_describe_rows(rows, data)}"
        if len(terms) > 1:
            note += "; " + " + ".join(f"{term} {float(each.mean()):.3g}" for term, each in terms.items())
        if bad:
            note += f"; {bad} of them are not finite"
        metrics[f"bpd_{name}"] = Metric(
            None if bad else value, higher_is_better=False, unit="bits/dim", note=note, method=likelihood.method
        )
    return metrics


def likelihood_terms(
    model: Any,
    name: str,
    likelihood: Any,
    data: EvaluationData,
    rows: Tensor,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Compute the terms of the bits/dim of the test images in ``rows``, each float64 (len(rows),)."""

    def score(k: int) -> dict[str, Tensor]:
        x, cond = _test_batch(model, data, rows[k * BATCH_SIZE : (k + 1) * BATCH_SIZE])
        with eval_mode(model), torch.no_grad():
            terms = likelihood.terms(x, cond, generator(x.device, seed, "likelihood", name, k))
        if progress is not None:
            progress(min(len(rows), (k + 1) * BATCH_SIZE), len(rows))
        return {term: bits.cpu() for term, bits in terms.items()}

    batches = distributed_map(score, _num_batches(rows))
    return {term: torch.cat([batch[term] for batch in batches]).double() for term in batches[0]}


def reconstruction(
    model: Any, data: EvaluationData, n: int, seed: int, extractor: Extractor, device: torch.device
) -> dict[str, Metric]:
    """Measure how well a model with an encoder reconstructs test images. For any other model, return an empty dict.

    Metrics are ``psnr`` and ``ssim`` (`reconstruction_similarity`) and ``r<frechet>``, the Frechet distance between
    reconstructions and originals. The distance needs more images than the extractor has features. If ``n`` is too
    small, all test images are used instead. If there are still too few, the distance is None.
    """
    autoencoder = model.autoencoder() if isinstance(model, TrainedModel) else model
    if not isinstance(autoencoder, SupportsReconstruction) or data.spec.num_bins is None:
        return {}
    total = len(data.split("test"))
    rows = _test_rows(data, n if n > extractor.dim or total <= extractor.dim else total)

    def reconstruct(k: int) -> tuple[Tensor, Tensor]:
        x, cond = _test_batch(model, data, rows[k * BATCH_SIZE : (k + 1) * BATCH_SIZE])
        with eval_mode(model), torch.no_grad():
            y = autoencoder.reconstruct(x, cond, generator=generator(x.device, seed, "reconstruct", k))
        return to_uint8(x, data.spec), to_uint8(y.clamp(-1, 1), data.spec)

    batches = distributed_map(reconstruct, _num_batches(rows))
    originals, reconstructions = (torch.cat(images) for images in zip(*batches, strict=True))
    note = f"reconstruction, {_describe_rows(rows, data)}"
    if len(rows) > extractor.dim:
        features = [extractor(images, device).features for images in (reconstructions, originals)]
        frechet = Metric(frechet_distance(*features), higher_is_better=False, note=note)
    else:
        frechet = Metric(None, higher_is_better=False, note=f"{note}: too few for {extractor.dim} features")
    return {f"r{extractor.frechet_name}": frechet} | reconstruction_similarity(originals, reconstructions, note)


def reconstruction_similarity(originals: Tensor, reconstructions: Tensor, note: str = "") -> dict[str, Metric]:
    r"""Compute ``psnr``, and ``ssim`` if height and width are at least 11 pixels, of uint8 images (n, C, H, W).

    .. math:: \mathrm{PSNR} = 10 \log_{10} \frac{255^2}{\mathrm{MSE}}

    where MSE is the mean squared error over all images. SSIM is the structural similarity of Wang et al. (2004), "Image
    Quality Assessment: From Error Visibility to Structural Similarity", averaged over images.
    """
    target, preds, metrics = originals.float(), reconstructions.float(), {}
    psnr = float(peak_signal_noise_ratio(preds, target, data_range=255.0))
    metrics["psnr"] = Metric(psnr if math.isfinite(psnr) else None, higher_is_better=True, unit="dB", note=note)
    if min(target.shape[2:]) >= SSIM_WINDOW:
        pairs = zip(preds.split(BATCH_SIZE), target.split(BATCH_SIZE), strict=True)
        ssim = [structural_similarity_index_measure(*pair, reduction="none", data_range=255.0) for pair in pairs]
        metrics["ssim"] = Metric(float(torch.cat(ssim).mean()), higher_is_better=True, note=note)  # type: ignore[arg-type]
    return metrics


def super_resolution(images: Tensor, source: ConditionSource) -> dict[str, Metric]:
    """Measure how well samples agree with their low-resolution images; return an empty dict if ``source`` has none.

    ``consistency`` is the mean squared difference between the low-resolution image and the downscaled sample, for
    pixels in [0, 1] (Saharia et al. 2021, "Image Super-Resolution via Iterative Refinement", section 4,
    https://arxiv.org/abs/2104.07636). ``psnr`` and ``ssim`` compare each sample with its original. Both favour a
    blurred average of all plausible originals, so the note contains their values for bicubic upscaling.

    Args:
        images: samples, as returned by `quantize_images`.
        source: the images that provided the conditions.
    """
    data, spec = source.data, source.data.spec
    if "low_res" not in spec.conditions or spec.num_bins is None:
        return {}
    errors, originals, upscaled = [], [], []
    for start in range(0, len(images), SUPER_RESOLUTION_BATCH_SIZE):
        batch = slice(start, start + SUPER_RESOLUTION_BATCH_SIZE)
        x, cond = source.batch(batch)
        part = data.split(source.split)[source.rows[batch]]
        low_res = data.cond(data.normalize(to_levels(images[batch], spec)), part)["low_res"]
        errors.append((low_res - cond["low_res"]).div(2).square().flatten(1).mean(1))
        originals.append(quantize_images(x, spec))
        bicubic = F.interpolate(cond["low_res"], x.shape[2:], mode="bicubic", align_corners=False)
        upscaled.append(quantize_images(bicubic.clamp(-1, 1), spec))
    original = torch.cat(originals)
    note = f"sample against original, {len(images)} {source.split} images"
    metrics = reconstruction_similarity(original, images, note)
    for name, metric in reconstruction_similarity(original, torch.cat(upscaled)).items():
        if name in metrics and metric.value is not None:
            metrics[name] = replace(metrics[name], note=f"{note}; bicubic upscaling: {metric.value:.4g}")
    consistency = Metric(
        float(torch.cat(errors).double().mean()),
        higher_is_better=False,
        note="squared, low-resolution image against downscaled sample, pixels in [0, 1]",
    )
    return {"consistency": consistency} | metrics


def with_low_res(images: Tensor, source: ConditionSource | None) -> tuple[Tensor, int | None]:
    """Return (uint8 images, number of columns) for a grid of low-resolution image, sample and original.

    Samples without low-resolution images are returned unchanged, with None columns (a square grid).
    """
    if source is None or "low_res" not in source.data.spec.conditions or source.data.spec.num_bins is None:
        return images, None
    x, cond = source.batch(slice(len(images)))
    spec = source.data.spec
    low_res = quantize_images(F.interpolate(cond["low_res"], x.shape[2:], mode="nearest"), spec)
    triples = torch.stack([low_res, images, quantize_images(x, spec)], dim=1).flatten(0, 1)
    return triples, 3 * max(1, round((len(images) / 3) ** 0.5))


def _test_rows(data: EvaluationData, n: int) -> Tensor:
    return evenly_spaced_indices(len(data.split("test")), n)


def _num_batches(rows: Tensor) -> int:
    return -(-len(rows) // BATCH_SIZE)


def _test_batch(model: Any, data: EvaluationData, rows: Tensor) -> tuple[Tensor, Cond]:
    """Return normalised test images and the conditions that the model uses."""
    x, cond = split_batch(data, "test", rows, torch.device(getattr(model, "device", "cpu")))
    x = x.double() if getattr(model, "dtype", None) == torch.float64 else x
    return x, model.select_conditions(cond) if hasattr(model, "select_conditions") else cond


def _describe_rows(rows: Tensor, data: EvaluationData) -> str:
    total = len(data.split("test"))
    return f"{len(rows)} test images" if len(rows) == total else f"{len(rows)} of {total} test images"
