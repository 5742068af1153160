"""The mathematics of diffusion models, one concept per module. Imports torch, but not Lightning, Hydra or networks."""
