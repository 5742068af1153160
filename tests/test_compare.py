"""Ranking, reading run folders, charts, the page and the table files; records are untrusted input."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import re
import shlex
import shutil
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from rich.console import Console

from gencompare.comparison import charts, formatting, page
from gencompare.comparison.load_runs import LoadedRuns, find_run_folders, load_runs, read_curve
from gencompare.comparison.page import report
from gencompare.comparison.ranking import (
    BASELINE,
    NEAR_BASELINE,
    NO_VALUE,
    NOT_BETTER,
    TRAINED_WITH_EXTRACTOR,
    RankingTable,
    explain_separate_tables,
    metric_disagreements,
    rank_results,
    ranking_tables,
)
from gencompare.comparison.settings import differing_settings
from gencompare.comparison.suggestions import suggested_commands
from gencompare.comparison.svg_plots import styles
from gencompare.comparison.tables import columns, likelihood_lines
from gencompare.comparison.terminal import print_tables, run_summary
from gencompare.errors import UserError
from gencompare.records import Metric, Result, RunRecord
from synthetic import DIGITS, result, write_curve, write_run

FASHION = replace(DIGITS, data="fashion_mnist", extractor="fashion_mnist")
ODD = '<img src=x onerror="alert(1)"><blink>[bold red]$a_1$|`x`*y*</blink>&amp;'
"""A name that contains markup for HTML, Markdown, rich and matplotlib."""


def statuses(table: RankingTable) -> list[tuple[int | None, str, str]]:
    return [(row.rank, row.run.label, row.status) for row in table.rows]


def ranked(folder: Path, values: dict[str, float | None], **common: Any) -> RankingTable:
    """Return a table of runs with these primary metrics; the family is the name up to the first ``-``."""
    folders = [
        write_run(folder / name, [result(value, **common)], family=name.split("-")[0], with_grid=False)
        for name, value in values.items()
    ]
    (table,) = rank_results(load_runs(folders).runs)
    return table


# Ranking


@pytest.mark.parametrize(
    "direction, order",
    [({"higher_is_better": False}, "abcd"), ({"higher_is_better": True}, "dcba"), ({"target": 1.0}, "bcad")],
)
def test_rows_are_ranked_by_the_primary_metric_in_its_direction(tmp_path: Path, direction: dict[str, Any], order: str):
    values = {"a": 0.2, "b": 0.9, "c": 1.2, "d": 3.0}
    folders = [
        write_run(tmp_path / name, [result(0, metrics={"fd_digits": Metric(value, **direction)})], with_grid=False)
        for name, value in values.items()
    ]
    (table,) = rank_results(load_runs(folders).runs)
    assert statuses(table) == [(k, name, "") for k, name in enumerate(order, 1)]


def test_with_a_target_rows_are_ordered_by_the_values_that_are_tested(tmp_path: Path):
    """Errors of both signs cancel in the mean over seeds, but not in the values of the individual seeds."""
    seeds = {"far": [0.5, 1.5, 0.5, 1.5, 1.0], "near": [1.1, 1.11, 1.1, 1.09, 1.12], "off": [3.0, 3.1, 3.2, 3.3, 2.9]}
    folders = [
        write_run(
            tmp_path / f"{name}{k}", [result(0, metrics={"fd_digits": Metric(value, target=1.0)})], family=name,
            seed=k, with_grid=False,
        )
        for name, values in seeds.items() for k, value in enumerate(values)
    ]  # fmt: skip
    (table,) = rank_results(load_runs(folders).runs)
    assert [row.run.record.family for row in table.rows] == ["near", "far", "off"]
    assert abs(table.rows[1].metric.value - 1) < abs(table.rows[0].metric.value - 1), "the best row has a worse mean"
    against = next(column for column in columns(table) if column.title == "vs. best")
    cells = [against.cell(row) for row in table.rows]
    assert cells[0].text == "best tested" and cells[2].annotation == "significantly worse than #1"
    keys = [cell.sort_key for cell in cells]
    assert keys == sorted(keys) and len(set(keys)) == 3, "the best row sorts next to the row that differs least from it"
    assert any("mean distance of their seeds from 1" in note for note in table.notes())


def test_equal_values_share_a_rank_and_unordered_metrics_do_not_rank(tmp_path: Path):
    table = ranked(tmp_path / "x", {"a": 2.0, "b": 1.0, "c": 2.0, "d": 3.0})
    assert statuses(table) == [(1, "b", ""), (2, "a", ""), (2, "c", ""), (4, "d", "")]
    unordered = {"fd_digits": Metric(1.0, higher_is_better=None)}
    table = ranked(tmp_path / "y", {"a": 2.0, "b": 1.0}, metrics=unordered)
    assert statuses(table) == [(None, "a", ""), (None, "b", "")]


def test_a_family_not_better_than_the_gaussian_baseline_is_not_ranked(tmp_path: Path):
    table = ranked(tmp_path, {"vae": 11.0, "gaussian": 10.0, "gan": 10.0, "ddpm": 9.9})
    assert statuses(table) == [
        (1, "ddpm", ""), (2, "gaussian", BASELINE), (None, "gan", NOT_BETTER), (None, "vae", NOT_BETTER),
    ]  # fmt: skip
    assert [heading for heading, _ in table.sections()] == ["", "Not ranked: not better than the Gaussian baseline"]
    (note,) = table.notes()
    assert note.startswith("No difference is claimed to be significant")


def test_a_row_within_the_interval_of_the_baseline_is_marked(tmp_path: Path):
    def measured(value: float, half_width: float) -> Result:
        return result(0, metrics={"fd_digits": Metric(value, False, interval=(value - half_width, value + half_width))})

    # The interval of a difference has the half-width hypot(0.3, 0.4) = 0.5.
    found = {"gaussian": (2.0, 0.4), "gan": (1.6, 0.3), "ddpm": (2.4, 0.3), "vae": (2.6, 0.3), "flow": (1.4, 0.3)}
    folders = [
        write_run(tmp_path / name, [measured(*values)], family=name, with_grid=False) for name, values in found.items()
    ]
    (table,) = rank_results(load_runs(folders).runs)
    assert statuses(table) == [
        (1, "flow", ""), (2, "gan", NEAR_BASELINE), (3, "gaussian", BASELINE), (4, "ddpm", NEAR_BASELINE),
        (None, "vae", NOT_BETTER),
    ]  # fmt: skip
    assert any(f"'{NEAR_BASELINE}'" in note and "evaluation.num_images" in note for note in table.notes())


def test_pairs_of_rows_that_two_metrics_order_differently_are_named(tmp_path: Path):
    """With two extractors for the same samples, the table of the primary extractor comes first."""
    other = replace(DIGITS, extractor="efficientnet_lite0", extractor_hash="e" * 64)

    def measured(first: float, second: float) -> list[Result]:
        primary = replace(
            result(first, measurement=other, metrics={"mmd_efficientnet_lite0": Metric(first, False)}),
            primary_metric="mmd_efficientnet_lite0",
        )
        return [primary, result(second)]

    values = {"a": (1.0, 3.0), "b": (2.0, 2.0), "c": (4.0, 4.0)}
    folders = [write_run(tmp_path / name, measured(*pair), with_grid=False) for name, pair in values.items()]
    loaded = load_runs(folders)
    tables = rank_results(loaded.runs)
    assert [table.primary_metric for table in tables] == ["mmd_efficientnet_lite0", "fd_digits"]
    (sentence,) = metric_disagreements(tables)
    assert "1 of 3 pairs" in sentence and "a and b" in sentence
    assert "Metrics disagree" in page.render(loaded)
    agreeing = rank_results(load_runs(folders[1:]).runs)
    assert metric_disagreements(agreeing) == [] and suggested_commands(tables) == []


def test_several_baselines_are_averaged_without_missing_values(tmp_path: Path):
    table = ranked(tmp_path, {"gaussian-1": 8.0, "gaussian-2": 12.0, "gaussian-3": None, "vae": 10.5, "gan": 9.5})
    assert statuses(table) == [
        (1, "gaussian-1", BASELINE), (2, "gan", ""), (3, "gaussian-2", BASELINE),
        (None, "vae", NOT_BETTER), (None, "gaussian-3", NO_VALUE),
    ]  # fmt: skip


def test_without_a_baseline_a_note_has_the_command_that_adds_it(tmp_path: Path):
    table = ranked(tmp_path, {"vae": 11.0}, measurement=replace(DIGITS, conditioning="labels"))
    (note,) = table.notes()
    assert note.endswith(
        "Add it: python run.py model=gaussian data=digits evaluation.num_images=500 evaluation.protocol.reference=test"
        f" evaluation.protocol.chunk_size=250 model.conditional=true hydra.run.dir={tmp_path}/gaussian"
    )
    config = {"choices": {"data": "image_folder", "evaluation": "quick"}}
    sweep = tmp_path / "it's [x]"
    folder = write_run(sweep / "b", [result(1.0)], config=config, overrides=["seed=1", "data.root='a b'"])
    (sweep / "gaussian").mkdir()
    command = rank_results(load_runs([folder]).runs)[0].notes()[0].split("Add it: ")[1]
    assert shlex.split(command)[2:6] == ["model=gaussian", "data=image_folder", "data.root='a b'", "evaluation=quick"]
    last = OverridesParser.create().parse_override(shlex.split(command)[-1])
    assert (last.key_or_group, last.value()) == ("hydra.run.dir", f"{sweep}/gaussian_2"), "an unused folder"


def test_a_command_quotes_any_folder_name(tmp_path: Path):
    more = replace(DIGITS, num_images=1000)
    odd = write_run(tmp_path / "lr=1,2 (it's [x]) \\ ${y}", [result(2.0, more)])
    folders = [odd, *(write_run(tmp_path / name, [result(1.0)]) for name in "ab")]
    (line,) = suggested_commands(rank_results(load_runs(folders).runs))
    words = shlex.split(line)
    assert [*words[:3], *words[4:]] == ["python", "run.py", "task=evaluate", "evaluation.num_images=500"]
    value = OverridesParser.create().parse_override(words[3]).value()
    assert OmegaConf.create({"run_dir": value}).run_dir == str(odd)


def test_a_model_trained_with_the_extractor_is_not_ranked(tmp_path: Path):
    fair = write_run(tmp_path / "fair", [result(2.0)])
    unfair = write_run(tmp_path / "unfair", [result(1.0)], training={"perceptual_networks": ["lpips", "beef" * 16]})
    (table,) = rank_results(load_runs([fair, unfair]).runs)
    assert statuses(table) == [(1, "fair", ""), (None, "unfair", TRAINED_WITH_EXTRACTOR)]


def test_different_protocols_have_separate_tables_and_named_fields(tmp_path: Path):
    more = replace(DIGITS, num_images=1000, chunk_size=100)
    folders = [
        write_run(tmp_path / "a", [result(2.0), result(0.5, more)]),
        write_run(tmp_path / "b", [result(1.0)]),
        write_run(tmp_path / "c", [result(0.1, FASHION)]),
    ]
    tables = rank_results(load_runs(folders).runs)
    assert [statuses(table) for table in tables] == [
        [(1, "b", ""), (2, "a", "")],
        [(1, "a", "")],
        [(1, "c", "")],
    ]
    assert [len({row.result.measurement.id for row in table.rows}) for table in tables] == [1, 1, 1]
    explanation = explain_separate_tables(tables)
    differences = "number of images (1000 instead of 500), chunk size (100 instead of 250)"
    assert f"Table 2 differs from table 1 in {differences}." in explanation
    assert "Table 3 uses a different data set, fashion_mnist, and also differs in extractor." in explanation
    shown = page.render(load_runs(folders))
    assert "3 protocols, 3 tables." in shown and "number of images (1000 instead of 500)" in shown
    command = (
        f"python run.py task=evaluate run_dir={tmp_path / 'a'} evaluation.num_images=500"
        " evaluation.protocol.chunk_size=250"
    )
    assert suggested_commands(tables) == [command], "results on other data cannot share a table"
    assert command in shown


def test_the_command_sets_the_preset_if_the_extractor_differs(tmp_path: Path):
    inception = replace(
        DIGITS, extractor="inception_v3_compat", extractor_hash="a" * 64, resize="299x299", num_images=5000
    )
    labels = replace(DIGITS, conditioning="labels", label_distribution="train")
    folders = [
        write_run(tmp_path / "a", [result(2.0)]),
        write_run(tmp_path / "b", [result(1.0)]),
        write_run(tmp_path / "c", [result(0.1, inception, generation={"checkpoint": "best"})]),
        write_run(tmp_path / "d", [result(0.1, labels)]),
        write_run(tmp_path / "e", [result(0.1, inception)], state="samples"),
    ]
    (line,) = suggested_commands(rank_results(load_runs(folders).runs))
    command = f"python run.py task=evaluate run_dir={tmp_path / 'c'} evaluation=default evaluation.num_images=500 "
    assert line.startswith(command)
    assert line.endswith(" checkpoint=best")


# Finding and reading


def test_a_glob_finds_runs_records_and_sweeps(tmp_path: Path):
    one = write_run(tmp_path / "one", with_grid=False)
    jobs = [write_run(tmp_path / "sweep" / name, with_grid=False) for name in ("0_vae", "1_gan")]
    (tmp_path / "empty").mkdir()
    assert find_run_folders(f"{tmp_path}/*") == [one, *jobs]
    assert find_run_folders(f"{tmp_path}/sweep/1*") == [jobs[1]]
    assert find_run_folders(f"{tmp_path}/**/record.json") == [one, *jobs]
    assert find_run_folders(str(one)) == [one]


@pytest.mark.parametrize("pattern", ["nowhere/*", "", "empty*"])
def test_a_glob_without_runs_raises(tmp_path: Path, pattern: str):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="matches no run folder"):
        find_run_folders(str(tmp_path / pattern))


def test_damaged_records_are_listed_and_the_rest_is_compared(tmp_path: Path):
    good = write_run(tmp_path / "good", [result(1.0)])
    older = write_run(tmp_path / "older", [result(1.0)], schema=0)
    cut = write_run(tmp_path / "cut", [result(1.0)])
    (cut / "record.json").write_text((cut / "record.json").read_text()[:-40])
    gone = tmp_path / "gone"
    loaded = load_runs([good, older, cut, gone])
    assert [run.label for run in loaded.runs] == ["good"]
    reasons = {skip.folder: skip.reason for skip in loaded.skipped}
    assert "schema 0" in reasons[older] and "corrupted" in reasons[cut] and "not a run folder" in reasons[gone]
    shown = page.render(loaded)
    assert all(str(folder) in shown for folder in (older, cut, gone))


def test_copies_of_a_run_are_skipped(tmp_path: Path):
    run = write_run(tmp_path / "a", [result(1.0)])
    (tmp_path / "link").symlink_to(run)
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    loaded = load_runs([run, tmp_path / "link", run / ".." / "a", copy])
    assert [r.folder for r in loaded.runs] == [run]
    assert [(skip.folder, skip.reason) for skip in loaded.skipped] == [(copy, f"a copy of the run in {run}")]


def test_runs_with_the_same_name_have_different_labels(tmp_path: Path):
    folders = [write_run(tmp_path / where / "0_vae", with_grid=False) for where in ("s1", "s2")]
    other = write_run(tmp_path / "gan", with_grid=False)
    assert [run.label for run in load_runs([*folders, other]).runs] == ["s1/0_vae", "s2/0_vae", "gan"]


@pytest.mark.parametrize(
    ("names", "seeds", "labels"),
    [
        (["0_digits_ddpm", "1_digits_ddpm"], [3, 4], ["ddpm, seed 3", "ddpm, seed 4"]),  # job numbers are not seeds
        (["2_digits_ddpm", "ddpm_wide"], [0, 0], ["ddpm", "ddpm_wide"]),
        (["2026-01-02_03-04-05_ddpm", "cosine_1"], [0, 1], ["ddpm", "cosine"]),
        (["0_ddpm", "1_ddpm"], [0, 0], ["0_ddpm", "1_ddpm"]),  # two settings of one family
        (["7", "12_"], [7, 0], ["7", "12_"]),
    ],
)
def test_runs_are_labelled_without_job_numbers(
    names: list[str], seeds: list[int], labels: list[str], tmp_path: Path
) -> None:
    folders = [write_run(tmp_path / name, with_grid=False, seed=seed) for name, seed in zip(names, seeds, strict=True)]
    assert [run.label for run in load_runs(folders).runs] == labels


def test_equal_names_of_different_groups_are_told_apart(tmp_path: Path) -> None:
    """Two groups of three seeds, which differ in a setting, have different labels."""
    folders = []
    for k, lr in enumerate((1e-3, 1e-2)):
        for seed in range(3):
            folder = write_run(tmp_path / f"{3 * k + seed}_digits_ddpm", [result(1.0 + k)], seed=seed, with_grid=False)
            record = RunRecord.load(folder)
            record.config["model"]["optimizer"]["lr"] = lr
            record.save(folder)
            folders.append(folder)
    (table,) = rank_results(load_runs(folders).runs)
    labels = [row.run.label for row in table.rows]
    assert len(set(labels)) == 2 and all(label.endswith("ddpm, mean of 3 seeds") for label in labels)


def test_the_summary_says_what_can_be_claimed(tmp_path: Path) -> None:
    def with_interval(value: float, margin: float) -> Result:
        metric = Metric(value, higher_is_better=False, interval=(value - margin, value + margin))
        return result(value, metrics={"fd_digits": metric})

    for name, made in (("a", with_interval(1, 0.3)), ("b", with_interval(1.3, 0.3)), ("c", with_interval(3, 0.3))):
        write_run(tmp_path / name, [made], with_grid=False, family=name)
    (table,) = rank_results(load_runs(tmp_path.iterdir()).runs)
    assert table.summary() == (
        "a has the best FD digits, 1.00 [0.700, 1.30]. 1 of 2 other rows may be as good (b), since the interval of the"
        " difference contains 0. Intervals of rows with one training seed do not show how much training runs"
        " differ."
    )
    shown = page.render(load_runs(tmp_path.iterdir()))
    assert table.summary() in shown.split("<nav>")[0], "at the top of the page"
    for name, level in (("a", 1.0), ("d", 0.5)):
        for seed in range(5):
            write_run(
                tmp_path / "seeds" / f"{name}_{seed}", [result(level + 0.001 * seed)], seed=seed, with_grid=False,
                family=name,
            )  # fmt: skip
    (tested,) = rank_results(load_runs((tmp_path / "seeds").iterdir()).runs)
    assert tested.summary().startswith("d has the best FD digits, 0.502 [")
    assert tested.summary().endswith("It is significantly better than every other row that was tested (1).")


def test_the_chart_of_intervals_shows_each_row_and_the_real_data(tmp_path: Path) -> None:
    for k, name in enumerate(("vae", "gan", "flow")):
        write_run(tmp_path / name, [result(1.0 + k)], family=name, with_grid=False)
    loaded = load_runs(tmp_path.iterdir())
    tables = ranking_tables(loaded)
    chart = charts.interval_charts(tables, styles(tables, loaded.runs))[1]
    assert [point.name for point in chart.points] == ["vae", "gan", "flow"] and chart.baseline == 0.5
    drawn = page.render(loaded).split('<figure class="intervals">')[1].split("</figure>")[0]
    assert all(name in drawn for name in ("vae", "gan", "flow", "real data, 0.500"))


def test_a_grid_is_named_if_another_row_has_another_one(tmp_path: Path) -> None:
    samplers = ["DDIM, 25 steps, eta 0", "DDIM, 25 steps, LogSNRGrid log_snr_start -9, eta 0"]
    write_run(tmp_path / "a", [result(1.0 + k, generation={"sampler": s}) for k, s in enumerate(samplers)])
    (table,) = rank_results(load_runs([tmp_path / "a"]).runs)
    assert [row.sampling for row in table.rows] == ["DDIM, UniformGrid", "DDIM, LogSNRGrid"]
    starts = [samplers[1], samplers[1].replace("-9", "-5")]
    write_run(tmp_path / "b", [result(1.0 + k, generation={"sampler": s}) for k, s in enumerate(starts)])
    (table,) = rank_results(load_runs([tmp_path / "b"]).runs)
    assert [row.sampling for row in table.rows] == [
        "DDIM, LogSNRGrid log_snr_start -9", "DDIM, LogSNRGrid log_snr_start -5",
    ]  # fmt: skip


def test_a_record_cannot_embed_files_outside_its_folder(tmp_path: Path):
    outside = write_run(tmp_path / "outside") / "samples" / "grid.png"
    pictures = {"up": "../outside/samples/grid.png", "root": str(outside), "zero": "a\0b", "gone": "gone.png"}
    folder = write_run(tmp_path / "run", [result(1.0, images=dict(pictures))], curve={}, images={"text": "curve.csv"})
    (run,) = load_runs([folder]).runs
    assert [run.read_png(path) for path in pictures.values()] == [None] * 4
    assert run.read_png("samples/grid.png") == (folder / "samples" / "grid.png").read_bytes()
    shown = page.render(LoadedRuns([run]))
    assert base64.b64encode(outside.read_bytes()).decode() not in shown
    assert "gone.png" in shown and "text (curve.csv)" in shown


def test_gaps_of_a_learning_curve_are_nan(tmp_path: Path):
    path = tmp_path / "curve.csv"
    path.write_text('step,images,"val/<b>",train/loss\n1,128,,0.5\n2,256,3.5,nan\n3,384,inf,x\n4,51')
    columns = read_curve(path)
    assert columns["images"].tolist() == [128, 256, 384]
    assert np.array_equal(columns["val/<b>"], [math.nan, 3.5, math.nan], equal_nan=True)
    assert np.array_equal(columns["train/loss"], [0.5, math.nan, math.nan], equal_nan=True)
    assert read_curve(tmp_path / "none.csv") == {}
    path.write_bytes(b"")
    assert read_curve(path) == {}


# Charts


def test_nfe_curves_join_rows_that_differ_in_steps_alone(tmp_path: Path):
    def measured(calls: float, value: float, sampler: str) -> Any:
        return result(value, generation={"nfe": {"network": calls}, "sampler": f"{sampler}, {calls:g} steps"})

    write_run(tmp_path / "a", [measured(50, 2.0, "DDIM"), measured(5, 9.0, "DDIM"), measured(20, 3.0, "Heun")])
    write_run(tmp_path / "b", [measured(10, 4.0, "DDIM")])
    for seed in (0, 1):  # one line for both seeds
        results = [measured(n, 90 / n + seed, "Heun") for n in (10, 30)]
        write_run(tmp_path / f"c{seed}", results, seed=seed, family="edm")
    runs = load_runs(sorted(tmp_path.iterdir())).runs
    tables = rank_results(runs)
    style = styles(tables, runs)
    (chart,) = charts.nfe_curves(tables, style)
    drawn = {line.name: (line.x.tolist(), line.y.tolist()) for line in chart.lines}
    assert drawn == {
        "a · DDIM": ([5, 50], [9.0, 2.0]), "c0, mean of 2 seeds · Heun": ([10, 30], [9.5, 3.5]),
        "a · Heun, 20 steps": ([20], [3.0]), "b": ([10], [4.0]),
    }, "one line per sampler, the mean over seeds, and points of models with one number of evaluations"  # fmt: skip
    best = {row.title: row for row in reversed(tables[0].rows)}
    assert [(line.color, line.dash) for line in chart.lines] == [
        (style[title].color, style[title].dash)
        for title in ("a · DDIM, 50 steps", "a · Heun, 20 steps", "c0, mean of 2 seeds · Heun, 30 steps", "b")
        if title in best
    ], "a line has the style of its best-ranked row"
    assert chart.x_log
    html = page.render(load_runs(tmp_path.iterdir()))
    assert "Quality against NFE" in html
    assert "Quality against NFE" not in page.render(load_runs([tmp_path / "b"]))


def test_noise_schedules_share_a_chart(tmp_path: Path):
    falling = {"t": [0.0, 0.5, 1.0], "log_snr": [9.0, 0.0, -9.0]}
    write_run(tmp_path / "a", [result(1.0)], model={"parameters": 1, "noise_schedule": falling})
    write_run(tmp_path / "b", [result(2.0)], model={"noise_schedule": {"t": [0.0], "log_snr": [1.0, 2.0]}})
    write_run(tmp_path / "c", [result(3.0)])
    runs = load_runs(tmp_path.iterdir()).runs
    (chart,) = charts.noise_schedules(runs, styles([], runs))
    assert [line.y.tolist() for line in chart.lines] == [[9.0, 0.0, -9.0]], "invalid schedules are not drawn"
    assert "Noise schedules" in page.render(load_runs(tmp_path.iterdir()))
    assert "Noise schedules" not in page.render(load_runs([tmp_path / "c"]))


def test_a_long_curve_is_averaged_over_segments():
    x, y = np.arange(3000.0), np.arange(3000.0) ** 2
    few_x, few_y = charts.subsample(x, y)
    assert len(few_x) == len(few_y) == 300
    assert few_x[0] == 4.5 and few_y[0] == np.mean(np.arange(10.0) ** 2)
    assert few_y[-1] == pytest.approx(np.mean(y[-10:]))
    uneven = charts.subsample(np.arange(301.0), np.arange(301.0))[0]
    assert len(uneven) == 300 and uneven[0] == 0 and uneven[-1] in (299.5, 300)
    assert np.array_equal(charts.subsample(x[:300], y[:300]), [x[:300], y[:300]])


def test_distances_share_a_chart_per_data_set_and_losses_per_family(tmp_path: Path):
    fashion = {"name": "fashion_mnist"}
    folders = [
        write_run(tmp_path / "d1", [result(1.0)], family="ddpm"),
        write_run(tmp_path / "d2", [result(2.0)], family="ddpm"),
        write_run(tmp_path / "v", [result(3.0)], family="vae"),
        write_run(tmp_path / "f", [result(3.0, FASHION)], family="vae", data=fashion),
        write_run(tmp_path / "none", [result(3.0)], family="gaussian", curve={}),
    ]
    runs = load_runs(folders).runs
    style = styles(rank_results(runs), runs)
    drawn = {chart.title: [line.color for line in chart.lines] for chart in charts.distance_curves(runs, style)}
    c = [style[label].color for label in ("d1", "d2", "v", "f")]
    assert drawn == {"FD digits on digits": c[:3], "FD digits on fashion_mnist": c[3:]}
    losses = {chart.title: [line.color for line in chart.lines] for chart in charts.loss_curves(runs, style)}
    # Training loss and validation loss of each run.
    assert losses == {
        "ddpm on digits: loss": [c[0], c[0], c[1], c[1]], "vae on digits: loss": [c[2]] * 2,
        "vae on fashion_mnist: loss": [c[3]] * 2,
    }  # fmt: skip


@pytest.mark.parametrize("metric", ["val/mmd_x", "val/fd_x", "val/coverage"])
def test_a_line_contains_the_logged_values(metric: str, tmp_path: Path):
    values = np.array([math.nan, 5, 4])
    curve = {"step": np.array([1.0, 2, 3]), "images": np.array([10.0, 20, 30]), metric: values}
    runs = load_runs([write_run(tmp_path / "a", curve=curve)]).runs
    (chart,) = charts.distance_curves(runs, styles([], runs))
    assert chart.lines[0].x.tolist() == [20, 30] and chart.lines[0].y.tolist() == [5, 4]


# Settings


def test_settings_that_differ_are_shown_with_model_settings_by_family(tmp_path: Path):
    def config(family: str, lr: float, images: int, **model: Any) -> dict[str, Any]:
        return {
            "family": family, "out": str(tmp_path / f"{lr}"), "budget": {"images": images, "steps": None},
            "model": {"optimizer": {"lr": lr, "betas": [0.9, 0.99]}, **model}, "data": {"root": str(lr), "flip": True},
        }  # fmt: skip

    folders = [
        write_run(tmp_path / "d1", family="ddpm", config=config("ddpm", 1e-3, 100)),
        write_run(tmp_path / "d2", family="ddpm", config=config("ddpm", 2e-3, 100, dropout=0.1)),
        write_run(tmp_path / "v", family="vae", config=config("vae", 5e-3, 200, latent=8)),
    ]
    found = differing_settings(load_runs(folders).runs)
    tables = {table.title: (table.names, {run.label: v for run, v in table.rows}) for table in found}
    assert tables == {
        "All runs": (["budget.images"], {"d1": ["100"], "d2": ["100"], "v": ["200"]}),
        "ddpm": (["model.optimizer.lr", "model.dropout"], {"d1": ["0.001", "–"], "d2": ["0.002", "0.1"]}),  # noqa: RUF001
    }


# The page


class Page(HTMLParser):
    """A parsed page: its elements with their attributes, and its text content."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "line", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> LoadedRuns:
    """Write runs with markup in every text field, including an invalid record, a run without results and several
    protocols."""
    folder = tmp_path_factory.mktemp("odd")
    metric = {
        "fd_digits": Metric(1.0, higher_is_better=False, baseline=0.5, note=ODD),
        ODD: Metric(None, note=ODD, unit=ODD),
    }
    generation = {"sampler": ODD, "guidance": ODD, "nfe": {ODD: 3.0, "b": math.nan}, "checkpoint": ODD}
    measured = replace(DIGITS, extractor=ODD, reference=ODD, label_distribution=ODD)
    details = {ODD: [ODD, {ODD: ODD}], "warnings": [ODD]}
    odd = result(1.0, measured, metrics=metric, generation=generation, details=details, primary_metric="fd_digits")
    write_run(
        folder / "a", [replace(odd, images={ODD: "samples/grid.png", "gone": f"{ODD}.png"})], name=ODD, family=ODD,
        state=ODD, config={ODD: ODD, "choices": {"data": ODD}}, overrides=[ODD], data={"name": ODD, "splits": ODD},
        environment={"run_id": ODD, "device": ODD, "git": ODD, "packages": {ODD: ODD}}, training={"error": ODD},
    )  # fmt: skip
    write_curve(
        folder / "a" / "curve.csv", {name: np.arange(5.0) for name in ("images", "val/fd_<b>", "train/loss<b>")}
    )
    write_run(folder / "b", [result(2.0)], config={ODD: "other"})
    write_run(folder / "c", [], training={"error": ODD}, state="failed", name=f"=1+{ODD}")
    (folder / "broken <blink>").mkdir()
    (folder / "broken <blink>" / "record.json").write_text("{")
    return load_runs(sorted(folder.iterdir()))


