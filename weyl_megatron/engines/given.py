"""An engine whose layout is known beforehand: of your own trainer, a benchmark or a test."""

from __future__ import annotations

from collections.abc import Callable

from ..layouts.buffers import Layout
from ..moments import Dtypes
from ..nonfinite import Guard
from .engine import Known


class GivenLayout:
    """See :class:`weyl_megatron.engines.engine.Engine`; ``optimizer.engine = GivenLayout(read)``.

    Args:
        read: returns what lies where in the tensors that the optimizer steps.
        counts_in_groups: whether steps are counted in the parameter groups.

    Example::

        parameter = Parameter("w", (8, 5))  # of which this rank holds the elements from 20 on
        optimizer.engine = GivenLayout(
            lambda: Layout([Buffer(tensor, (Shard(parameter, 20, 40, 0),), (group,))])
        )
    """

    steps_parameters = False
    moment_dtypes: Dtypes | None = None

    def __init__(self, read: Callable[[], Layout], *, counts_in_groups: bool = False) -> None:
        self._read = read
        self.counts_in_groups = counts_in_groups

    def is_constructing(self) -> bool:
        return False

    def read_layout(self, _: Known) -> Layout:
        return self._read()

    def give_norm(self, guard: Guard) -> None:
        """It has none."""
