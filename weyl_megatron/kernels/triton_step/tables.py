"""What kernels and those who launch them agree on: the columns of tables, the rows of numbers."""

from __future__ import annotations

import triton.language as tl

#: Columns of a table of units, int64: the buffer, where its first row begins there, rows, columns
#: and the distance between rows; the matrix (-1: none); whether it is measured here.
UNIT = (
    "buffer",
    "offset",
    "rows",
    "cols",
    "stride",
    "matrix",
    "measured",
    # Of products only: 0 is W and 1 is U; where its columns of X begin; the matrix's columns n;
    # where what it sums lies, where its columns of Z begin from there; where its Y lie in ``left``
    # (-1: it has whole rows).
    "operand",
    "x",
    "n",
    "place",
    "col",
    "left",
    "width",
)
UNIT_SIZE = tl.constexpr(len(UNIT))

#: Columns of a table of the pieces of Z that are added up, int64: the operand, the matrix, where
#: its Z begins, n, b, the first column, where the places of its units with whole rows begin, how
#: many there are and how far they are apart; its units from the first to behind the last, of
#: whole rows and of any; which of those have cut rows.
PIECE = (
    "operand",
    "matrix",
    "z",
    "n",
    "width",
    "start",
    "place",
    "count",
    "apart",
    "first",
    "last",
    "cut",
)
PIECE_SIZE = tl.constexpr(len(PIECE))

#: Columns of a table of blocks, int64: the operand, the matrix, where X and Z begin, n, b, where
#: its Y in ``left`` begin and how many numbers they are.
BLOCK = ("operand", "matrix", "x", "z", "n", "width", "left", "lefts")
BLOCK_SIZE = tl.constexpr(len(BLOCK))

#: Hyperparameters of a buffer, float32: what of (g - m), v and g² the moments take; what of √v and
#: 1 makes the denominator of U; α, λ, the first correction, the root of the second, ε.
HYPER = 12
HYPER_SIZE = tl.constexpr(HYPER)
