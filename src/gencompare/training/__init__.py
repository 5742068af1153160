"""Training of all families with the Lightning Trainer: callbacks, budget and loggers."""
