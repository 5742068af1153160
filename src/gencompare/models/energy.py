"""Energy-based models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gencompare.distributed import all_gather_rows
from gencompare.errors import UserError, check_non_negative
from gencompare.generative_model import Cond, DataSpec, GenerativeModel
from gencompare.models import visualization
from gencompare.models.langevin import Langevin, ReplayBuffer, last_state
from gencompare.models.manual_optimization import Snapshot, manual_step
from gencompare.networks.energy_networks import EnergyNetwork
from gencompare.networks.layers import at_least_float32
from gencompare.rng import RandomSource, draw_normal, draw_uniform


class EBM(GenerativeModel):
    r"""An energy-based model :math:`p(x) = \exp(-E(x) / T) / Z`, trained by maximum likelihood with Langevin chains.

    The gradient of :math:`-T \log p(x)`, averaged over the data, is

    .. math:: E_{data}[\nabla E(x)] - E_p[\nabla E(x)]

    (Hinton 2002, "Training products of experts by minimizing contrastive divergence"). The second mean is over chains
    of ``num_langevin_steps`` Langevin steps. Chains continue from a replay buffer or, with probability ``reinit_prob``,
    start from uniform noise in [-1, 1] (Du and Mordatch 2019, "Implicit generation and modeling with energy-based
    models", algorithm 1, https://arxiv.org/abs/1903.08689; reinit_prob = 1 is Nijkamp et al. 2019, "Learning
    non-convergent non-persistent short-run MCMC toward energy-based model", https://arxiv.org/abs/1904.09770).
    Gradients do not flow through the chains. The loss is

    .. math:: \bar E(x) - \bar E(\tilde x) + \lambda (\overline{E(x)^2} + \overline{E(\tilde x)^2}),

    where bars are batch means, :math:`\tilde x` the chains and :math:`\lambda` = ``energy_l2``. Gaussian noise of
    standard deviation ``data_noise`` is added to x, which smooths the density of discrete images (Nijkamp et al. 2019,
    algorithm 1). The last term (Du and Mordatch 2019, algorithm 1) keeps energies near 0, since the difference does not
    determine their offset.

    T = noise_std^2 / (2 step_size) is the temperature of the `Langevin` steps. If chains are far from converged (short
    runs, clipped gradients), the density is unreliable: it separates images from other inputs, but density ratios are
    too large. Images are clamped to [-1, 1] after each step, with black padding; continuous data are not clamped.

    A step diverges if its energies, before or after the update, are not finite or their means differ by more than
    ``divergence_threshold``. The last `Snapshot` is then restored, and the step logs only ``rollbacks``, the number of
    rollbacks so far. Diverged weights never enter the EMA or a checkpoint.

    Args:
        spec: shape, number of classes and value range of the data.
        energy: a factory ``shape -> trunk``. The trunk maps (n, C, H, W) to (n, trunk.num_features), and a linear head
            follows.
        langevin: settings of the Langevin steps in training and sampling.
        num_langevin_steps: Langevin steps per training batch.
        num_sampling_steps: Langevin steps from noise to a sample. On average, a chain of the buffer takes
            num_langevin_steps / reinit_prob steps before it is reinitialised.
        buffer_size: number of chains in the replay buffer. In a run, each chain is used (images seen) / buffer_size
            times, so short runs need a small buffer.
        reinit_prob: probability that a chain starts from noise.
        energy_l2: weight of the squared energies.
        data_noise: standard deviation of the noise on training images.
        spectral_norm: whether to apply spectral normalisation to the trunk weights.
        divergence_threshold: maximum difference of the mean energies of images and chains.
        snapshot_every_n_steps: see `Snapshot`.
        max_rollbacks: see `Snapshot`.
        kwargs: see `TrainedModel`.
    """

    def __init__(
        self,
        spec: DataSpec,
        *,
        energy: Callable[..., nn.Module],
        langevin: Langevin,
        num_langevin_steps: int = 60,
        num_sampling_steps: int = 1200,
        buffer_size: int = 10_000,
        reinit_prob: float = 0.05,
        energy_l2: float = 0.1,
        data_noise: float = 0.0,
        spectral_norm: bool = False,
        divergence_threshold: float = 100.0,
        snapshot_every_n_steps: int = 100,
        max_rollbacks: int = 5,
        **kwargs: Any,
    ) -> None:
        super().__init__(spec, **kwargs)
        if num_langevin_steps < 1 or num_sampling_steps < 1:
            raise UserError(
                f"model.num_langevin_steps={num_langevin_steps} and model.num_sampling_steps={num_sampling_steps} must"
                " be at least 1."
            )
        if not 0 <= reinit_prob <= 1:
            raise UserError(f"model.reinit_prob={reinit_prob} must be in [0, 1].")
        check_non_negative("model.energy_l2", energy_l2)
        check_non_negative("model.data_noise", data_noise)
        if not divergence_threshold > 0:  # infinity disables rollbacks
            raise UserError(f"model.divergence_threshold={divergence_threshold} must be positive.")
        self.automatic_optimization = False
        self.langevin = langevin
        self.num_langevin_steps, self.num_sampling_steps = num_langevin_steps, num_sampling_steps
        self.reinit_prob, self.energy_l2, self.data_noise = reinit_prob, energy_l2, data_noise
        self.divergence_threshold = divergence_threshold
        num_classes = spec.num_classes if self.conditional else 0
        self.network = EnergyNetwork(energy(spec.shape), num_classes, spectral_norm=spectral_norm)
        self.replay = ReplayBuffer(spec, buffer_size, max(1, num_classes))
        self.snapshot = Snapshot(snapshot_every_n_steps, max_rollbacks)
        self.register_buffer("mask", spec.mask(), persistent=False)
        self.mask: Tensor

    # Energies and densities

    def energy(self, x: Tensor, cond: Cond | None = None) -> Tensor:
        """Compute the energy E(x), or E(x, y) for a conditional model, of images (n, C, H, W): (n,), not in 16 bits."""
        return at_least_float32(self.network(x, self.label(self.select_conditions(cond))))

    def unnormalized_log_density(self, x: Tensor, cond: Cond | None = None) -> Tensor:
        r"""Compute :math:`\log p(x) + \log Z = -E(x) / T` in nats, (n,).

        For a conditional model, this is :math:`\log p(x | y) + \log Z_y`.
        """
        return -self.energy(x, cond) / self.langevin.temperature

    def log_density_ratio(self, x: Tensor, y: Tensor, cond: Cond | None = None) -> Tensor:
        """Compute log p(x) - log p(y) in nats, (n,), for images (n, C, H, W) under the same conditions."""
        return (self.energy(y, cond) - self.energy(x, cond)) / self.langevin.temperature

    # Training

    def check_batch_size(self, batch_size: int, processes: int) -> None:
        self.replay.check_batch_size(batch_size)

    def fit_batch(self, x: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        label = self.label(cond)
        self.snapshot.begin_step(self)
        real = self._clamp(x + self.data_noise * rng.normal(x.shape[1:]).to(x))
        chains = self._run_chains(label, rng)
        real_energy, chain_energy = self._energies(real, chains, label)
        gap = self._energy_gap(real_energy, chain_energy)
        if not gap <= self.divergence_threshold:
            return self._rollback(gap)
        squares = real_energy.square().mean() + chain_energy.square().mean()
        loss = real_energy.mean() - chain_energy.mean() + self.energy_l2 * squares
        grad_norm = manual_step(self, 0, loss, list(self.network.parameters()))
        # Check the new weights before callbacks see them: the EMA would keep bad ones.
        with torch.no_grad():
            gap = self._energy_gap(*self._energies(real, chains, label))
        if not gap <= self.divergence_threshold:
            return self._rollback(gap)
        self.snapshot.step_succeeded(self)
        return {
            "loss": loss.detach(),
            "energy_data": real_energy.mean().detach(),
            "energy_chains": chain_energy.mean().detach(),
            "grad": grad_norm,
            "rollbacks": x.new_tensor(float(self.snapshot.num_rollbacks)),
        }

    def _run_chains(self, label: Tensor | None, rng: RandomSource) -> Tensor:
        """Run Langevin steps on chains of the buffer and put them back. Return their states (n, C, H, W) without
        gradient."""
        shape = self.spec.shape
        indices = self.replay.sample_indices(label, rng)
        x, started = self.replay.get(indices[rng.start : rng.stop], rng.uniform(shape).to(self.device))
        x = self._clamp(x)
        reinit = ~started | (rng.uniform().to(x.device) < self.reinit_prob)
        noise = self._clamp(rng.uniform(shape).to(x) * 2 - 1)
        x = torch.where(reinit[:, None, None, None], noise, x)
        # Compute spectrally normalised weights once for all steps.
        with parametrize.cached():
            x = last_state(self._trajectory(x, label, self.num_langevin_steps, lambda: rng.normal(shape)))
        self.replay.put(indices, all_gather_rows(x))
        return x

    def _energies(self, real: Tensor, chains: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute the energies of images and of chains, (n,) each."""
        labels = None if label is None else torch.cat([label, label])
        real_energy, chain_energy = at_least_float32(self.network(torch.cat([real, chains]), labels)).chunk(2)
        return real_energy, chain_energy

    @torch.no_grad()
    def _energy_gap(self, real_energy: Tensor, chain_energy: Tensor) -> float:
        """Compute the absolute difference of mean energies over the global batch.

        The difference is not finite if an energy is not. This synchronises with the device, which is cheap compared
        with the network calls of the chains.
        """
        return abs(float(all_gather_rows(real_energy).mean() - all_gather_rows(chain_energy).mean()))

    def _rollback(self, gap: float) -> dict[str, Tensor]:
        """Restore the snapshot. Only the rollback count is reported for a rolled-back step."""
        self.snapshot.rollback(self, f"The mean energies of images and chains diverged (difference {gap:.3g})")
        return {"rollbacks": self.mask.new_tensor(float(self.snapshot.num_rollbacks))}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["last_good"] = self.snapshot.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.snapshot.load_state_dict(checkpoint["last_good"])

    def validation_metrics(self, x: Tensor, cond: Cond, rng: RandomSource) -> dict[str, Tensor]:
        """Compute the energies of held-out images (with noise, like training images) and of uniform noise.

        The model overfits if held-out images have far higher energies than training images (``energy_data``).
        """
        cond = self.select_conditions(cond)
        real = self._clamp(x + self.data_noise * rng.normal(x.shape[1:]).to(x))
        noise = self._clamp(rng.uniform(x.shape[1:]).to(x) * 2 - 1)
        return {"energy_held_out": self.energy(real, cond), "energy_noise": self.energy(noise, cond)}

    # Sampling

    def _trajectory(
        self, x: Tensor, label: Tensor | None, num_steps: int, normal: Callable[[], Tensor]
    ) -> Iterator[Tensor]:
        def energy(x: Tensor) -> Tensor:
            return at_least_float32(self.network(x, label))

        return self.langevin.trajectory(energy, x, num_steps, normal, self._clamp)

    def _clamp(self, x: Tensor) -> Tensor:
        """Clamp images to [-1, 1] and make padding black; return continuous data unchanged."""
        if self.spec.num_bins is None:
            return x
        return x.clamp(-1, 1) * self.mask - (1 - self.mask)

    def sampling_trajectory(self, n: int, cond: Cond | None, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield states of ``n`` chains, each (n, C, H, W): uniform noise, then the state after each sampling step."""
        shape, label = (n, *self.spec.shape), self.label(self.select_conditions(cond))
        noise = draw_uniform(shape, generator, self.device, self.dtype)
        yield (x := self._clamp(noise * 2 - 1))
        yield from self._trajectory(x, label, self.num_sampling_steps, lambda: draw_normal(shape, generator))

    @torch.no_grad()
    def sample(self, n: int, cond: Cond | None = None, *, generator: torch.Generator) -> Tensor:
        """Run chains from noise and return their final states. The replay buffer is used only in training."""
        with parametrize.cached():
            return last_state(self.sampling_trajectory(n, cond, generator)).clamp(-1, 1)

    @torch.no_grad()
    def visualize(self, x: Tensor, cond: Cond, *, generator: torch.Generator) -> dict[str, Tensor]:
        """Order images and corrupted images by energy, and show chains from noise over time."""
        cond = self.select_conditions(cond)
        return {
            **visualization.energy_ranking(self.energy, x, cond, self._clamp, generator),
            "chains": visualization.chains_over_time(
                self.sampling_trajectory(len(x), cond, generator),
                self.num_sampling_steps,
                rows=visualization.NUM_CHAINS,
            ),
        }

    def sampling_description(self) -> str:
        return f"{self.num_sampling_steps} steps from noise, {self.langevin.describe()}"

    def nfe_networks(self) -> dict[str, nn.Module]:
        return {"network": self.network}
