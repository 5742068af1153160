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
    changed_settings,
    check_reproduction,
    find_published,
    published_results,
)
from gencompare.errors import UserError
from gencompare.records import Measurement, Metric, RunRecord
from gencompare.tasks.main import main
from gencompare.tasks.runs.interpolations import plain
from gencompare.tasks.runs.overrides import add_paper_settings
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


def fid_run(value: float, measurement: Measurement = INCEPTION, **generation: Any) -> RunRecord:
    fid = result(1.0, measurement, metrics={"fid": Metric(value, higher_is_better=False)}, generation=generation)
    return RunRecord(name="run", family="ddpm", data={}, state="finished", results=[fid])


def test_each_paper_with_settings_composes_and_measures_what_it_reports() -> None:
    names = [each.name for each in published_results("cifar10") if each.name]
    assert len(names) > 12 and len({*names}) == len(names)
    for name in names:
        cfg = compose(*add_paper_settings(["task=reproduce", f"paper={name}"]))
        assert cfg.paper == name and cfg.evaluation.checkpoints == ["last"]
        reported = find_published(name)
        assert reported.fid is None or cfg.evaluation.num_images == 50_000
        if reported.bpd is not None:
            assert cfg.evaluation.protocol.num_likelihood_images == 10_000
            # Diffusion models have the estimators of their config, other families the one of their class.
            assert reported.likelihood in (cfg.model.get("likelihoods") or OTHER_LIKELIHOODS)
        assert not changed_settings(plain(cfg), plain(compose(*reported.overrides)))


OTHER_LIKELIHOODS = ("density", "elbo", "flow", "pixels")


def test_the_tier_needs_the_published_number_its_protocol_and_its_settings() -> None:
    def tier(record: RunRecord, **options: Any) -> str:
        return check_reproduction(record, DDPM, **options).tier

    assert tier(fid_run(3.2)) == tier(fid_run(3.02)) == "reproduced here"
    assert tier(fid_run(3.2, checkpoint="as published"), external=True) == "reproduced elsewhere"
    for other in (
        fid_run(3.5), fid_run(2.8), fid_run(math.nan), fid_run(3.2, checkpoint="best"),
        fid_run(3.2, replace(INCEPTION, num_images=10_000)), fid_run(3.2, replace(INCEPTION, reference="train")),
        fid_run(3.2, replace(INCEPTION, extractor="efficientnet_lite0")),
    ):  # fmt: skip
        assert tier(other) == "reported"
    assert tier(fid_run(3.2), changed=["model.network.channels=64 (paper: 128)"]) == "reported"
    fid = check_reproduction(fid_run(3.2), DDPM, ["x=1 (paper: 2)"])
    assert fid.lines()[1:] == [
        "FID: 3.17 published, 3.20 measured, agrees within 0.16", "Not the settings of the paper: x=1 (paper: 2)"
    ]  # fmt: skip
    own_sampler_first = fid_run(3.2)
    own_sampler_first.results += fid_run(9.0).results
    assert tier(own_sampler_first) == "reproduced here"


@pytest.mark.parametrize(
    ("override", "counts"),
    [
        ("model.network.channels=64", True), ("trainer.global_batch_size=64", True), ("callbacks.ema.decay=0.5", True),
        ("callbacks.evaluation.patience=3", True), ("budget.images=1000", True), ("data.random_flip=false", True),
        ("model/sampler=ddim", True), ("seed=3", False), ("tags=[a]", False), ("name=x", False), ("logger=csv", False),
        ("trainer.precision=bf16-mixed", False), ("trainer.devices=2", False), ("evaluation.num_images=500", False),
        ("callbacks.evaluation.num_evaluations=2", False), ("paths.data=elsewhere", False), ("data=cifar10", False),
    ],
)  # fmt: skip
def test_only_settings_of_the_trained_model_count_as_changed(override: str, counts: bool) -> None:
    paper = plain(compose(*DDPM.overrides))
    changed = changed_settings(plain(compose(*DDPM.overrides, override)), paper)
    assert bool(changed) == counts
    if override.startswith("model.network"):
        assert changed == ["model.network.channels=64 (paper: 128)"]


