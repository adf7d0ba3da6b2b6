"""Who holds what: each engine's tensors as buffers of parameter ranges, and from there as tiles of matrices.

Knows engines' memory layouts and nothing of optimizers.
"""

from weyl_megatron.layouts.buffers import Buffer, Parameter, Plan, Run, Shard, plan_of
from weyl_megatron.layouts.grid import Fused, Grid, Sharding, grid_of, known_fused, told_fused

__all__ = [
    "Buffer",
    "Fused",
    "Grid",
    "Parameter",
    "Plan",
    "Run",
    "Shard",
    "Sharding",
    "grid_of",
    "known_fused",
    "plan_of",
    "told_fused",
]
