"""The arithmetic of a step on flat buffers: plain torch, and fused kernels that read each number
once.

A kernel walks tables of tiles (:mod:`weyl_megatron.spectral.blocks`). All do the same; which one
runs is picked once, by :func:`pick`, and ``weyl-megatron doctor`` says which and why.
"""

from .choice import Kernel, pick
from .stepped import Hyper, Stepped

__all__ = ["Hyper", "Kernel", "Stepped", "pick"]
