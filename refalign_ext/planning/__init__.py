"""Parameters, FLOPs and memory of a run, computed before anything is loaded."""
