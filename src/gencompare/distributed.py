"""Work shared between processes, with results that do not depend on how many there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gencompare.errors import UserError

T = TypeVar("T")


def rank_and_world_size() -> tuple[int, int]:
    """(rank, processes): (0, 1) where torch.distributed is not initialised."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def distribute(count: int, work: Callable[[int], T]) -> list[T]:
    """[work(0), ..., work(count - 1)], each computed by one process in turn, and known to all of them.

    A failure in one process is raised in all, so that none waits for ever.
    """
    rank, processes = rank_and_world_size()
    mine: dict[int, T] = {}
    failure: Exception | None = None
    try:
        for k in range(rank, count, processes):
            mine[k] = work(k)
    except Exception as error:
        failure = error
    everyone: list[Any] = [(mine, failure)]
    if processes > 1:
        everyone = [None] * processes
        dist.all_gather_object(everyone, (mine, None if failure is None else UserError(str(failure))))
    _raise(failure, [error for _, error in everyone])
    results = {k: value for part, _ in everyone for k, value in part.items()}
    return [results[k] for k in range(count)]


def run_on_first(work: Callable[[], T]) -> T:
    """work(), computed by the first process and known to all. Its failure is raised in all."""
    rank, processes = rank_and_world_size()
    if processes == 1:
        return work()
    box: list[Any] = [None, None]
    failure: Exception | None = None
    if rank == 0:
        try:
            box[0] = work()
        except Exception as error:
            failure, box[1] = error, UserError(str(error))
    dist.broadcast_object_list(box, src=0)
    _raise(failure, [box[1]])
    return box[0]


def all_agree(flag: bool) -> bool:
    """Whether ``flag`` is true in every process: what one of them alone may know must not decide what all do."""
    processes = rank_and_world_size()[1]
    if processes == 1:
        return flag
    everyone: list[Any] = [None] * processes
    dist.all_gather_object(everyone, flag)
    return all(everyone)


def _raise(own: Exception | None, others: list[Exception | None]) -> None:
    if own is not None:
        raise own
    for error in others:
        if error is not None:
            raise error


def world_size() -> int:
    """How many processes train together."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if together else 1


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum over all processes; with one, the values themselves."""
    if world_size() == 1:
        return values
    total = values.clone()
    torch.distributed.all_reduce(total)
    return total


def all_gather_rows(rows: Tensor) -> Tensor:
    """The rows of the whole batch, (n W, ...), from the n rows that each of W processes holds; with one, its own.

    Process r holds the r-th part, as batches and `Draws` are shared out, so all processes get the same rows in the same
    order.
    """
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    torch.distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
