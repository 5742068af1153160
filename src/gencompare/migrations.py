"""Convert configs, records and checkpoints from earlier versions to the current names.

A file with an earlier schema opens as if it had been written by this version, because `migrate` replaces the paths of
classes that moved and the names of options that changed. This module does not import torch.
"""

from __future__ import annotations

import re
from typing import Any

MODULES = {
    "contract": "generative_model",
    "seeds": "rng",
    "data.archive": "data.archives",
    "data.base": "data.datamodule",
    "data.fashion_mnist": "data.mnist",
    "data.layout": "data.image_folder",
    "data.planar": "data.toy2d",
    "data.stream": "data.datamodule",
    "diffusion.couplings": "diffusion.objectives",
    "diffusion.likelihood": "diffusion.likelihoods",
    "diffusion.likelihood.base": "diffusion.likelihoods",
    "diffusion.likelihood.ode": "diffusion.likelihoods",
    "diffusion.likelihood.vlb": "diffusion.likelihoods",
    "diffusion.noise_conditioning": "diffusion.parameterizations",
    "diffusion.objectives.base": "diffusion.objectives",
    "diffusion.objectives.discrete_vlb": "diffusion.variational_objectives",
    "diffusion.objectives.hybrid": "diffusion.variational_objectives",
    "diffusion.objectives.vlb": "diffusion.variational_objectives",
    "diffusion.objectives.weighted_mse": "diffusion.objectives",
    "diffusion.parameterization": "diffusion.parameterizations",
    "diffusion.parameterization.base": "diffusion.parameterizations",
    "diffusion.parameterization.karras": "diffusion.parameterizations",
    "diffusion.parameterization.plain": "diffusion.parameterizations",
    "diffusion.parameterization.posterior_mean": "diffusion.parameterizations",
    "diffusion.parameterization.variance": "diffusion.parameterizations",
    "diffusion.pixels": "diffusion.objectives",
    "diffusion.samplers.adaptive": "diffusion.ode_samplers",
    "diffusion.samplers.ancestral": "diffusion.samplers",
    "diffusion.samplers.base": "diffusion.samplers",
    "diffusion.samplers.langevin": "diffusion.sde_samplers",
    "diffusion.samplers.multistep": "diffusion.multistep_samplers",
    "diffusion.samplers.ode": "diffusion.ode_samplers",
    "diffusion.samplers.sde": "diffusion.sde_samplers",
    "diffusion.schedules.base": "diffusion.schedules",
    "diffusion.schedules.karras": "diffusion.schedules",
    "diffusion.schedules.learned": "diffusion.learned_schedule",
    "diffusion.schedules.levels": "diffusion.discrete_schedules",
    "diffusion.schedules.rectified": "diffusion.schedules",
    "diffusion.schedules.sde": "diffusion.schedules",
    "diffusion.schedules.tables": "diffusion.discrete_schedules",
    "diffusion.times.grids": "diffusion.times",
    "diffusion.times.training": "diffusion.times",
    "diffusion.weightings": "diffusion.objectives",
    "evaluation.compact": "evaluation.extractors.shipped_classifiers",
    "evaluation.fidelity": "evaluation.extractors.torch_fidelity_networks",
    "evaluation.imagenet": "evaluation.extractors.efficientnet",
    "evaluation.inception": "evaluation.extractors.torch_fidelity_networks",
    "evaluation.mmd": "evaluation.metrics.kernel",
    "evaluation.raw": "evaluation.extractors.extractor",
    "models.coder": "models.autoencoder_core",
    "models.likelihoods": "models.pixel_likelihoods",
    "models.likelihoods.base": "models.pixel_likelihoods",
    "models.likelihoods.bernoulli": "models.pixel_likelihoods",
    "models.likelihoods.gaussian": "models.pixel_likelihoods",
    "models.likelihoods.logistic": "models.pixel_likelihoods",
    "models.likelihoods.mixture": "models.pixel_likelihoods",
    "models.lpips": "models.autoencoder",
    "models.noisy_classifier": "models.classifier",
    "models.penalties": "models.gan_penalties",
    "models.ramp": "models.elbo",
    "models.replay": "models.langevin",
    "models.rollback": "models.manual_optimization",
    "networks.autoencoder": "networks.conv_autoencoder",
    "networks.blocks": "networks.layers",
    "networks.class_norm": "networks.layers",
    "networks.classifier": "networks.residual_classifier",
    "networks.conditions": "networks.conditioning",
    "networks.dcgan": "networks.gan_networks",
    "networks.denoising_mlp": "networks.mlp",
    "networks.embeddings": "networks.conditioning",
    "networks.energy": "networks.energy_networks",
    "networks.instance_norm": "networks.layers",
    "networks.noisy_classifier": "networks.residual_classifier",
    "networks.patch_discriminator": "networks.gan_networks",
    "networks.players": "networks.gan_networks",
    "networks.projection": "networks.gan_networks",
    "networks.pyramids": "networks.unet_blocks",
    "networks.refinenet_blocks": "networks.refinenet",
    "networks.resampling": "networks.layers",
    "networks.vgg": "networks.perceptual",
    "tasks.compare": "tasks.compare_runs",
    "tasks.evaluate": "tasks.evaluate_run",
    "tasks.explore": "tasks.visualize",
    "tasks.extractor": "tasks.export_extractor",
    "tasks.load": "tasks.runs.loading",
    "tasks.sweep": "tasks.runs.sweep",
    "training.lr": "training.learning_rate",
}
"""Old and current paths of modules that moved."""

