"""Samples for training, loaded ahead."""
