"""Published results are shown below the tables of their data set and never ranked."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from composing import compose
from gencompare.comparison import page, published
from gencompare.comparison.load_runs import load_runs
from gencompare.comparison.page import report
from gencompare.comparison.published import (
    PublishedResult,
    check_reproduction,
    find_published,
    published_results,
)
from gencompare.errors import UserError
from gencompare.records import Measurement, Metric, RunRecord
from gencompare.tasks.main import main
from gencompare.tasks.runs.build import build_budget
from gencompare.tasks.runs.run_config import add_paper_settings
from synthetic import DIGITS, result, write_run


def test_each_published_result_has_a_paper_with_its_year() -> None:
    found = published_results("cifar10")
    assert len(found) > 15 and len({each.model for each in found}) == len(found)
    for each in found:
        assert re.search(r"(19|20)\d\d, \w", each.source), each
        assert each.fid is not None or each.bpd is not None
        assert (each.fid is None or 1 < each.fid < 60) and (each.bpd is None or 2 < each.bpd < 5)
    assert found[0].fid == min(a.fid for a in found if a.fid is not None)
    # Ho et al. 2020, table 1: 800,000 steps of 128 images.
    (ddpm,) = [each for each in found if each.model == "DDPM"]
    assert (ddpm.fid, ddpm.nfe, ddpm.images) == (3.17, 1000, 800_000 * 128)
    assert published_results("digits") == []


def test_published_results_are_shown_once_and_never_ranked(tmp_path: Path) -> None:
    cifar = replace(DIGITS, data="cifar10", extractor="inception_v3_compat")
    folders = [
        write_run(tmp_path / "a", [result(5.0, cifar), result(6.0, replace(cifar, num_images=1000)), result(1.0)]),
        write_run(tmp_path / "b", [result(7.0, cifar)], family="vae"),
    ]
    report(folders, tmp_path / "out")
    html = (tmp_path / "out" / "compare.html").read_text()
    assert html.count("cifar10: published results, not measured here") == 1
    ranking = re.findall(r'<table class="ranking">.*?</table>', html, re.DOTALL)
    assert len(ranking) == 3 and not any("Ho et al." in table for table in ranking)
    assert "Ho et al. 2020" in html
    for name in ("compare.csv", "compare.md", "compare.tex"):
        assert "Ho et al." not in (tmp_path / "out" / name).read_text()
    digits = [write_run(tmp_path / "d", [result(1.0)])]
    assert "published results, not measured" not in page.render(
        load_runs([*digits, write_run(tmp_path / "e", [result(2.0)])])
    )


INCEPTION = replace(DIGITS, data="cifar10", extractor="inception_v3_compat", num_images=50_000, reference="train+val")
DDPM = find_published("cifar10_ddpm")


def fid_run(value: float, measurement: Measurement = INCEPTION, **fields: Any) -> RunRecord:
    metrics = {"fid": Metric(value, higher_is_better=False)}
    fields = {"overrides": ["task=reproduce", "paper=cifar10_ddpm", *DDPM.overrides, "seed=3"]} | fields
    return RunRecord(
        name="run", family="ddpm", data={}, state=fields.pop("state", "finished"),
        results=[result(1.0, measurement, metrics=metrics)], **fields,
    )  # fmt: skip


def test_each_paper_with_settings_composes() -> None:
    names = [each.name for each in published_results("cifar10") if each.name]
    assert len(names) > 12 and len({*names}) == len(names)
    for name in names:
        argv = add_paper_settings(["task=reproduce", f"paper={name}"])
        cfg = compose(*argv)
        assert cfg.paper == name and type(build_budget(cfg)).__name__ == "Budget"
        reported = find_published(name)
        assert reported.fid is None or cfg.evaluation.num_images == 50_000
        assert reported.bpd is None or cfg.evaluation.protocol.num_likelihood_images == 10_000


def test_the_tier_needs_the_published_number_its_protocol_and_its_settings() -> None:
    tier = lambda record: check_reproduction(record, DDPM).tier  # noqa: E731
    assert tier(fid_run(3.2)) == tier(fid_run(3.02)) == "reproduced here"
    assert tier(fid_run(3.2, state="samples", overrides=["samples=theirs.npz"])) == "reproduced elsewhere"
    for other in (
        fid_run(3.5), fid_run(2.8), fid_run(math.nan),
        fid_run(3.2, replace(INCEPTION, num_images=10_000)), fid_run(3.2, replace(INCEPTION, reference="train")),
        fid_run(3.2, replace(INCEPTION, extractor="efficientnet_lite0")),
        fid_run(3.2, overrides=[*DDPM.overrides, "budget.images=1000"]),
        fid_run(3.2, overrides=[*DDPM.overrides, "trainer.global_batch_size=64"]),
        fid_run(3.2, overrides=["data=cifar10", "model=ddpm"]),
    ):  # fmt: skip
        assert tier(other) == "reported"
    changed = check_reproduction(fid_run(3.2, overrides=[*DDPM.overrides, "model.network.channels=64"]), DDPM)
    assert "Not the settings of the paper: model.network.channels=64" in str(changed)
    lacking = check_reproduction(fid_run(3.2, overrides=["model=ddpm"]), DDPM)
    assert "without experiment=cifar10_ddpm" in str(lacking)


def test_bits_per_dim_count_only_if_all_test_images_were_scored() -> None:
    glow = find_published("cifar10_glow")
    for note, measured in (("exact, 10000 test images", 3.35), ("exact, 500 of 10000 test images", None)):
        scored = result(1.0, metrics={"bpd_vlb": Metric(9.0), "bpd_density": Metric(3.35, note=note)})
        record = RunRecord("run", "glow", {}, state="finished", results=[scored], overrides=list(glow.overrides))
        (check,) = check_reproduction(record, glow).checks
        assert check.measured == measured and check.agrees == (measured is not None)


def test_the_command_line_receives_the_settings_and_keeps_its_own() -> None:
    argv = ["task=reproduce", "paper=cifar10_ddpm"]
    assert add_paper_settings(argv) == ["experiment=cifar10_ddpm", "evaluation=paper_fid50k", *argv]
    assert add_paper_settings([*argv, "evaluation=quick"]) == ["experiment=cifar10_ddpm", *argv, "evaluation=quick"]
    assert add_paper_settings([*argv, "run_dir=r"]) == ["evaluation=paper_fid50k", *argv, "run_dir=r"]
    expected = ["data=cifar10", "evaluation=paper_fid50k", *argv, "samples=s"]
    assert add_paper_settings([*argv, "samples=s"]) == expected
    assert add_paper_settings(["model=ddpm"]) == ["model=ddpm"]
    for name, hint in (("cifar10_dpm", "Did you mean paper=cifar10_ddpm"), ("xx", "Choose from cifar10_ddpm, cif")):
        with pytest.raises(UserError, match=hint):
            add_paper_settings(["task=reproduce", f"paper={name}"])
    with pytest.raises(UserError, match="paper=None"):
        add_paper_settings(["task=reproduce"])


def test_the_page_shows_the_tier_of_published_results(tmp_path: Path) -> None:
    reproduced = fid_run(3.2, config={"paper": "cifar10_ddpm"})
    folder = write_run(tmp_path / "a", reproduced.results, config=reproduced.config, overrides=reproduced.overrides)
    report([folder], tmp_path / "out")
    html = (tmp_path / "out" / "compare.html").read_text()
    assert html.count("reproduced here") == 1 and html.count("reported") > 10


def test_a_published_result_is_reproduced_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The task trains, evaluates, compares, and notes the paper; task=reproduce run_dir=DIR compares the run again."""
    toy = PublishedResult(
        "Toy", "Nobody 2020, Nothing", "digits", name="toy", bpd=3.0,
        overrides=("model=gaussian", "evaluation=quick", "evaluation.num_images=50"),
    )  # fmt: skip
    monkeypatch.setattr(published, "_published", lambda: {"digits": [toy]})
    folder = tmp_path / "run"
    for argv in (["hydra.run.dir=" + str(folder)], [f"run_dir={folder}"]):
        monkeypatch.setattr("sys.argv", ["run.py", "task=reproduce", "paper=toy", "logger=none", *argv])
        main()
        out = capsys.readouterr().out
        assert "Toy (Nobody 2020, Nothing): reported." in out and "bits/dim: 3 published" in out
        assert RunRecord.load(folder).config["paper"] == "toy"
