"""Hydra sweepers: families with their presets, and a search; resolvers that name sweep folders."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, ListConfig, OmegaConf

from gencompare.errors import UserError

UNFIT = re.compile(r"[^\w.+-]+")
"""Characters that the name of a folder does without."""


def sweep_folder(words: ListConfig, moment: str) -> str:
    """Named by what is swept and what is not, so that more values, and more seeds, join the same folder.

    What is fixed counts with its value, what is swept by its key; seeds, places and loggers do not count.

    Args:
        words: of the command line, without Hydra's own.
        moment: names the folder of a task that does not train, which is begun anew each time.
    """
    from gencompare.tasks.runs.sweep import counts

    given: Any = OmegaConf.to_container(words, resolve=False)
    if any(word.startswith("task=") and word != "task=train" for word in given):
        return f"{moment}_sweep"
    said, read = [], []
    parsed = OverridesParser.create().parse_overrides([word for word in given if counts(word)])
    for key, word in sorted(((word.get_key_element().lstrip("+"), word) for word in parsed), key=itemgetter(0)):
        if key == "seed":
            continue
        swept = word.is_sweep_override()
        said.append(key if swept else str(word.input_line))
        if swept or key in ("data", "model", "experiment"):
            read.append(re.split(r"[./]", key)[-1] if swept else word.get_value_element_as_str())
    name = hashlib.sha256("\n".join(sorted(said)).encode()).hexdigest()[:8]
    return "_".join(["sweep", *(UNFIT.sub("-", part) for part in read), name])


def limits(budget: Any) -> str:
    """What a budget allows, such as ``10000_images``: studies at other costs are other studies."""
    options: Any = OmegaConf.to_container(budget, resolve=True)
    allowed = {key: value for key, value in options.items() if value is not None and not key.startswith("_")}
    return UNFIT.sub("-", "_".join(f"{shown(value)}_{key}" for key, value in allowed.items()) or "no_limit")


def shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


for resolver in (sweep_folder, limits):
    OmegaConf.register_new_resolver(resolver.__name__, resolver, use_cache=True, replace=True)


class FamiliesSweeper(BasicSweeper):
    """Hydra's own sweeper, but that a job of ``model=FAMILY`` gets ``experiment=DATA_FAMILY`` where there is one."""

    def split_arguments(  # type: ignore[override]
        self, overrides: list[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        assert self.config is not None and self.hydra_context is not None
        experiments = self.hydra_context.config_loader.get_group_options("experiment")
        data = self.config.hydra.runtime.choices.data
        return [
            [with_experiment(job, experiments, data) for job in batch]
            for batch in BasicSweeper.split_arguments(overrides, max_batch_size)
        ]


def with_experiment(job: Sequence[str], experiments: Collection[str], data: str) -> list[str]:
    """The words of a job, led by those of the experiment for its family and data, unless it names one itself.

    Args:
        experiments: all there are, by name.
        data: the data set of jobs that name none.
    """
    said = dict(word.split("=", 1) for word in job if "=" in word)
    experiment = f"{said.get('data', data)}_{said.get('model')}"
    if "experiment" in said or experiment not in experiments:
        return list(job)
    return [f"experiment={experiment}", *job]


class SearchSweeper(Sweeper):
    """A study, or one for each value of a key; see `gencompare.tasks.runs.search`.

    Args:
        trials: of each study.
        at_once: proposed together, for launchers of several jobs at once.
        each: a key of the config, each of whose values gets a study of its own; None makes one study.
        seed: of the proposals.
        params: by key of the config, the values to search among, in Hydra's words; or one value, for all trials.
    """

    def __init__(self, trials: int, at_once: int, each: str | None, seed: int, params: dict[str, Any] | None) -> None:
        super().__init__()
        self.trials, self.at_once, self.each, self.seed, self.params = trials, at_once, each, seed, dict(params or {})
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None
        self.launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        from gencompare.tasks.runs.search import Study, distribution, import_optuna

        assert self.config is not None and self.hydra_context is not None and self.launcher is not None
        import_optuna()
        for name, count in (("trials", self.trials), ("at_once", self.at_once)):
            if not isinstance(count, int) or count < 1:
                raise UserError(f"hydra.sweeper.{name}={count}: give a whole number, at least 1.")
        loader = self.hydra_context.config_loader
        words = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        parsed = {o.get_key_element(): o for o in OverridesParser.create(config_loader=loader).parse_overrides(words)}
        apart = parsed.pop(self.each, None) if self.each is not None else None
        values = [None] if apart is None else list(apart.sweep_string_iterator()) if apart.is_sweep_override() else [
            apart.get_value_element_as_str()
        ]  # fmt: skip
        space = {key: distribution(o) for key, o in parsed.items() if o.is_sweep_override()}
        if not space:
            example = "'model.optimizer.lr=tag(log, interval(1e-4, 1e-2))'"
            raise UserError(f"A search needs something to search: for instance {example}.")
        fixed = [f"{key}={o.get_value_element_as_str()}" for key, o in parsed.items() if not o.is_sweep_override()]
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        experiments, data = loader.get_group_options("experiment"), self.config.hydra.runtime.choices.data
        for number, value in enumerate(values):
            own = fixed if value is None else with_experiment([f"{self.each}={value}", *fixed], experiments, data)
            Study(
                name=value or "search", space=space, fixed=own, trials=self.trials, at_once=self.at_once,
                first=number * self.trials, seed=self.seed, sweep=folder,
            ).run(self.launch)  # fmt: skip

    def launch(self, jobs: Sequence[Sequence[str]], first: int) -> object:
        assert self.launcher is not None
        self.validate_batch_is_legal(jobs)
        return self.launcher.launch(jobs, initial_job_idx=first)

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Compose each job's config, so that what cannot be composed, or gives nothing to go by, ends the search and is
        no failed trial."""
        from gencompare.tasks.runs.search import NO_AIM

        assert self.config is not None and self.hydra_context is not None
        for words in batch:
            evaluation = self.hydra_context.config_loader.load_sweep_config(
                self.config, list(words)
            ).callbacks.evaluation
            if not (evaluation and evaluation.num_evaluations and evaluation.num_samples):
                raise UserError(NO_AIM)
