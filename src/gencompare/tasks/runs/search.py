"""Search: trials that Optuna proposes, judged by validation images, in a study that outlives the process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override

from gencompare.command_line import quote
from gencompare.errors import UserError
from gencompare.records import RECORD_FILE, RunRecord
from gencompare.tasks.runs import dependency_costs
from gencompare.tasks.runs.dependency_costs import TRIAL
from gencompare.tasks.runs.sweep import counts, wait_for

STORE = "study.db"
NO_AIM = (
    "A search goes by the distance to validation images while training: set callbacks.evaluation.num_evaluations and"
    " callbacks.evaluation.num_samples above 0, and a model that draws samples."
)
Launch = Callable[[Sequence[Sequence[str]], int], object]
"""(the words of each job, the number of the first) -> when they have ended."""


def import_optuna() -> Any:
    try:
        optuna = import_module("optuna")
    except ImportError as error:
        raise UserError("A search needs Optuna: pip install 'gencompare[search]'.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def distribution(override: Override) -> Any:
    """What Optuna draws a value from: ``interval(a, b)``, of whole numbers as ``int(interval(a, b))``, by its logarithm
    with ``tag(log, ...)``; or one of a list, of ``choice(...)`` or of ``range(...)``."""
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
    """A search over ``space`` with ``fixed`` words, of which the folder ``sweep`` holds the trials and the state.

    Started again, it goes on: a trial that was under way is taken up first, with the values that it had. What the next
    trial is depends on the seed and on the trials before it, and not on sittings.

    Args:
        name: of the study among those in the folder.
        space: by key of the config, where its values come from.
        fixed: words that every trial has.
        trials: how many, those that failed counted.
        at_once: how many are proposed, and launched, together.
        first: number of the first job.
        seed: of the proposals.
    """

    name: str
    space: dict[str, Any]
    fixed: list[str]
    trials: int
    at_once: int
    first: int
    seed: int
    sweep: Path

    def __post_init__(self) -> None:
        optuna: Any = import_optuna()
        url: Any = import_module("sqlalchemy").URL  # which escapes what a path may hold
        # Another question is another study, whose trials are nothing to this one.
        asked = "\n".join(
            [*sorted(filter(counts, self.fixed)), *(f"{key}: {self.space[key]}" for key in sorted(self.space))]
        )
        self.id = f"{self.name}_{hashlib.sha256(asked.encode()).hexdigest()[:8]}"
        self.study = optuna.create_study(
            study_name=self.id, direction="minimize", load_if_exists=True,
            storage=url.create("sqlite", database=str(self.sweep / STORE)).render_as_string(),
        )  # fmt: skip
        self.states = optuna.trial.TrialState
        self.sampler = optuna.samplers.TPESampler

    def run(self, launch: Launch) -> None:
        """Do what is left of the trials, then measure the best one."""
        while batch := self.next_batch():
            launch([self.words(trial) for trial in batch], self.first + batch[0].number)
            for trial in batch:
                folder = self.folder(trial.number)
                if folder is not None:
                    wait_for(folder)
                value = objective(folder)
                state = self.states.FAIL if value is None else self.states.COMPLETE
                self.study.tell(trial.number, value, state=state)
        if not self.of(self.states.COMPLETE):
            print(f"[{self.name}] no trial of {self.trials} came to a figure.", flush=True)
            return
        best = self.study.best_trial
        folder = self.folder(best.number)
        assert folder is not None
        wait_for(folder)
        print(f"[{self.name}] best of {self.trials}: {folder.name}, {' '.join(self.values(best))}", flush=True)
        if not RunRecord.load(folder).results:
            there = [f"resume={quote(str(folder.absolute()))}", f"hydra.sweep.subdir={quote(folder.name)}"]
            measured = [*self.words(best), *there, "evaluation.checkpoints=[last]"]
            launch([measured], self.first + best.number)
        self.tell(best.number)

    def next_batch(self) -> list[Any]:
        """Trials to launch now: those of a sitting that broke off, else new ones; with numbers in a row."""
        running = self.of(self.states.RUNNING)
        if not running:
            done = len(self.study.get_trials(deepcopy=False))
            return [self.ask(number) for number in range(done, min(done + self.at_once, self.trials))]
        row = [running[0]]
        for trial in running[1:]:
            if trial.number == row[-1].number + 1:
                row.append(trial)
        return row[: self.at_once]

    def ask(self, number: int) -> Any:
        self.study.sampler = self.sampler(seed=self.seed + number, n_startup_trials=min(10, max(2, self.trials // 3)))
        return self.study.ask(self.space)

    def of(self, state: Any) -> list[Any]:
        return self.study.get_trials(deepcopy=False, states=(state,))

    def values(self, trial: Any) -> list[str]:
        return [f"{key}={trial.params[key]}" for key in self.space]

    def words(self, trial: Any) -> list[str]:
        return [*self.fixed, *self.values(trial), f"trial={{study: {quote(self.id)}, number: {trial.number}}}"]

    def folder(self, number: int) -> Path | None:
        """The run folder of a trial."""
        for path in sorted(self.sweep.glob(f"*/{RECORD_FILE}")):
            try:
                if RunRecord.load(path).config.get("trial") == {"study": self.id, "number": number}:
                    return path.parent
            except UserError:
                continue
        return None

    def tell(self, best: int) -> None:
        """Write into each trial's record how many there were; and what they cost into that of the best one."""
        trials = self.study.get_trials(deepcopy=False)
        folders = {trial.number: self.folder(trial.number) for trial in trials}
        records = {number: RunRecord.load(folder) for number, folder in folders.items() if folder is not None}
        failed = len(self.of(self.states.FAIL))
        # One that failed before it had trained cost nothing.
        others = [record for number, record in records.items() if number != best and record.training.get("steps")]
        spent = [
            part
            for record in others
            for part in (*record.training.get("dependencies", []), dependency_costs.cost_entry(record, TRIAL))
        ]
        for number in records:

            def change(record: RunRecord, number: int = number) -> None:
                record.training["tuning"] = {
                    "study": self.id, "trial": number, "trials": len(trials), "failed": failed, "best": number == best,
                    "space": {key: str(value) for key, value in self.space.items()},
                }  # fmt: skip
                # The best of fewer trials may be another one.
                needed = [part for part in record.training.get("dependencies", []) if part["role"] != TRIAL]
                tuning = [{**part, "role": TRIAL} for part in spent] if number == best else []
                record.training["dependencies"] = dependency_costs.deduplicated([*needed, *tuning])
                if record.training.get("steps"):
                    dependency_costs.print_costs(record)

            RunRecord.update(folders[number], change)  # type: ignore[arg-type]


def objective(folder: Path | None) -> float | None:
    """The distance to validation images at the last look of a trial; None where it failed."""
    if folder is None:
        return None
    record = RunRecord.load(folder)
    if record.state not in ("finished", "failed"):
        raise UserError(f"The trial in {folder} did not finish ({record.state}): the same command goes on with it.")
    found = record.training.get("preview", {}).get("last")
    if record.state == "finished" and found is None:
        raise UserError(NO_AIM)
    return found if record.state == "finished" else None