def test_names_are_escaped_everywhere(odd: LoadedRuns):
    shown = Page(page.render(odd))
    assert not shown.open, "every element is closed"
    assert not shown.all("blink") and not shown.all("bold")
    assert all((image["src"] or "").startswith("data:image/png;base64,") for image in shown.all("img"))
    assert not [name for _, attributes in shown.elements for name in attributes if name.startswith("on")]
    assert sum(ODD in text for text in shown.texts) > 20
    assert ODD in "".join(shown.texts[shown.texts.index("Losses") :])


def test_the_page_makes_no_network_requests(odd: LoadedRuns):
    html = page.render(odd)
    shown = Page(html)
    for _, attributes in shown.elements:
        for name in ("src", "href", "xlink:href", "action", "srcset", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    assert not re.search(r"@import|url\((?!#)", html)
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    policy = next(meta["content"] for meta in shown.all("meta") if "http-equiv" in meta) or ""
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy


def test_ids_are_unique_and_references_resolve(odd: LoadedRuns):
    shown = Page(page.render(odd))
    ids = Counter(attributes["id"] for _, attributes in shown.elements if "id" in attributes)
    assert len(shown.all("svg")) > 4 and max(ids.values()) == 1
    references = [a[1:] for _, attributes in shown.elements if (a := attributes.get("href") or "").startswith("#")]
    clips = [a["clip-path"][5:-1] for _, a in shown.elements if a.get("clip-path")]  # type: ignore[index]
    assert references and clips and {*references, *clips} <= ids.keys()


def test_a_table_cell_has_the_sort_key_of_its_column(tmp_path: Path):
    folders = [write_run(tmp_path / name, [result(v)]) for name, v in (("a", 1.23456), ("b", 0.1), ("c", None))]
    shown = Page(page.render(load_runs(folders)))
    start = next(k for k, (tag, a) in enumerate(shown.elements) if tag == "table" and a.get("class") == "ranking")
    cells = [a for tag, a in shown.elements[start:] if tag == "td" and "primary" in (a.get("class") or "")]
    assert [cell["data-key"] for cell in cells] == ["0.1", "1.23456", ""]


def test_images_stay_within_their_total_size(tmp_path: Path, monkeypatch):
    folders = [write_run(tmp_path / f"r{k}", [result(float(k))]) for k in range(5)]
    sizes = [(folder / "samples" / "grid.png").stat().st_size for folder in folders]
    monkeypatch.setattr(page, "MAX_IMAGE_BYTES", sum(sizes[:3]) + min(sizes) - 1)
    shown = Page(page.render(load_runs(folders)))
    # Images of the best-ranked runs come first.
    best = [base64.b64encode((f / "samples" / "grid.png").read_bytes()).decode() for f in folders[:3]]
    assert [image["src"] for image in shown.all("img")] == [f"data:image/png;base64,{content}" for content in best]
    assert any("2 more images" in text for text in shown.texts)


def test_a_single_run_has_its_own_page(tmp_path: Path):
    folder = write_run(tmp_path / "mine", [result(1.5)], images={"while training": "samples/grid.png"})
    path = report([folder], folder)
    shown = Page(path.read_text())
    assert path == folder / "compare.html" and "mine" in shown.texts
    text = " ".join(" ".join(shown.texts).split())
    assert "ddpm on digits, 412 k parameters, 200 k images seen in 2:51 min, 1,169 images/s" in text
    assert "Comparison of" not in text and "Settings that differ" not in text
    assert len(shown.all("img")) == 2
    record = json.loads((folder / "record.json").read_text())
    assert record["config"]["out"] not in "".join(re.findall(r"<pre>(.*?)</pre>", path.read_text(), re.DOTALL))


def test_warnings_about_samples_are_shown(tmp_path: Path):
    flagged = write_run(tmp_path / "a", [result(1.0, details={"warnings": ["many samples are alike"]})])
    plain = write_run(tmp_path / "b", [result(2.0)])
    assert "a: many samples are alike" in page.render(load_runs([flagged, plain]))


# Files and terminal


def test_the_csv_has_all_results_and_metrics(tmp_path: Path):
    folders = [
        write_run(tmp_path / "a", [result(1.25), result(1.5, generation={"checkpoint": "best"})], seed=7),
        write_run(tmp_path / "b", [result(None)], name="=HYPERLINK(1)", family="vae"),
        write_run(tmp_path / "c", [], state="failed"),
    ]
    report(folders, tmp_path / "out")
    with (tmp_path / "out" / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["rank"], row["state"]) for row in rows] == [
        ("a", "1", "finished"), ("a", "2", "finished"), ("'=HYPERLINK(1)", "", "finished"), ("c", "", "failed"),
    ]  # fmt: skip
    first = rows[0]
    assert [float(first[key]) for key in ("fd_digits", "fd_digits.baseline", "kd_digits.low", "kd_digits.high")] == [
        1.25, 0.5, 0.001, 0.0032,
    ]  # fmt: skip
    assert (
        first["seed"] == "7" and first["measurement.num_images"] == "500" and first["generation.checkpoint"] == "last"
    )
    assert first["nfe.unet"] == "50.0" and first["training.images_seen"] == "200064"
    assert rows[2]["fd_digits"] == "" and rows[2]["fd_digits.note"] == "samples hold NaN"
    assert rows[2]["status"] == NO_VALUE


