"""Settings that nothing would read are refused before any work: a slip of the finger must not look like a result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from omegaconf import DictConfig, OmegaConf

from gencompare.errors import UserError
from gencompare.paths import conf_dir

ADDED_LATER = {"choices", "out", "sweep_name", "command", "trained_in", "autoencoder_run", "whitening", "hydra"}
"""Top-level keys that this program adds to a composed config."""
INSTEAD = {
    "max_epochs": "budget.images=N", "min_epochs": "budget.images=N", "max_steps": "budget=steps budget.steps=N",
    "min_steps": "budget=steps budget.steps=N", "max_time": "budget=device_minutes budget.device_minutes=N",
    "limit_train_batches": "budget.images=N", "overfit_batches": "debug=overfit", "fast_dev_run": "debug=fast",
    "accumulate_grad_batches": "trainer.global_batch_size=N", "gradient_clip_val": "model.grad_clip=X",
    "gradient_clip_algorithm": "model.grad_clip=X", "check_val_every_n_epoch": "callbacks.looks.count=N",
    "val_check_interval": "callbacks.looks.count=N", "limit_val_batches": "callbacks.looks.held_out=N",
    "num_sanity_val_steps": "debug=fast", "log_every_n_steps": "callbacks.curve.every=N",
    "enable_progress_bar": "callbacks.progress=false", "enable_checkpointing": "callbacks.checkpoints.every_minutes=X",
    "callbacks": "+callbacks.NAME._target_=CLASS", "logger": "logger=wandb, or +logger.NAME._target_=CLASS",
    "default_root_dir": "hydra.run.dir=DIR",
}  # fmt: skip
"""Settings of Lightning's Trainer that this program makes itself, and what sets the same here."""
TEMPLATE = {
    "ckpt_path": "resume=RUN_FOLDER goes on with a run, task=evaluate run=RUN_FOLDER checkpoint=last measures it",
    "task_name": "a run is named by its folder: hydra.run.dir=DIR",
    "train": "task=train is the default, and task=evaluate run=RUN_FOLDER trains nothing",
    "test": "every run is evaluated at its end, unless evaluation.checkpoints=[]",
    "lr": "model.optimizer.lr=X",
    "batch_size": "trainer.global_batch_size=N",
}
"""Keys that users of other templates look for, and where the same is here."""


def check_keys(cfg: DictConfig) -> None:
    """Refuse, as `UserError`, keys of a freshly composed config that nothing reads."""
    top = OmegaConf.load(conf_dir() / "config.yaml")
    groups = {
        str(key).removeprefix("optional ").removeprefix("override ").split("@")[0]
        for entry in top.defaults if not isinstance(entry, str) for key in entry
    }  # fmt: skip
    known = ({str(key) for key in top} | groups | ADDED_LATER) - {"defaults"}
    _check("", cfg, known, "A label of your own goes into tags=[...].")
    default = OmegaConf.load(conf_dir() / "callbacks" / "default.yaml")
    for name, options in (cfg.get("callbacks") or {}).items():
        if name in default:
            if isinstance(options, Mapping | DictConfig):
                _check(f"callbacks.{name}.", options, map(str, default[name]))
        elif not isinstance(options, str) and "_target_" not in (options or {}):
            raise UserError(
                f"callbacks.{name}: give the class, +callbacks.{name}._target_=CLASS, or the name of an option:"
                f" {', '.join(sorted(p.stem for p in (conf_dir() / 'callbacks').glob('*.yaml')))}."
            )
    evaluation = OmegaConf.load(conf_dir() / "evaluation" / "default.yaml")
    _check("evaluation.", cfg.get("evaluation") or {}, {*map(str, evaluation), "defaults"})


def check_trainer(options: Mapping[str, object], known: Iterable[str]) -> None:
    """Refuse settings of the Trainer that this program makes itself, and those that no Trainer has.

    Args:
        options: of ``trainer``.
        known: what Lightning's Trainer takes.
    """
    _check("trainer.", options, {*known, "global_batch_size"})
    for name in options:
        if name in INSTEAD:
            raise UserError(f"trainer.{name} is set by this program. Use {INSTEAD[name]}.")


def _check(prefix: str, found: Iterable[str], known: Iterable[str], hint: str = "") -> None:
    known = set(known)
    for key in map(str, found):
        if key not in known:
            near = get_close_matches(key, known, 1)
            meant = f" Did you mean {prefix}{near[0]}?" if near else ""
            raise UserError(f"There is no setting '{prefix}{key}'.{meant}{' ' + hint if hint and not near else ''}")
