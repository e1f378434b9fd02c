"""Sizes of plates in the benchmarks' models: a plate's size cannot be traced."""

GROUPS = 20  # of the hierarchical model