def test_markdown_rows_have_one_cell_per_column_for_any_name(odd: LoadedRuns, tmp_path: Path):
    report([run.folder for run in odd.runs], tmp_path)
    text = (tmp_path / "compare.md").read_text()
    tables = [table for table in re.split(r"^#+ ", text, flags=re.MULTILINE) if "\n| " in table]
    for table in tables:
        lines = [line for line in table.splitlines() if line.startswith("| ")]
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert len(tables) == 2 * 2, "the ranking and the bits/dim of each data set"
    assert "<" not in text and r"\*y\*" in text


def test_a_report_needs_a_run(tmp_path: Path):
    with pytest.raises(UserError, match="not a run folder"):
        report([tmp_path], tmp_path)
    with pytest.raises(UserError, match="No run folder"):
        report([], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("width", [60, 100, 240])
def test_terminal_tables_escape_names_and_fit_the_width(odd: LoadedRuns, width: int):
    text = io.StringIO()
    folders = [run.folder for run in odd.runs] + [skip.folder for skip in odd.skipped]
    print_tables(folders, Console(file=text, width=width, force_terminal=False))
    lines = text.getvalue().splitlines()
    # A command stays on one line so that it can be copied.
    assert max(len(line) for line in lines if not line.startswith("  python run.py")) <= width
    flat = re.sub(r"\s", "", text.getvalue())
    assert "[boldred]$a_1$" in flat and "skipped:" in flat and "noresults:" in flat
    assert "FDdigits↓" in flat and "2protocols:" in flat


def test_a_narrow_terminal_shows_fewer_columns(tmp_path: Path):
    folders = [write_run(tmp_path / name, [result(value)]) for name, value in (("first", 1.25), ("second", 2.5))]
    text = io.StringIO()
    print_tables(folders, Console(file=text, width=70, force_terminal=False))
    lines = text.getvalue().splitlines()
    assert ["1", "first", "ddpm", "1.25", "0.00210"] in [line.split()[:5] for line in lines]
    assert any("more columns are in compare.html and compare.csv" in line for line in lines)
    assert "…" not in text.getvalue()


def test_the_summary_of_a_run_has_all_metrics_with_baselines(tmp_path: Path):
    folder = write_run(tmp_path / "a", [result(1.25), result(None, generation={"checkpoint": "best"})])
    text = io.StringIO()
    Console(file=text, width=140).print(run_summary(RunRecord.load(folder)))
    shown = text.getvalue()
    row = next(line for line in shown.splitlines() if line.strip().startswith("FD"))
    assert row.split() == ["FD", "↓", "1.25", "2.5", "×", "real", "data", "–", "0.500"]  # noqa: RUF001
    assert "2.31  bound" in shown and "last, EMA, ddim, 50 steps" in shown
    assert "bits/dim vlb: bound, 500 test images" in shown


# Formatting


@pytest.mark.parametrize(
    "to_text, value, text",
    [
        (formatting.format_metric, 3.17, "3.17"), (formatting.format_metric, 0.99996, "1.00"),
        (formatting.format_metric, 0.0021, "0.00210"),
        (formatting.format_metric, 1234.5, "1,234"), (formatting.format_metric, -2.0, "-2.00"),
        (formatting.format_metric, 0, "0"),
        (formatting.format_metric, 3e-7, "3.00e-07"), (formatting.format_metric, None, "–"),  # noqa: RUF001
        (formatting.format_metric, math.nan, "–"),  # noqa: RUF001
        (formatting.format_count, 870, "870"), (formatting.format_count, 412_345, "412 k"), (formatting.format_count,
        999_900, "1 M"),
        (formatting.format_count, 35_700_000, "35.7 M"), (formatting.format_count, 3.2e13, "32 T"),
        (formatting.format_duration, 4.2, "4.2 s"), (formatting.format_duration, 59.7, "1:00 min"),
        (formatting.format_duration, 171.2, "2:51 min"),
        (formatting.format_duration, 7859, "2:10 h"), (formatting.format_ratio, 1.1, "1.10"),
        (formatting.format_ratio, 2.94, "2.9"),
        (formatting.format_ratio, 14.4, "14"), (formatting.format_rate, 1168.6, "1,169"), (formatting.format_rate,
        2.5, "2.5"), (formatting.format_rate, 50.0, "50"),
    ],
)  # fmt: skip
def test_numbers_as_text(to_text: Any, value: float | None, text: str):
    assert to_text(value) == text


@pytest.mark.parametrize(
    "name, title",
    [
        ("fid", "FID"), ("fd_fashion_mnist", "FD fashion mnist"), ("kid", "KID"), ("bpd_vlb", "bits/dim vlb"),
        ("class_share_min", "class share min"), ("fidelity", "fidelity"),
    ],
)  # fmt: skip
def test_titles_of_metrics(name: str, title: str):
    assert formatting.title(name) == title


def test_bits_per_dim_of_all_families_are_compared(tmp_path: Path):
    def measured(value: float, **bits: tuple[float, str, str]) -> Any:
        metrics = {
            f"bpd_{name}": Metric(each, higher_is_better=False, note=note, method=method)
            for name, (each, note, method) in bits.items()
        }
        return replace(result(value), metrics={"fd_digits": Metric(value, higher_is_better=False)} | metrics)

    write_run(tmp_path / "a", [measured(1.0, elbo=(2.5, "bound, 100 test images; kl 1", "discrete"))])
    estimate = "estimate, 100 test images", "uniform dequantisation"
    write_run(tmp_path / "b", [measured(2.0, ode=(1.5, *estimate), vlb=(1.75, "bound", "softmax decoder"))])
    write_run(tmp_path / "c", [measured(3.0)])
    loaded = load_runs(sorted(tmp_path.iterdir()))
    (table,) = rank_results(loaded.runs)
    assert [(row.title, texts) for row, texts in likelihood_lines(table)] == [
        ("b", ["1.50", "estimate", "uniform dequantisation", "ode", "100 test images"]),
        ("b", ["1.75", "bound", "softmax decoder", "vlb", ""]),
        ("a", ["2.50", "bound", "discrete", "elbo", "100 test images"]),
    ]
    (chart,) = charts.Charts.of([table], loaded.runs, styles([table], loaded.runs)).likelihoods
    assert {line.name: (line.x.tolist(), line.y.tolist()) for line in chart.lines} == {
        "a (bound)": ([2.5], [1.0]), "b (bound)": ([1.75], [2.0]),
    }  # fmt: skip
    html = page.render(loaded)
    assert "softmax decoder" in html.split('id="likelihoods"')[1].split("</section>")[0]
    assert 'id="likelihoods"' not in page.render(load_runs([tmp_path / "c"]))


@pytest.mark.parametrize(
    "scores, shown",
    [
        ({"elbo": (2.5, "bound"), "iwae": (2.3, "bound")}, ("2.30", "iwae, bound")),
        ({"elbo": (2.5, "bound"), "ode": (2.1, "estimate, 100 test images")}, ("2.50", "elbo, bound")),
        ({"density": (3.5, "exact"), "elbo": (2.5, "bound")}, ("3.50", "density, exact")),
        ({"odd": (3.5, "")}, ("3.50", "odd")),
        ({"elbo": (None, "bound")}, ("–", "")),  # noqa: RUF001
    ],
)
def test_bits_per_dim_is_one_column_with_the_estimator(tmp_path: Path, scores: dict[str, Any], shown: tuple[str, str]):
    metrics = {"fd_digits": Metric(1.0, higher_is_better=False), "new": Metric(1.0)}
    metrics |= {
        f"bpd_{name}": Metric(value, higher_is_better=False, note=note) for name, (value, note) in scores.items()
    }
    other = {
        "fd_digits": Metric(2.0, higher_is_better=False),
        "precision": Metric(0.5),
        "bpd_vlb": Metric(9.0, note="bound"),
    }
    folders = [
        write_run(tmp_path / name, [replace(result(1.0), metrics=m)]) for name, m in (("a", metrics), ("b", other))
    ]
    (table,) = rank_results(load_runs(folders).runs)
    found = {column.title: column.cell(table.rows[0]) for column in columns(table)}
    assert [title for title in found if title.split("\u00a0")[0] in ("FD", "precision", "bits/dim", "new")] == [
        "FD\u00a0↓", "precision", "bits/dim\u00a0↓", "new",
    ]  # fmt: skip
    assert (found["bits/dim\u00a0↓"].text, found["bits/dim\u00a0↓"].annotation) == shown


def test_any_metric_has_a_column_and_known_ones_come_first(tmp_path: Path):
    extra = {"aa_new": Metric(1.0), "fid": Metric(3.0)}
    table = ranked(tmp_path, {"a": 1.0}, metrics=extra)
    assert table.metrics() == [
        "fd_digits", "fid", "kd_digits", "precision", "recall", "bpd_vlb", "confident", "memorization", "aa_new",
    ]  # fmt: skip


def test_a_protocol_is_described_in_words():
    measured = replace(DIGITS, conditioning="labels", label_distribution="test", resize="bilinear to 299")
    assert formatting.describe_protocol(measured) == (
        "500 generated images (conditional, labels as in test, 250 per seed) against 500 images of the test split of"
        " digits, rounded to uint8, resized (bilinear to 299). Features: digits (beefbeefbeef)."
    )


def test_a_latent_model_costs_its_autoencoder_too(tmp_path: Path) -> None:
    training = {"seconds": 600.0, "images_seen": 1000}
    first = {"run": "digits_autoencoder_0", "seconds": 300.0, "images_seen": 500}
    write_run(tmp_path / "pixels", [result(1.0)], training=training)
    write_run(tmp_path / "latents", [result(2.0)], training=training, model={"parameters": 7, "autoencoder": first})
    loaded = load_runs([tmp_path / "pixels", tmp_path / "latents"])
    (table,) = rank_results(loaded.runs)
    (time,) = [column for column in columns(table) if column.title == "device time"]
    pixels, latents = (time.cell(row) for row in table.rows)
    assert (pixels.sort_key, pixels.annotation) == (600.0, "")
    assert latents.sort_key == 900.0 and "incl. 5:00 min: autoencoder" in latents.annotation
    (images,) = [column for column in columns(table) if column.title == "images seen"]
    assert [(cell.sort_key, cell.annotation) for cell in map(images.cell, table.rows)] == [
        (1000, ""), (1500, "incl. 500: autoencoder"),
    ]  # fmt: skip
    report([tmp_path / "pixels", tmp_path / "latents"], tmp_path / "page")
    rows = list(csv.DictReader((tmp_path / "page" / "compare.csv").open()))
    assert [row["autoencoder.images_seen"] for row in rows] == ["", "500"]
