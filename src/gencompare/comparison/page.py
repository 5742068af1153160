"""The comparison page: one self-contained HTML file."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from gencompare.comparison import formatting
from gencompare.comparison.charts import Charts, by_rank, save_all
from gencompare.comparison.load_runs import ComparisonOptions, LoadedRuns, RunFolder, load_runs
from gencompare.comparison.planning import power_note
from gencompare.comparison.published import REPORTED, published_results, tiers
from gencompare.comparison.ranking import (
    RankingTable,
    explain_separate_tables,
    metric_disagreements,
    ranking_tables,
    runs_without_results,
)
from gencompare.comparison.sampler_description import describe_sampling
from gencompare.comparison.settings import config_settings, differing_settings
from gencompare.comparison.statistics import MIN_SEEDS
from gencompare.comparison.suggestions import suggested_commands
from gencompare.comparison.svg_plots import MARKERS, Chart, legend, styles, svg
from gencompare.comparison.tables import (
    LIKELIHOOD_TITLES,
    Column,
    columns,
    format_value,
    likelihood_lines,
    metrics_table,
    real_data,
    table_title,
    write_csv,
    write_latex,
    write_markdown,
)
from gencompare.comparison.terminal import describe_run
from gencompare.errors import UserError, printable
from gencompare.files import write_text
from gencompare.records import Metric
from gencompare.version import __version__

HTML_FILE, CSV_FILE, MARKDOWN_FILE, LATEX_FILE = "compare.html", "compare.csv", "compare.md", "compare.tex"

MAX_IMAGE_BYTES = 7_000_000
"""Maximum total size of the embedded images in bytes, before base64 encoding adds a third. If they do not all fit,
images of lower-ranked runs are omitted."""

MAX_DETAILED_ROWS = 12
"""Maximum length of a ranking for which the page shows a table of all metrics, which has one column per ranked row. The
CSV file contains all metrics of any ranking."""


MAIN_TITLES = ("run", "family", "vs. best", "bits/dim", "NFE")
"""Columns without a metric that are always visible in a table."""


def report(
    folders: Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    options: ComparisonOptions = ComparisonOptions(),
) -> Path:
    """Compare the runs in ``folders`` (see `write_report`)."""
    return write_report(load_runs(folders, options), out)


def write_report(loaded: LoadedRuns, out: str | os.PathLike[str]) -> Path:
    """Write ``compare.html``, ``.csv``, ``.md``, ``.tex`` and the folder ``plots`` to ``out``.

    Return the path of ``compare.html``. The folder ``plots`` is not written for a single run.

    Raises:
        UserError: there is no readable record, or no run has the metric or the config key that the options name.
    """
    if not loaded.runs:
        reasons = [skip.reason for skip in loaded.skipped]
        raise UserError(f"No run can be compared: {reasons[0]}" if reasons else "No run folder was given to compare.")
    out = Path(out)
    write_csv(loaded, out / CSV_FILE)
    write_markdown(loaded, out / MARKDOWN_FILE)
    write_latex(loaded, out / LATEX_FILE)
    if len(loaded.runs) > 1:
        save_all(loaded, out)
    write_text(out / HTML_FILE, render(loaded))
    return out / HTML_FILE


def render(loaded: LoadedRuns) -> str:
    """Return the HTML page of one or several runs."""
    tables = ranking_tables(loaded)
    runs = by_rank(tables, loaded.runs)
    style = styles(tables, runs)
    single = len(runs) == 1
    script = _asset("page.js")
    charts = Charts.of(tables, runs, style)
    pareto_svgs = _draw([each.chart for each in charts.pareto], "c")
    return _template().render(
        title=runs[0].label if single else f"Comparison of {len(runs)} runs",
        subtitle=describe_run(runs[0].record) if single else _subtitle(runs, tables),
        single=single,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        css=Markup(_asset("page.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        tables=[_table(number, table, single) for number, table in enumerate(tables, 1)],
        intervals={number: (chart, Markup(svg(chart, f"i{number}"))) for number, chart in charts.intervals.items()},
        published=_published(tables, runs),
        separate_tables=explain_separate_tables(tables) if len(tables) > 1 else "",
        disagreements=metric_disagreements(tables),
        commands=suggested_commands(tables),
        images=_images(tables, runs, single),
        distances=_draw(charts.distances, "d"),
        losses=_draw(charts.losses, "l"),
        nfe=_draw(charts.nfe, "n"),
        likelihoods=_draw(charts.likelihoods, "b"),
        likelihood_titles=LIKELIHOOD_TITLES,
        costs=[(*drawn, each.front, each.others) for drawn, each in zip(pareto_svgs, charts.pareto, strict=True)],
        schedules=_draw(charts.schedules, "s"),
        runs=[_run(run) for run in runs],
        style=style,
        markers={dash: path for dash, (_, path) in MARKERS.items()},
        legend=lambda drawn: legend(chart for chart, *_ in drawn),
        settings=[] if single else differing_settings(runs),
        without_results=runs_without_results(runs),
        skipped=loaded.skipped,
        missing=formatting.MISSING,
        percent=formatting.format_percent,
        min_seeds=MIN_SEEDS,
    )


@cache
def _template() -> Any:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_asset("page.html.jinja"))


def _asset(name: str) -> str:
    return resources.files("gencompare.comparison").joinpath(name).read_text(encoding="utf-8")


def _subtitle(runs: list[RunFolder], tables: list[RankingTable]) -> str:
    families = sorted({run.record.family for run in runs})
    data = sorted({str(run.record.data.get("name", "")) for run in runs})
    protocols = f"{len(tables)} protocol{'s' if len(tables) != 1 else ''}"
    return f"{', '.join(families)} on {', '.join(data)}; {protocols}"


def _table(number: int, table: RankingTable, single: bool) -> dict[str, Any]:
    shown = columns(table)
    return {
        "number": number,
        "data": table.measurement.data,
        "title": table_title(table),
        "protocol": formatting.describe_protocol(table.measurement),
        "id": table.measurement.id,
        "primary_metric": table.primary_metric,
        "notes": [*table.notes(), *filter(None, [power_note(table)])],
        "warnings": table.warnings(),
        "summary": table.summary(),
        "columns": shown,
        "real_data": [real_data(table, column) for column in shown],
        "extra": [not _is_main(column, table) for column in shown],
        "sections": [
            (heading, [(row, [column.cell(row) for column in shown]) for row in rows])
            for heading, rows in table.sections()
        ],
        "likelihoods": [] if single else likelihood_lines(table),
        "metrics": metrics_table(table) if single or len(table.rows) <= MAX_DETAILED_ROWS else None,
    }


def _is_main(column: Column, table: RankingTable) -> bool:
    """Return whether a column is always visible. The page hides the others until a switch is set."""
    if column.title == "family":
        return any(row.run.record.family not in row.run.label for row in table.rows)
    name = column.metric_name or ""
    return (
        name in (table.primary_metric, "fid", "precision", "recall", "coverage")
        or (name.startswith("fd_") and not name.endswith("_infinity"))
        or (not name and column.title.startswith(MAIN_TITLES))
    )


def _published(tables: list[RankingTable], runs: list[RunFolder]) -> dict[int, list[tuple[str, ...]]]:
    """Format published results as strings. The keys are the numbers of the tables that they are shown after."""
    found = tiers(run.record for run in runs)
    last = {table.measurement.data: number for number, table in enumerate(tables, 1)}
    return {
        number: [
            (
                result.model, formatting.format_metric(result.fid), formatting.format_metric(result.bpd),
                formatting.format_rate(result.nfe), formatting.format_count(result.images),
                found.get(result.name, REPORTED),
                f"{result.source} ({result.note})" if result.note else result.source,
            )
            for result in published_results(data)
        ]
        for data, number in last.items()
        if published_results(data)
    }  # fmt: skip


# Images


@dataclass(frozen=True)
class PageImage:
    run: RunFolder
    caption: str
    source: str
    """The image as a data URI."""


@dataclass
class PageImages:
    """The images of a page, by title, with a limit on their total size."""

    bytes_left: int
    by_title: dict[str, list[PageImage]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    """Images that are listed in a record but whose files are missing."""
    num_omitted: int = 0
    _added: set[tuple[str, str, bytes]] = field(default_factory=set)

    def add(self, run: RunFolder, title: str, path: str, caption: str) -> None:
        """Add an image unless it was added before, its file is missing, or it would exceed the size limit."""
        content = run.read_png(path)
        if content is None:
            self.missing.append(f"{run.label}: {title} ({path})")
        elif (run.label, title, content) in self._added:
            return
        elif len(content) > self.bytes_left:
            self.num_omitted += 1
        else:
            self.bytes_left -= len(content)
            self._added.add((run.label, title, content))
            source = "data:image/png;base64," + base64.b64encode(content).decode()
            self.by_title.setdefault(title, []).append(PageImage(run, caption, source))


def _images(tables: list[RankingTable], runs: list[RunFolder], single: bool) -> PageImages:
    images = PageImages(MAX_IMAGE_BYTES)
    several_data_sets = len({table.measurement.data for table in tables}) > 1
    for table in tables:
        for row in table.rows:
            run, result = row.group.members[0]
            # Show the metric of the run that drew these samples, not the mean of its row.
            metric = result.metrics.get(table.primary_metric, Metric(None))
            value = f"{formatting.title(table.primary_metric)} {formatting.format_metric(metric.value)}"
            for title, path in result.images.items():
                heading = f"{table.measurement.data}: {title}" if several_data_sets else title
                images.add(run, heading, path, f"{value}, {describe_sampling(result)}")
    for run in runs:
        if single or not any(result.images for result in run.record.results):
            for title, path in run.record.images.items():
                images.add(run, title, path, "" if single else run.record.family)
    return images


def _draw(charts: list[Chart], prefix: str) -> list[tuple[Chart, Markup]]:
    return [(chart, Markup(svg(chart, f"{prefix}{k}"))) for k, chart in enumerate(charts)]


# Runs


def _run(run: RunFolder) -> dict[str, Any]:
    """Return the known facts about a run (state, data, cost, versions), and its config."""
    record, training, environment = run.record, run.record.training, run.record.environment
    git, packages = _as_dict(environment.get("git")), _as_dict(environment.get("packages"))
    commit = str(git.get("commit", ""))[:12] + (" with uncommitted changes" if git.get("dirty") else "")
    facts = {
        "state": record.state,
        "error": str(training.get("error") or ""),
        "folder": printable(run.folder),
        "created": record.created,
        "command": " ".join(["python run.py", *record.overrides]) if record.overrides else "",
        "data": f"{record.data.get('name', '')} {format_value(record.data.get('splits') or {})}",
        "parameters": _if_number(record.model.get("parameters"), formatting.format_count),
        "training FLOPs": _if_number(training.get("flops"), formatting.format_count),
        "peak memory": _if_number(training.get("peak_memory_bytes"), lambda size: f"{size / 2**20:,.0f} MiB"),
        "processes": format_value(training.get("processes", "")),
        "device": str(environment.get("device", "")),
        "commit": commit,
        "versions": "  ".join(f"{name} {version}" for name, version in packages.items() if version),
    }
    config = json.dumps(config_settings(record.config), indent=1, ensure_ascii=False) if record.config else ""
    known = {name: text.strip() for name, text in facts.items() if text.strip()}
    return {"run": run, "description": describe_run(record), "facts": known, "config": config}


def _as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _if_number(value: Any, to_text: Callable[[float], str]) -> str:
    number = formatting.as_number(value)
    return to_text(number) if number is not None else ""
