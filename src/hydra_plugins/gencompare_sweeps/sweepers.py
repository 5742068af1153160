"""Hydra sweepers for model families and hyperparameter searches, and the resolvers that name sweep folders."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra.utils import get_class
from omegaconf import DictConfig, ListConfig, OmegaConf

from gencompare.command_line import config_roots
from gencompare.errors import UserError
from gencompare.private_apis import basic_sweeper

UNSAFE = re.compile(r"[^\w.+-]+")
"""Characters that are replaced in folder names."""


def sweep_folder(overrides: ListConfig, timestamp: str) -> str:
    """Return the folder name of a sweep. The same sweep with more values or more seeds uses the same folder.

    The name contains a hash of fixed overrides with their values and of swept overrides without their values. Seeds,
    locations and loggers do not count.

    Args:
        overrides: the command line, without Hydra's own keys.
        timestamp: name of the folder for tasks other than training, which start a new folder each time.
    """
    from gencompare.tasks.runs.sweep import is_identifying

    args: Any = OmegaConf.to_container(overrides, resolve=False)
    if any(arg.startswith("task=") and arg != "task=train" for arg in args):
        return f"{timestamp}_sweep"
    hashed, readable = [], []
    parsed = OverridesParser.create().parse_overrides([arg for arg in args if is_identifying(arg)])
    for key, override in sorted(((each.get_key_element().lstrip("+"), each) for each in parsed), key=itemgetter(0)):
        if key == "seed":
            continue
        swept = override.is_sweep_override()
        hashed.append(key if swept else str(override.input_line))
        if swept or key in ("data", "model", "experiment"):
            readable.append(re.split(r"[./]", key)[-1] if swept else override.get_value_element_as_str())
    digest = hashlib.sha256("\n".join(sorted(hashed)).encode()).hexdigest()[:8]
    return "_".join(["sweep", *(UNSAFE.sub("-", part) for part in readable), digest])


def limits(budget: Any) -> str:
    """Format the limits of a budget, such as ``10000_images``, for folder names. Each budget is a separate study."""
    options: Any = OmegaConf.to_container(budget, resolve=True)
    values = {key: value for key, value in options.items() if value is not None and not key.startswith("_")}
    return UNSAFE.sub("-", "_".join(f"{_format(value)}_{key}" for key, value in values.items()) or "no_limit")


def _format(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def families(kind: str = "all") -> str:
    """Return all generative models of ``conf/model`` and of the user's own config groups, separated by commas.

    Args:
        kind: ``all``, or ``trained`` without models in closed form, which have nothing to search.
    """
    from gencompare.generative_model import GenerativeModel

    names = sorted({path.stem for root in config_roots() for path in (root / "model").glob("*.yaml")})
    models = {name: _model_class(name) for name in names}
    return ",".join(
        name
        for name, model in models.items()
        if issubclass(model, GenerativeModel) and not (kind == "trained" and model.closed_form)
    )


def _model_class(name: str) -> type:
    """Return the class of ``model=name``, which its config names or inherits from another option."""
    path = next(path for root in config_roots() if (path := root / "model" / f"{name}.yaml").is_file())
    cfg: Any = OmegaConf.load(path)
    if "_target_" in cfg:
        try:
            return get_class(cfg._target_)
        except ImportError as error:
            raise UserError(f"{path}: the class {cfg._target_} cannot be imported ({error}).") from error
    parents = [entry for entry in cfg.get("defaults", []) if isinstance(entry, str) and entry != "_self_"]
    if not parents:
        raise UserError(f"{path} names no model: add _target_.")
    return _model_class(parents[0].rsplit("/", 1)[-1])


for resolver in (sweep_folder, limits, families):
    OmegaConf.register_new_resolver(resolver.__name__, resolver, use_cache=True, replace=True)


class FamiliesSweeper(basic_sweeper()):
    """Hydra's basic sweeper, which also adds ``experiment=DATA_FAMILY``, if it exists, to jobs of ``model=FAMILY``.

    Args:
        max_batch_size: as in Hydra's basic sweeper.
        params: as in Hydra's basic sweeper.
        presets: the data set whose experiments are used; None stands for each job's own.
    """

    def __init__(self, max_batch_size: int | None, params: dict[str, str] | None, presets: str | None = None) -> None:
        super().__init__(max_batch_size, params)
        self.presets = presets

    def split_arguments(  # type: ignore[override]
        self, overrides: list[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        assert self.config is not None and self.hydra_context is not None
        experiments = self.hydra_context.config_loader.get_group_options("experiment")
        data = self.config.hydra.runtime.choices.data
        return [
            [with_experiment(job, experiments, data, self.presets) for job in batch]
            for batch in super().split_arguments(overrides, max_batch_size)
        ]


def with_experiment(
    overrides: Sequence[str], experiments: Collection[str], data: str, presets: str | None = None
) -> list[str]:
    """Prepend the experiment for a job's data set and family to its overrides, if it exists and no experiment is given.

    Args:
        experiments: the names of all experiments.
        data: the data set of jobs without ``data=``.
        presets: the data set whose experiments are used, on the job's own data; None: the job's own data set.

    Raises:
        UserError: there are no experiments of ``presets``.
    """
    if presets is not None and not any(name.startswith(f"{presets}_") for name in experiments):
        raise UserError(f"hydra.sweeper.presets={presets}: there is no experiment whose name starts with {presets}_.")
    values = dict(arg.split("=", 1) for arg in overrides if "=" in arg)
    own_data = values.get("data", data)
    experiment = f"{presets or own_data}_{values.get('model')}"
    if "experiment" in values or experiment not in experiments:
        return list(overrides)
    kept = [] if presets is None or "data" in values else [f"data={own_data}"]
    return [f"experiment={experiment}", *kept, *overrides]


class SearchSweeper(Sweeper):
    """Runs a hyperparameter search, or one per value of a key (see `gencompare.tasks.runs.search`).

    Args:
        n_trials: trials per study.
        n_jobs: trials that are proposed together, for launchers that run several jobs at once.
        study_per: a config key with a separate study for each of its values; None runs a single study.
        seed: seed of the proposals.
        params: the search space, as Hydra override values by config key; single values are fixed for all trials.
    """

    def __init__(
        self, n_trials: int, n_jobs: int, study_per: str | None, seed: int, params: dict[str, Any] | None
    ) -> None:
        super().__init__()
        self.n_trials, self.n_jobs, self.study_per, self.seed = n_trials, n_jobs, study_per, seed
        self.params = dict(params or {})
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
        for name, count in (("n_trials", self.n_trials), ("n_jobs", self.n_jobs)):
            if not isinstance(count, int) or count < 1:
                raise UserError(f"hydra.sweeper.{name}={count} must be a whole number of at least 1.")
        loader = self.hydra_context.config_loader
        args = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        parsed = {o.get_key_element(): o for o in OverridesParser.create(config_loader=loader).parse_overrides(args)}
        per = parsed.pop(self.study_per, None) if self.study_per is not None else None
        if per is None:
            values: list[str | None] = [None]
        elif per.is_sweep_override():
            values = list(per.sweep_string_iterator())
        else:
            values = [per.get_value_element_as_str()]
        space = {key: distribution(o) for key, o in parsed.items() if o.is_sweep_override()}
        if not space:
            example = "'model.optimizer.lr=tag(log, interval(1e-4, 1e-2))'"
            raise UserError(f"A search needs a search space: for instance {example}.")
        fixed = [f"{key}={o.get_value_element_as_str()}" for key, o in parsed.items() if not o.is_sweep_override()]
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        experiments, data = loader.get_group_options("experiment"), self.config.hydra.runtime.choices.data
        for index, value in enumerate(values):
            overrides = fixed
            if value is not None:
                overrides = with_experiment([f"{self.study_per}={value}", *fixed], experiments, data)
            Study(
                name=value or "search", space=space, fixed=overrides, n_trials=self.n_trials, n_jobs=self.n_jobs,
                first_job=index * self.n_trials, seed=self.seed, sweep=folder,
            ).run(self.launch)  # fmt: skip

    def launch(self, jobs: Sequence[Sequence[str]], first_job: int) -> object:
        assert self.launcher is not None
        self.validate_batch_is_legal(jobs)
        return self.launcher.launch(jobs, initial_job_idx=first_job)

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Compose each job's config, so that an invalid config, or one without an objective, ends the search with an
        error instead of counting as a failed trial."""
        from gencompare.tasks.runs.search import NO_OBJECTIVE

        assert self.config is not None and self.hydra_context is not None
        loader = self.hydra_context.config_loader
        for overrides in batch:
            evaluation = loader.load_sweep_config(self.config, list(overrides)).callbacks.evaluation
            if not (evaluation and evaluation.num_evaluations and evaluation.num_samples):
                raise UserError(NO_OBJECTIVE)
