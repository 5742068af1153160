"""Split network calls along the batch, to save memory in training and sampling."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

log = logging.getLogger(__name__)


@contextmanager
def micro_batches(networks: Iterable[nn.Module], count: int) -> Iterator[None]:
    """Split calls of ``networks`` in ``count`` parts along the batch in the block, to save memory in the backward pass.

    The activations of all parts but the last are discarded, and computed again in the backward pass, so memory holds
    those of one part at a time; this costs (count - 1) / count of the forward pass. Random numbers, losses and
    gradients are those of the whole batch up to rounding and the masks of dropout. (``accumulate_grad_batches`` of
    Lightning's Trainer makes a batch of several instead.) The networks must map each sample on its own.
    """
    if count == 1:
        yield
        return

    def split(forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            n = _batch_size((args, kwargs))
            parts = list(_parts(args, kwargs, n, count))
            outputs = [checkpoint(forward, *a, use_reentrant=False, **k) for a, k in parts[:-1]]  # type: ignore[misc]
            args_of_last, kwargs_of_last = parts[-1]
            return _join([*outputs, forward(*args_of_last, **kwargs_of_last)])

        return call

    with replaced_forward(networks, split):
        yield


@contextmanager
def split_when_out_of_memory(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Split calls of ``networks`` in two, four, ... parts along the batch in the block, when they run out of memory.

    The samples of a chunk share their random numbers, so the chunk itself must not be split; its network calls may be,
    since a network maps each sample on its own. (A network that gets a function, which may have a state, is not split.)
    Values change only by rounding. The number of parts stays for later calls of the same network.
    """
    with replaced_forward(networks, _splitting):
        yield


@contextmanager
def replaced_forward(
    networks: Iterable[nn.Module], replace: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Replace the method ``forward`` of ``networks`` in the block."""
    own = {network: network.__dict__.get("forward") for network in networks}
    for network in own:
        network.forward = replace(network.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for network, forward in own.items():
            if forward is None:
                del network.forward  # uncovers the method of the class
            else:
                network.forward = forward  # type: ignore[method-assign]


def _splitting(forward: Callable[..., Any]) -> Callable[..., Any]:
    parts = 1

    @wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal parts
        n = 1 if any(map(callable, (*args, *kwargs.values()))) else _batch_size((args, kwargs))
        while True:
            try:
                return _in_parts(forward, args, kwargs, n, parts)
            except torch.OutOfMemoryError:
                if parts >= n:
                    raise
            # Outside of the handler, whose traceback keeps the tensors of the failed call alive.
            gc.collect()
            torch.cuda.empty_cache()
            parts *= 2
            log.warning("Out of memory: the network is called on %d samples at a time, not %d.", -(-n // parts), n)

    return call


def _in_parts(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], n: int, parts: int) -> Any:
    if parts == 1:
        return forward(*args, **kwargs)
    return _join([forward(*a, **k) for a, k in _parts(args, kwargs, n, parts)])


def _parts(args: Any, kwargs: Any, n: int, count: int) -> Iterator[tuple[Any, Any]]:
    """Divide the arguments of a call on ``n`` samples into those of at most ``count`` calls."""
    size = -(-n // count)
    for start in range(0, n, size):
        rows = slice(start, start + size)
        yield _take(args, rows, n), _take(kwargs, rows, n)


def _batch_size(value: Any) -> int:
    """Return the length of the longest tensor in nested arguments, or 1 if there is none."""
    if isinstance(value, Tensor):
        return len(value) if value.dim() else 1
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return max((_batch_size(part) for part in parts), default=1)


def _take(value: Any, rows: slice, n: int) -> Any:
    """Take rows of all tensors of length ``n`` in nested arguments."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() and len(value) == n else value
    if isinstance(value, Mapping):
        return {key: _take(each, rows, n) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_take(each, rows, n) for each in value)
    return value


def _join(outputs: list[Any]) -> Any:
    """Concatenate the outputs of the parts: tensors, or tuples, lists and dictionaries of tensors."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(outputs)
    if isinstance(first, Mapping):
        return {key: _join([output[key] for output in outputs]) for key in first}
    if isinstance(first, list | tuple):
        return type(first)(_join(list(each)) for each in zip(*outputs, strict=True))
    raise TypeError(f"cannot join outputs of type {type(first).__name__}")
