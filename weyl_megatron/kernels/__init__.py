"""The arithmetic of a step on flat buffers: plain torch, and fused kernels that read each number
once.

A kernel goes through tables of tiles (:class:`.Table`). All do the same. Which one runs is picked
once, by :func:`pick`; ``environment.DOCTOR`` says which and why.
"""

from .choice import VECTORS_ON_GPU, Kernel, make, make_triton, pick
from .clipping import Clipping
from .stepped import Hyper, Stepped

__all__ = [
    "VECTORS_ON_GPU",
    "Clipping",
    "Hyper",
    "Kernel",
    "Stepped",
    "make",
    "make_triton",
    "pick",
]
