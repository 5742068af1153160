"""A run folder from somebody else executes nothing, writes nothing outside of itself, and reveals nothing."""

from __future__ import annotations

import base64
import copy
import gzip
import io
import json
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pytorch_lightning import Callback

import gencompare
from forking import Forked
from gencompare import safe_files, trust
from gencompare.command_line import override
from gencompare.comparison.load_runs import find_run_folders, load_runs
from gencompare.comparison.notebook import Comparison
from gencompare.comparison.page import HTML_FILE, write_report
from gencompare.data import file_formats
from gencompare.data.archives import open_archive
from gencompare.data.conditions import Embedding
from gencompare.data.file_formats import decode, decompress
from gencompare.data.generated_samples import read_samples
from gencompare.errors import UserError, printable
from gencompare.generative_model import DataSpec
from gencompare.hyperparameters import from_config, import_object
from gencompare.records import RunRecord
from gencompare.safe_files import read_npy
from gencompare.tasks.runs import run_config
from gencompare.tasks.runs.build import build_data
from gencompare.tasks.runs.loading import fetch_wandb_run, guide
from parts import slow_if
from synthetic import result, write_run

Cli = Callable[..., int]
QUICK = [
    "trainer=cpu", "logger=csv", "budget=steps", "budget.steps=2", "trainer.global_batch_size=8",
    "evaluation.num_images=20", "evaluation.extractors=[classifier]", "evaluation.checkpoints=[last]",
    "evaluation.protocol.num_likelihood_images=10", "callbacks.evaluation.num_evaluations=0",
    "callbacks.progress_bar=null",
]  # fmt: skip
TASKS = {
    "evaluate": ["task=evaluate", "run_dir=run"],
    "sample": ["task=sample", "run_dir=run", "num_images=2"],
    "export": ["task=export", "run_dir=run"],
    "visualize": ["task=visualize", "run_dir=run"],
    "export_extractor": ["task=export_extractor", "run_dir=run"],
    "resume": ["resume=run"],
}
ESC = "\x1b]0;owned\x07\x1b[31m"
"""A control sequence that sets the title of the terminal, and one that changes its colour."""


# What a hostile folder would call. The tests make sure that this works where it is allowed.


def touch(path: str = "canary", **_: Any) -> None:
    Path(path).touch()


class Touching(Callback):
    """A user's own callback."""

    def __init__(self, path: str = "canary") -> None:
        touch(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    process = Forked(folder, "model=gaussian", *QUICK, "hydra.run.dir=run")
    assert process.wait(timeout=200) == 0, process.output()[-3000:]
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a normal run folder, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(trust.VARIABLE, raising=False)
    return Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))


def edit(run: Path, settings: dict[str, Any]) -> None:
    """Set dotted keys in the config of a run folder."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    for key, value in settings.items():
        *parents, last = key.split(".")
        node = config
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = copy.deepcopy(value)  # the same object twice would become an alias
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


yaml.SafeDumper.add_representer(
    PosixPath,
    lambda dumper, path: dumper.represent_sequence(
        "tag:yaml.org,2002:python/object/apply:pathlib.PosixPath", [str(path)]
    ),
)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the only line on stderr."""
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "Traceback" not in error and printable(error[:-1]) == error[:-1], error
    return error


CALLS = {"_target_": "test_trust.touch"}
NAMED = {
    "model": {"model._target_": "test_trust.touch"},
    "model argument": {"model.optimizer": CALLS},
    "list": {"model.optimizer": [[CALLS]]},
    "getter": {"model.x": {"_target_": "hydra.utils.get_object", "path": "os.system"}},
    "getter of a sampler": {"model.sampler.x": {"_target_": "hydra.utils.get_class", "path": "torch.nn.Linear"}},
    "getter of arguments": {"model.x": {"_target_": "hydra.utils.get_method", "_args_": ["os.system"]}},
    "instantiate": {"model.x": {"_target_": "hydra.utils.instantiate", "config": CALLS}},
    "pickle": {"model.x": {"_target_": "torch.load", "f": "run/evil.pt", "weights_only": False}},
    "numpy": {"data.x": {"_target_": "numpy.load", "file": "run/evil.npy", "allow_pickle": True}},
    "joblib": {"evaluation.protocol.metrics.x": {"_target_": "joblib.load", "filename": "run/evil"}},
    "writes": {"callbacks.x": {"_target_": "gencompare.files.write_text", "path": "canary", "text": ""}},
    "re-exported": {"model.x": {"_target_": "gencompare.models.autoencoder.read_checkpoint", "path": "x"}},
    "foreign module": {"model.x": {"_target_": "gencompare.hyperparameters.os.system", "command": "touch canary"}},
    "method": {"model.x": {"_target_": "torch.nn.Module.apply"}},
    "not an option": {"evaluation.available.x": {"_target_": "gencompare.evaluation.sampling.draw_samples"}},
    "another section": {"callbacks.x": {"_target_": "gencompare.data.digits.Digits"}},
    "data": {"data._target_": "test_trust.touch"},
    "condition": {"data.conditions.x": CALLS},
    "protocol": {"evaluation.protocol._target_": "test_trust.touch"},
    "callback": {"callbacks.clock": CALLS},
    "logger": {"logger.curve": CALLS},
    "trainer": {"trainer._target_": "test_trust.touch"},
    "budget": {"budget._target_": "test_trust.touch"},
    "elsewhere": {"tags": [CALLS]},
    "number": {"model._target_": 3},
    "mapping": {"model._target_": {"_target_": "test_trust.touch"}},
    "empty": {"model._target_": {}},
    "list as target": {"model._target_": ["test_trust.touch"]},
    "module": {"model._target_": "gencompare.models.gaussian"},
    "missing": {"model._target_": "gencompare.models.gaussian.Missing"},
    "dots": {"model._target_": "gencompare.models..gaussian.GaussianBaseline"},
}  # fmt: skip


