"""Published results are shown below the tables of their data set and never ranked."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from gencompare.comparison import page
from gencompare.comparison.load_runs import load_runs
from gencompare.comparison.page import report
from gencompare.comparison.ranking import published_results
from synthetic import DIGITS, result, write_run


def test_each_published_result_has_a_paper_with_its_year() -> None:
    found = published_results("cifar10")
    assert len(found) > 15 and len({each.model for each in found}) == len(found)
    for each in found:
        assert re.search(r"(19|20)\d\d, \w", each.source), each
        assert each.fid is not None or each.bpd is not None
        assert (each.fid is None or 1 < each.fid < 60) and (each.bpd is None or 2 < each.bpd < 4)
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
