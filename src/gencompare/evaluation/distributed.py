"""Work shared out over processes, with results that do not depend on how many there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from gencompare.errors import UserError

T = TypeVar("T")


def world() -> tuple[int, int]:
    """(rank, processes): (0, 1) where torch.distributed is not initialised."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def shared_out(count: int, work: Callable[[int], T]) -> list[T]:
    """[work(0), ..., work(count - 1)], each computed by one process in turn, and known to all of them.

    A failure in one process is raised in all, so that none waits for ever.
    """
    rank, processes = world()
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


def once(work: Callable[[], T]) -> T:
    """work(), computed by the first process and known to all. Its failure is raised in all."""
    rank, processes = world()
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
    processes = world()[1]
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
