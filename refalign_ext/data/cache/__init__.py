"""Latents, text and teacher features computed before training."""
