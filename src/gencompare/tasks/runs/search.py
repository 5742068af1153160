"""Hyperparameter search with Optuna, which minimises the distance of samples to validation images."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gencompare.command_line import quote
from gencompare.comparison import formatting
from gencompare.errors import UserError
from gencompare.records import RECORD_FILE, RunRecord
from gencompare.tasks.runs import dependency_costs
from gencompare.tasks.runs.dependency_costs import TRIAL_ROLE
from gencompare.tasks.runs.run_folder import wait_until_inactive
from gencompare.tasks.runs.sweep import is_identifying

STUDY_FILE = "study.db"
NO_OBJECTIVE = (
    "A search minimises the distance to validation images during training: set callbacks.evaluation.num_evaluations and"
    " callbacks.evaluation.num_samples above 0, and choose a generative model."
)
Launch = Callable[[Sequence[Sequence[str]], int], object]
"""Function ``(overrides of each job, number of the first job)`` that runs jobs and returns when all have ended."""


def import_optuna() -> Any:
    """Import `optuna`, an optional dependency."""
    try:
        optuna = import_module("optuna")
    except ImportError as error:
        raise UserError("A search needs Optuna: pip install 'gencompare[search]'.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def distribution(override: Override) -> Any:
    """Return the Optuna distribution of a sweep override.

    ``interval(a, b)`` is uniform, ``int(interval(a, b))`` is uniform over whole numbers, and ``tag(log, ...)`` makes
    them log-uniform. Lists, ``choice(...)`` and ``range(...)`` are categorical.
    """
    optuna: Any = import_optuna()
    if not override.is_interval_sweep():
        return optuna.distributions.CategoricalDistribution(list(override.sweep_string_iterator()))
    interval: Any = override.value()
    whole = isinstance(interval.start, int) and isinstance(interval.end, int)
    kind = optuna.distributions.IntDistribution if whole else optuna.distributions.FloatDistribution
    try:
        return kind(interval.start, interval.end, log="log" in interval.tags)
    except ValueError as error:
        raise UserError(f"{override.input_line}: {error}") from error


@dataclass
class Study:
    """An Optuna study whose trials are run folders in ``sweep``.

    An interrupted study can be resumed. Unfinished trials then run first, with the same values. Each proposal depends
    on the seed and earlier trials, but not on interruptions.

    Args:
        name: prefix of the study's name in the database.
        space: distributions by config key.
        fixed: overrides that all trials share.
        n_trials: number of trials, including failed ones.
        n_jobs: number of trials that are proposed and launched together.
        first_job: number of the first job.
        seed: seed of the proposals.
        sweep: folder of the trials and of the database.
    """

    name: str
    space: dict[str, Any]
    fixed: list[str]
    n_trials: int
    n_jobs: int
    first_job: int
    seed: int
    sweep: Path

    def __post_init__(self) -> None:
        optuna: Any = import_optuna()
        url: Any = import_module("sqlalchemy").URL  # escapes special characters of paths
        # Different settings or a different space define a new study.
        settings = "\n".join(
            [*sorted(filter(is_identifying, self.fixed)), *(f"{key}: {self.space[key]}" for key in sorted(self.space))]
        )
        self.id = f"{self.name}_{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
        self.study = optuna.create_study(
            study_name=self.id, direction="minimize", load_if_exists=True,
            storage=url.create("sqlite", database=str(self.sweep / STUDY_FILE)).render_as_string(),
        )  # fmt: skip
        self.states = optuna.trial.TrialState
        self.sampler = optuna.samplers.TPESampler

    def run(self, launch: Launch) -> None:
        """Run the remaining trials, then evaluate the best one on test images."""
        while batch := self.next_batch():
            launch([self.overrides(trial) for trial in batch], self.first_job + batch[0].number)
            for trial in batch:
                folder = self.trial_folder(trial.number)
                if folder is not None:
                    wait_until_inactive(folder)
                value = objective(folder)
                state = self.states.FAIL if value is None else self.states.COMPLETE
                self.study.tell(trial.number, value, state=state)
        if not self.trials_in(self.states.COMPLETE):
            print(f"[{self.name}] all {self.n_trials} trials failed.", flush=True)
            return
        best = self.study.best_trial
        folder = self.trial_folder(best.number)
        assert folder is not None
        wait_until_inactive(folder)
        Console(width=formatting.WIDE).print(self.trial_table(), soft_wrap=True)
        print(f"[{self.name}] best of {self.n_trials}: {folder.name}, {' '.join(self.values(best))}", flush=True)
        if not RunRecord.load(folder).results:
            resume = [f"resume={quote(str(folder.absolute()))}", f"hydra.sweep.subdir={quote(folder.name)}"]
            launch([[*self.overrides(best), *resume, "evaluation.checkpoints=[last]"]], self.first_job + best.number)
        self.record_tuning(best.number)

    def next_batch(self) -> list[Any]:
        """Return the next trials to launch, with consecutive numbers: unfinished trials if any, else new ones."""
        running = self.trials_in(self.states.RUNNING)
        if not running:
            done = len(self.study.get_trials(deepcopy=False))
            return [self.propose(number) for number in range(done, min(done + self.n_jobs, self.n_trials))]
        batch = [running[0]]
        for trial in running[1:]:
            if trial.number == batch[-1].number + 1:
                batch.append(trial)
        return batch[: self.n_jobs]

    def propose(self, number: int) -> Any:
        """Propose a new trial."""
        num_startup = min(10, max(2, self.n_trials // 3))
        self.study.sampler = self.sampler(seed=self.seed + number, n_startup_trials=num_startup)
        return self.study.ask(self.space)

    def trials_in(self, state: Any) -> list[Any]:
        return self.study.get_trials(deepcopy=False, states=(state,))

    def values(self, trial: Any) -> list[str]:
        return [f"{key}={trial.params[key]}" for key in self.space]

    def trial_table(self) -> Table:
        """Tabulate the trials, best first, with their objective and their values of the searched settings."""
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for heading in ("trial", "distance", *self.space, "folder"):
            table.add_column(Text(heading), justify="left" if heading == "folder" else "right", no_wrap=True)
        failed = [(math.inf, trial) for trial in self.trials_in(self.states.FAIL)]
        completed = [(trial.value, trial) for trial in self.trials_in(self.states.COMPLETE)]
        for value, trial in sorted([*completed, *failed], key=lambda pair: (pair[0], pair[1].number)):
            folder = self.trial_folder(trial.number)
            distance = f"{value:.4g}" if math.isfinite(value) else "failed"
            settings = [f"{each:.4g}" if isinstance(each, float) else str(each) for each in self.params(trial)]
            cells = [str(trial.number), distance, *settings, str(folder or "")]
            table.add_row(*map(Text, cells))
        return table

    def params(self, trial: Any) -> list[Any]:
        return [trial.params[key] for key in self.space]

    def overrides(self, trial: Any) -> list[str]:
        return [*self.fixed, *self.values(trial), f"trial={{study: {quote(self.id)}, number: {trial.number}}}"]

    def trial_folder(self, number: int) -> Path | None:
        """Return the run folder of a trial, or None if it has none."""
        for path in sorted(self.sweep.glob(f"*/{RECORD_FILE}")):
            try:
                if RunRecord.load(path).config.get("trial") == {"study": self.id, "number": number}:
                    return path.parent
            except UserError:
                continue
        return None

    def record_tuning(self, best: int) -> None:
        """Write the number of trials to each record, and the cost of the other trials to the record of the best."""
        trials = self.study.get_trials(deepcopy=False)
        folders = {trial.number: self.trial_folder(trial.number) for trial in trials}
        records = {number: RunRecord.load(folder) for number, folder in folders.items() if folder is not None}
        failed = len(self.trials_in(self.states.FAIL))
        # Trials that failed before training cost nothing.
        others = [record for number, record in records.items() if number != best and record.training.get("steps")]
        trial_costs = [
            entry
            for record in others
            for entry in (*record.training.get("dependencies", []), dependency_costs.cost_entry(record, TRIAL_ROLE))
        ]
        for number in records:

            def update(record: RunRecord, number: int = number) -> None:
                record.training["tuning"] = {
                    "study": self.id, "trial": number, "trials": len(trials), "failed": failed, "best": number == best,
                    "space": {key: str(value) for key, value in self.space.items()},
                }  # fmt: skip
                # This trial may have been the best of fewer trials, so remove the cost of other trials.
                own = [entry for entry in record.training.get("dependencies", []) if entry["role"] != TRIAL_ROLE]
                tuning = [{**entry, "role": TRIAL_ROLE} for entry in trial_costs] if number == best else []
                record.training["dependencies"] = dependency_costs.deduplicate([*own, *tuning])
                if record.training.get("steps"):
                    dependency_costs.update_total_cost(record)

            RunRecord.update(folders[number], update)  # type: ignore[arg-type]


def objective(folder: Path | None) -> float | None:
    """Return the distance to validation images at the last evaluation of a trial, or None if the trial failed."""
    if folder is None:
        return None
    record = RunRecord.load(folder)
    if record.state not in ("finished", "failed"):
        raise UserError(f"The trial in {folder} did not finish ({record.state}). Repeat the command to resume it.")
    value = record.training.get("preview", {}).get("last")
    if record.state == "finished" and value is None:
        raise UserError(NO_OBJECTIVE)
    return value if record.state == "finished" else None
