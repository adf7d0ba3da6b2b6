"""What a kernel that forms M by itself is given of matrices whose singular values are clipped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..spectral.blocks import Table
from ..spectral.seen import Seen


class Clipping(NamedTuple):
    """The matrices that are projected, and what the last step did to those whose update broke the
    rule. Vectors of one number per matrix, written in place.
    """

    seen: Seen
    tables: Sequence[Table]  #: per batch, tiles with the places of ``seen``
    is_projected: Tensor  #: bool
    is_whole: Tensor  #: whether a matrix has no more singular values than vectors; bool
    rate: Tensor  #: what multiplies U, float64
    decay: Tensor  #: what multiplies λ W, float64
    unseen: Tensor  #: what is left of the part of α U that the vectors do not see, float64
    share: Tensor  #: ‖update‖_F / ‖α U‖_F, float64
    clipped: Tensor  #: how many singular values were clipped, int64
    is_active: Tensor  #: whether the update was projected, bool

    def clear(self) -> None:
        """Forget what the last step did."""
        for nothing in (self.rate, self.decay, self.clipped, self.is_active):
            nothing.zero_()
        for whole in (self.unseen, self.share):
            whole.fill_(1)
