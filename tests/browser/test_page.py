"""Test the page in a real browser: sorting, filtering and tooltips work, without network requests or errors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from devtools import Tab, find_browser  # type: ignore[import-not-found]

from gencompare.comparison.page import report
from synthetic import result, write_run

ODD = '<img src=http://127.0.0.1:9/x onerror="alert(1)"><script>window.bad = 1</script>'
BROWSER = find_browser()
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium: install it, or set CHROMIUM to its path"),
    pytest.mark.timeout(300),
]

ROWS = "[...document.querySelectorAll('table.ranking tbody tr:not(.section)')].filter(row => !row.hidden)"
NAMES = ROWS + ".map(row => row.querySelector('.name').innerText.trim())"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    for k, name in enumerate(["cosine", "linear", "sigmoid"]):
        for seed in range(5):
            write_run(
                folder / "runs" / f"{name}_{seed}",
                [result(1.0 + k + 0.01 * seed, generation={"seed": seed})], seed=seed,
                family=("ddpm", "vae", "gan")[k], training={"flops": 1e12 * (3 - k), "seconds": 60.0},
            )  # fmt: skip
    write_run(folder / "runs" / "odd", [result(9.0)], name=ODD, family="nf", training={"flops": 5e12, "seconds": 9.0})
    return report(sorted((folder / "runs").iterdir()), folder / "out")


@pytest.fixture(scope="module")
def tab(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    assert BROWSER is not None
    tab = Tab(BROWSER, tmp_path_factory.mktemp("profile"))
    try:
        tab.open(page)
        yield tab
    finally:
        tab.close()


def center(tab: Tab, element: str) -> tuple[float, float]:
    """Scroll an element into view and return its centre."""
    script = (
        f"(() => {{ const e = {element}; e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect();"
        " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
    )
    x, y = tab.run(script)
    return x, y


def test_clicking_a_heading_sorts(tab: Tab) -> None:
    before = tab.run(NAMES)
    assert [name.split(",")[0] for name in before[:3]] == ["cosine", "linear", "sigmoid"] and before[3] == ODD
    heading = "[...document.querySelectorAll('.ranking thead button')].find(b => b.textContent.startsWith('family'))"
    tab.point(*center(tab, heading), click=True)
    families = f"{ROWS}.map(row => row.children[2].innerText.trim())"
    assert tab.run(families) == ["ddpm", "gan", "nf", "vae"]
    assert tab.run(f"{heading}.closest('th').getAttribute('aria-sort')") == "ascending"
    tab.run(f"{heading}.focus()")
    tab.press("Enter", 13, "\r")
    assert tab.run(families) == ["vae", "nf", "gan", "ddpm"], "sorting works with the keyboard too"
    tab.point(*center(tab, "document.querySelector('.ranking thead button')"), click=True)
    assert tab.run(NAMES) == before


def test_a_click_enlarges_an_image_and_arrow_keys_show_the_others(tab: Tab) -> None:
    dialog = "document.querySelector('dialog')"
    assert not tab.run(f"{dialog}.open")
    tab.point(*center(tab, "document.querySelector('.enlarge')"), click=True)
    assert tab.run(f"{dialog}.open")
    assert tab.run(f"{dialog}.querySelector('img').getBoundingClientRect().width") > 400
    captions = [tab.run(f"{dialog}.querySelector('p').textContent")]
    tab.press("ArrowRight", 39)
    captions.append(tab.run(f"{dialog}.querySelector('p').textContent"))
    assert captions[0].startswith("cosine") and captions[1].startswith("linear"), captions
    tab.point(*center(tab, f"{dialog}.querySelector('img')"), click=True)
    assert not tab.run(f"{dialog}.open")


def test_typing_filters_rows(tab: Tab) -> None:
    all_names = tab.run(NAMES)
    tab.point(*center(tab, "document.querySelector('.filter input')"), click=True)
    tab.write("SEEDS vae")
    assert [name.split(",")[0] for name in tab.run(NAMES)] == ["linear"]
    assert tab.run("document.querySelector('.filter output').textContent") == "1 of 4 rows"
    tab.write(" nothing like it")
    assert tab.run(NAMES) == []
    tab.press("Escape", 27)
    assert tab.run(NAMES) == all_names
    assert tab.run("document.querySelector('.filter output').textContent") == ""


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_the_tooltip_shows_the_name_and_value_of_a_point(tab: Tab, k: int) -> None:
    """Pointing at a marker shows a tooltip with the name of its row and the values from the record."""
    lines = "document.querySelector('#costs svg.chart').querySelectorAll('g[data-name]')"
    marker = f"{lines}[{k + 1}].querySelector('use')"
    tab.point(*center(tab, marker))
    text: Any = tab.run(
        "document.getElementById('tooltip').hidden ? null : document.getElementById('tooltip').textContent"
    )
    name = tab.run(f"{marker}.closest('g[data-name]').dataset.name")
    value, flops = [(1.02, 3e12), (2.02, 2e12), (3.02, 1e12), (9.0, 5e12)][k]
    assert text is not None and text.startswith(f"{name}: ")
    shown_value, shown_flops = text.removeprefix(f"{name}: ").replace(",", "").split(" at ")
    assert float(shown_value) == pytest.approx(value, rel=2e-3)
    assert shown_flops.endswith("T") and float(shown_flops[:-1]) * 1e12 == pytest.approx(flops, rel=2e-3)
    tab.point(1, 1)
    assert tab.run("document.getElementById('tooltip').hidden")


def test_the_tooltip_of_a_learning_curve_shows_its_run(tab: Tab) -> None:
    x, y = center(tab, "document.querySelector('#curves svg.chart g[data-name] path')")
    found = set()
    for down in range(-100, 101, 8):
        tab.point(x, y + down)
        found.add(
            tab.run("document.getElementById('tooltip').hidden ? '' : document.getElementById('tooltip').textContent")
        )
    assert any(", seed " in text and " at " in text for text in found), found


@pytest.mark.parametrize("width", [1440, 700, 360])
def test_the_page_does_not_scroll_sideways(tab: Tab, width: int) -> None:
    tab.resize(width, 900)
    assert tab.run("document.documentElement.scrollWidth <= innerWidth")
    tab.resize(1440, 1000)


def test_there_were_no_network_requests_and_no_errors(tab: Tab) -> None:
    requests = [e["params"]["request"]["url"] for e in tab.events if e["method"] == "Network.requestWillBeSent"]
    assert len([url for url in requests if url.startswith("file:")]) == 1
    assert not [url for url in requests if not url.startswith(("file:", "data:"))]
    logged = [e["params"] for e in tab.events if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
    assert not logged
    assert not [e for e in tab.events if e["method"] in ("Runtime.consoleAPICalled", "Page.javascriptDialogOpening")]
    assert tab.run("window.bad === undefined && document.querySelectorAll('script').length === 1")