CLASSES = {
    "models.ramp.CosineRamp": "models.gan_penalties.CosineRamp",
    "data.conditions.Conditioned": "data.conditions.ConditionedData",
    "diffusion.objectives.DiscreteVLB": "diffusion.variational_objectives.DiscreteVLB",
    "diffusion.objectives.Hybrid": "diffusion.variational_objectives.Hybrid",
    "tasks.runs.runs": "tasks.list_runs.runs",
    "contract.AddsNoise": "generative_model.SupportsNoising",
    "contract.Classifies": "generative_model.SupportsClassification",
    "contract.Explores": "generative_model.SupportsVisualization",
    "contract.Likelihood": "generative_model.LikelihoodEstimate",
    "contract.Reconstructs": "generative_model.SupportsReconstruction",
    "seeds.Draws": "rng.RandomSource",
    "diffusion.couplings.Independent": "diffusion.objectives.IndependentCoupling",
    "diffusion.denoiser.Denoises": "diffusion.denoiser.DenoiserProtocol",
    "diffusion.likelihood.ODE": "diffusion.likelihoods.ODELikelihood",
    "diffusion.likelihood.VLB": "diffusion.likelihoods.VLBLikelihood",
    "diffusion.likelihood.ode.ODE": "diffusion.likelihoods.ODELikelihood",
    "diffusion.likelihood.vlb.VLB": "diffusion.likelihoods.VLBLikelihood",
    "diffusion.noise_conditioning.ContinuousTime": "diffusion.parameterizations.TimeConditioning",
    "diffusion.noise_conditioning.LevelIndex": "diffusion.parameterizations.LevelIndexConditioning",
    "diffusion.noise_conditioning.LogSNR": "diffusion.parameterizations.LogSNRConditioning",
    "diffusion.noise_conditioning.LogSigma": "diffusion.parameterizations.LogSigmaConditioning",
    "diffusion.noise_conditioning.Timestep": "diffusion.parameterizations.TimestepConditioning",
    "diffusion.objectives.VLB": "diffusion.variational_objectives.ContinuousVLB",
    "diffusion.objectives.base.Noised": "diffusion.objectives.NoisyBatch",
    "diffusion.objectives.vlb.EndsAndCourse": "diffusion.variational_objectives.LearnedScheduleGradients",
    "diffusion.objectives.vlb.VLB": "diffusion.variational_objectives.ContinuousVLB",
    "diffusion.ode_samplers.DPMSolverPP2M": "diffusion.multistep_samplers.DPMSolverPP2M",
    "diffusion.ode_samplers.UniPC": "diffusion.multistep_samplers.UniPC",
    "diffusion.parameterization.Karras": "diffusion.parameterizations.EDMPreconditioning",
    "diffusion.parameterization.karras.Karras": "diffusion.parameterizations.EDMPreconditioning",
    "diffusion.samplers.AnnealedLangevin": "diffusion.sde_samplers.AnnealedLangevin",
    "diffusion.samplers.DPMSolverPP2M": "diffusion.multistep_samplers.DPMSolverPP2M",
    "diffusion.samplers.Euler": "diffusion.ode_samplers.Euler",
    "diffusion.samplers.EulerMaruyama": "diffusion.sde_samplers.EulerMaruyama",
    "diffusion.samplers.Heun": "diffusion.ode_samplers.Heun",
    "diffusion.samplers.PredictorCorrector": "diffusion.sde_samplers.PredictorCorrector",
    "diffusion.samplers.RK45": "diffusion.ode_samplers.RK45",
    "diffusion.samplers.ReverseDiffusion": "diffusion.sde_samplers.ReverseDiffusion",
    "diffusion.samplers.UniPC": "diffusion.multistep_samplers.UniPC",
    "diffusion.schedules.BetaTable": "diffusion.discrete_schedules.BetaTable",
    "diffusion.schedules.CosineBetas": "diffusion.discrete_schedules.CosineBetas",
    "diffusion.schedules.Karras": "diffusion.schedules.EDMSchedule",
    "diffusion.schedules.Learned": "diffusion.learned_schedule.LearnedSchedule",
    "diffusion.schedules.LinearBetas": "diffusion.discrete_schedules.LinearBetas",
    "diffusion.schedules.NCSNLevels": "diffusion.discrete_schedules.GeometricSigmas",
    "diffusion.schedules.Rectified": "diffusion.schedules.RectifiedFlow",
    "diffusion.schedules.Scales": "diffusion.schedules.ScheduleValues",
    "diffusion.schedules.SigmoidBetas": "diffusion.discrete_schedules.SigmoidBetas",
    "diffusion.schedules.base.Scales": "diffusion.schedules.ScheduleValues",
    "diffusion.schedules.karras.Karras": "diffusion.schedules.EDMSchedule",
    "diffusion.schedules.learned.Learned": "diffusion.learned_schedule.LearnedSchedule",
    "diffusion.schedules.levels.NCSNLevels": "diffusion.discrete_schedules.GeometricSigmas",
    "diffusion.schedules.rectified.Rectified": "diffusion.schedules.RectifiedFlow",
    "diffusion.weightings.EDM": "diffusion.objectives.EDMWeighting",
    "diffusion.weightings.Likelihood": "diffusion.objectives.LikelihoodWeighting",
    "diffusion.weightings.MinSNR": "diffusion.objectives.MinSNRWeighting",
    "diffusion.weightings.P2": "diffusion.objectives.P2Weighting",
    "diffusion.weightings.Simple": "diffusion.objectives.SimpleWeighting",
    "diffusion.weightings.UniformV": "diffusion.objectives.UniformVWeighting",
    "diffusion.weightings.UniformVelocity": "diffusion.objectives.UniformVelocityWeighting",
    "evaluation.compact.compact": "evaluation.extractors.shipped_classifiers.shipped_classifier",
    "evaluation.evaluate.Protocol": "evaluation.evaluate.EvaluationProtocol",
    "evaluation.fidelity.fidelity": "evaluation.extractors.torch_fidelity_networks.torch_fidelity_network",
    "evaluation.raw.RawValues": "evaluation.extractors.extractor.IdentityExtractor",
    "models.bottlenecks.KLBottleneck": "models.bottlenecks.GaussianPosterior",
    "models.bottlenecks.VQBottleneck": "models.bottlenecks.VectorQuantizer",
    "models.coder.Coder": "models.autoencoder_core.AutoencoderCore",
    "models.gaussian.Gaussian": "models.gaussian.GaussianBaseline",
    "models.likelihoods.Bernoulli": "models.pixel_likelihoods.BernoulliLikelihood",
    "models.likelihoods.Gaussian": "models.pixel_likelihoods.GaussianLikelihood",
    "models.likelihoods.bernoulli.Bernoulli": "models.pixel_likelihoods.BernoulliLikelihood",
    "models.likelihoods.gaussian.Gaussian": "models.pixel_likelihoods.GaussianLikelihood",
    "models.likelihoods.mixture.Components": "models.pixel_likelihoods.MixtureParams",
    "models.penalties.Duel": "models.gan_penalties.DiscriminatorStep",
    "models.rollback.LastGood": "models.manual_optimization.Snapshot",
    "networks.blocks.ModulatedGroupNorm": "networks.layers.AdaptiveGroupNorm",
    "networks.blocks.Normalized": "networks.layers.NormActivation",
    "networks.blocks.Plain": "networks.layers.Activation",
    "networks.class_norm.ClassNorm": "networks.layers.ClassConditionalGroupNorm",
    "networks.classifier.ResidualBlock": "networks.residual_classifier.ClassifierBlock",
    "networks.conditions.Conditions": "networks.conditioning.ConditionEmbedding",
    "networks.denoising_mlp.ModulatedBlock": "networks.mlp.ModulatedMLPBlock",
    "networks.energy.Energy": "networks.energy_networks.EnergyNetwork",
    "networks.hierarchical.Bottleneck": "networks.hierarchical.BottleneckBlock",
    "networks.hierarchical.Ladder": "networks.hierarchical.TopDownDecoder",
    "networks.hierarchical.LatentLayer": "networks.hierarchical.TopDownBlock",
    "networks.r3gan.Block": "networks.r3gan.R3GANBlock",
    "networks.unet_blocks.Block": "networks.unet_blocks.UNetBlock",
    "training.loggers.CurveFile": "training.loggers.CurveCSVLogger",
}
"""Old and current paths of classes and functions that were renamed or moved separately from their module."""

