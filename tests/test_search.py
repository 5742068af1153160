"""Search: trials by Optuna, judged by validation images, the same in one sitting or several."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from composing import compose, options
from forking import living_on
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
    "callbacks.looks.grid=0", "callbacks.looks.held_out=0", "callbacks.looks.preview=66", "callbacks.progress=false",
    "callbacks.looks.count=2", "evaluation.n=100",
    "evaluation.extractors=[classifier]", "evaluation.protocol.likelihood_n=20", "model.encoder.channels=8",
    "model.decoder.channels=8", "model.importance_samples=0",
]  # fmt: skip
SEARCH = ["-m", "+search=optuna", "model=vae", *TINY, "hydra.sweeper.trials=2"]


def records(folder: Path) -> dict[int, Any]:
    """By number of the trial."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*/record.json"))]
    return {record["config"]["trial"]["number"]: record for record in found}


def essence(record: dict[str, Any]) -> Any:
    return record["training"]["preview"], record["config"]["model"]["optimizer"]["lr"], record["training"]["steps"]


def test_a_search_that_broke_off_ends_as_one_that_did_not(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert cli(*SEARCH, "hydra.sweep.dir=whole") == 0
    whole = records(tmp_path / "whole")
    assert sorted(whole) == [0, 1] and len({essence(record)[1] for record in whole.values()}) == 2
    last = {number: record["training"]["preview"]["last"] for number, record in whole.items()}
    best = min(last, key=lambda number: last[number])
    for number, record in whole.items():
        # Only the best trial meets the test images, and it was chosen without them.
        assert bool(record["results"]) == (number == best) == record["training"]["tuning"]["best"]
        assert record["training"]["tuning"]["trials"] == 2 and record["state"] == "finished"
    costs = {
        kind: sum(record["training"][kind] for record in whole.values()) for kind in ("steps", "images_seen", "flops")
    }
    assert {kind: whole[best]["training"]["total"][kind] for kind in costs} == costs, "the search is part of the cost"
    assert "best of 2" in capsys.readouterr().out and (tmp_path / "whole" / "compare.html").is_file()

    # The second trial is stopped on its way, as Ctrl-C does; the same command goes on with it.
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
    assert {number: essence(record) for number, record in again.items()} == {n: essence(r) for n, r in whole.items()}
    assert bool(again[best]["results"]) and len(list((tmp_path / "broken").glob("*/record.json"))) == 2

    # More trials go on from there.
    capsys.readouterr()
    assert cli(*SEARCH[:-1], "hydra.sweeper.trials=3", "hydra.sweep.dir=broken") == 0
    assert records(tmp_path / "broken")[0]["training"]["tuning"]["trials"] == 3


def test_a_trial_that_lives_on_is_waited_for_in_a_folder_of_any_name(tmp_path: Path, capsys: Any) -> None:
    """As after SIGKILL of ``hydra/launcher=parallel``. The trial's own process ends it while the search waits."""
    folder = tmp_path / "it's a u? 50%" / "0_digits vae"
    folder.parent.mkdir()
    study = search.Study(
        name="it's", space={"a": optuna.distributions.FloatDistribution(0, 1)}, fixed=[], trials=1, at_once=1, first=0,
        seed=0, sweep=folder.parent,
    )  # fmt: skip
    launched: list[dict[str, Any]] = []

    def launch(jobs: Any, first: int) -> None:
        (words,) = jobs
        launched.append({o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(words)})
        if len(launched) == 1:
            trial = launched[0]["trial"]
            RunRecord("0", "vae", {}, config={"trial": {str(k): v for k, v in trial.items()}}).save(folder)
            living.enter_context(living_on(folder, "finished", preview={"last": 1.0}))

    with ExitStack() as living:
        study.run(launch)
    assert "[0_digits vae] waiting for the process" in capsys.readouterr().out
    assert len(launched) == 2 and launched[1]["resume"] == str(folder), "then it is measured"
    assert launched[1]["hydra.sweep.subdir"] == "0_digits vae"
    assert (folder.parent / search.STORE).is_file()


def test_each_family_has_as_many_trials_of_which_some_fail(cli: Cli, tmp_path: Path) -> None:
    """A study a family: here two values of beta stand for families, one of which cannot be trained."""
    each = ["hydra.sweeper.each=model.beta", "model.beta=-1,1"]
    words = [*SEARCH[:-1], "hydra.sweeper.trials=1", *each, "hydra.sweep.dir=two"]
    assert cli(*words) == 1
    found = [json.loads(path.read_text()) for path in sorted((tmp_path / "two").glob("*/record.json"))]
    assert [record["state"] for record in found] == ["failed", "finished"]
    assert [record["config"]["model"]["beta"] for record in found] == [-1, 1]
    assert [bool(record["results"]) for record in found] == [False, True]
    assert found[1]["training"]["tuning"]["trials"] == 1


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("a=interval(0.5,2.0)", "FloatDistribution(high=2.0, log=False, low=0.5, step=None)"),
        ("a=tag(log,interval(1e-4,1e-2))", "FloatDistribution(high=0.01, log=True, low=0.0001, step=None)"),
        ("a=int(interval(1,9))", "IntDistribution(high=9, log=False, low=1, step=1)"),
        ("a=linear,cosine", "CategoricalDistribution(choices=('linear', 'cosine'))"),
        ("a=choice(3,x)", "CategoricalDistribution(choices=('3', 'x'))"),
        ("a=range(0,6,2)", "CategoricalDistribution(choices=('0', '2', '4'))"),
    ],
)
def test_values_are_said_in_hydras_words(word: str, expected: str) -> None:
    (override,) = OverridesParser.create().parse_overrides([word])
    assert str(search.distribution(override)) == expected


def test_an_interval_that_is_none_is_refused() -> None:
    (override,) = OverridesParser.create().parse_overrides(["a=tag(log,interval(-1.0,2.0))"])
    with pytest.raises(UserError, match="interval"):
        search.distribution(override)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model=vae", "model.optimizer.lr=1e-3"], "needs something to search"),
        (["model=vae", "hydra.sweeper.trials=0"], "hydra.sweeper.trials=0"),
        (["model=vae", *TINY, "callbacks.looks.count=0"], "distance to validation images"),
    ],
)
def test_what_cannot_be_searched_is_refused(words: list[str], says: str, cli: Cli, capsys: Any) -> None:
    assert cli("-m", "+search=optuna", *words) == 1
    assert says in capsys.readouterr().err


def test_every_family_of_the_preset_has_what_is_searched() -> None:
    families = compose("+search=families") and HydraConfig.get().sweeper.params.model.split(",")
    assert {*families} == {name for name in options("model") if generative(name)} - {"gaussian"}
    for family in ("vae", "hvae", "gan", "ebm", "ldm"):  # the rest change nothing of ddpm's
        assert "optimizer" in OmegaConf.select(compose(f"model={family}"), "model"), family
    cfg = compose("+search=families", *with_experiment(["model=vae"], ["digits_vae"], "digits"))
    assert cfg.evaluation.checkpoints == [] and cfg.evaluation.n == 500 and cfg.budget.images == 10_000


def generative(name: str) -> bool:
    return "GenerativeModel" in bases(name)
