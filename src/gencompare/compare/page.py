"""The comparison page: one self-contained HTML file."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from gencompare import __version__
from gencompare.compare import formatting, terminal
from gencompare.compare.charts import Charts, in_order, save_all
from gencompare.compare.load_runs import LoadedRuns, ResultView, RunFolder, load_runs
from gencompare.compare.ranking import (
    TableSection,
    by_primary_metric,
    disagreements,
    published_results,
    ranked,
    without_metrics,
)
from gencompare.compare.sampler_description import sampler_description
from gencompare.compare.settings import differences, settings_of
from gencompare.compare.statistics import MIN_SEEDS
from gencompare.compare.suggestions import suggested_commands
from gencompare.compare.svg_plots import MARKS, Chart, legend, styles, svg
from gencompare.compare.tables import (
    all_metrics,
    columns,
    compact_config,
    heading,
    write_csv,
    write_latex,
    write_markdown,
)
from gencompare.errors import UserError
from gencompare.files import write_text
from gencompare.records import Metric

PICTURE_BYTES = 7_000_000
"""Pictures are put in, best rank first, until they take so much; base64 makes that 4/3 of it."""

DETAILED = 12
"""A table of all figures has a column a row of the ranking: with more rows than this it is left to the CSV."""


@dataclass(frozen=True)
class PageImage:
    run: RunFolder
    caption: str
    """What was drawn, and how good it is."""
    source: str
    """A data URI."""


@dataclass
class PageImages:
    """The pictures of a page under its budget, side by side under their titles."""

    left: int
    by_title: dict[str, list[PageImage]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    """Pictures that a record names and that are not there."""
    too_many: int = 0
    _seen: set[tuple[str, str, bytes]] = field(default_factory=set)

    def add(self, run: RunFolder, title: str, path: str, caption: str) -> None:
        content = run.picture(path)
        if content is None:
            self.missing.append(f"{run.label}: {title} ({path})")
        elif (run.label, title, content) in self._seen:
            return
        elif len(content) > self.left:
            self.too_many += 1
        else:
            self.left -= len(content)
            self._seen.add((run.label, title, content))
            source = "data:image/png;base64," + base64.b64encode(content).decode()
            self.by_title.setdefault(title, []).append(PageImage(run, caption, source))


def write_page(gathered: LoadedRuns, path: str | os.PathLike[str]) -> None:
    """Write the page of one run, or of many."""
    write_text(path, render(gathered))


def render(gathered: LoadedRuns) -> str:
    groups = ranked(gathered)
    runs = in_order(groups, gathered.runs)
    style = styles(groups, runs)
    single = len(runs) == 1
    script = _asset("page.js")
    charts = Charts.of(groups, runs, style)
    return _template().render(
        title=runs[0].label if single else f"Comparison of {len(runs)} runs",
        subtitle=terminal.cost(runs[0].record) if single else _subtitle(runs, groups),
        single=single,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        css=Markup(_asset("page.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        groups=[_table(k, group, single) for k, group in enumerate(groups, 1)],
        anchors=_anchors(groups),
        apart=by_primary_metric(groups) if len(groups) > 1 else "",
        disagreements=disagreements(groups),
        commands=suggested_commands(groups),
        pictures=_images(groups, runs, single),
        distances=_drawn(charts.distances, "d"),
        losses=_drawn(charts.losses, "l"),
        against_calls=_drawn(charts.against_calls, "n"),
        costs=[
            (*drawn, trade.front)
            for drawn, trade in zip(_drawn([t.chart for t in charts.trades], "c"), charts.trades, strict=True)
        ],
        schedules=_drawn(charts.schedules, "s"),
        runs=[_run(run) for run in runs],
        style=style,
        marks={dash: path for dash, (_, path) in MARKS.items()},
        legend=lambda drawn: legend(chart for chart, *_ in drawn),
        settings=[] if single else differences(runs),
        without_figures=without_metrics(runs),
        skipped=gathered.skipped,
        dash=formatting.NONE,
        least_seeds=MIN_SEEDS,
    )


@cache
def _template() -> Any:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_asset("page.html.jinja"))


def _asset(name: str) -> str:
    return resources.files("gencompare.compare").joinpath(name).read_text(encoding="utf-8")


def _subtitle(runs: list[RunFolder], groups: list[TableSection]) -> str:
    families = sorted({run.record.family for run in runs})
    data = sorted({str(run.record.data.get("name", "")) for run in runs})
    protocols = f"{len(groups)} protocol{'s' if len(groups) != 1 else ''}"
    return f"{', '.join(families)} on {', '.join(data)}; {protocols}"


def _table(number: int, group: TableSection, single: bool) -> dict[str, Any]:
    shown = columns(group)
    return {
        "number": number,
        "data": group.measurement.data,
        "title": f"{group.measurement.data}: {heading(group, group.primary_metric)}",
        "protocol": formatting.describe(group.measurement),
        "id": group.measurement.id,
        "primary_metric": group.primary_metric,
        "notes": group.notes(),
        "warnings": group.flags(),
        "columns": shown,
        "sections": [
            (title, [(row, [column.cell(row) for column in shown]) for row in rows]) for title, rows in group.sections()
        ],
        "figures": all_metrics(group) if single or len(group.rows) <= DETAILED else None,
    }


def _anchors(groups: list[TableSection]) -> dict[int, list[tuple[str, ...]]]:
    """Published figures, as text, by the number of the last table of their data set: there they stand below."""
    last = {group.measurement.data: number for number, group in enumerate(groups, 1)}
    return {
        number: [
            (
                a.model, formatting.format_metric(a.fid), formatting.format_metric(a.bpd),
                formatting.format_rate(a.nfe),
                formatting.format_count(a.images),
                f"{a.source} ({a.note})" if a.note else a.source,
            )
            for a in published_results(data)
        ]
        for data, number in last.items()
        if published_results(data)
    }  # fmt: skip


def _images(groups: list[TableSection], runs: list[RunFolder], single: bool) -> PageImages:
    pictures = PageImages(PICTURE_BYTES)
    for group in groups:
        for row in group.rows:
            run, result = row.line.members[0]
            # The figure of the run whose samples these are, not its row's mean.
            own = result.metrics.get(group.primary_metric, Metric(None))
            quality = f"{formatting.title(group.primary_metric)} {formatting.format_metric(own.value)}"
            for title, path in result.images.items():
                of_data = (
                    title if len({g.measurement.data for g in groups}) == 1 else f"{group.measurement.data}: {title}"
                )
                pictures.add(run, of_data, path, f"{quality}, {sampler_description(result)}")
    for run in runs:
        if single or not any(result.images for result in run.record.results):
            for title, path in run.record.images.items():
                pictures.add(run, title, path, "" if single else run.record.family)
    return pictures


def _drawn(charts: list[Chart], key: str) -> list[tuple[Chart, Markup]]:
    return [(chart, Markup(svg(chart, f"{key}{k}"))) for k, chart in enumerate(charts)]


def _run(run: RunFolder) -> dict[str, Any]:
    """What a reader may want to know of one run, in order; lines without a value are left out."""
    record, taken, made = run.record, run.record.training, run.record.environment
    git, packages = _mapping(made.get("git")), _mapping(made.get("packages"))
    commit = str(git.get("commit", ""))[:12] + (" with uncommitted changes" if git.get("dirty") else "")
    memory = formatting.format_number(taken.get("peak_memory_bytes"))
    facts = {
        "state": record.state,
        "error": str(taken.get("error") or ""),
        "folder": str(run.folder),
        "made": record.created,
        "command": " ".join(["python run.py", *record.overrides]) if record.overrides else "",
        "data": f"{record.data.get('name', '')} {compact_config(record.data.get('splits') or {})}",
        "parameters": _known(formatting.format_number(record.model.get("parameters")), formatting.format_count),
        "FLOPs": _known(formatting.format_number(taken.get("flops")), formatting.format_count),
        "peak memory": f"{memory / 2**20:,.0f} MiB" if memory is not None else "",
        "processes": compact_config(taken.get("processes", "")),
        "device": str(made.get("device", "")),
        "commit": commit,
        "versions": "  ".join(f"{name} {version}" for name, version in packages.items() if version),
    }
    config = json.dumps(settings_of(record.config), indent=1, ensure_ascii=False) if record.config else ""
    known = {name: text.strip() for name, text in facts.items() if text.strip()}
    return {"run": run, "cost": terminal.cost(record), "facts": known, "config": config}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _known(value: float | None, say: Any) -> str:
    return say(value) if value is not None else ""


PAGE, TABLE, MARKDOWN, LATEX = "compare.html", "compare.csv", "compare.md", "compare.tex"


def report(
    folders: Iterable[str | os.PathLike[str]], out: str | os.PathLike[str], view: ResultView = ResultView()
) -> Path:
    """`write` of what is gathered from ``folders``."""
    return write(load_runs(folders, view), out)


def write(gathered: LoadedRuns, out: str | os.PathLike[str]) -> Path:
    """Write ``compare.html``, ``.csv``, ``.md``, ``.tex`` and the folder ``plots`` in ``out``. Returns the page.

    One folder makes the page and the tables of a single run. Raises `UserError` when none of them holds a readable
    record, and when the view asks for what there is not.
    """
    if not gathered.runs:
        reasons = [skip.reason for skip in gathered.skipped]
        raise UserError(f"No run can be shown: {reasons[0]}" if reasons else "No run folder was given to compare.")
    out = Path(out)
    write_csv(gathered, out / TABLE)
    write_markdown(gathered, out / MARKDOWN)
    write_latex(gathered, out / LATEX)
    if len(gathered.runs) > 1:
        save_all(gathered, out)
    write_page(gathered, out / PAGE)
    return out / PAGE