OPTIONS: dict[str, str] = {
    "task.n": "task.num_images",
    "task.images": "task.num_images",
    "task.references": "task.num_reference_images",
    "hydra.launcher.jobs": "hydra.launcher.n_jobs",
    "hydra.sweeper.trials": "hydra.sweeper.n_trials",
    "hydra.sweeper.at_once": "hydra.sweeper.n_jobs",
    "hydra.sweeper.each": "hydra.sweeper.study_per",
    "model/ladder": "model/decoder",
    "model/chains": "model/langevin",
    "model.ladder": "model.decoder",
    "model.steps": "model.num_langevin_steps",
    "model.sample_steps": "model.num_sampling_steps",
    "model.restarts": "model.reinit_prob",
    "model.max_gap": "model.divergence_threshold",
    "model.keep_every": "model.snapshot_every_n_steps",
    "model.langevin.step": "model.langevin.step_size",
    "model.langevin.noise": "model.langevin.noise_std",
    "model.langevin.clip": "model.langevin.grad_clip",
    "model.prior.components": "model.prior.num_components",
    "model.likelihood.components": "model.likelihood.num_components",
    "model.adversarial_after": "model.adversarial_start",
    "model.bottleneck.codes": "model.bottleneck.num_codes",
    "model.bottleneck.revive": "model.bottleneck.revival_threshold",
    "model.latent.run": "model.latent.autoencoder_run",
    "model.latent.autoencoder.adversarial_after": "model.latent.autoencoder.adversarial_start",
    "model.latent.autoencoder.bottleneck.codes": "model.latent.autoencoder.bottleneck.num_codes",
    "model.latent.autoencoder.bottleneck.revive": "model.latent.autoencoder.bottleneck.revival_threshold",
    "model.noise": "model.noise_conditioning",
    "model.discriminator_augmentation.colours": "model.discriminator_augmentation.color_multiplier",
    "model.discriminator_augmentation.cutout": "model.discriminator_augmentation.cutout_multiplier",
    "model.discriminator_augmentation.horizon": "model.discriminator_augmentation.adjustment_images",
    "model.discriminator_augmentation.ramp.first": "model.discriminator_augmentation.ramp.start",
    "model.discriminator_augmentation.ramp.last": "model.discriminator_augmentation.ramp.end",
    "model.discriminator_augmentation.ramp.images": "model.discriminator_augmentation.ramp.num_images",
    "model.penalty.r1.weight.first": "model.penalty.r1.weight.start",
    "model.penalty.r1.weight.last": "model.penalty.r1.weight.end",
    "model.penalty.r1.weight.images": "model.penalty.r1.weight.num_images",
    "model.penalty.r2.weight.first": "model.penalty.r2.weight.start",
    "model.penalty.r2.weight.last": "model.penalty.r2.weight.end",
    "model.penalty.r2.weight.images": "model.penalty.r2.weight.num_images",
    "model.penalty.wgan_gp.weight.first": "model.penalty.wgan_gp.weight.start",
    "model.penalty.wgan_gp.weight.last": "model.penalty.wgan_gp.weight.end",
    "model.penalty.wgan_gp.weight.images": "model.penalty.wgan_gp.weight.num_images",
    "model.network.multipliers": "model.network.channel_mult",
    "model.network.blocks": "model.network.num_blocks",
    "model.network.attention": "model.network.attention_resolutions",
    "model.network.groups": "model.network.num_groups",
    "model.network.heads": "model.network.num_heads",
    "model.network.scale_shift": "model.network.scale_shift_norm",
    "model.network.fourier_input": "model.network.fourier_exponents",
    "model.network.patch": "model.network.patch_size",
    "model.network.levels": "model.network.num_levels",
    "model.encoder.multipliers": "model.encoder.channel_mult",
    "model.encoder.blocks": "model.encoder.num_blocks",
    "model.encoder.attention": "model.encoder.mid_attention",
    "model.decoder.multipliers": "model.decoder.channel_mult",
    "model.decoder.blocks": "model.decoder.num_blocks",
    "model.decoder.attention": "model.decoder.mid_attention",
    "model.generator.blocks": "model.generator.num_blocks",
    "model.discriminator.blocks": "model.discriminator.num_blocks",
    "model.discriminator.features": "model.discriminator.num_features",
    "model.discriminator.layers": "model.discriminator.num_layers",
    "model.energy.blocks": "model.energy.num_blocks",
    "model.energy.leaky": "model.energy.negative_slope",
    "model.ladder.bottleneck": "model.decoder.bottleneck_ratio",
    "model.ladder.encoder_blocks": "model.decoder.num_encoder_blocks",
    "model.ladder.decoder_blocks": "model.decoder.num_decoder_blocks",
    "model.latent.autoencoder.encoder.multipliers": "model.latent.autoencoder.encoder.channel_mult",
    "model.latent.autoencoder.encoder.blocks": "model.latent.autoencoder.encoder.num_blocks",
    "model.latent.autoencoder.encoder.attention": "model.latent.autoencoder.encoder.mid_attention",
    "model.latent.autoencoder.decoder.multipliers": "model.latent.autoencoder.decoder.channel_mult",
    "model.latent.autoencoder.decoder.blocks": "model.latent.autoencoder.decoder.num_blocks",
    "model.latent.autoencoder.decoder.attention": "model.latent.autoencoder.decoder.mid_attention",
    "run": "run_dir",
    "by": "group_by",
    "metric": "rank_by",
    "n": "num_images",
    "evaluation.available.raw": "evaluation.available.identity",
    "evaluation.n": "evaluation.num_images",
    "evaluation.protocol.chunk": "evaluation.protocol.chunk_size",
    "evaluation.protocol.conditions": "evaluation.protocol.condition_split",
    "evaluation.protocol.likelihood_n": "evaluation.protocol.num_likelihood_images",
    "evaluation.protocol.n": "evaluation.protocol.num_images",
    "callbacks.looks.count": "callbacks.evaluation.num_evaluations",
    "callbacks.looks.grid": "callbacks.evaluation.num_grid_images",
    "callbacks.looks.held_out": "callbacks.evaluation.num_val_images",
    "callbacks.looks.preview": "callbacks.evaluation.num_samples",
    "callbacks.looks": "callbacks.evaluation",
    "callbacks.curve.every": "callbacks.metric_logger.log_every_n_steps",
    "callbacks.progress": "callbacks.progress_bar",
    "data.limit": "data.train_subset_size",
    "data.flip": "data.random_flip",
    "data.size": "data.image_size",
    "data.name": "data.distribution",
    "data.n": "data.num_points",
    "model.sampler.steps": "model.sampler.num_steps",
    "model.sampler.corrector_steps": "model.sampler.num_corrector_steps",
    "model.sampler.steps_per_level": "model.sampler.num_langevin_steps",
    "model.sampler.grid.first": "model.sampler.grid.log_snr_start",
    "model.sampler.grid.last": "model.sampler.grid.log_snr_end",
    "model.schedule.first": "model.schedule.beta_start",
    "model.schedule.last": "model.schedule.beta_end",
    "model.schedule.T": "model.schedule.num_train_timesteps",
    "model.schedule.levels": "model.schedule.num_levels",
    "model.schedule.features": "model.schedule.num_features",
    "model.parameterization.noise": "model.parameterization.noise_conditioning",
    "model.parameterization.noise.steps": "model.parameterization.noise_conditioning.num_train_timesteps",
    "model.objective.steps": "model.objective.num_timesteps",
    "model.objective.vlb": "model.objective.vlb_weight",
    "model.bits": "model.likelihoods",
    "model/bits": "model/likelihoods",
    "model.bits.vlb.samples": "model.likelihoods.vlb.num_samples",
    "model.bits.vlb.steps": "model.likelihoods.vlb.num_timesteps",
}
"""Old and current dotted keys of options on the command line and in stored configs."""

