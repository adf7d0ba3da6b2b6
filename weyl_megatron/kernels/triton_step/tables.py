"""How many columns the kernels' tables have."""

from __future__ import annotations

import triton.language as tl

from ..units import BLOCK, PIECE, UNIT

UNIT_SIZE = tl.constexpr(len(UNIT))
PIECE_SIZE = tl.constexpr(len(PIECE))
BLOCK_SIZE = tl.constexpr(len(BLOCK))

#: Hyperparameters of a buffer, float32: what of (g - m), v and g² the moments take; what of √v and
#: 1 makes the denominator of U; α, λ, the first correction, the root of the second, ε.
HYPER = 12
HYPER_SIZE = tl.constexpr(HYPER)
