"""Helpers for multi-process runs, with results that do not depend on the number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gencompare.errors import UserError

T = TypeVar("T")


def rank_and_world_size() -> tuple[int, int]:
    """Return (rank, world size), or (0, 1) if torch.distributed is not initialised."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def world_size() -> int:
    """Return the number of processes, or 1 if torch.distributed is not initialised."""
    return rank_and_world_size()[1]


def distributed_map(function: Callable[[int], T], count: int) -> list[T]:
    """Return [function(0), ..., function(count - 1)] on all ranks; rank r of W computes every W-th item.

    An exception on one rank is raised on all ranks, so that no rank hangs.
    """
    rank, num_ranks = rank_and_world_size()
    local_results: dict[int, T] = {}
    failure: Exception | None = None
    try:
        for k in range(rank, count, num_ranks):
            local_results[k] = function(k)
    except Exception as error:
        failure = error
    gathered: list[Any] = [(local_results, failure)]
    if num_ranks > 1:
        gathered = [None] * num_ranks
        dist.all_gather_object(gathered, (local_results, None if failure is None else UserError(str(failure))))
    _raise_first(failure, [error for _, error in gathered])
    results = {k: value for part, _ in gathered for k, value in part.items()}
    return [results[k] for k in range(count)]


def run_on_rank_zero(function: Callable[[], T]) -> T:
    """Call ``function`` on rank 0 and return the result on all ranks. An exception is raised on all ranks."""
    rank, num_ranks = rank_and_world_size()
    if num_ranks == 1:
        return function()
    result_and_error: list[Any] = [None, None]
    failure: Exception | None = None
    if rank == 0:
        try:
            result_and_error[0] = function()
        except Exception as error:
            failure, result_and_error[1] = error, UserError(str(error))
    dist.broadcast_object_list(result_and_error, src=0)
    _raise_first(failure, [result_and_error[1]])
    return result_and_error[0]


def all_ranks_true(flag: bool) -> bool:
    """Return whether ``flag`` is true on all ranks, for decisions that all ranks must make alike."""
    num_ranks = world_size()
    if num_ranks == 1:
        return flag
    flags: list[Any] = [None] * num_ranks
    dist.all_gather_object(flags, flag)
    return all(flags)


def _raise_first(own: Exception | None, errors: list[Exception | None]) -> None:
    """Raise this rank's exception if there is one, otherwise the first exception from another rank, if any."""
    if own is not None:
        raise own
    for error in errors:
        if error is not None:
            raise error


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum ``values`` over all ranks."""
    if world_size() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total


class _DifferentiableSum(torch.autograd.Function):
    """The sum over all ranks. Its gradient is the sum of the gradients of all ranks."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return all_reduce_sum(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return all_reduce_sum(gradient)


def differentiable_sum(values: Tensor) -> Tensor:
    """Sum ``values`` over all ranks. The gradient is that of the sum of the losses of all ranks."""
    return _DifferentiableSum.apply(values)  # type: ignore[return-value]


def all_gather_rows(rows: Tensor) -> Tensor:
    """Concatenate the rows (n, ...) of all W ranks into (n W, ...), in rank order.

    This is the order of the global batch in `TrainStream` and `RandomSource`.
    """
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def gather_global_batch(rows: Tensor, start: int, total: int) -> Tensor:
    """Return the global batch (total, ...) on all ranks, of which this rank has ``rows`` from index ``start`` on.

    Unlike in `all_gather_rows`, ranks may have different numbers of rows. A batch that is not divided among the ranks
    is returned as it is.
    """
    if len(rows) == total:
        return rows
    assert world_size() > 1, "a part of a batch needs the other processes"
    whole = rows.new_zeros(total, *rows.shape[1:])
    whole[start : start + len(rows)] = rows
    return all_reduce_sum(whole)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average gradients over processes, in place; a no-op with a single process.

    Each process has an equal part of the batch, so the result is the gradient of the whole batch.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if world_size() == 1 or not gradients:
        return
    flat = all_reduce_sum(torch.cat([g.reshape(-1) for g in gradients])) / world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
