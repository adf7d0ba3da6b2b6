"""What the optimizer asks of an engine, and where engines say that they are there.

An engine is one folder beside this file. One that builds the optimizer, or builds something around
it, sets ``optimizer.engine``. The others register a function here that looks at the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ..layouts.buffers import Layout
from ..layouts.kinds import Kind
from ..moments import Dtypes
from ..nonfinite import Guard
from . import unstepped

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: What registers itself as it is imported; other engines are enabled by their users.
_ADAPTERS = ("torch.plain", "torch.accelerate", "deepspeed.construction")


@dataclass(frozen=True)
class Known:
    """What the optimizer itself knows of its parameters, for an engine that knows no more.

    Args:
        param_groups: as they are now.
        names: returns the name of every parameter in them, by ``id``.
        kinds: what parameters are to their modules, by name, where a model was shown.
        tp_group: the user's process group of tensor-parallel parameters.
        budget_group: the user's process group of ranks that have other parameters.
    """

    param_groups: Sequence[Mapping[str, Any]]
    names: Callable[[], Mapping[int, str]]
    kinds: Mapping[str, Kind]
    tp_group: ProcessGroup | None
    budget_group: ProcessGroup | None = None

    def tensors(self) -> list[Tensor]:
        """Return what is in the parameter groups."""
        return [tensor for group in self.param_groups for tensor in group["params"]]


class Engine(Protocol):
    """What holds the optimizer's parameters while it trains."""

    #: Whether it has the optimizer step the model's own parameters, which users may freeze, add and
    #: move between steps; else these are tensors of its own, which stay.
    steps_parameters: bool

    #: Whether steps are counted in the parameter groups, where FusedAdam has its count.
    counts_in_groups: bool

    #: What M and V are kept in where the user does not say; None: their weights' dtypes.
    moment_dtypes: Dtypes | None

    def is_constructing(self) -> bool:
        """Whether the engine is calling ``step`` while it is built: only the state is made then."""

    def read_layout(self, known: Known) -> Layout:
        """Return what lies where in the tensors that are stepped. Collective over their groups.

        Raises:
            ValueError: it holds them in a way that is not understood.
        """

    def give_norm(self, guard: Guard) -> None:
        """Let ``guard`` read the norm of all gradients, where the engine has it before it steps."""


def user_groups(tp_group: Any, budget_group: Any) -> tuple[Any, Any]:
    """Return the process groups that the user gave, for :class:`Known`.

    Raises:
        ValueError: what is to share a budget is no process group, or one without this rank.
    """
    is_group = dist.is_available() and isinstance(budget_group, dist.ProcessGroup)
    if budget_group is not None and not is_group:
        raise ValueError(
            f"AdamW2: budget_group got {budget_group!r}, it takes a process group that this rank "
            "is in."
        )
    return tp_group, budget_group


_finders: list[Callable[[Known], Engine | None]] = []
_preparations: list[Callable[[Optimizer], None]] = []


def register(
    *,
    find: Callable[[Known], Engine | None] | None = None,
    prepare: Callable[[Optimizer], None] | None = None,
) -> None:
    """Add an engine.

    Args:
        find: returns the engine where it holds the parameters, else None; what was registered last
            is asked first.
        prepare: is called with every AdamW2 that is made, before an engine may get it.
    """
    if find is not None:
        _finders.insert(0, find)
    if prepare is not None:
        _preparations.append(prepare)


def find(known: Known) -> Engine:
    """Return the engine that holds the parameters; PyTorch holds those that no other does."""
    _load()
    return next(engine for look in _finders if (engine := look(known)) is not None)


def note_made(optimizer: Optimizer) -> None:
    """Let engines make ready for an AdamW2 that was just made."""
    _load()
    unstepped.note_made(optimizer)
    for prepare in _preparations:
        prepare(optimizer)


def note_stepped(optimizer: Optimizer) -> None:
    """Note that an AdamW2 is being stepped: no engine has put another in its place."""
    unstepped.note_stepped(optimizer)


def _load() -> None:
    for adapter in _ADAPTERS:
        import_module(f".{adapter}", __package__)