def test_bits_per_dim_need_the_papers_estimator_on_all_test_images() -> None:
    glow = find_published("cifar10_glow")
    for name, note, measured in (
        ("bpd_flow", "exact, 10000 test images", 3.35),
        ("bpd_flow", "exact, 500 of 10000 test images", None),
        ("bpd_vlb", "bound, 10000 test images", None),
    ):
        scored = result(1.0, metrics={"bpd_vlb": Metric(9.0), name: Metric(3.35, note=note)})
        record = RunRecord("run", "glow", {}, state="finished", results=[scored])
        (check,) = check_reproduction(record, glow).checks
        assert check.measured == measured and check.agrees == (measured is not None)


def test_the_command_line_receives_the_settings_and_keeps_its_own() -> None:
    argv, last = ["task=reproduce", "paper=cifar10_ddpm"], "evaluation.checkpoints=[last]"
    assert add_paper_settings(argv) == ["experiment=cifar10_ddpm", "evaluation=paper_fid50k", last, *argv]
    own = [*argv, "evaluation=quick"]
    assert add_paper_settings(own) == ["experiment=cifar10_ddpm", last, *own]
    assert add_paper_settings([*argv, "run_dir=r"]) == ["evaluation=paper_fid50k", last, *argv, "run_dir=r"]
    expected = ["data=cifar10", "evaluation=paper_fid50k", last, *argv, "samples=s"]
    assert add_paper_settings([*argv, "samples=s"]) == expected
    assert add_paper_settings(["model=ddpm"]) == ["model=ddpm"]
    flags = ["--config-dir", "conf", *argv, "--cfg", "job"]
    assert add_paper_settings(flags)[:3] == ["--config-dir", "conf", "experiment=cifar10_ddpm"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["paper=cifar10_dpm"], "Did you mean paper=cifar10_ddpm"),
        (["paper=xx"], "Choose from cifar10_ddpm, cif"),
        (["paper=cifar10_ddpm,cifar10_edm"], "one name per command"),
        ([], "task=reproduce needs paper=NAME: choose from cifar10_ddpm"),
    ],
)
def test_an_unknown_paper_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        add_paper_settings(["task=reproduce", *words])


def test_the_page_shows_the_best_tier_of_published_results(tmp_path: Path) -> None:
    folders = []
    for name, value in (("a", 3.2), ("b", 3.9)):
        record = fid_run(value)
        summary = check_reproduction(record, DDPM).summary()
        folders.append(write_run(tmp_path / name, record.results, model={"reproduction": summary}))
    folders.append(write_run(tmp_path / "c", record.results, model={"reproduction": {"paper": "x", "tier": "<b>best"}}))
    report(folders, tmp_path / "out")
    html = (tmp_path / "out" / "compare.html").read_text()
    assert html.count("reproduced here (1 of 2 runs)") == 1 and html.count(">reported<") > 10 and "<b>best" not in html


def test_a_published_result_is_reproduced_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The task trains, evaluates, compares, and notes the result; with run_dir=DIR it compares the run again."""
    toy = PublishedResult(
        "Toy", "Nobody 2020, Nothing", "digits", name="toy", bpd=2.61, likelihood="density",
        overrides=(
            "model=gaussian", "evaluation=quick", "evaluation.num_images=50", "evaluation.extractors=[classifier]",
            "evaluation.protocol.num_likelihood_images=500",
        ),
    )  # fmt: skip
    monkeypatch.setattr(published, "_published", lambda: {"digits": [toy]})
    folder = tmp_path / "run"
    for argv, tier in (
        ([f"hydra.run.dir={folder}"], "reproduced here"), ([f"run_dir={folder}"], "reproduced here"),
        ([f"hydra.run.dir={tmp_path / 'changed'}", "model.per_class=false"], "reported"),
    ):  # fmt: skip
        monkeypatch.setattr("sys.argv", ["run.py", "task=reproduce", "paper=toy", "logger=none", *argv])
        main()
        out = capsys.readouterr().out
        assert f"Toy (Nobody 2020, Nothing): {tier}." in out, out[-600:]
        assert re.search(r"bits/dim: 2.61 published, \d.\d+ measured", out)
    assert "Not the settings of the paper: model.per_class=false (paper: true)" in out
    assert RunRecord.load(folder).model["reproduction"]["measured"]["bpd"] == pytest.approx(2.61, abs=0.01)
