"""Weights, media files and solvers."""
