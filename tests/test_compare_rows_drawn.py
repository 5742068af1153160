"""Rows are drawn and called alike everywhere: one style and one name for all seeds of a row, another for each other."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from gencompare.compare import page
from gencompare.compare.charts import Charts, in_order
from gencompare.compare.load_runs import LoadedRuns, load_runs
from gencompare.compare.ranking import rank
from gencompare.compare.sampler_description import without_steps
from gencompare.compare.svg_plots import legend, styles
from gencompare.compare.tables import columns
from synthetic import result, write_run


def charts_of(gathered: LoadedRuns) -> Charts:
    groups = rank(gathered.runs)
    runs = in_order(groups, gathered.runs)
    return Charts.of(groups, runs, styles(groups, runs))


def test_fifteen_families_of_five_seeds_have_fifteen_styles(tmp_path: Path) -> None:
    curve = {"images": np.array([1e4, 2e4]), "val/fd_digits": np.array([9.0, 3.0])}
    folders = [
        write_run(
            tmp_path / f"{family}_{seed}", [result(1.0 + family + 0.01 * seed, generation={"seed": seed})], seed=seed,
            family=f"f{family:02d}", training={"flops": 1e12 * (20 - family), "seconds": 60.0}, picture=False,
            curve=curve,
        )
        for family in range(15) for seed in range(5)
    ]  # fmt: skip
    gathered = load_runs(folders)
    groups = rank(gathered.runs)
    style = styles(groups, gathered.runs)
    of_rows = {row.title: (style[row.title].color, style[row.title].dash) for row in groups[0].rows}
    assert len(of_rows) == len(set(of_rows.values())) == 15
    for row in groups[0].rows:
        drawn = {(style[run.label].color, style[run.label].dash) for run, _ in row.line.members}
        assert drawn == {of_rows[row.title]}, "all seeds of a row are drawn alike"
    charts = charts_of(gathered)
    (cost,) = (trade.chart for trade in charts.trades)
    assert {line.name: (line.color, line.dash) for line in cost.lines if line.name} == of_rows
    (distance,) = charts.distances
    assert len(distance.lines) == 75, "every seed has its curve"
    assert {name: (line.color, line.dash) for name, line in legend([distance]).items()} == of_rows
    section = page.render(gathered).split('id="costs"')[1].split("</section>")[0]
    assert section.split('<div class="charts">')[0].count("mean of 5 seeds") == 15, "the legend"
    swatches = re.findall(r'stroke="([^"]+)" stroke-width="2" stroke-dasharray="([^"]*)"', section)
    assert set(swatches[:15]) == set(of_rows.values())


def test_scales_of_guidance_are_told_apart_and_joined_by_no_line(tmp_path: Path) -> None:
    ways = [(0, 25, 3.0), (1, 25, 2.0), (1.5, 50, 1.5), (2, 50, 1.2), (3, 50, 1.8)]
    sampler = "DDIM, 25 steps, eta 0, ClassifierFree, scale {:g}, x0 clipped"
    for seed in range(2):
        results = [
            result(value + 0.01 * seed, generation={"seed": seed, "sampler": sampler.format(scale), "nfe": {"net": n}})
            for scale, n, value in ways
        ]
        write_run(tmp_path / f"r{seed}", results, seed=seed, picture=False)
    gathered = load_runs(sorted(tmp_path.iterdir()))
    (group,) = rank(gathered.runs)
    names = [f"r0, mean of 2 seeds · DDIM, scale {scale:g}" for scale in (2, 1.5, 3, 1, 0)]
    assert [row.title for row in group.rows] == names
    charts = charts_of(gathered)
    assert charts.against_calls == [], "no two rows differ in the number of steps alone"
    (calls,) = (trade for trade in charts.trades if trade.chart.x_label == "network calls a sample")
    assert [line.name for line in calls.chart.lines if line.name] == names
    assert [row.title for row in calls.front] == [names[3], names[0]]
    front = page.render(gathered).split("On the front, cheapest first:")[1].split("</figcaption>")[0]
    assert re.findall(r"</svg>([^<;]+)", front) == [names[3], names[0]]
    (run,) = (column for column in columns(group) if column.title == "run")
    assert [run.cell(row).beside for row in group.rows] == [name.split(" · ")[1] for name in names]


def test_lines_against_calls_have_a_key_of_their_own(tmp_path: Path) -> None:
    results = [
        result(20 / n + k, generation={"sampler": f"{kind}, {n} steps, eta {eta}", "nfe": {"net": float(n)}})
        for k, (kind, eta) in enumerate([("DDIM", 0), ("DDIM", 1), ("Heun", 0)]) for n in (5, 10)
    ]  # fmt: skip
    write_run(tmp_path / "a", results, picture=False)
    write_run(tmp_path / "b", [result(9.0)], family="vae", picture=False)
    gathered = load_runs(sorted(tmp_path.iterdir()))
    (chart,) = charts_of(gathered).against_calls
    assert [line.name for line in chart.lines] == ["a · DDIM, eta 0", "a · DDIM, eta 1", "a · Heun, eta 0"]
    assert len({(line.color, line.dash) for line in chart.lines}) == 3
    section = page.render(gathered).split('id="calls"')[1].split("</section>")[0]
    shown = section.split('class="legend"')[1].split("</div>")[0]
    assert re.findall(r"</svg>([^<]+)", shown) == [line.name for line in chart.lines], "and nothing that is not drawn"


@pytest.mark.parametrize(
    "text, left",
    [
        ("DDIM, 25 steps, eta 0", "DDIM, eta 0"), ("250 steps from noise, Langevin", "from noise, Langevin"),
        ("Langevin, 10 steps, num_langevin_steps 20", "Langevin, num_langevin_steps 20"), ("5 steps · best", "best"),
    ],
)  # fmt: skip
def test_a_way_without_its_steps(text: str, left: str) -> None:
    assert without_steps(text) == left


def test_a_picture_is_captioned_with_the_figure_of_its_own_run(tmp_path: Path) -> None:
    for seed, value in enumerate((1.0, 2.0, 6.0)):
        made = result(value, generation={"seed": seed, "step": 100 + seed, "checkpoint": "best"})
        write_run(tmp_path / f"a{seed}", [made], seed=seed)
    write_run(tmp_path / "b", [result(9.0)], family="vae")
    (caption,) = re.findall(r"<b>a0</b><br>([^<]+)", page.render(load_runs(sorted(tmp_path.iterdir()))))
    assert caption == "FD digits 1.00, best, EMA, ddim, 50 steps, step 100, sampling seed 0"
