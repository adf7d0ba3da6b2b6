"""Parameters as a model has them: plain torch and DDP, every parameter whole on every rank."""

from __future__ import annotations

from ...layouts.buffers import Layout
from ...layouts.plain import plain_buffer, why_foreign
from ...layouts.tensor_parallel import shardings_of
from ...nonfinite import Guard
from ..engine import Known, register


class PlainTorch:
    """See :class:`weyl_megatron.engines.engine.Engine`."""

    steps_parameters = True
    counts_in_groups = False

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
        shardings = shardings_of(named, known.tp_group)
        buffers = [
            plain_buffer(tensor, name, shardings, known.kinds.get(name)) for name, tensor in named
        ]
        return Layout(buffers, known.kinds)

    def give_norm(self, guard: Guard) -> None:
        """Torch takes no norm on its own."""


def find(_: Known) -> PlainTorch:
    """Return the engine of parameters that no other one holds."""
    return PlainTorch()


register(find=find)
