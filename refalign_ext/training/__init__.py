"""The trainer: one step, the loop around it, optimizers, EMA, logs and previews."""
