"""What a weight is: to its module, to its user, or by its shape alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Kind(NamedTuple):
    """What a parameter is to the module that owns it, or to the user who says so.

    The matrix of a grouped convolution is block-diagonal. Its ``groups`` are matrices of their own,
    bands of the first dimension: outputs in ``nn.ConvNd``, inputs in ``nn.ConvTransposeNd``.
    """

    # "vector" (scheduled rate), "matrix", "convolution" (rows: the first dimension) or "experts"
    form: str
    groups: int = 1
    # Labels of what it stacks along ``axis`` of each matrix.
    parts: tuple[str, ...] = ()
    axis: int = 0
    # Consecutive rows (columns) of each part, in an order that repeats; (): all of one size, once.
    period: tuple[int, ...] = ()
    role: str | None = None  # "embedding", "head" or "adapter"
    partner: str | None = None  # the other factor of an adapter's product, by its parameter's name


def guessed_form(shape: Sequence[int]) -> str:
    """Return what a weight of three dimensions or more is taken for by its shape alone.

    A convolution has more filters than taps, (out, in/groups, taps), a depthwise one has a single
    input per filter; a stack has no more experts than each has columns, (experts, m, n). What has
    more than three dimensions is a convolution.
    """
    is_stack = len(shape) == 3 and shape[0] <= shape[2] and (shape[1] > 1 or shape[0] == 1)
    return "experts" if is_stack else "convolution"


def form_of(shape: Sequence[int], kind: Kind | None) -> str:
    """Return what each matrix of a weight is: "matrix", "convolution" or "experts"."""
    if len(shape) < 3:
        return "matrix"
    return guessed_form(shape) if kind is None or kind.form == "vector" else kind.form


def matrix_axis(shape: Sequence[int], kind: Kind | None, dim: int) -> int | None:
    """Return the axis of a weight's matrices that a dimension of it lies along; None: of experts it
    is their number.
    """
    if form_of(shape, kind) == "experts":
        axis = dim - len(shape) + 2
        return axis if axis >= 0 else None
    return min(dim, 1)
