"""hydra/sweeper=search: jobs are trials that Optuna proposes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from gencompare.errors import UserError


class Search(Sweeper):
    """A study, or one for each value of a key; see `gencompare.tasks.search`.

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
        from gencompare.tasks.search import Study, distribution, import_optuna
        from hydra_plugins.gencompare_sweeps.families import with_experiment

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
        from gencompare.tasks.search import NO_AIM

        assert self.config is not None and self.hydra_context is not None
        for words in batch:
            looks = self.hydra_context.config_loader.load_sweep_config(self.config, list(words)).callbacks.looks
            if not (looks.count and looks.preview):
                raise UserError(NO_AIM)
