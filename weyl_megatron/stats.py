"""What a step says of every matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class MatrixStats(NamedTuple):
    """What the last step did to one matrix; the same on every rank.

    Where ``certified``, no σ₁ was measured, because the bounds that stand in their places prove
    that the clip is inactive: ``sigma_weight`` is a lower bound, ``sigma_update`` an upper one,
    ‖U‖_F.
    """

    sigma_weight: float  #: σ₁(W) before the step
    sigma_update: float  #: σ₁(U) of the update U = M̂ / (√V̂ + ε)
    lr: float  #: the rate α_W that was used; of a projected update ‖update‖_F / ‖U‖_F
    clipped: bool  #: whether the update α U was too large
    tau: float  #: the threshold τ that held for this matrix
    certified: bool = False  #: whether the certificate settled the matrix, without an iteration
    #: where clip is "project": how many singular values of the update were clipped
    directions: int | None = None
    share: float | None = None  #: likewise, ‖update‖_F / ‖α U‖_F
    unseen: float | None = None  #: likewise, the factor on what the vectors do not see of α U
    update_norm: float = 0.0  #: ‖U‖_F
    #: α_W ‖U‖_F / ‖W‖_F after the step; None where there was no update, or ``spike`` is not set
    update_ratio: float | None = None


def entries(
    names: Sequence[str],
    columns: Sequence[Tensor],
    projected: Sequence[int],
    norm: Tensor,
    squares: Tensor | None,
) -> dict[str, MatrixStats]:
    """Return what a step says, by the matrix's name.

    Args:
        names: of the matrices.
        columns: the first six numbers of every matrix, and the three of projected ones.
        projected: the numbers of these.
        norm, squares: ‖U‖_F and Σ w² of every matrix, None where that is not known.
    """
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    norms, ratios = norm.tolist(), [None] * len(names)
    if squares is not None:
        ratios = (columns[2] * norm / squares.sqrt()).tolist()
    is_projected = set(projected)
    return {
        name: MatrixStats(*rows[k][: 9 if k in is_projected else 6])._replace(
            update_norm=norms[k], update_ratio=ratios[k] if norms[k] else None
        )
        for k, name in enumerate(names)
    }
