"""How many columns the kernels' tables have."""

from __future__ import annotations

import torch
import triton.language as tl

from ..units import BLOCK, PIECE, UNIT, Dtypes

UNIT_SIZE = tl.constexpr(len(UNIT))
PIECE_SIZE = tl.constexpr(len(PIECE))
BLOCK_SIZE = tl.constexpr(len(BLOCK))

#: Hyperparameters of a buffer, float32: what of (g - m), v and g² the moments take; what of √v and
#: 1 makes the denominator of U; α, λ, the first correction, the root of the second, ε.
HYPER = 12
HYPER_SIZE = tl.constexpr(HYPER)

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def state_types(dtypes: Dtypes) -> dict[str, tl.dtype]:
    """Return what a kernel is compiled for: the dtypes of W, M and V."""
    return {
        "STATE": TYPES[dtypes.weight],
        "OF_M": TYPES[dtypes.exp_avg],
        "OF_V": TYPES[dtypes.exp_avg_sq],
    }
