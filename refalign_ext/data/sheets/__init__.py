"""Pages to look at: the result of a generation, and samples of a data set."""
