"""Who holds what: each engine's tensors as buffers of parameter ranges, and from there as tiles of
matrices.

Knows engines' memory layouts and nothing of optimizers.
"""