TASKS = {"extractor": "export_extractor", "explore": "visualize", "runs": "list_runs"}
"""Old and current names of tasks."""

_DATA = {"limit": "train_subset_size", "flip": "random_flip"}
_UNET = {
    "multipliers": "channel_mult",
    "blocks": "num_blocks",
    "attention": "attention_resolutions",
    "groups": "num_groups",
}
_LATENT = {"multipliers": "channel_mult", "blocks": "num_blocks", "attention": "mid_attention"}
_BETAS = {"first": "beta_start", "last": "beta_end", "T": "num_train_timesteps"}
_GRID = {"first": "log_snr_start", "last": "log_snr_end"}
_STEPS = {"steps": "num_steps"}
_NOISE = {"noise": "noise_conditioning"}
_BLOCKS = {"blocks": "num_blocks"}

ARGUMENTS: dict[str, dict[str, str]] = {
    "generative_model.DataSpec": {"num_levels": "num_bins"},
    "models.autoencoder.Autoencoder": {"adversarial_after": "adversarial_start"},
    "models.bottlenecks.VectorQuantizer": {"codes": "num_codes", "revive": "revival_threshold"},
    "models.classifier.NoisyClassifier": _NOISE,
    "models.discriminator_augmentation.ADA": {
        "colours": "color_multiplier",
        "cutout": "cutout_multiplier",
        "horizon": "adjustment_images",
    },
    "models.discriminator_augmentation.ScheduledAugmentation": {
        "colours": "color_multiplier",
        "cutout": "cutout_multiplier",
    },
    "models.energy.EBM": {
        "steps": "num_langevin_steps",
        "sample_steps": "num_sampling_steps",
        "restarts": "reinit_prob",
        "max_gap": "divergence_threshold",
        "keep_every": "snapshot_every_n_steps",
    },
    "models.gan_penalties.CosineRamp": {"first": "start", "last": "end", "images": "num_images"},
    "models.hvae.HVAE": {"ladder": "decoder"},
    "models.langevin.Langevin": {"step": "step_size", "noise": "noise_std", "clip": "grad_clip"},
    "models.latents.Latents": {"run": "autoencoder_run"},
    "models.pixel_likelihoods.DiscretizedLogisticMixture": {"components": "num_components"},
    "models.priors.MixtureOfGaussians": {"components": "num_components"},
    "networks.unet.UNet": _UNET
    | {
        "heads": "num_heads",
        "scale_shift": "scale_shift_norm",
        "fourier_input": "fourier_exponents",
        "low_res": "low_res_channels",
    },
    "networks.residual_classifier.NoisyClassifierNet": _UNET,
    "networks.dit.DiT": {
        "patch": "patch_size",
        "width": "hidden_size",
        "heads": "num_heads",
        "low_res": "low_res_channels",
    },
    "networks.refinenet.RefineNet": {"levels": "num_levels", "low_res": "low_res_channels"},
    "networks.conv_autoencoder.LatentEncoder": _LATENT,
    "networks.conv_autoencoder.LatentDecoder": _LATENT,
    "networks.convnets.ResNetEncoder": _BLOCKS,
    "networks.convnets.ResNetDecoder": _BLOCKS,
    "networks.gan_networks.ResNetGenerator": _BLOCKS,
    "networks.gan_networks.ResNetDiscriminator": _BLOCKS | {"features": "num_features"},
    "networks.gan_networks.MLPDiscriminator": {"features": "num_features"},
    "networks.r3gan.R3GANGenerator": _BLOCKS,
    "networks.r3gan.R3GANDiscriminator": _BLOCKS,
    "networks.energy_networks.EnergyResNet": _BLOCKS | {"leaky": "negative_slope"},
    "networks.energy_networks.EnergyConvNet": {"leaky": "negative_slope"},
    "networks.gan_networks.PatchDiscriminator": {"width": "channels", "layers": "num_layers"},
    "networks.hierarchical.TopDownDecoder": {
        "bottleneck": "bottleneck_ratio",
        "encoder_blocks": "num_encoder_blocks",
        "decoder_blocks": "num_decoder_blocks",
    },
    "networks.mlp.DenoisingMLP": {"low_res": "low_res_channels"},
    "data.cifar10.CIFAR10": _DATA,
    "data.digits.Digits": _DATA,
    "data.eurosat64.EuroSAT64": _DATA,
    "data.image_folder.ImageFolder": _DATA | {"size": "image_size"},
    "data.mnist.FashionMNIST": _DATA,
    "data.mnist.MNIST": _DATA,
    "data.toy2d.Toy2D": _DATA | {"name": "distribution", "n": "num_points"},
    "diffusion.discrete_schedules.CosineBetas": {"T": "num_train_timesteps"},
    "diffusion.discrete_schedules.GeometricSigmas": {"levels": "num_levels"},
    "diffusion.discrete_schedules.LinearBetas": _BETAS,
    "diffusion.discrete_schedules.SigmoidBetas": _BETAS,
    "diffusion.learned_schedule.LearnedSchedule": {"features": "num_features"},
    "diffusion.likelihoods.VLBLikelihood": {"samples": "num_samples", "steps": "num_timesteps"},
    "diffusion.multistep_samplers.DPMSolverPP2M": _STEPS,
    "diffusion.multistep_samplers.UniPC": _STEPS,
    "diffusion.ode_samplers.Euler": _STEPS,
    "diffusion.ode_samplers.Heun": _STEPS,
    "diffusion.ode_samplers.RK45": _STEPS,
    "diffusion.parameterizations.EDMPreconditioning": _NOISE,
    "diffusion.parameterizations.Eps": _NOISE,
    "diffusion.parameterizations.LearnedVariance": _NOISE,
    "diffusion.parameterizations.PosteriorMean": _NOISE,
    "diffusion.parameterizations.Score": _NOISE,
    "diffusion.parameterizations.TimestepConditioning": {"steps": "num_train_timesteps"},
    "diffusion.parameterizations.V": _NOISE,
    "diffusion.parameterizations.Velocity": _NOISE,
    "diffusion.parameterizations.X0": _NOISE,
    "diffusion.samplers.Ancestral": _STEPS,
    "diffusion.samplers.DDIM": _STEPS,
    "diffusion.sde_samplers.AnnealedLangevin": _STEPS | {"steps_per_level": "num_langevin_steps"},
    "diffusion.sde_samplers.EulerMaruyama": _STEPS,
    "diffusion.sde_samplers.PredictorCorrector": _STEPS | {"corrector_steps": "num_corrector_steps"},
    "diffusion.sde_samplers.ReverseDiffusion": _STEPS,
    "diffusion.times.KarrasGrid": _GRID,
    "diffusion.times.LogSNRGrid": _GRID,
    "diffusion.variational_objectives.ContinuousVLB": {"pixels": "likelihood"},
    "diffusion.variational_objectives.DiscreteVLB": {"steps": "num_timesteps", "pixels": "likelihood"},
    "diffusion.variational_objectives.Hybrid": {"vlb": "vlb_weight", "pixels": "likelihood"},
    "evaluation.evaluate.EvaluationProtocol": {
        "n": "num_images",
        "conditions": "condition_split",
        "chunk": "chunk_size",
        "likelihood_n": "num_likelihood_images",
    },
    "models.diffusion.Diffusion": {"bits": "likelihoods"},
}
"""Old and current names of constructor arguments, by current class."""

