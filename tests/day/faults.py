"""Faults to plant, which the search has to find."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from weyl_megatron.kernels.cpu import CpuKernel
from weyl_megatron.tensors import SteppedTensors


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _unchecked() -> None:
    """Kernels are handed the addresses of whatever lies in the state."""
    for name in ("check_form", "check_loaded"):
        owners = [
            module
            for key, module in sys.modules.items()
            if key.startswith("weyl_megatron") and name in vars(module)
        ]
        assert owners, name
        for owner in owners:
            setattr(owner, name, _nothing)


def _kept_addresses() -> None:
    """The kernel goes by the addresses of the first step."""
    bind = CpuKernel.bind

    def once(self: CpuKernel, weights: Any, stepped: Any) -> None:
        if all(stepped) and not hasattr(self, "was_bound"):
            bind(self, weights, stepped)
            self.was_bound = True  # type: ignore[attr-defined]

    CpuKernel.bind = once  # type: ignore[method-assign]


def _old_layout() -> None:
    """What was learnt of the tensors at the first step is held to be so for ever."""
    SteppedTensors.have_changed = lambda self, groups, share_a_budget: False  # type: ignore[method-assign]


class Fault(NamedTuple):
    """What to break, and what the search then has to say."""

    plant: Callable[[], None]
    seen: str


FAULTS = {
    "kernels without their check": Fault(_unchecked, "signal SIG|foreign memory was"),
    "a kernel that keeps addresses": Fault(_kept_addresses, "signal SIG|foreign memory was"),
    "a layout that is read once": Fault(_old_layout, "is not AdamW's"),
}


def plant(name: str) -> None:
    """Plant a fault in this process; none where the name is empty."""
    if name:
        FAULTS[name].plant()
