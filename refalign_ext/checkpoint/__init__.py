"""Training checkpoints, adapters and exported weights: written, resumed and read in every layout."""
