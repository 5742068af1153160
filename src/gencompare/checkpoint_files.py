"""Reading checkpoints without running what is in them."""

from __future__ import annotations

import os
from typing import Any

import torch

from gencompare.errors import UserError

AVERAGED = "ema"
"""The key of a checkpoint under which averaged weights are."""


def read_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """A checkpoint's content; only tensors and plain containers are admitted. Raises `UserError` for a bad file."""
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"There is no checkpoint {path}.") from error
    except Exception as error:
        raise UserError(f"{path} is damaged or no checkpoint of gencompare ({type(error).__name__}).") from error
