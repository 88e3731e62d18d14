"""Benchmarks of the kernels, and what can be learnt about them without a GPU."""
