"""Each row has one style and one name everywhere, shared by all of its seeds."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from gencompare.comparison import page
from gencompare.comparison.charts import Charts, by_rank
from gencompare.comparison.load_runs import LoadedRuns, load_runs
from gencompare.comparison.ranking import rank_results
from gencompare.comparison.sampler_description import without_steps
from gencompare.comparison.svg_plots import legend, styles
from gencompare.comparison.tables import columns
from synthetic import result, write_run


def charts_of(loaded: LoadedRuns) -> Charts:
    tables = rank_results(loaded.runs)
    runs = by_rank(tables, loaded.runs)
    return Charts.of(tables, runs, styles(tables, runs))


def test_fifteen_families_of_five_seeds_have_fifteen_styles(tmp_path: Path) -> None:
    curve = {"images": np.array([1e4, 2e4]), "val/fd_digits": np.array([9.0, 3.0])}
    folders = [
        write_run(
            tmp_path / f"{family}_{seed}", [result(1.0 + family + 0.01 * seed, generation={"seed": seed})], seed=seed,
            family=f"f{family:02d}", training={"flops": 1e12 * (20 - family), "seconds": 60.0}, with_grid=False,
            curve=curve,
        )
        for family in range(15) for seed in range(5)
    ]  # fmt: skip
    loaded = load_runs(folders)
    tables = rank_results(loaded.runs)
    style = styles(tables, loaded.runs)
    of_rows = {row.title: (style[row.title].color, style[row.title].dash) for row in tables[0].rows}
    assert len(of_rows) == len(set(of_rows.values())) == 15
    for row in tables[0].rows:
        drawn = {(style[run.label].color, style[run.label].dash) for run, _ in row.group.members}
        assert drawn == {of_rows[row.title]}, "all seeds of a row share its style"
    charts = charts_of(loaded)
    (cost,) = (each.chart for each in charts.pareto)
    assert {line.name: (line.color, line.dash) for line in cost.lines if line.name} == of_rows
    (distance,) = charts.distances
    assert len(distance.lines) == 75, "every seed has its curve"
    assert {name: (line.color, line.dash) for name, line in legend([distance]).items()} == of_rows
    section = page.render(loaded).split('id="costs"')[1].split("</section>")[0]
    assert section.split('<div class="charts">')[0].count("mean of 5 seeds") == 15, "the legend"
    swatches = re.findall(r'stroke="([^"]+)" stroke-width="2" stroke-dasharray="([^"]*)"', section)
    assert set(swatches[:15]) == set(of_rows.values())


def test_guidance_scales_are_separate_rows_without_a_line(tmp_path: Path) -> None:
    settings = [(0, 25, 3.0), (1, 25, 2.0), (1.5, 50, 1.5), (2, 50, 1.2), (3, 50, 1.8)]
    sampler = "DDIM, 25 steps, eta 0, ClassifierFree, scale {:g}, x0 clipped"
    for seed in range(2):
        results = [
            result(value + 0.01 * seed, generation={"seed": seed, "sampler": sampler.format(scale), "nfe": {"net": n}})
            for scale, n, value in settings
        ]
        write_run(tmp_path / f"r{seed}", results, seed=seed, with_grid=False)
    loaded = load_runs(sorted(tmp_path.iterdir()))
    (table,) = rank_results(loaded.runs)
    names = [f"r0, mean of 2 seeds · DDIM, scale {scale:g}" for scale in (2, 1.5, 3, 1, 0)]
    assert [row.title for row in table.rows] == names
    charts = charts_of(loaded)
    assert charts.nfe == [], "no two rows differ only in the number of steps"
    (nfe,) = (each for each in charts.pareto if each.chart.x_label == "NFE per sample")
    assert [line.name for line in nfe.chart.lines if line.name] == names
    assert [row.title for row, _ in nfe.front] == [names[3], names[0]]
    front = page.render(loaded).split("Pareto front, cheapest first:")[1].split("</figcaption>")[0]
    assert re.findall(r"</svg>([^<;]+)", front) == [f"{names[3]} (100 %)", f"{names[0]} (100 %)"]
    (run,) = (column for column in columns(table) if column.title == "run")
    assert [run.cell(row).annotation for row in table.rows] == [name.split(" · ")[1] for name in names]


def test_the_legend_of_nfe_curves_lists_their_lines(tmp_path: Path) -> None:
    results = [
        result(20 / n + k, generation={"sampler": f"{kind}, {n} steps, eta {eta}", "nfe": {"net": float(n)}})
        for k, (kind, eta) in enumerate([("DDIM", 0), ("DDIM", 1), ("Heun", 0)]) for n in (5, 10)
    ]  # fmt: skip
    write_run(tmp_path / "a", results, with_grid=False)
    write_run(tmp_path / "b", [result(9.0)], family="vae", with_grid=False)
    loaded = load_runs(sorted(tmp_path.iterdir()))
    (chart,) = charts_of(loaded).nfe
    assert [line.name for line in chart.lines] == ["a · DDIM, eta 0", "a · DDIM, eta 1", "a · Heun, eta 0", "b"]
    assert len({(line.color, line.dash) for line in chart.lines}) == 4
    section = page.render(loaded).split('id="nfe"')[1].split("</section>")[0]
    shown = section.split('class="legend"')[1].split("</div>")[0]
    assert re.findall(r"</svg>([^<]+)", shown) == [line.name for line in chart.lines], "and nothing else"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("DDIM, 25 steps, eta 0", "DDIM, eta 0"), ("250 steps from noise, Langevin", "from noise, Langevin"),
        ("Langevin, 10 steps, num_langevin_steps 20", "Langevin, num_langevin_steps 20"), ("5 steps · best", "best"),
    ],
)  # fmt: skip
def test_a_sampling_description_without_steps(text: str, expected: str) -> None:
    assert without_steps(text) == expected


def test_an_image_caption_has_the_metric_of_its_own_run(tmp_path: Path) -> None:
    for seed, value in enumerate((1.0, 2.0, 6.0)):
        made = result(value, generation={"seed": seed, "step": 100 + seed, "checkpoint": "best"})
        write_run(tmp_path / f"a{seed}", [made], seed=seed)
    write_run(tmp_path / "b", [result(9.0)], family="vae")
    (caption,) = re.findall(r"<b>a0</b><br>([^<]+)", page.render(load_runs(sorted(tmp_path.iterdir()))))
    assert caption == "FD digits 1.00, best, EMA, ddim, 50 steps, step 100, sampling seed 0"
