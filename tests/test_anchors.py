"""Published figures stand below the tables of their data set, apart from what was measured."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from gencompare.compare import page
from gencompare.compare.load_runs import load_runs
from gencompare.compare.page import report
from gencompare.compare.ranking import published_results
from synthetic import DIGITS, result, write_run


def test_every_published_figure_has_its_paper_and_year() -> None:
    found = published_results("cifar10")
    assert len(found) > 15 and len({anchor.model for anchor in found}) == len(found)
    for anchor in found:
        assert re.search(r"(19|20)\d\d, \w", anchor.source), anchor
        assert anchor.fid is not None or anchor.bpd is not None
        assert (anchor.fid is None or 1 < anchor.fid < 60) and (anchor.bpd is None or 2 < anchor.bpd < 4)
    assert found[0].fid == min(a.fid for a in found if a.fid is not None)
    # Ho et al. 2020, table 1: 800,000 steps of 128 images.
    (ddpm,) = [anchor for anchor in found if anchor.model == "DDPM"]
    assert (ddpm.fid, ddpm.nfe, ddpm.images) == (3.17, 1000, 800_000 * 128)
    assert published_results("digits") == []


def test_they_are_shown_once_and_never_ranked(tmp_path: Path) -> None:
    cifar = replace(DIGITS, data="cifar10", extractor="inception_v3_compat")
    folders = [
        write_run(tmp_path / "a", [result(5.0, cifar), result(6.0, replace(cifar, num_images=1000)), result(1.0)]),
        write_run(tmp_path / "b", [result(7.0, cifar)], family="vae"),
    ]
    report(folders, tmp_path / "out")
    html = (tmp_path / "out" / "compare.html").read_text()
    assert html.count("cifar10: published, not measured here") == 1
    ranking = re.findall(r'<table class="ranking">.*?</table>', html, re.DOTALL)
    assert len(ranking) == 3 and not any("Ho et al." in table for table in ranking)
    assert "Ho et al. 2020" in html
    for name in ("compare.csv", "compare.md", "compare.tex"):
        assert "Ho et al." not in (tmp_path / "out" / name).read_text()
    digits = [write_run(tmp_path / "d", [result(1.0)])]
    assert "published, not measured" not in page.render(load_runs([*digits, write_run(tmp_path / "e", [result(2.0)])]))
