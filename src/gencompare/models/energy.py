"""The energy-based model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gencompare.distributed import all_gather_rows
from gencompare.errors import UserError
from gencompare.generative_model import Cond, DataSpec, GenerativeModel
from gencompare.models import visualization
from gencompare.models.langevin import Langevin, ReplayBuffer, last_state
from gencompare.models.manual_optimization import Snapshot, manual_step
from gencompare.networks.energy_networks import EnergyNetwork
from gencompare.rng import RandomSource


class EBM(GenerativeModel):
    r"""p(x) = exp(-E(x) / T) / Z with a network for E, trained by maximum likelihood on Langevin chains.

    The gradient of -T log p(x), averaged over the data, is

        E_data[grad E(x)] - E_p[grad E(x)]

    (Hinton 2002, "Training products of experts by minimizing contrastive divergence"). The second mean is taken over
    chains of ``steps`` Langevin steps, which go on where chains of a replay buffer stopped, or, with probability
    ``restarts``, start from noise that is uniform in [-1, 1] (Du and Mordatch 2019, "Implicit generation and modeling
    with energy-based models", algorithm 1; restarts=1 is Nijkamp et al. 2019, "Learning non-convergent non-persistent
    short-run MCMC toward energy-based model"). The gradient does not go through the chains. What is minimised is

        mean E(x) - mean E(x~) + energy_l2 (mean E(x)^2 + mean E(x~)^2),

    x with Gaussian noise of ``data_noise`` added, which spreads the density of images with few levels (Nijkamp et al.
    2019, algorithm 1). The last term (Du and Mordatch 2019, algorithm 1) keeps energies near 0, which the difference
    alone leaves free.

    T = noise^2 / (2 step) is that of the `Langevin` steps. Where chains are far from their law (short runs, clipped
    gradients), the density is a tendency rather than a fact: it tells images from what are none, and its ratios are
    too large. Images stay within [-1, 1] at each step, and black outside of the real pixels; continuous data go
    anywhere.

    A step whose energies are not finite or lie further than ``max_gap`` apart, before it or after, has diverged: the
    last good state is put back (`Snapshot`), and the step reports nothing but ``rollbacks``, the number of such
    returns so far. No weights that were refused come into the moving average or a checkpoint.

    Args:
        energy: a factory ``shape -> trunk`` of (n, C, H, W) -> (n, trunk.features), under a linear head.
        langevin: the steps of the chains, in training and in sampling.
        steps: Langevin steps of a chain for each batch.
        sample_steps: Langevin steps from noise to a sample. A chain of the buffer is steps / restarts old on average
            when it ends.
        buffer_size: chains in the replay buffer. In a whole run each is taken (images seen) / buffer_size times, so a
            short run wants few.
        restarts: share of a batch's chains that start anew.
        energy_l2: weight of the squared energies.
        data_noise: standard deviation of the noise on training images.
        spectral_norm: normalise the trunk's weights.
        max_gap: how far the mean energies of images and of chains may lie apart.
        keep_every, max_rollbacks: of `Snapshot`.
    """

    def __init__(
        self,
        spec: DataSpec,
        *,
        energy: Callable[..., nn.Module],
        langevin: Langevin,
        steps: int = 60,
        sample_steps: int = 1200,
        buffer_size: int = 10_000,
        restarts: float = 0.05,
        energy_l2: float = 0.1,
        data_noise: float = 0.0,
        spectral_norm: bool = False,
        max_gap: float = 100.0,
        keep_every: int = 100,
        max_rollbacks: int = 5,
        **training: Any,
    ) -> None:
        super().__init__(spec, **training)
        if steps < 1 or sample_steps < 1:
            raise UserError(f"model.steps={steps}, model.sample_steps={sample_steps}: both must be at least 1.")
        if not 0 <= restarts <= 1:
            raise UserError(f"model.restarts={restarts}: give a share from 0 to 1.")
        if not (energy_l2 >= 0 and data_noise >= 0):
            raise UserError(f"model.energy_l2={energy_l2}, model.data_noise={data_noise}: neither may be negative.")
        if not max_gap > 0:
            raise UserError(f"model.max_gap={max_gap}: give a positive number.")
        self.automatic_optimization = False
        self.langevin, self.steps, self.sample_steps = langevin, steps, sample_steps
        self.restarts, self.energy_l2, self.data_noise, self.max_gap = restarts, energy_l2, data_noise, max_gap
        classes = spec.num_classes if self.conditional else 0
        self.network = EnergyNetwork(energy(spec.shape), classes, spectral_norm=spectral_norm)
        self.replay = ReplayBuffer(spec, buffer_size, max(1, classes))
        self.last_good = Snapshot(keep_every, max_rollbacks)
        self.register_buffer("mask", spec.mask(), persistent=False)
        self.mask: Tensor

    # Energies and densities

    def energy(self, x: Tensor, cond: Cond | None = None) -> Tensor:
        """E(x), or E(x, y) of a conditional model, of images (n, C, H, W): (n,) in float32."""
        return self.network(x, self.label(self.used(cond))).float()

    def unnormalized_log_density(self, x: Tensor, cond: Cond | None = None) -> Tensor:
        """log p(x) + log Z = -E(x) / T in nats, (n,); log p(x | y) + log Z_y of a conditional model."""
        return -self.energy(x, cond) / self.langevin.temperature

    def log_density_ratio(self, x: Tensor, y: Tensor, cond: Cond | None = None) -> Tensor:
        """log p(x) - log p(y) in nats, (n,), of images x and y (n, C, H, W): Z cancels. ``cond`` is of both."""
        return (self.energy(y, cond) - self.energy(x, cond)) / self.langevin.temperature

    # Training

    def fit_batch(self, x: Tensor, cond: Cond, draws: RandomSource) -> dict[str, Tensor]:
        label = self.label(cond)
        self.last_good.begin(self)
        real = self._held(x + self.data_noise * draws.normal(x.shape[1:]).to(x))
        chains = self._chains(label, draws)
        ours, theirs = self._energies(real, chains, label)
        gap = self._gap(ours, theirs)
        if not gap <= self.max_gap:
            return self._go_back(gap)
        squares = ours.square().mean() + theirs.square().mean()
        loss = ours.mean() - theirs.mean() + self.energy_l2 * squares
        norm = manual_step(self, 0, loss, list(self.network.parameters()))
        # Weights are judged before anyone else sees them: the moving average would not forget bad ones.
        with torch.no_grad():
            gap = self._gap(*self._energies(real, chains, label))
        if not gap <= self.max_gap:
            return self._go_back(gap)
        self.last_good.passed(self)
        return {
            "loss": loss.detach(),
            "energy_data": ours.mean().detach(),
            "energy_chains": theirs.mean().detach(),
            "grad": norm,
            "rollbacks": x.new_tensor(float(self.last_good.total)),
        }

    def _chains(self, label: Tensor | None, draws: RandomSource) -> Tensor:
        """What Langevin steps make of chains of the buffer, which keeps it: (n, C, H, W) without gradient."""
        shape = self.spec.shape
        places = self.replay.places(label, draws)
        x, started = self.replay.take(places[draws.start : draws.stop], draws.uniform(shape).to(self.device))
        x = self._held(x)
        anew = ~started | (draws.uniform().to(x.device) < self.restarts)
        noise = self._held(draws.uniform(shape).to(x) * 2 - 1)
        x = torch.where(anew[:, None, None, None], noise, x)
        # Weights under spectral normalisation are worked out once for the whole walk.
        with parametrize.cached():
            x = last_state(self._walk(x, label, self.steps, lambda: draws.normal(shape)))
        self.replay.put(places, all_gather_rows(x))
        return x

    def _energies(self, real: Tensor, chains: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        """E of images and of chains, (n,) each."""
        both = None if label is None else torch.cat([label, label])
        ours, theirs = self.network(torch.cat([real, chains]), both).float().chunk(2)
        return ours, theirs

    @torch.no_grad()
    def _gap(self, ours: Tensor, theirs: Tensor) -> float:
        """|mean E(x) - mean E(x~)| over the whole batch, for all processes alike; NaN where energies are not finite.

        The host waits for it: what follows depends on it, and it is one of hundreds of network calls.
        """
        return abs(float(all_gather_rows(ours).mean() - all_gather_rows(theirs).mean()))

    def _go_back(self, gap: float) -> dict[str, Tensor]:
        """The last good state; of a step that was undone, nothing else is told."""
        self.last_good.go_back(self, f"The energies of images and chains diverged, to {gap:.3g} apart")
        return {"rollbacks": self.mask.new_tensor(float(self.last_good.total))}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["last_good"] = self.last_good.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.last_good.load_state_dict(checkpoint["last_good"])

    def validation_figures(self, x: Tensor, cond: Cond, draws: RandomSource) -> dict[str, Tensor]:
        """Energies of held-out images, with the noise that training images have, and of noise alone. Held-out images
        far above training images (``energy_data``) tell of a model that knows its training set by heart."""
        cond = self.used(cond)
        real = self._held(x + self.data_noise * draws.normal(x.shape[1:]).to(x))
        noise = self._held(draws.uniform(x.shape[1:]).to(x) * 2 - 1)
        return {"energy_held_out": self.energy(real, cond), "energy_noise": self.energy(noise, cond)}

    # Samples

    def _walk(self, x: Tensor, label: Tensor | None, steps: int, normal: Callable[[], Tensor]) -> Iterator[Tensor]:
        return self.langevin.walk(lambda x: self.network(x, label).float(), x, steps, normal, self._held)

    def _held(self, x: Tensor) -> Tensor:
        """Images within [-1, 1], black where there are no real pixels; continuous data as they are."""
        if self.spec.num_levels is None:
            return x
        return x.clamp(-1, 1) * self.mask - (1 - self.mask)

    def from_noise(self, n: int, cond: Cond | None, generator: torch.Generator) -> Iterator[Tensor]:
        """The states of ``n`` chains, (n, C, H, W) each: uniform noise, then one after each of ``sample_steps``."""
        shape, label = (n, *self.spec.shape), self.label(self.used(cond))
        noise = torch.rand(shape, generator=generator, device=generator.device).to(self.device)
        yield (x := self._held(noise * 2 - 1))
        yield from self._walk(
            x, label, self.sample_steps, lambda: torch.randn(shape, generator=generator, device=generator.device)
        )

    @torch.no_grad()
    def sample(self, n: int, cond: Cond | None = None, *, generator: torch.Generator) -> Tensor:
        """Where chains from noise end. The replay buffer has no part in it: it belongs to training."""
        with parametrize.cached():
            return last_state(self.from_noise(n, cond, generator)).clamp(-1, 1)

    @torch.no_grad()
    def pictures(self, x: Tensor, cond: Cond, *, generator: torch.Generator) -> dict[str, Tensor]:
        """What `Explores` asks for: images and corrupted ones ordered by energy, and chains from noise over time."""
        cond = self.used(cond)
        return {
            **visualization.energy_ranking(self.energy, x, cond, self._held, generator),
            "chains": visualization.chains_over_time(
                self.from_noise(len(x), cond, generator), self.sample_steps, rows=visualization.CHAINS
            ),
        }

    def sampling_description(self) -> str:
        return f"{self.sample_steps} steps from noise, {self.langevin.describe()}"

    def counted_networks(self) -> dict[str, nn.Module]:
        return {"network": self.network}
