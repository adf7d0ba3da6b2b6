"""Says when an engine trains with another optimizer than the AdamW2 that was made for its
parameters.

Engines put other optimizers in the place of the one they are given, or never call it. What they do
in no version that is known is refused where it is known (:mod:`.deepspeed.construction`); this is
for the rest.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..environment import LOG
from ..layouts.local import is_on_mesh

_OPTIONS = ("lr", "betas", "eps", "weight_decay", "tau")


@dataclass(frozen=True, eq=False)
class _Made:
    """An AdamW2 that was made, which the engine may have dropped since."""

    params: tuple[weakref.ReferenceType[Tensor], ...]
    options: Mapping[str, Any]


#: What was made and not stepped so far. Nothing here keeps an optimizer or a parameter alive.
_unstepped: list[_Made] = []
_made_of: weakref.WeakKeyDictionary[torch.optim.Optimizer, _Made] = weakref.WeakKeyDictionary()

#: Engines whose first step was looked at.
_seen: weakref.WeakSet[Any] = weakref.WeakSet()


def note_made(optimizer: torch.optim.Optimizer) -> None:
    """Remember an AdamW2, with the parameters that it has now, but for DTensors, which no engine
    puts others in the place of and which take no weak reference (see ``remembered``).
    """
    listed = (param for group in optimizer.param_groups for param in group["params"])
    params = (param for param in listed if not is_on_mesh(param))
    made = _Made(
        tuple(map(weakref.ref, params)), {key: optimizer.defaults[key] for key in _OPTIONS}
    )
    _unstepped[:] = [
        other for other in _unstepped if any(ref() is not None for ref in other.params)
    ]
    _unstepped.append(made)
    _made_of[optimizer] = made


def note_stepped(optimizer: torch.optim.Optimizer) -> None:
    """Forget an AdamW2 that is being stepped."""
    made = _made_of.pop(optimizer, None)
    if made in _unstepped:
        _unstepped.remove(made)


def look(engine: Any, params: Iterable[Tensor], stepped: object) -> None:
    """Log an error, once, where an AdamW2 of some of ``params`` was not stepped in the first step
    of ``engine``.

    An AdamW2 with the same options as one that is stepped in its place is none: it was made anew.

    Args:
        engine: has just made a step.
        params: the parameters that it trains.
        stepped: the optimizer that it stepped.
    """
    if not _unstepped or engine in _seen:
        return
    _seen.add(engine)
    held = {id(param) for param in params}
    waiting = [made for made in _unstepped if any(id(ref()) in held for ref in made.params)]
    _unstepped[:] = [made for made in _unstepped if made not in waiting]
    options = {key: getattr(stepped, "defaults", {}).get(key) for key in _OPTIONS}
    if any(made.options != options for made in waiting) and not (
        dist.is_initialized() and dist.get_rank()
    ):
        kind = type(stepped)
        LOG.error(
            "AdamW2: an AdamW2 was made for parameters of this model, but %s does not step it: its "
            "first step was that of %s.%s. Engines take it by its name in their configuration or "
            "by their own argument for an optimizer; where that is how it was given, this engine "
            "put another in its place.",
            type(engine).__name__,
            kind.__module__,
            kind.__name__,
        )
