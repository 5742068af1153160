"""Numbers, names and protocols as text: the same in terminal, page and Markdown."""

from __future__ import annotations

import math
from typing import Any

from gencompare.records import Measurement, Metric

NONE = "–"  # noqa: RUF001
"""Shown where there is no figure."""

BASELINES = "× floor"  # noqa: RUF001

TITLES = {
    "fid": "FID",
    "fd": "FD",
    "kid": "KID",
    "kd": "KD",
    "mmd": "MMD",
    "nfe": "NFE",
    "is": "IS",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "bpd": "bits/dim",
}
"""Names that are written otherwise than as words with spaces between."""

FIRST = (
    "mmd", "fid", "fd_", "kid", "kd_", "precision", "recall", "density", "coverage", "bpd", "confident", "memorization",
)  # fmt: skip
"""Beginnings of the metrics that come first in a table, in this order; the others follow by name."""


def direction_arrow(metric: Metric) -> str:
    """An arrow towards better values: ↓, ↑, or → and the target; empty for a metric without an order."""
    if metric.target is not None:
        return f"→{metric.target:g}"
    return "" if metric.higher_is_better is None else "↑" if metric.higher_is_better else "↓"


def title(name: str) -> str:
    """A metric's name for a reader."""
    for begin, written in TITLES.items():
        if name == begin or name.startswith((begin + "_", begin + "/")):
            return (written + name[len(begin) :].replace("_", " ").replace("/", " ")).strip()
    return name.replace("_", " ").replace("/", " ")


def format_place(name: str) -> tuple[int, str]:
    """Sorting key of a metric's column."""
    return next((k for k, begin in enumerate(FIRST) if name.startswith(begin)), len(FIRST)), name


def format_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def format_number(value: Any) -> float | None:
    """``value`` if it is a finite number (a record's free fields may hold anything), else None."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def format_metric(value: float | None) -> str:
    """A number to two decimals or three significant digits, whichever says more."""
    if value is None or not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e7 or size < 1e-4:
        return f"{value:.2e}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if size >= 0.9995 else f"{value:#.3g}"


def format_rate(value: float | None) -> str:
    """So many a second, or so many network calls: 2.5, 50, 1,169."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def format_factor(value: float | None) -> str:
    """A multiple: 2.9, 14, 1,200."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:.2f}" if value < 1.995 else f"{value:.1f}" if value < 9.95 else f"{value:,.0f}"


def format_count(value: float | None) -> str:
    """A count with a unit of thousand or million: 870, 12.3 k, 1.20 M."""
    if value is None or not math.isfinite(value):
        return NONE
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}" if value != int(value) else f"{int(value)}"


def format_duration(seconds: float | None) -> str:
    """12 s, 3:05 min, 2:10 h."""
    if seconds is None or not math.isfinite(seconds):
        return NONE
    if seconds < 59.5:
        return f"{seconds:.2g} s" if seconds < 9.5 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d} h"


def format_calls(nfe: dict[str, float] | None) -> float | None:
    """Network calls a sample, over all networks; None where they were not counted."""
    counted = [n for n in (nfe or {}).values() if format_finite(n)]
    return sum(counted) if counted else None


def format_seeds(metric: Metric) -> str:
    """A primary_metric distance as a multiple of its floor.

    Only a primary_metric is divided: the floor of an unbiased distance (KID) is 0 up to noise, and that of a share is no
    unit of anything.
    """
    return (
        f"{format_factor(metric.ratio_to_baseline)} {BASELINES}"
        if metric.higher_is_better is False and format_finite(metric.ratio_to_baseline)
        else ""
    )


def format_interval(metric: Metric) -> str:
    """``[low, high]``, or nothing."""
    if metric.interval is None or not all(map(format_finite, metric.interval)):
        return ""
    return f"[{format_metric(metric.interval[0])}, {format_metric(metric.interval[1])}]"


WARNED = "warning"
"""Shown with the primary metric of samples about which the evaluation warns."""


def join(*parts: str) -> str:
    """Remarks on a metric as one text."""
    return " · ".join(part for part in parts if part)


def beside(metric: Metric, *, primary_metric: bool, real: bool = True) -> str:
    """What stands beside a figure: its interval, its multiple of the floor or (``real``) the floor, its label."""
    parts = []
    if format_interval(metric):
        parts.append(format_interval(metric))
    if primary_metric and format_seeds(metric):
        parts.append(format_seeds(metric))
    elif real and format_finite(metric.baseline):
        parts.append(f"real {format_metric(metric.baseline)}")
    if label(metric):
        parts.append(label(metric))
    return " · ".join(parts)


def label(metric: Metric) -> str:
    """The first word of a figure's note where it is one (``bound``, ``exact``), before a comma or the end."""
    first = metric.note.split(",")[0].strip()
    return first if first.isalpha() and len(first) <= 12 else ""


def describe(m: Measurement) -> str:
    """A measurement protocol in one sentence or two."""
    drawn = f"{m.num_images:,} generated images ({'conditional' if m.conditioning == 'labels' else m.conditioning}"
    drawn += f", labels: {m.label_distribution}" if m.label_distribution not in ("", "none") else ""
    drawn += f", {m.chunk_size:,} from one seed at a time)" if m.chunk_size else ")"
    against = f"held against the {m.num_reference_images:,} images of the {m.reference} split of {m.data}"
    resized = "no resizing" if m.resize in ("", "none") else f"resized by {m.resize}"
    rounded = "not rounded" if m.quantization in ("", "none") else f"rounded to {m.quantization}"
    return f"{drawn}, {against}, {rounded}, {resized}. Features: {m.extractor} ({m.extractor_hash[:12]})."


def listed(names: list[str]) -> str:
    """``a, b and c``, with spaces for underscores."""
    names = [name.replace("_", " ") for name in names]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def unlike(differences: dict[str, tuple[Any, Any]]) -> str:
    """The fields in which a second protocol differs from a first, in words."""
    return ", ".join(
        f"{name.replace('_', ' ')} ({_short(second)} instead of {_short(first)})"
        for name, (first, second) in differences.items()
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "…"