SAMPLER_ARGUMENTS = {
    old: new for name, renamed in ARGUMENTS.items() if "samplers." in name for old, new in renamed.items()
}
"""Renamed arguments of all samplers, for ``evaluation.samplers``, which overrides the model's sampler arguments."""

CALLBACKS = {
    "Clock": "TrainingClock",
    "Curve": "MetricLogger",
    "LearningRate": "LearningRateScheduler",
    "Looks": "EvaluationCallback",
    "ProgressLine": "TrainingProgressBar",
}
"""Old and current names under which checkpoints store the state of callbacks."""

TRAINER = {
    "_target_": "pytorch_lightning.Trainer", "num_micro_batches": 1, "matmul_precision": "highest", "compile": None,
    "memory_format": None, "fused_optimizer": False,
}  # fmt: skip
"""Values of settings of the trainer in versions that did not have them yet."""
PACKAGE = "gencompare."


def migrate_path(path: str) -> str:
    """Return the current path of a class or function in this package."""
    if not path.startswith(PACKAGE):
        return path
    name = path.removeprefix(PACKAGE)
    if name not in CLASSES:
        module, _, last = name.rpartition(".")
        return f"{PACKAGE}{MODULES.get(module, module)}.{last}"
    return PACKAGE + CLASSES[name]


