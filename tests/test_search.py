"""Hyperparameter search with Optuna, by the distance to validation images, with and without interruptions."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from composing import compose, options
from forking import active_process
from gencompare.errors import UserError
from gencompare.records import RunRecord
from gencompare.tasks import main
from gencompare.tasks.runs import search
from hydra_plugins.gencompare_sweeps.sweepers import with_experiment
from test_cli import Cli
from test_sweep_presets import bases

optuna = pytest.importorskip("optuna", reason="Optuna is an optional extra: pip install 'gencompare[search]'")

TINY = [
    "data=digits", "trainer=cpu", "logger=csv", "trainer.global_batch_size=16", "budget=steps", "budget.steps=4",
    "callbacks.evaluation.num_grid_images=0", "callbacks.evaluation.num_val_images=0",
    "callbacks.evaluation.num_samples=66", "callbacks.evaluation.num_evaluations=2", "callbacks.progress_bar=null",
    "evaluation.num_images=100",
    "evaluation.extractors=[classifier]", "evaluation.protocol.num_likelihood_images=20", "model.encoder.channels=8",
    "model.decoder.channels=8", "model.importance_samples=0",
]  # fmt: skip
SEARCH = ["-m", "+search=optuna", "model=vae", *TINY, "hydra.sweeper.n_trials=2"]


def records(folder: Path) -> dict[int, Any]:
    """Return the records by trial number."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*/record.json"))]
    return {record["config"]["trial"]["number"]: record for record in found}


def outcome(record: dict[str, Any]) -> Any:
    """Return the parts of a trial's record that must not depend on interruptions."""
    return record["training"]["preview"], record["config"]["model"]["optimizer"]["lr"], record["training"]["steps"]


