"""Parameters as a model has them: whole on every rank (plain torch, DDP), or DTensors (FSDP2, HSDP,
tensor parallelism).
"""

from __future__ import annotations

import functools

from ...layouts.buffers import Layout
from ...layouts.local import specification
from ...layouts.plain import mesh_buffer, plain_buffer, why_foreign
from ...layouts.tensor_parallel import shardings_of
from ...moments import Dtypes
from ...nonfinite import Guard
from ..engine import Known, register
from .dtensor import placed
from .replaced import refuse_replaced
from .stages import gathered, refuse_partition


class PlainTorch:
    """See :class:`weyl_megatron.engines.engine.Engine`."""

    steps_parameters = True
    counts_in_groups = False
    moment_dtypes: Dtypes | None = None

    def is_constructing(self) -> bool:
        return False

    def read_layout(self, known: Known) -> Layout:
        names = known.names()
        # What torch cannot step either may be in the groups as long as it has no gradient.
        tensors = [
            tensor
            for tensor in known.tensors()
            if tensor.grad is not None or why_foreign(tensor) is None
        ]
        named = [(names[id(tensor)], tensor) for tensor in tensors]
        refuse_replaced([(names[id(tensor)], tensor) for tensor in known.tensors()])
        whole = [(name, tensor) for name, tensor in named if specification(tensor) is None]
        shardings = shardings_of(whole, known.tp_group)
        places = placed(named)
        buffers = [
            mesh_buffer(tensor, name, *places[id(tensor)], known.kinds.get(name))
            if id(tensor) in places
            else plain_buffer(tensor, name, shardings, known.kinds.get(name))
            for name, tensor in named
        ]
        if known.budget_group is None:
            refuse_partition(known.param_groups)
            return Layout(buffers, known.kinds)
        gather = functools.partial(gathered, group=known.budget_group)
        return Layout(buffers, known.kinds, gather=gather)

    def give_norm(self, guard: Guard) -> None:
        """Torch takes no norm on its own."""


def find(_: Known) -> PlainTorch:
    """Return the engine of parameters that no other one holds."""
    return PlainTorch()


register(find=find)
