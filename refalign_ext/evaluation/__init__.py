"""Measurements of a trained model: how well references can be told apart, with plots and curves."""
