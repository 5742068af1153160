"""Seeds and random numbers that are independent of the number of processes and of where a run was resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """Derive a 63-bit seed from all ``parts`` (for example the seed of the run, a purpose and a step)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(device: torch.device | str, *parts: int | str) -> torch.Generator:
    """Create a generator on ``device``, seeded with ``derive_seed(*parts)``."""
    return torch.Generator(device).manual_seed(derive_seed(*parts))


def default_generator(device: torch.device) -> torch.Generator:
    """Return the global generator of ``device``, which ``torch.manual_seed`` and ``seed_everything`` seed."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator


@contextmanager
def from_state(source: torch.Generator, state: Tensor) -> Iterator[None]:
    """Let ``source`` repeat the numbers that it drew after it was in ``state``, in the block. Afterwards it continues
    where it was before the block."""
    after = source.get_state()
    source.set_state(state)
    try:
        yield
    finally:
        source.set_state(after)


@dataclass(frozen=True)
class RandomSource:
    """Random numbers for the part of the global batch that is on this process.

    Each call generates numbers for all ``total`` samples and returns those for samples ``start`` to ``stop - 1``, so
    each sample gets the same numbers for any number of processes. The extra numbers cost little compared with a step.

    Args:
        generator: generator in the same state on all processes.
        start: index of the first sample on this process.
        stop: one past the index of the last sample on this process.
        total: size of the global batch.
        dtype: float32 or float64, the type of the numbers. The draws are the same in both.
    """

    generator: torch.Generator
    start: int
    stop: int
    total: int
    dtype: torch.dtype = field(default_factory=lambda: full_precision(torch.get_default_dtype()))

    @classmethod
    def for_batch(cls, generator: torch.Generator, batch_size: int) -> RandomSource:
        """Create a source for a batch that is not divided among processes."""
        return cls(generator, 0, batch_size, batch_size)

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def device(self) -> torch.device:
        return self.generator.device

    def whole_batch(self) -> RandomSource:
        """Create a source for all samples of the global batch, which draws the same on all processes."""
        return replace(self, start=0, stop=self.total)

    def strided(self, stride: int, offset: int) -> RandomSource:
        """Create a source for a smaller batch: samples ``offset``, ``offset + stride``, ... of the global batch.

        The result is independent of the number of processes, because indices refer to the global batch.
        """
        start, stop, total = (-((offset - rows) // stride) for rows in (self.start, self.stop, self.total))
        return replace(self, start=start, stop=stop, total=total)

    def _local(self, values: Tensor) -> Tensor:
        return values[self.start : self.stop]

    def normal(self, shape: Sequence[int] = ()) -> Tensor:
        """Draw standard normal numbers, (n, \\*shape) for n samples on this process."""
        return self._local(draw_normal((self.total, *shape), self.generator, dtype=self.dtype))

    def uniform(self, shape: Sequence[int] = ()) -> Tensor:
        """Draw uniform numbers in [0, 1) of shape (n, \\*shape), where this process has n samples."""
        return self._local(draw_uniform((self.total, *shape), self.generator, dtype=self.dtype))

    def integers(self, high: int, shape: Sequence[int] = ()) -> Tensor:
        """Draw uniform integers from 0 to ``high - 1`` of shape (n, \\*shape), where this process has n samples."""
        return self._local(torch.randint(high, (self.total, *shape), generator=self.generator, device=self.device))

    def shared_uniform(self, purpose: str) -> float:
        """Return a uniform number in [0, 1), the same on all processes, without advancing the generator.

        It is a function of ``purpose`` and of the state of the generator, which is on the host even for a GPU, so that
        reading it does not wait for the GPU.
        """
        return derive_seed(purpose, self.generator.get_state().numpy().tobytes().hex()) / 2**63

    def stratified(self) -> Tensor:
        r"""Draw low-discrepancy uniform numbers in [0, 1), (n,) for n samples on this process.

        Sample :math:`i` gets :math:`(u + i / \mathrm{total}) \bmod 1` with one :math:`u \sim U[0, 1)` per batch. Each
        number is uniform, and together they cover the interval evenly, which lowers the variance of a loss averaged
        over times (Kingma et al. 2021, "Variational Diffusion Models", appendix I.1,
        https://arxiv.org/abs/2107.00630).
        """
        offset = draw_uniform((), self.generator, dtype=self.dtype)
        rows = torch.arange(self.start, self.stop, device=self.device, dtype=self.dtype)
        return (offset + rows / self.total) % 1.0


def full_precision(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, and float32 for any other floating-point type."""
    return torch.promote_types(dtype, torch.float32)


def draw_normal(
    shape: Sequence[int],
    generator: torch.Generator,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw standard normal numbers, generated on the generator's device.

    float64 numbers are cast from float32 draws, so a model gets the same random numbers in both precisions.

    Args:
        shape: shape of the result.
        generator: source of the numbers.
        device: device of the result; None for the generator's.
        dtype: type of the result.
    """
    drawn = torch.float32 if dtype == torch.float64 else dtype
    noise = torch.randn(*shape, generator=generator, device=generator.device, dtype=drawn)
    return noise.to(device or generator.device, dtype)


def draw_uniform(
    shape: Sequence[int],
    generator: torch.Generator,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw uniform numbers in [0, 1); see `draw_normal`."""
    drawn = torch.float32 if dtype == torch.float64 else dtype
    noise = torch.rand(tuple(shape), generator=generator, device=generator.device, dtype=drawn)
    return noise.to(device or generator.device, dtype)


def normal_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Draw standard normal numbers with the shape, dtype and device of ``x``; see `draw_normal`."""
    return draw_normal(x.shape, generator, x.device, x.dtype)


def uniform_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Draw uniform numbers in [0, 1) with the shape, dtype and device of ``x``; see `draw_normal`."""
    return draw_uniform(x.shape, generator, x.device, x.dtype)


def draw_categorical(logits: Tensor, generator: torch.Generator, dim: int) -> Tensor:
    """Draw indices along ``dim`` with the probabilities softmax(logits), by the Gumbel-max trick; see `draw_normal`."""
    gumbel = -torch.log(-torch.log(uniform_like(logits, generator).clamp_min(1e-20)))
    return (logits + gumbel).argmax(dim)