def migrate(value: Any) -> Any:
    """Return a copy of plain data (a config, or the arguments in a checkpoint) with the current names."""
    if isinstance(value, list):
        return [migrate(each) for each in value]
    if not isinstance(value, dict):
        return value
    done = {key: migrate(each) for key, each in value.items()}
    for key in ("_target_", "_missing_"):
        if isinstance(done.get(key), str):
            done[key] = migrate_path(done[key])
    target = done.get("_target_")
    if target == "hydra.utils.get_object" and isinstance(done.get("path"), str):
        done["path"] = migrate_path(done["path"])
    renamed = ARGUMENTS.get(str(target).removeprefix(PACKAGE), {})
    return {renamed.get(key, key): each for key, each in done.items()}


def migrate_config(config: dict[str, Any]) -> dict[str, Any]:
    """Convert the config of a run folder or record from an earlier version to the current names."""
    done = migrate(config)
    if "looks" in (done.get("callbacks") or {}):
        done["callbacks"] = _migrate_callbacks(done["callbacks"])
    for old, new in OPTIONS.items():
        if "/" not in old and not old.startswith("callbacks."):
            _move(done, old.split("."), new.split("."))
    evaluation = done.get("evaluation")
    if isinstance(evaluation, dict) and isinstance(evaluation.get("extractors"), list):
        evaluation["extractors"] = ["identity" if name == "raw" else name for name in evaluation["extractors"]]
    if isinstance(evaluation, dict) and isinstance(evaluation.get("samplers"), dict):
        evaluation["samplers"] = {
            name: _rename(changes, SAMPLER_ARGUMENTS) if isinstance(changes, dict) else changes
            for name, changes in evaluation["samplers"].items()
        }
    if isinstance(done.get("trainer"), dict):
        done["trainer"] |= {name: value for name, value in TRAINER.items() if name not in done["trainer"]}
    if isinstance(done.get("choices"), dict):
        done["choices"] = {OPTIONS.get(group, group): choice for group, choice in done["choices"].items()}
        task = done["choices"].get("task")
        done["choices"]["task"] = TASKS.get(task, task)
    return done