@pytest.mark.slow
def test_an_interrupted_search_ends_like_an_uninterrupted_one(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert cli(*SEARCH, "hydra.sweep.dir=whole") == 0
    whole = records(tmp_path / "whole")
    assert sorted(whole) == [0, 1] and len({outcome(record)[1] for record in whole.values()}) == 2
    last = {number: record["training"]["preview"]["last"] for number, record in whole.items()}
    best = min(last, key=lambda number: last[number])
    for number, record in whole.items():
        # Only the best trial is evaluated on test images, and it is chosen without them.
        assert bool(record["results"]) == (number == best) == record["training"]["tuning"]["best"]
        assert record["training"]["tuning"]["trials"] == 2 and record["state"] == "finished"
    costs = {
        kind: sum(record["training"][kind] for record in whole.values()) for kind in ("steps", "images_seen", "flops")
    }
    assert {kind: whole[best]["training"]["total_cost"][kind] for kind in costs} == costs, (
        "the cost includes all trials"
    )
    out = capsys.readouterr().out
    assert "best of 2" in out and (tmp_path / "whole" / "compare.html").is_file()
    rows = [
        line.split() for line in out[: out.index("best of 2")].splitlines() if re.match(r" *[01] .*_digits_vae", line)
    ]
    distances = {number: record["training"]["preview"]["last"] for number, record in whole.items()}
    assert [int(row[0]) for row in rows] == sorted(distances, key=lambda number: distances[number]), "best first"
    assert [float(row[1]) for row in rows] == [float(f"{distances[int(row[0])]:.4g}") for row in rows]
    assert all(Path(row[-1]).is_dir() for row in rows)

    # Ctrl-C stops the second trial; the same command resumes it.
    original, calls = main.call_task, []

    def interrupted(cfg: Any) -> None:
        calls.append(cfg)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(cfg)

    with monkeypatch.context() as patch:
        patch.setattr(main, "call_task", interrupted)
        assert cli(*SEARCH, "hydra.sweep.dir=broken") == 130
    assert sorted(records(tmp_path / "broken")) == [0]
    assert cli(*SEARCH, "hydra.sweep.dir=broken") == 0
    again = records(tmp_path / "broken")
    assert {number: outcome(record) for number, record in again.items()} == {n: outcome(r) for n, r in whole.items()}
    assert bool(again[best]["results"]) and len(list((tmp_path / "broken").glob("*/record.json"))) == 2

    # More trials continue the study.
    capsys.readouterr()
    assert cli(*SEARCH[:-1], "hydra.sweeper.n_trials=3", "hydra.sweep.dir=broken") == 0
    assert records(tmp_path / "broken")[0]["training"]["tuning"]["trials"] == 3


def test_a_search_waits_for_an_active_trial_in_a_folder_of_any_name(tmp_path: Path, capsys: Any) -> None:
    """Simulate a parallel launcher (``hydra/launcher=parallel``) killed by SIGKILL: the trial's process continues and
    finishes the trial while the search waits."""
    folder = tmp_path / "it's a u? 50%" / "0_digits vae"
    folder.parent.mkdir()
    study = search.Study(
        name="it's", space={"a": optuna.distributions.FloatDistribution(0, 1)}, fixed=[], n_trials=1, n_jobs=1,
        first_job=0, seed=0, sweep=folder.parent,
    )  # fmt: skip
    launched: list[dict[str, Any]] = []

    def launch(jobs: Any, first_job: int) -> None:
        (overrides,) = jobs
        launched.append({o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(overrides)})
        if len(launched) == 1:
            trial = launched[0]["trial"]
            RunRecord("0", "vae", {}, config={"trial": {str(k): v for k, v in trial.items()}}).save(folder)
            stack.enter_context(active_process(folder, "finished", preview={"last": 1.0}))

    with ExitStack() as stack:
        study.run(launch)
    assert "[0_digits vae] waiting for the process" in capsys.readouterr().out
    assert len(launched) == 2 and launched[1]["resume"] == str(folder), "the trial is then evaluated"
    assert launched[1]["hydra.sweep.subdir"] == "0_digits vae"
    assert (folder.parent / search.STUDY_FILE).is_file()


def test_each_value_of_study_per_has_a_study_with_failed_trials(cli: Cli, tmp_path: Path) -> None:
    """Two values of beta represent two families, one of which cannot be trained."""
    studies = ["hydra.sweeper.study_per=model.beta", "model.beta=-1,1"]
    overrides = [*SEARCH[:-1], "hydra.sweeper.n_trials=1", *studies, "hydra.sweep.dir=two"]
    assert cli(*overrides) == 1
    found = [json.loads(path.read_text()) for path in sorted((tmp_path / "two").glob("*/record.json"))]
    assert [record["state"] for record in found] == ["failed", "finished"]
    assert [record["config"]["model"]["beta"] for record in found] == [-1, 1]
    assert [bool(record["results"]) for record in found] == [False, True]
    assert found[1]["training"]["tuning"]["trials"] == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=interval(0.5,2.0)", "FloatDistribution(high=2.0, log=False, low=0.5, step=None)"),
        ("a=tag(log,interval(1e-4,1e-2))", "FloatDistribution(high=0.01, log=True, low=0.0001, step=None)"),
        ("a=int(interval(1,9))", "IntDistribution(high=9, log=False, low=1, step=1)"),
        ("a=linear,cosine", "CategoricalDistribution(choices=('linear', 'cosine'))"),
        ("a=choice(3,x)", "CategoricalDistribution(choices=('3', 'x'))"),
        ("a=range(0,6,2)", "CategoricalDistribution(choices=('0', '2', '4'))"),
    ],
)
def test_hydra_overrides_define_distributions(text: str, expected: str) -> None:
    (override,) = OverridesParser.create().parse_overrides([text])
    assert str(search.distribution(override)) == expected


def test_an_invalid_interval_is_refused() -> None:
    (override,) = OverridesParser.create().parse_overrides(["a=tag(log,interval(-1.0,2.0))"])
    with pytest.raises(UserError, match="interval"):
        search.distribution(override)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=vae", "model.optimizer.lr=1e-3"], "needs a search space"),
        (["model=vae", "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials=0"),
        (["model=vae", *TINY, "callbacks.evaluation.num_evaluations=0"], "distance to validation images"),
    ],
)
def test_a_search_without_space_or_objective_is_refused(
    overrides: list[str], message: str, cli: Cli, capsys: Any
) -> None:
    assert cli("-m", "+search=optuna", *overrides) == 1
    assert message in capsys.readouterr().err


def test_the_preset_searches_all_generative_families() -> None:
    families = compose("+search=families") and HydraConfig.get().sweeper.params.model.split(",")
    assert {*families} == {name for name in options("model") if generative(name)} - {"gaussian"}
    for family in ("vae", "hvae", "gan", "ebm", "ldm"):  # the others inherit from ddpm
        assert "optimizer" in OmegaConf.select(compose(f"model={family}"), "model"), family
    cfg = compose("+search=families", *with_experiment(["model=vae"], ["digits_vae"], "digits"))
    assert cfg.evaluation.checkpoints == [] and cfg.evaluation.num_images == 500 and cfg.budget.images == 50_000


def generative(name: str) -> bool:
    return "GenerativeModel" in bases(name)
