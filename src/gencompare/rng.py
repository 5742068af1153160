"""Seeds and random numbers that do not depend on how many processes draw them, or on where a run was resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a function of all ``parts`` (say, the run's seed, a purpose and a step)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(device: torch.device | str, *parts: int | str) -> torch.Generator:
    """A fresh generator on ``device``, seeded with ``derive_seed(*parts)``."""
    return torch.Generator(device).manual_seed(derive_seed(*parts))


def default_generator(device: torch.device) -> torch.Generator:
    """Torch's own generator on ``device``, which ``torch.manual_seed`` and Lightning's ``seed_everything`` seed."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator


@dataclass(frozen=True)
class RandomSource:
    """Random numbers for the rows of the global batch that this process holds.

    Every call draws for all ``total`` rows and keeps rows ``start`` to ``stop``. So sample i of the global batch meets
    the same noise whether one process holds it or four share it. (Drawing is a small part of a step's cost.)
    """

    generator: torch.Generator
    start: int
    stop: int
    total: int

    @classmethod
    def whole(cls, generator: torch.Generator, total: int) -> RandomSource:
        """All rows in this process."""
        return cls(generator, 0, total, total)

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def device(self) -> torch.device:
        return self.generator.device

    def every(self, step: int, first: int) -> RandomSource:
        """Numbers for rows ``first``, ``first + step``, ... of the global batch alone: a batch of its own.

        The rows are counted in the global batch, so all processes together hold the parts that one would.
        """
        start, stop, total = (-((first - rows) // step) for rows in (self.start, self.stop, self.total))
        return RandomSource(self.generator, start, stop, total)

    def _mine(self, values: Tensor) -> Tensor:
        return values[self.start : self.stop]

    def normal(self, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers, (rows, *shape)."""
        return self._mine(torch.randn(self.total, *shape, generator=self.generator, device=self.device, dtype=dtype))

    def uniform(self, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform numbers in [0, 1), (rows, *shape)."""
        return self._mine(torch.rand(self.total, *shape, generator=self.generator, device=self.device, dtype=dtype))

    def integers(self, high: int, shape: Sequence[int] = ()) -> Tensor:
        """Whole numbers 0 to high - 1, (rows, *shape)."""
        return self._mine(torch.randint(high, (self.total, *shape), generator=self.generator, device=self.device))

    def stratified(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Low-discrepancy uniform numbers in [0, 1): (u + i / total) mod 1 for row i, one u a batch.

        Each is uniform; together they cover the interval evenly, which lowers the variance of a loss that is averaged
        over times (Kingma et al. 2021, "Variational Diffusion Models", appendix I.1).
        """
        offset = torch.rand((), generator=self.generator, device=self.device, dtype=dtype)
        rows = torch.arange(self.start, self.stop, device=self.device, dtype=dtype)
        return (offset + rows / self.total) % 1.0


def normal_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of the shape and type of x, drawn where the generator lives."""
    return torch.randn(x.shape, generator=generator, device=generator.device, dtype=x.dtype).to(x.device)