def rename_option(word: str) -> tuple[str, str, str] | None:
    """Return an override with the current option name, and the old and new names, or None if it is up to date."""
    key, equals, value = word.partition("=")
    bare = key.lstrip("+~")
    if key == "task" and value in TASKS:
        return f"task={TASKS[value]}", word, f"task={TASKS[value]}"
    parts = bare.replace("/", ".").split(".")
    for k in range(len(parts), 0, -1):
        old = bare[: len(".".join(parts[:k]))]
        if old in OPTIONS:
            if old == "callbacks.progress" and value == "false":
                value = "null"
            name = OPTIONS[old] + bare[len(old) :]
            return f"{key[: len(key) - len(bare)]}{name}{equals}{value}", bare, name
    return None


def _move(config: dict[str, Any], old: list[str], new: list[str]) -> None:
    """Move a value to its new key, unless the old key is a constructor argument, which `ARGUMENTS` covers."""
    node: Any = config
    for name in old[:-1]:
        node = node.get(name) if isinstance(node, dict) else None
    if not isinstance(node, dict) or "_target_" in node or old[-1] not in node:
        return
    value = node.pop(old[-1])
    target = config
    for name in new[:-1]:
        target = target.setdefault(name, {})
    target.setdefault(new[-1], value)


def _migrate_callbacks(old: dict[str, Any]) -> dict[str, Any]:
    """Convert callback settings that do not name the callback classes to configs that do."""
    looks, training = old["looks"], f"{PACKAGE}training."
    names = {
        "count": "num_evaluations",
        "grid": "num_grid_images",
        "held_out": "num_val_images",
        "preview": "num_samples",
    }
    known = {
        "clock": {"_target_": f"{training}clock.TrainingClock"},
        "learning_rate": {"_target_": f"{training}learning_rate.LearningRateScheduler"},
        "flops": {"_target_": f"{training}clock.TrainingFlops"},
        "ema": {"_target_": f"{training}ema.EMA", **old["ema"]},
        "graceful_stop": {"_target_": f"{training}graceful_stop.GracefulStop"},
        "metric_logger": {
            "_target_": f"{training}loggers.MetricLogger",
            "log_every_n_steps": old["curve"]["every"],
        },
        "evaluation": {
            "_target_": f"{training}evaluation_callback.EvaluationCallback",
            "patience": None,
            **{names.get(name, name): value for name, value in looks.items()},
        },
        "progress_bar": {"_target_": f"{training}progress_bar.TrainingProgressBar"} if old["progress"] else None,
        "checkpoints": {"_target_": f"{training}checkpoints.Checkpoints", **old["checkpoints"]},
    }
    return known | {name: value for name, value in old.items() if name not in ("looks", "curve", "progress", *known)}


