"""Super-resolution: how samples agree with the low-resolution images that they were asked for."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from gencompare.evaluation.asked import Asked
from gencompare.evaluation.quantize import as_stored, levels_of
from gencompare.evaluation.scoring import likeness
from gencompare.records import Metric

ROWS = 500
"""Images in one step of what is computed about all samples."""


def super_resolution(images: Tensor, asked: Asked) -> dict[str, Metric]:
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
    found = likeness(original, images, note)
    blurred = likeness(original, torch.cat(resized), "")
    for name, metric in blurred.items():
        if name in found and metric.value is not None:
            found[name] = replace(found[name], note=f"{note}; resized low_res: {metric.value:.4g}")
    consistency = Metric(
        float(torch.cat(errors).double().mean()), better="lower", note="squared, pixels in [0, 1]; low_res of samples"
    )
    return {"consistency": consistency} | found


def beside(images: Tensor, asked: Asked | None) -> tuple[Tensor, int | None]:
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
