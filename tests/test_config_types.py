"""Values of the wrong type are named in one line, before anything is built, for every setting of every family."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from composing import compose
from gencompare.command_line import conf_dir
from gencompare.tasks.runs.config_types import check_types, describe, matches
from test_cli import QUICK, Cli, error_line


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (int, [0, -3], [1.5, True, "1", None, [1]]),
        (float, [0, 1.5, -1e9], [True, "1e5", ".nan", None, []]),
        (bool, [True, False], [0, 1, "true", None]),
        (str, ["a", ""], [1, None, []]),
        (Path, ["a/b"], [1, None]),
        (int | None, [1, None], ["null", 0.5]),
        (Sequence[int], [[], [1, 2]], [[1.5], 3, "12", ["1"], {"a": 1}]),
        (tuple[float, float], [[0.5, 1]], [[1], [1, 2, 3], [1, "2"]]),
        (tuple[int, ...], [[], [1, 2]], [[1, "2"], 1]),
        (Mapping[str, int], [{}, {"a": 1}], [[], 1, "a"]),
        (Literal["a", "b"], ["a"], ["c", 1]),
        (Callable[[int], int], [{"_target_": "x"}, None, "x"], [1, [1]]),
        (Iterable[int], [[1, 2]], [[1.5], 3]),
        (object, [1, "a", None, []], []),
        (Any, [1, "a", None, []], []),
    ],
)
def test_values_and_annotations(hint: Any, good: list[Any], bad: list[Any]) -> None:
    assert all(matches(value, hint) for value in good)
    assert not any(matches(value, hint) for value in bad)
    assert describe(hint)


SHIPPED = [
    f"{group}={path.stem}"
    for group in ("model", "data", "experiment", "trainer", "evaluation", "logger")
    for path in sorted((conf_dir() / group).glob("*.yaml"))
]


@pytest.mark.slow
def test_all_shipped_configs_have_the_right_types() -> None:
    for option in SHIPPED:
        check_types(compose(option))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.network.num_blocks=1.5", "model.network.num_blocks=1.5 must be a whole number."),
        ("model.network.attention_resolutions=7", "model.network.attention_resolutions=7 must be a list"),
        ("model.optimizer._partial_=3", "model.optimizer._partial_=3 must be true or false."),
        ("model.network=3", "model.network=3 must be a mapping with _target_."),
        ("data.batch_size=/nowhere", "data.batch_size=/nowhere must be a whole number."),
        ("data.train_subset_size=1e30", "data.train_subset_size=1e+30 must be a whole number or null."),
        ("evaluation.protocol.chunk_size=.inf", "evaluation.protocol.chunk_size=.inf must be a whole number."),
        ("evaluation.extractors=7", "evaluation.extractors=7 must be a list of strings or null."),
        ("callbacks.checkpoints.every_minutes=null", "callbacks.checkpoints.every_minutes=null must be a number."),
        ("trainer.precision=[]", "trainer.precision=[] must be"),
        ("tags=1", "tags=1 must be a list of strings or null."),
        ("seed=0.5", "seed=0.5 must be a whole number."),
        ("family=1e5", "family=100000.0 must be a string. Quote it"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(
    override: str, message: str, cli: Cli, tmp_path: Path, capsys: Any
) -> None:
    assert cli("model=ddpm", *QUICK, "budget.steps=2", "hydra.run.dir=run", override) == 1
    assert message in error_line(capsys)
    assert not (tmp_path / "run").exists()
