"""The paper's ablations on the embedded world: studies, statistics and tables."""
