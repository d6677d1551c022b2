"""Device mesh, process groups, FSDP2 and sequence parallelism, applied to the model from outside."""
