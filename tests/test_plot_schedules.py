"""The noise schedule plot and its data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from composing import options
from gencompare.comparison.charts import draw_schedules
from gencompare.diffusion.schedules import schedule_curve
from parts import part

NAMES = options("model/schedule")


@pytest.mark.parametrize("name", NAMES)
def test_curve_contains_the_values_of_the_schedule(name: str) -> None:
    schedule = part("schedule", name)
    found = schedule_curve(schedule, points=4001)
    assert {value.shape for value in found.values()} == {(4001,)}
    assert found["t"][0] == pytest.approx(schedule.t_min) and found["t"][-1] == pytest.approx(schedule.t_max)
    assert np.isfinite(list(found.values())).all() and (found["density"] > 0).all()
    np.testing.assert_allclose(found["log_snr"], 2 * np.log(found["alpha"] / found["sigma"]), atol=2e-5)
    # The probability of the middle three fifths of uniform times, from the density of their noise levels.
    density, log_snr = found["density"][800:3201], found["log_snr"][800:3201]
    mass = np.sum((density[1:] + density[:-1]) / 2 * -np.diff(log_snr))
    assert mass == pytest.approx(0.6, abs=0.01)


def test_every_panel_shows_every_schedule() -> None:
    numbers = schedule_curve(part("schedule", "linear"))
    names = [*NAMES, *[f"another {k}" for k in range(12)]]
    for axes in draw_schedules(dict.fromkeys(names, numbers)).axes:
        assert [line.get_label() for line in axes.lines] == names
        looks = {(line.get_color(), str(line._unscaled_dash_pattern)) for line in axes.lines}  # type: ignore[attr-defined]
        assert len(looks) == len(names), "no two lines have the same style"


def test_task_plots_the_requested_schedules(
    cli: Callable[..., int], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gencompare.tasks import plot_schedules

    drawn: dict[str, Any] = {}
    monkeypatch.setattr(plot_schedules, "draw_schedules", lambda curves: drawn.update(curves) or draw_schedules(curves))
    assert cli("task=plot_schedules", "hydra.run.dir=job") == 0
    assert str(tmp_path / "job" / "schedules.png") in capsys.readouterr().out
    assert Image.open(tmp_path / "job" / "schedules.png").size[0] > 1000
    assert list(drawn) == NAMES
    drawn.clear()
    words = ["task.schedules=[cosine,ve]", "task.out=two.png", "model/schedule=ve", "model.schedule.sigma_max=7"]
    assert cli("task=plot_schedules", *words) == 0
    assert list(drawn) == ["cosine", "ve"] and (tmp_path / "two.png").is_file()
    assert drawn["ve"]["sigma"].max() == pytest.approx(7, rel=1e-5), "settings from the command line apply"
    assert cli("task=plot_schedules", "task.schedules=[cosin]") == 1
    assert "unknown schedule cosin; choose from betas, cosine," in capsys.readouterr().err