def migrate_checkpoint(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Convert the argument and callback names in a checkpoint from an earlier version to the current names."""
    if "hyper_parameters" in checkpoint:
        checkpoint["hyper_parameters"] = migrate(checkpoint["hyper_parameters"])
    if "callbacks" in checkpoint:
        checkpoint["callbacks"] = {CALLBACKS.get(key, key): state for key, state in checkpoint["callbacks"].items()}
    return checkpoint


RECORD_FIELDS = {"pictures": "images"}
RECORD_DATA = {"num_levels": "num_bins"}
RECORD_TRAINING = {"needed": "dependencies", "total": "total_cost", "trained_against": "perceptual_networks"}
RECORD_RESULTS = {"headline": "primary_metric", "pictures": "images", "also": "secondary_results"}
RECORD_DETAILS = {"flags": "warnings", "class_shares_of_floor": "class_shares_of_real_images"}
RECORD_MEASUREMENTS = {"n": "num_images", "reference_n": "num_reference_images", "chunk": "chunk_size"}
RECORD_METRICS = {"floor": "baseline"}
"""Names of record fields in schema 1 and in schema 2."""

METRIC_ORDER: dict[str | None, dict[str, Any]] = {
    "lower": {"higher_is_better": False}, "higher": {"higher_is_better": True}, "one": {"target": 1.0}, None: {},
}  # fmt: skip
"""The values of ``better`` in schema 1, and the corresponding fields of schema 2."""


def migrate_record(record: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a run record (parsed JSON) in the current schema, with the current names in its config.

    Raises:
        KeyError, TypeError, AttributeError: the record is corrupted.
    """
    if record["schema"] < 2:
        record = _rename(record, RECORD_FIELDS)
        record["data"] = _rename(record.get("data", {}), RECORD_DATA)
        record["training"] = _rename(record.get("training", {}), RECORD_TRAINING)
        record["overrides"] = [_migrate_override(override) for override in record.get("overrides", [])]
        record["results"] = [_migrate_result(result) for result in record["results"]]
    results = [_rename_sampler_arguments(result) for result in record["results"]]
    return record | {"config": migrate_config(record.get("config", {})), "results": results}


SAMPLER_DESCRIPTIONS = {"steps_per_level": "num_langevin_steps", "corrector_steps": "num_corrector_steps"}
"""Renamed arguments in descriptions of samplers. Results are grouped by these and by the names of networks."""


def _rename_sampler_arguments(result: dict[str, Any]) -> dict[str, Any]:
    generation = dict(result["generation"])
    for old, new in SAMPLER_DESCRIPTIONS.items():
        if isinstance(generation.get("sampler"), str):
            generation["sampler"] = re.sub(rf"\b{old}\b", new, generation["sampler"])
    if isinstance(generation.get("nfe"), dict):
        generation["nfe"] = _rename(generation["nfe"], {"ladder": "decoder"})
    return result | {"generation": generation}


def _migrate_override(override: str) -> str:
    renamed = rename_option(override)
    return override if renamed is None else renamed[0]


def _migrate_result(result: dict[str, Any]) -> dict[str, Any]:
    """Convert a result from schema 1 to schema 2."""
    result = _rename(result, RECORD_RESULTS)
    result["measurement"] = _rename(result["measurement"], RECORD_MEASUREMENTS)
    result["details"] = _rename(result.get("details", {}), RECORD_DETAILS)
    result["metrics"] = {name: _migrate_metric(metric) for name, metric in result["metrics"].items()}
    result["secondary_results"] = [_migrate_result(each) for each in result.get("secondary_results", [])]
    return result


def _migrate_metric(metric: dict[str, Any]) -> dict[str, Any]:
    metric = _rename(metric, RECORD_METRICS)
    return metric | METRIC_ORDER[metric.pop("better", None)]


def _rename(fields: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in fields.items()}
