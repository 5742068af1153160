"""Weights that are sharded over the processes of a run (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import get_total_norm


def is_sharded(value: Tensor | nn.Module) -> bool:
    """Return whether a tensor, or the weights of a network, are sharded over processes."""
    return isinstance(value, DTensor | FSDPModule)


def full_tensor(value: Tensor) -> Tensor:
    """Gather a tensor that is sharded over all ranks. Any other tensor is returned as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local_tensor(value: Tensor) -> Tensor:
    """Return the part of a sharded tensor on this rank, which shares its memory, or the tensor itself."""
    return value.to_local() if isinstance(value, DTensor) else value


def shard_like(value: Tensor, other: Tensor) -> Tensor:
    """Shard a full tensor, which all ranks have, as ``other`` is."""
    if isinstance(other, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value.to(other.device), other.device_mesh, other.placements, src_data_rank=None)
    return value


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the weights of a network and their gradients over processes; each of ``network.blocks`` is gathered when
    it computes (`torch.distributed.fsdp.fully_shard`)."""
    for block in network.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


@contextmanager
def gathered_weights(module: nn.Module) -> Iterator[None]:
    """Gather the weights of sharded parts of a module on all ranks in the block, for calls without gradients.

    The ranks may then call its networks a different number of times, as in sampling.
    """
    sharded = [each for each in module.modules() if isinstance(each, FSDPModule)]
    for each in sharded:
        each.set_reshard_after_forward(False, recurse=False)
        each.unshard()
    try:
        yield
    finally:
        for index, each in enumerate(sharded):
            is_root = index == 0  # which backward needs at once
            each.set_reshard_after_forward(not is_root, recurse=False)
            each.reshard()


def total_norm(values: Iterable[Tensor]) -> Tensor:
    """Compute the norm of all values together, as `torch.nn.utils.get_total_norm`, also of sharded tensors."""
    kinds: dict[bool, list[Tensor]] = {}
    for value in values:
        kinds.setdefault(isinstance(value, DTensor), []).append(value)
    return get_total_norm([full_tensor(get_total_norm(each)) for each in kinds.values()])
