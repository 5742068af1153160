"""task=plot_schedules: plot the noise schedules."""

from __future__ import annotations

from pathlib import Path

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import DictConfig

from gencompare.comparison.charts import draw_schedules
from gencompare.diffusion.schedules import NoiseSchedule, schedule_curve
from gencompare.errors import UserError
from gencompare.files import atomic_write

GROUP = "model/schedule"


def plot_schedules(cfg: DictConfig) -> None:
    """Plot every option of ``model/schedule``, or those of ``cfg.task.schedules``, in one PNG file.

    The schedule chosen by ``model/schedule`` is plotted with the command-line overrides.
    """
    options = GlobalHydra.instance().config_loader().get_group_options(GROUP)
    names = list(cfg.task.schedules or options)
    unknown = [name for name in names if name not in options]
    if unknown:
        raise UserError(f"task.schedules: unknown schedule {unknown[0]}; choose from {', '.join(options)}.")
    path = Path(cfg.task.out or Path(cfg.out) / "schedules.png")
    figure = draw_schedules({name: schedule_curve(_schedule(name, cfg), points=1001) for name in names})
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)
    print(f"Noise schedules: {path}")


def _schedule(name: str, cfg: DictConfig) -> NoiseSchedule:
    chosen = name == cfg.choices.get(GROUP)
    schedule = instantiate((cfg if chosen else compose(f"{GROUP}/{name}")).model.schedule, _convert_="all")
    schedule.check()
    return schedule