@pytest.mark.parametrize("case", NAMED)
def test_a_stored_config_may_not_name_other_code(case: str, run: Path, cli: Cli, capsys: Any) -> None:
    edit(run, NAMED[case])
    assert cli("task=sample", "run_dir=run") == 1
    key = next(iter(NAMED[case]))
    error = one_line(capsys)
    assert key in error and "run/config.yaml" in error and "trust=true" in error
    assert not Path("canary").exists()
    with pytest.raises(UserError, match="trust=True"):
        gencompare.load_run(run)
    assert not Path("canary").exists()


@pytest.mark.parametrize("task", TASKS)
def test_no_task_calls_other_code(task: str, run: Path, cli: Cli, capsys: Any) -> None:
    before = sorted(run.rglob("*"))
    edit(run, {"model.max_parameters": CALLS, "callbacks.clock": CALLS})
    assert cli(*TASKS[task]) == 1
    assert "test_trust.touch" in one_line(capsys) and not Path("canary").exists()
    assert sorted(run.rglob("*")) == before
    with pytest.raises(UserError, match=r"test_trust\.touch"):
        gencompare.compose(*TASKS[task])


@pytest.mark.parametrize("way", ["trust", "variable", "override"])
def test_the_ways_to_open_a_folder_that_names_other_code(
    way: str, run: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(run, {"callbacks.mine": {"_target_": "test_trust.Touching"}})
    if way == "variable":
        monkeypatch.setenv(trust.VARIABLE, "other, test_trust")
    overrides = {"trust": ["trust=true"], "variable": [], "override": ["+callbacks.mine=null"]}[way]
    assert cli("resume=run", *overrides) == 0
    assert Path("canary").exists() == (way != "override")
    if way != "override":
        gencompare.load_run(run, trust=way == "trust")
    stored = yaml.safe_load((run / "config.yaml").read_text())
    edit(run, {"trust": True})
    Path("canary").unlink(missing_ok=True)
    monkeypatch.delenv(trust.VARIABLE, raising=False)
    if way != "override":
        assert stored["callbacks"]["mine"] and cli("resume=run") == 1, "trust is never taken from a stored config"
    assert not Path("canary").exists()


def test_what_the_user_types_is_not_checked(run: Path, cli: Cli, tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "conf" / "evaluation" / "metric" / "mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("# @package evaluation.protocol.metrics.mine\n_target_: test_trust.touch\n_partial_: true\n")
    monkeypatch.setenv("GENCOMPARE_CONF", str(tmp_path / "conf"))
    assert cli("resume=run", "+callbacks.mine._target_=test_trust.Touching") == 0
    assert Path("canary").exists()


@pytest.mark.parametrize("override", ["+data/condition=low_res", "+evaluation/metric=mmd"])
def test_an_appended_group_leaves_the_rest_checked(override: str, run: Path, cli: Cli, capsys: Any) -> None:
    key = override.lstrip("+").partition("=")[0].replace("/", ".")
    edit(run, {key: CALLS})
    assert cli("task=evaluate", "run_dir=run", override) == 1
    assert f"{key}._target_=test_trust.touch" in one_line(capsys) and not Path("canary").exists()


def test_the_variable_does_not_trust_what_the_package_imports(
    run: Path, cli: Cli, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv(trust.VARIABLE, "test_trust")
    edit(run, {"model.x": {"_target_": "test_trust.shutil.rmtree", "path": "run"}})
    assert cli("task=sample", "run_dir=run") == 1
    assert "test_trust.shutil.rmtree" in one_line(capsys) and run.exists()
    monkeypatch.setenv(trust.VARIABLE, "not a package")
    assert cli("task=sample", "run_dir=run") == 1
    assert trust.VARIABLE in one_line(capsys)


def test_a_normal_folder_needs_no_trust(run: Path, cli: Cli) -> None:
    gencompare.load_run(run)
    assert cli(*TASKS["evaluate"]) == 0
    assert cli(*TASKS["sample"]) == 0
    assert cli(*TASKS["export"]) == 0
    assert cli(*TASKS["resume"]) == 0


def test_every_option_of_conf_may_be_named() -> None:
    """So that no run of this program needs trust."""
    unnamed = {"hydra_plugins.", "gencompare.tasks.compare_sweep."}
    for path in sorted(trust.shipped_targets()):
        if not path.startswith(tuple(unnamed)):
            sections = [section for section in trust.PACKAGES if not refuses(path, section)]
            assert sections, path
            imported = trust.import_trusted(path, sections[0])
            assert imported is not None


def refuses(path: str, section: str) -> bool:
    try:
        trust.check_target(path, section)
    except trust.NotTrusted:
        return True
    return False


def test_checkpoints_name_only_what_a_model_may_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert import_object("torch.nn.functional.silu") is torch.nn.functional.silu
    for path in (
        "torch.load",
        "gencompare.networks.layers.torch.load",
        "gencompare.models.langevin.Tensor",
        "os.system",
    ):
        with pytest.raises(UserError, match="load_from_checkpoint"):
            import_object(path)
    with pytest.raises(UserError, match=trust.VARIABLE):
        from_config({"_target_": "test_trust.touch"})
    monkeypatch.setenv(trust.VARIABLE, "test_trust")
    assert import_object("test_trust.Touching") is Touching


# Places to write to


PLACES = {
    "absolute": {"callbacks.checkpoints.dirpath": "/tmp/elsewhere"},
    "relative": {"callbacks.checkpoints.dirpath": "elsewhere"},
    "home": {"callbacks.x": {"_target_": "pytorch_lightning.callbacks.ModelCheckpoint", "dirpath": "~/x"}},
    "parent": {"callbacks.x": {"_target_": "pytorch_lightning.callbacks.ModelCheckpoint", "filename": "../../x"}},
    "own callback": {"callbacks.x": {"_target_": "gencompare.training.loggers.CurveCSVLogger", "folder": "."}},
    "arguments": {"callbacks.x": {"_target_": "gencompare.training.loggers.CurveCSVLogger", "_args_": ["."]}},
    "file of a callback": {"callbacks.x": "../../run/evil"},
    "logger": {"logger.x": {"_target_": "pytorch_lightning.loggers.CSVLogger", "save_dir": "logs"}},
    "variable": {"logger.x": {"_target_": "pytorch_lightning.loggers.CSVLogger", "save_dir": "$HOME/logs"}},
    "name of a logger": {"logger.x": {"_target_": "pytorch_lightning.loggers.CSVLogger", "name": "../../x"}},
    "server": {"logger.x": {"_target_": "pytorch_lightning.loggers.MLFlowLogger", "tracking_uri": "databricks"}},
    "url": {"logger.x": {"_target_": "pytorch_lightning.loggers.WandbLogger", "x": "https://evil.example"}},
    "settings": {"logger.x": {"_target_": "gencompare.training.loggers.wandb_logger", "settings": {"base_url": "x"}}},
    "folder": {"logger.x": {"_target_": "gencompare.training.loggers.wandb_logger", "dir": "x"}},
    "id": {"logger.x": {"_target_": "gencompare.training.loggers.wandb_logger", "id": "x"}},
    "trainer": {"trainer.default_root_dir": "/tmp/elsewhere"},
    "cache": {"data.conditions.x": {"_target_": "gencompare.data.cifar10.CIFAR10", "root": ".", "cache": "elsewhere"}},
    "download": {"data.conditions.x": {"_target_": "gencompare.data.cifar10.CIFAR10", "root": ".", "download": True}},
    "protocol": {"evaluation.protocol.metrics.x.cache": "elsewhere"},
    "path object": {"logger.x": {"_target_": "pytorch_lightning.loggers.CSVLogger", "name": Path("../../x")}},
    "two keys": {"logger": {1: {}, "1": {}}},
}  # fmt: skip


@pytest.mark.parametrize("case", PLACES)
def test_a_stored_config_may_not_choose_where_to_write(case: str, run: Path, cli: Cli, capsys: Any) -> None:
    edit(run, PLACES[case])
    assert cli("resume=run") == 1
    assert next(iter(PLACES[case])) in one_line(capsys)
    assert cli(*TASKS["evaluate"]) == 1
    assert sorted(path.name for path in Path().iterdir()) == ["run"]


def test_places_inside_the_folder_and_names_are_allowed(run: Path) -> None:
    config = run_config.read(run)
    config["callbacks"]["x"] = {
        "_target_": "pytorch_lightning.callbacks.ModelCheckpoint", "dirpath": str(run / "more"),
        "filename": "{epoch}-{val/loss:.2f}", "monitor": "val/loss",
    }  # fmt: skip
    config["logger"]["wandb"] = {
        "_target_": "gencompare.training.loggers.wandb_logger", "project": "p", "entity": "e", "mode": None,
        "notes": "see https://example.com/../x, about $5", "tags": ["a/b"], "log_model": False,
    }  # fmt: skip
    trust.check_config({name: config[name] for name in ("callbacks", "logger")}, run / "config.yaml")


def test_an_override_of_one_argument_needs_the_callback(run: Path, cli: Cli, capsys: Any) -> None:
    assert cli("resume=run", "+callbacks.missing.path=x") == 1
    assert "callbacks.missing needs a class" in one_line(capsys)


def test_an_override_of_the_key_is_enough(run: Path, cli: Cli, tmp_path: Path, capsys: Any) -> None:
    edit(run, {"logger.x": {"_target_": "pytorch_lightning.loggers.CSVLogger", "save_dir": "elsewhere"}})
    assert cli("resume=run") == 1 and "++logger.x.save_dir=VALUE" in one_line(capsys)
    assert cli("resume=run", "++logger.x.save_dir=chosen") == 0
    assert Path("chosen").exists() and not Path("elsewhere").exists()


def test_caches_and_downloads_are_the_users_own(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENCOMPARE_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("GENCOMPARE_DATA", str(tmp_path / "data"))
    (tmp_path / "theirs").mkdir()
    edit(run, {
        "data": {"_target_": "gencompare.data.cifar10.CIFAR10", "root": str(tmp_path / "theirs"), "download": True,
                 "cache": str(tmp_path / "theirs"), "batch_size": 8, "seed": 0},
        "paths": {"data": "/x", "cache": "/x", "runs": "/x"}, "evaluation.protocol.cache": "/x",
    })  # fmt: skip
    for config in (gencompare.compose("task=sample", "run_dir=run"), run_config.load_checked(run)):
        assert config.data.root == str(tmp_path / "theirs") and config.data.download is False
        assert config.data.cache == config.evaluation.protocol.cache == str(tmp_path / "own")
    assert gencompare.compose("task=sample", "run_dir=run").paths.runs == "runs"
    with pytest.raises(UserError, match="is not in"):
        build_data(run_config.load_checked(run)).setup()
    assert not list((tmp_path / "theirs").iterdir())
    shutil.rmtree(tmp_path / "theirs")
    assert gencompare.compose("resume=run").data.root == str(tmp_path / "data"), "the user's own, with downloads"
    assert gencompare.compose("resume=run").data.download is True


@pytest.mark.parametrize("key", ["out", "trained_run", "autoencoder_run", "resume"])
def test_a_stored_config_does_not_choose_the_folder_of_a_job(key: str, run: Path, tmp_path: Path) -> None:
    victim = write_run(tmp_path / "victim", [result(1.0)])
    before = (victim / "record.json").read_bytes()
    edit(run, {key: str(victim)})
    config = gencompare.compose("task=evaluate", "run_dir=run", folder=run)
    assert config.get(key) in (None, str(run.absolute()))
    assert (victim / "record.json").read_bytes() == before


@pytest.mark.parametrize(
    "name", ["checkpoints", "samples", "curve.csv", "record.json", "drawn/x.png", "checkpoints/last.ckpt"]
)
def test_links_out_of_the_folder_are_refused(name: str, run: Path, cli: Cli, capsys: Any, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    path = run / name
    if path.exists():
        path.rename(elsewhere)
    else:
        path.parent.mkdir()
    path.symlink_to(elsewhere)
    content = elsewhere.read_bytes() if elsewhere.is_file() else None
    for task in ("evaluate", "sample", "resume"):
        assert cli(*TASKS[task]) == 1
        assert name in one_line(capsys)
    assert content is None or elsewhere.read_bytes() == content
    assert cli("task=sample", "run_dir=run", "trust=true") == 0


# The command line


CHOICES = {
    "hydra.job.chdir": "true",
    "hydra.run.dir": "/tmp/elsewhere",
    "--config-dir": "run",
    "model": "../../run/evil",
    "data": "--config-dir=run",
    "evaluation": "default hydra.job.chdir=true",
    "budget": "{a: 1}",
    "trainer": "cpu,gpu",
    "callbacks": ["default", "../x"],
    "logger": {"a": 1},
    "experiment\nx": "y",
}


@pytest.mark.parametrize("group", CHOICES)
def test_choices_of_a_stored_config_are_only_names(group: str, run: Path, cli: Cli, capsys: Any) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["choices"][group] = CHOICES[group]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert cli("task=sample", "run_dir=run") == 1
    assert "choices." in one_line(capsys)
    assert sorted(path.name for path in Path().iterdir()) == ["run"]


def test_groups_that_do_not_exist_here_are_left_out(run: Path, cli: Cli) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["choices"] |= {"hydra/launcher": "evil", "theirs": "x", "theirs/more@model.x": "y"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert cli("task=sample", "run_dir=run", "num_images=1") == 0


# Interpolations


def files_of(folder: Path) -> str:
    """Return the content of all text files in a folder."""
    return "".join(path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("task", TASKS)
def test_a_stored_config_does_not_read_the_environment(
    task: str, run: Path, cli: Cli, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    edit(run, {"data.random_flip": "${oc.env:SECRET}", "tags": ["${oc.env:SECRET}"], "family": "${oc.env:SECRET}"})
    assert cli(*TASKS[task]) == 1
    error = one_line(capsys)
    assert "data.random_flip" in error and "${oc.env:SECRET}" in error and "hunter2" not in error
    with pytest.raises(UserError, match="trust=True"):
        gencompare.load_run(run)
    assert "hunter2" not in files_of(run)


def test_interpolations_in_other_places_are_text(run: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    text = "${oc.env:SECRET}"
    edit(run, {"tags": [text], "family": text, "sweep_name": text, "command": [text], "trial": {"a": "${seed}"}})
    assert cli("resume=run") == 0 and cli(*TASKS["evaluate"]) == 0
    stored = yaml.safe_load((run / "config.yaml").read_text())
    record = json.loads((run / "record.json").read_text()) | {"sha256": None}
    assert record["config"]["tags"] == [text] and record["config"]["trial"] == {"a": "${seed}"}
    assert stored["trial"] == {"a": r"\${seed}"} and "hunter2" not in files_of(run)


def test_secrets_are_used_but_not_stored(
    cli: Cli, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    secret = "${oc.env:SECRET}"
    added = [f"+callbacks.mine={{_target_: test_trust.Touching, path: '{secret}'}}", f"tags=['{secret}-x']"]
    assert cli("model=gaussian", *QUICK, *added, "hydra.run.dir=run") == 0
    assert Path("hunter2").exists(), "the callback got the value"
    run = tmp_path / "run"
    assert "hunter2" not in files_of(run) and secret in (run / "config.yaml").read_text()
    record = json.loads((run / "record.json").read_text()) | {"sha256": None}
    assert record["config"]["callbacks"]["mine"]["path"] == secret and record["config"]["tags"] == [f"{secret}-x"]
    assert any(secret in override for override in record["overrides"])
    assert record["config"]["paths"]["cache"] == os.environ["GENCOMPARE_CACHE"], "folders are stored"
    # On resume, the value comes from the user's own command again.
    Path("hunter2").unlink()
    monkeypatch.setenv(trust.VARIABLE, "test_trust")
    capsys.readouterr()
    assert cli("resume=run") == 1
    error = one_line(capsys)
    assert "callbacks.mine.path" in error and "hunter2" not in error and not Path("hunter2").exists()
    repeated = error[error.index("'++") + 1 : error.index("', or")]
    assert cli("resume=run", repeated) == 0
    assert Path("hunter2").exists() and "hunter2" not in files_of(run)


def test_a_secret_in_the_users_own_options_needs_no_repetition(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    monkeypatch.setenv("GENCOMPARE_CONF", str(tmp_path / "conf"))
    monkeypatch.setenv(trust.VARIABLE, "test_trust")
    option = tmp_path / "conf" / "callbacks" / "touching.yaml"
    option.parent.mkdir(parents=True)
    option.write_text("defaults: [default]\nmine:\n  _target_: test_trust.Touching\n  path: ${oc.env:SECRET}-${seed}\n")
    assert cli("model=gaussian", *QUICK, "callbacks=touching", "hydra.run.dir=run") == 0
    Path("hunter2-0").unlink()
    assert cli("resume=run") == 0 and Path("hunter2-0").exists()
    assert "hunter2" not in files_of(tmp_path / "run")
    # Jobs of a sweep are recognised without the value.
    sweep = ["-m", "model=gaussian", *QUICK, "callbacks=touching", "seed=0", "hydra.sweep.dir=sweep"]
    assert cli(*sweep) == 0 and "hunter2" not in files_of(tmp_path / "sweep")
    Path("hunter2-0").unlink()
    assert cli(*sweep) == 0 and not Path("hunter2-0").exists(), "already finished"


# Files that cost too much


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\nmodel: [*b, *b]\n", "anchor or alias"),
        ("model: " + "[" * 5000 + "]" * 5000, "levels deep"),
        ("x: '" + "y" * (1 << 20) + "'", "bytes"),
        ("- a list", "corrupted"),
        ("model: !!python/object/apply:os.system ['touch canary']", "corrupted"),
        ("model: {a: 1, a: 2}", "corrupted"),
        ("\x00\xff", "corrupted"),
        ("model: !!binary aGk=", "corrupted"),
        ("x: '" + "${" * 2000 + "'", "corrupted"),
        ("choices: model", "choices"),
    ],
)
def test_configs_that_cost_too_much_or_are_none(text: str, message: str, run: Path, cli: Cli, capsys: Any) -> None:
    (run / "config.yaml").write_text(text)
    (run / "record.json").unlink()  # which has a copy of the config
    for task in ("sample", "resume"):
        assert cli(*TASKS[task]) == 1
        assert message in one_line(capsys)
    with pytest.raises(UserError, match="config"):
        gencompare.load_run(run)
    assert not Path("canary").exists()


@pytest.mark.parametrize(
    "text",
    [
        '{"schema": 2, "results": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"schema": 2, "config": ' + '{"a": ' * 500 + "1" + "}" * 500 + ', "results": []}',
        '{"schema": 2, "x": "' + "y" * (1 << 25) + '"}',
        '{"schema": ' + "1" * 5000 + "}",
    ],
    ids=["deep", "nested", "large", "long number"],
)
def test_records_that_cost_too_much(text: str, tmp_path: Path, cli: Cli, capsys: Any) -> None:
    folder = tmp_path / "runs" / "x"
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(text)
    assert cli("task=list_runs", "runs=runs/*") == 0
    assert "1 skipped" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"record\.json"):
        RunRecord.load(folder)


def test_a_pipe_is_not_a_record(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "record.json")
    with pytest.raises(UserError, match="not a file"):
        RunRecord.load(tmp_path)


SPEC = DataSpec("digits", (1, 8, 8), 10)


def npy_header(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["header", "compressed", "directory", "bzip2", "objects", "truncated", "no array"])
def test_an_npz_that_claims_too_much_is_refused_before_it_is_allocated(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "samples.npz"
    content = npy_header((73 << 24, 8, 8)) + bytes(64)
    if kind == "compressed":
        content = npy_header((1 << 16, 8, 8)) + bytes(1 << 22)
    if kind == "objects":
        content = npy_header((3,), "|O") + bytes(64)
    if kind == "no array":
        content = b"x"
    method = {"compressed": zipfile.ZIP_DEFLATED, "bzip2": zipfile.ZIP_BZIP2}.get(kind, zipfile.ZIP_STORED)
    with zipfile.ZipFile(path, "w", method, compresslevel=1) as archive:
        archive.writestr("arr_0.npy", content)
    if kind == "directory":  # the table of contents of the zip file lies too
        raw = path.read_bytes()
        start = raw.rindex(b"PK\x01\x02")
        path.write_bytes(raw[: start + 24] + struct.pack("<I", 0xFFFFFFF0) + raw[start + 28 :])
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-30])
    monkeypatch.setattr(safe_files, "SMALL", 1 << 20)
    real = np.empty

    def empty(shape: Any, *args: Any, **kwargs: Any) -> Any:
        assert np.prod(shape) < 1 << 20, "allocated"
        return real(shape, *args, **kwargs)

    monkeypatch.setattr(np, "empty", empty)
    with pytest.raises(UserError, match=r"samples\.npz"):
        read_samples(path, SPEC)
    with pytest.raises(UserError, match=r"samples\.npz"):
        _ = Embedding(str(path)).load("train", 3)


def test_arrays_are_read_as_by_numpy(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for k, array in enumerate(
        (rng.random((3, 4)), np.asfortranarray(rng.random((5, 6))), np.float32(3), np.zeros((0, 2)))
    ):
        np.save(tmp_path / f"{k}.npy", array)
        found = read_npy(tmp_path / f"{k}.npy")
        assert found.dtype == np.asarray(array).dtype and np.array_equal(found, array) and found.flags.writeable


def test_images_and_archives_that_claim_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    size = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "bomb.png").write_bytes(bomb)
    with pytest.raises(UserError, match="claims 10000x10000 pixels"):
        decode(open_archive(tmp_path / "images"), ["bomb.png"])
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.png", bytes(1000))
    with pytest.raises(UserError, match="deflate"):
        open_archive(tmp_path / "x.zip").read("a.png")
    with zipfile.ZipFile(tmp_path / "y.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(1 << 20))
    raw = (tmp_path / "y.zip").read_bytes()
    start = raw.rindex(b"PK\x01\x02")
    (tmp_path / "y.zip").write_bytes(raw[: start + 24] + struct.pack("<I", 100) + raw[start + 28 :])
    with pytest.raises((UserError, zipfile.BadZipFile)):
        open_archive(tmp_path / "y.zip").read("a.png")
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(bytes(1 << 22)))
    assert len(decompress(path)) == 1 << 22
    for module in (safe_files, file_formats):
        monkeypatch.setattr(module, "SMALL", 1 << 20)
    with pytest.raises(UserError, match="claims to contain"):
        decompress(path)


# Text that a terminal, a browser or a spreadsheet obeys


HOSTILE = f"<script>alert(1)</script><img src=x onerror=alert(2)>{ESC}=cmd()[/b][bold]\ud800\u202e"


def hostile_run(folder: Path) -> Path:
    """Write a run folder whose record and curve contain `HOSTILE` wherever there is text."""
    made = result(1.5, images={HOSTILE: "samples/grid.png"}, details={"warnings": [HOSTILE]})
    write_run(folder, [made], name=HOSTILE, family=HOSTILE, overrides=[HOSTILE, f"tags=[{HOSTILE}]"])
    raw = json.loads((folder / "record.json").read_text()) | {"sha256": None}
    raw["data"]["name"] = raw["state"] = raw["created"] = HOSTILE
    raw["training"]["error"] = HOSTILE
    raw["environment"] |= {"device": HOSTILE, "git": {"commit": HOSTILE}, "packages": {HOSTILE: HOSTILE}}
    raw["config"] = {HOSTILE: HOSTILE, "choices": {"evaluation": HOSTILE}}
    raw["model"]["noise_schedule"] = {"t": [0, 1], "log_snr": [1, 0]}
    (each,) = raw["results"]
    metric = next(iter(each["metrics"].values()))
    each["metrics"][HOSTILE] = {**metric, "note": HOSTILE, "unit": HOSTILE}
    each["measurement"] |= {"data": HOSTILE, "extractor": HOSTILE, "reference": HOSTILE}
    each["generation"] |= {"sampler": HOSTILE, "guidance": HOSTILE, "nfe": {HOSTILE: 3, "b": 2}, "checkpoint": HOSTILE}
    (folder / "record.json").write_text(json.dumps(raw))
    curve = folder / "curve.csv"
    curve.write_text(f'step,images,train/loss,"val/{HOSTILE.encode(errors="replace").decode()}"\n1,2,3,4\n2,4,3,4\n')
    return folder


def test_hostile_text_is_escaped_everywhere(tmp_path: Path, cli: Cli, capsys: Any) -> None:
    hostile_run(tmp_path / "runs" / "a")
    other = hostile_run(tmp_path / "runs" / f"b{ESC}\n[/b]")
    raw = json.loads((other / "record.json").read_text()) | {"sha256": None}
    raw["environment"]["run_id"], raw["results"][0]["measurement"]["chunk_size"] = "other", 7
    (other / "record.json").write_text(json.dumps(raw))
    (tmp_path / "runs" / f"c{ESC}").mkdir()
    (tmp_path / "runs" / f"c{ESC}" / "record.json").write_text('{"schema": "' + "\\u001b]0;x" + '"}')
    for command in (["task=list_runs", "runs=runs/*"], ["task=compare", "runs=runs/*", "task.out=out"]):
        assert cli(*command) == 0
        printed = capsys.readouterr()
        assert not set(printed.out + printed.err) & set("\x1b\x07\x9b\x00\u202e"), command
    page = (tmp_path / "out" / HTML_FILE).read_text()
    assert "<script>alert" not in page and "<img src=x" not in page and page.count("<script>") == 1
    assert "default-src 'none'" in page
    for line in (tmp_path / "out" / "compare.csv").read_text().splitlines():
        assert not any(cell.startswith(("=", "+", "@")) for cell in line.split(",")), line
    for path in (tmp_path / "out").glob("compare.*"):
        assert "\x1b" not in path.read_text(), path
    for svg in (tmp_path / "out" / "plots").glob("*.svg"):
        assert "<script>" not in svg.read_text()
    loaded = load_runs(find_run_folders("runs/*"))
    for html in (Comparison(loaded)._repr_html_(), loaded.runs[0].record.results[0]._repr_html_()):
        assert "alert(1)" in html and "<script>" not in html and "<img src=x" not in html


def test_files_outside_of_a_run_folder_are_not_shown(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    shutil.copy(write_run(tmp_path / "other", [result(1.0)]) / "samples" / "grid.png", secret)
    with secret.open("ab") as file:
        file.write(b"secret")
    folder = write_run(
        tmp_path / "run", [result(1.0, images={"a": "../secret.png", "b": str(secret), "c": "link.png"})]
    )
    (folder / "link.png").symlink_to(secret)
    raw = json.loads((folder / "record.json").read_text()) | {"sha256": None}
    raw |= {"curve": "../../etc/passwd", "images": {"d": "../secret.png"}, "checkpoints": {"last": "/etc/passwd"}}
    (folder / "record.json").write_text(json.dumps(raw))
    page = write_report(load_runs([folder]), tmp_path / "out").read_text()
    content = secret.read_bytes()
    assert base64.b64encode(content).decode()[:100] not in page


def test_printable() -> None:
    assert printable("a\nb\tc") == "a b c" and printable("é ∑ 日本 a\u0301") == "é ∑ 日本 a\u0301"
    assert printable("\x1b[31m\x9b\ud800") == "\ufffd[31m\ufffd\ufffd"
    assert str(UserError("a\nb\x1b")) == "a b\ufffd"


def test_errors_of_a_hostile_folder_are_printed_in_one_line(run: Path, cli: Cli, capsys: Any) -> None:
    edit(run, {"model._target_": f"x{ESC}\nError: run curl"})
    assert cli("task=sample", "run_dir=run") == 1
    one_line(capsys)
    edit(run, {"model._target_": "gencompare.models.gaussian.GaussianBaseline", f"model.{ESC}": 1})
    assert cli("task=sample", "run_dir=run") == 1
    one_line(capsys)


# Paths are printed as they are


@pytest.mark.parametrize("name", slow_if({"x[/b]", "a{b}"}, ["run=1, a [b] (c)", "x[/b]", "[bold]x", "a{b}"]))
def test_paths_are_printed_and_taken_literally(name: str, run: Path, cli: Cli, capsys: Any, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / name
    folder.parent.mkdir(parents=True)
    run.rename(folder)
    path = f"runs/{name}"
    capsys.readouterr()
    for command, expected in (
        (["task=evaluate", override("run_dir", path)], f"{path}/record.json"),
        (["task=sample", override("run_dir", path), "num_images=1"], f"{path}/drawn"),
        (["task=export", override("run_dir", path)], f"{path}/weights.safetensors"),
        ([override("resume", path)], f"{path}/record.json"),
        (["task=list_runs", override("runs", path)], path),
        (["task=list_runs", "runs='runs/*'"], path),
        (["task=compare", override("runs", path), override("task.out", f"out/{name}")], f"out/{name}/compare.html"),
    ):
        assert cli(*command) == 0, command
        assert expected in capsys.readouterr().out, command


# Folders that come in other ways


class WandbFile:
    def __init__(self, name: str, content: str) -> None:
        self.name, self.content = name, content

    def download(self, root: str, replace: bool) -> None:
        path = Path(root) / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.content)


def test_a_run_from_wandb_brings_no_config(tmp_path: Path, cli: Cli, capsys: Any) -> None:
    source = hostile_run(tmp_path / "source")
    record = (source / "record.json").read_text()
    names = ("config.yaml", "../evil.json", "samples/../../x.png", "record.json", "checkpoints/last.ckpt")
    fetched = type("Run", (), {"files": lambda self: [WandbFile(name, record) for name in names]})()
    fetch_wandb_run(fetched, tmp_path / "cache" / "run")
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == ["record.json"]
    assert cli("task=list_runs", "runs=cache/*") == 0 and "\x1b" not in capsys.readouterr().out
    assert cli("task=sample", "run_dir=cache/run") == 1
    assert "contains no config.yaml" in one_line(capsys)


@pytest.mark.parametrize("target", ["torch.load", "test_trust.touch", "gencompare.files.write_text"])
def test_a_model_folder_names_only_models(target: str, run: Path, cli: Cli) -> None:
    assert cli("task=export", "run_dir=run", "format=hub") == 0
    path = run / "hub" / "config.json"
    config = json.loads(path.read_text())
    assert gencompare.from_pretrained(run / "hub") is not None
    for name in ("_target_", "max_parameters"):
        changed = {**config["model"], name: target if name == "_target_" else {"_target_": target, "path": "canary"}}
        path.write_text(json.dumps({**config, "model": changed, "sha256": None}))
        with pytest.raises(UserError, match=target):
            gencompare.from_pretrained(run / "hub")
    for text in ("[" * 100_000 + "]" * 100_000, "[]", "x" * (1 << 23)):
        path.write_text(text)
        with pytest.raises(UserError, match=r"hub"):
            gencompare.from_pretrained(run / "hub")
    assert not Path("canary").exists()


def test_a_guide_from_elsewhere_is_checked(run: Path) -> None:
    edit(run, {"model.max_parameters": CALLS})
    with pytest.raises(UserError, match=r"test_trust\.touch"):
        guide(str(run))
    with trust.opened_by(trust.Opener(trusting=True)):
        run_config.load_checked(run)


def test_a_checkpoint_that_claims_too_much_is_refused(run: Path, cli: Cli, capsys: Any) -> None:
    path = run / "checkpoints" / "last.ckpt"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    assert cli(*TASKS["sample"]) == 1
    assert "last.ckpt is compressed" in one_line(capsys)
    path.unlink()
    os.mkfifo(path)
    assert cli(*TASKS["sample"]) == 1
    assert "last.ckpt is neither a file nor a folder" in one_line(capsys)
    with pytest.raises(UserError, match="There is no checkpoint"):
        gencompare.load_run(run)


def test_the_id_of_a_record_is_no_path(run: Path, cli: Cli, capsys: Any) -> None:
    record = json.loads((run / "record.json").read_text()) | {"sha256": None}
    record["environment"]["run_id"] = "../../x"
    (run / "record.json").write_text(json.dumps(record))
    assert cli("resume=run") == 1
    assert "run_id" in one_line(capsys)


@pytest.fixture(autouse=True)
def no_canary() -> Iterator[None]:
    yield
    Path("canary").unlink(missing_ok=True)
