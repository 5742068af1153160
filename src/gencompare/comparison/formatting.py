"""Format numbers, metric names and protocols for the terminal, the HTML page and the table files."""

from __future__ import annotations

import math
from typing import Any

from gencompare.records import Measurement, Metric

MISSING = "–"  # noqa: RUF001
"""Text that is shown in place of a missing value."""

WARNING = "warning"
"""Text that is shown next to the primary metric of samples with warnings."""

WIDE = 1000
"""Width of tables with folders. The terminal itself wraps longer lines, so that a folder can be copied as one word."""

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
"""Display names of abbreviated metric names or prefixes."""

COLUMN_ORDER = (
    "mmd", "fid", "fd_", "kid", "kd_", "precision", "recall", "density", "coverage", "bpd", "confident", "memorization",
)  # fmt: skip
"""Prefixes of the metrics that come first in a table, in this order. The other metrics follow by name."""


def title(name: str) -> str:
    """Return the display name of a metric."""
    for prefix, spelling in TITLES.items():
        if name == prefix or name.startswith((prefix + "_", prefix + "/")):
            return (spelling + name[len(prefix) :].replace("_", " ").replace("/", " ")).strip()
    return name.replace("_", " ").replace("/", " ")


def direction_arrow(metric: Metric) -> str:
    """Return the direction of better values: ↓, ↑, → with the target, or an empty string if there is none."""
    if metric.target is not None:
        return f"→{metric.target:g}"
    return "" if metric.higher_is_better is None else "↑" if metric.higher_is_better else "↓"


def column_position(name: str) -> tuple[int, str]:
    """Return the sort key of a metric's column."""
    return next((k for k, prefix in enumerate(COLUMN_ORDER) if name.startswith(prefix)), len(COLUMN_ORDER)), name


def is_finite(value: float | None) -> bool:
    """Return whether ``value`` is finite and not None."""
    return value is not None and math.isfinite(value)


def as_number(value: Any) -> float | None:
    """Return ``value`` if it is a finite number, else None. (Unvalidated record fields may contain anything.)"""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def total_nfe(nfe: dict[str, float] | None) -> float | None:
    """Sum network evaluations per sample over the networks. Return None if they were not counted."""
    counted = [n for n in (nfe or {}).values() if is_finite(n)]
    return sum(counted) if counted else None


def format_metric(value: float | None) -> str:
    """Format a metric with two decimals, or with three significant digits below 1.

    Values of at least 1000 have no decimals, and extreme values are in scientific notation.
    """
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e7 or size < 1e-4:
        return f"{value:.2e}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if size >= 0.9995 else f"{value:#.3g}"


def format_rate(value: float | None) -> str:
    """Format a rate or a number of network evaluations, such as 2.5, 50 or 1,169."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def format_ratio(value: float | None) -> str:
    """Format a ratio, such as 1.10, 2.9, 14 or 1,200."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:.2f}" if value < 1.995 else f"{value:.1f}" if value < 9.95 else f"{value:,.0f}"


def format_percent(value: float | None) -> str:
    """Format a share, such as 31 % or 4.2 %."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{100 * value:.2g} %" if value < 0.995 else f"{100 * value:.0f} %"


def format_count(value: float | None) -> str:
    """Format a count with an SI prefix, such as 870, 12.3 k or 1.2 M."""
    if value is None or not math.isfinite(value):
        return MISSING
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g}" if value != int(value) else f"{int(value)}"


def format_duration(seconds: float | None) -> str:
    """Format a duration, such as 12 s, 3:05 min or 2:10 h."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 59.5:
        return f"{seconds:.2g} s" if seconds < 9.5 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d} h"


def format_interval(metric: Metric) -> str:
    """Format the interval as ``[low, high]``. Return an empty string if there is none."""
    if metric.interval is None or not all(map(is_finite, metric.interval)):
        return ""
    return f"[{format_metric(metric.interval[0])}, {format_metric(metric.interval[1])}]"


def format_ratio_to_baseline(metric: Metric) -> str:
    """Format a distance relative to its baseline, such as ``2.5 × real data``. Return an empty string if the ratio is
    undefined."""
    if metric.higher_is_better is not False or not is_finite(metric.ratio_to_baseline):
        return ""
    return f"{format_ratio(metric.ratio_to_baseline)} × real data"  # noqa: RUF001


def note_label(metric: Metric) -> str:
    """Return the part of the note before its first comma, such as ``bound``, if it is a single short word.

    Otherwise, return an empty string.
    """
    first = metric.note.split(",")[0].strip()
    return first if first.isalpha() and len(first) <= 12 else ""


def join_values(*values: str) -> str:
    """Join the nonempty values with spaces."""
    return " ".join(filter(None, values))


def join_notes(*notes: str) -> str:
    """Join the nonempty notes on a metric."""
    return " · ".join(note for note in notes if note)


def annotation(metric: Metric, *, primary: bool, baseline: bool = True) -> str:
    """Format the text below a metric value: confidence interval, real-data baseline, and the label of its note.

    Args:
        primary: whether this is the primary metric. Its value is also shown as a multiple of its real-data baseline.
        baseline: whether to show the real-data baseline of a metric that is not shown as a multiple of it.
    """
    compared = format_ratio_to_baseline(metric) if primary else ""
    if not compared and baseline and is_finite(metric.baseline):
        compared = f"real data {format_metric(metric.baseline)}"
    return join_notes(format_interval(metric), compared, note_label(metric))


def describe_protocol(m: Measurement) -> str:
    """Describe an evaluation protocol in two sentences."""
    settings = ["conditional" if m.conditioning == "labels" else m.conditioning]
    settings += [f"labels as in {m.label_distribution}"] if m.label_distribution not in ("", "none") else []
    settings += [f"{m.chunk_size:,} per seed"] if 0 < m.chunk_size < m.num_images else []
    rounding = "not rounded" if m.quantization in ("", "none") else f"rounded to {m.quantization}"
    resizing = "not resized" if m.resize in ("", "none") else f"resized ({m.resize})"
    return (
        f"{m.num_images:,} generated images ({', '.join(settings)}) against {m.num_reference_images:,} images of the"
        f" {m.reference} split of {m.data}, {rounding}, {resizing}. Features: {m.extractor} ({m.extractor_hash[:12]})."
    )


FIELD_TITLES = {"num_images": "number of images", "num_reference_images": "number of reference images"}


def field_title(name: str) -> str:
    """Return the display name of a field of a protocol."""
    return FIELD_TITLES.get(name, name.replace("_", " "))


def describe_differences(differences: dict[str, tuple[Any, Any]]) -> str:
    """List the fields that differ between two protocols, with both values."""
    return ", ".join(
        f"{field_title(name)} ({_shorten(second)} instead of {_shorten(first)})"
        for name, (first, second) in differences.items()
    )


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "…"


def join_names(names: list[str]) -> str:
    """Join names as ``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
