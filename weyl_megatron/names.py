"""Which name each parameter goes by.

Patterns, start vectors, statistics and checkpoints hang on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.parameter import is_lazy

from .layouts.buffers import model_name
from .layouts.local import remembered


class _Place(NamedTuple):
    """What was put at one place of a parameter group."""

    name: str
    dims: int
    tensor: Callable[[], Tensor | None]  # None: it is no more


def _dims(param: Tensor) -> int:
    """Return how many dimensions a parameter has; -1: a lazy module does not know yet."""
    return -1 if is_lazy(param) else param.dim()


class ParameterNames:
    """The names of the parameters in an optimizer's groups.

    A parameter without a name goes by its place, ``group0.param3``. One that was put in the place
    of another inherits its name. Parameters are not kept alive, DTensors until the next step.
    """

    def __init__(self) -> None:
        self._places: list[list[_Place]] = []  # per parameter group

    def add(self, params: Sequence[Tensor], names: Sequence[str | None]) -> None:
        """Take the parameters of one more group, in order; a name of None is none."""
        number = len(self._places)
        taken = {place.name for group in self._places for place in group}
        group: list[_Place] = []
        for position, (param, given) in enumerate(zip(params, names, strict=True)):
            place = f"group{number}.param{position}"
            name = place if given is None else model_name(given)
            # Two models of one optimizer may have a name in common; patterns end alike.
            for longer in (f"group{number}.{name}", f"{place}.{name}"):
                name = longer if name in taken else name
            taken.add(name)
            group.append(_Place(name, _dims(param), remembered(param)))
        self._places.append(group)

    def resolve(self, groups: Sequence[Mapping[str, Any]]) -> dict[int, str]:
        """Return the name of every parameter in ``groups`` by ``id``; remember what is there now.

        Raises:
            ValueError: a tensor came that may be several parameters in one, as engines make them.
        """
        known = {id(place.tensor()): place for group in self._places for place in group}
        known.pop(id(None), None)  # of parameters that are no more
        self._places = [
            list(self._resolve_group(number, group, known)) for number, group in enumerate(groups)
        ]
        tensors = (tensor for group in groups for tensor in group["params"])
        names = (place.name for group in self._places for place in group)
        return {id(tensor): name for tensor, name in zip(tensors, names, strict=True)}

    def _resolve_group(
        self, number: int, group: Mapping[str, Any], known: Mapping[int, _Place]
    ) -> Iterator[_Place]:
        params: list[Tensor] = group["params"]
        places = self._places[number] if number < len(self._places) else []
        present = {id(param) for param in params}
        gone = [id(place.tensor()) not in present for place in places]
        taken = {place.name for place in known.values()}
        for position, param in enumerate(params):
            if id(param) in known:
                yield known[id(param)]._replace(dims=_dims(param))
                continue
            is_free = position < len(places) and gone[position]
            may_be_many = param.dim() < 2 and len(params) < len(places)
            if is_free and places[position].dims == param.dim() and not may_be_many:
                yield places[position]._replace(tensor=remembered(param))
                continue
            if any(gone) and param.dim() < 2:  # may be what an engine makes of many
                name = places[gone.index(True)].name
                raise ValueError(
                    f"AdamW2: an engine replaced parameter '{name}' or one beside it by a tensor "
                    f"of shape {tuple(param.shape)}, whose layout AdamW2 does not understand; it "
                    "takes plain parameters, DDP, and the engines of DeepSpeed and Megatron, and "
                    "in the place of a parameter another of as many dimensions."
                )
            name = f"group{number}.param{position}"
            while name in taken:
                name += "+"
            taken.add(name)
            yield _Place(name, param.dim(), remembered(param))

    def known(self) -> dict[int, str]:
        """Return the names of the parameters that were there last, by ``id``."""
        places = (place for group in self._places for place in group)
        return {id(place.tensor()): place.name for place in places if place.tensor() is not None}

    def listed(self) -> list[list[str]]:
        """Return the names per parameter group, as a copy of the optimizer takes them on."""
        return [[place.name for place in group] for group in self._places]

    def restore(self, groups: Sequence[Mapping[str, Any]], listed: Sequence[Sequence[str]]) -> None:
        """Take over what :meth:`listed` returned, for the parameters that are in ``groups`` now."""
        self._places = []
        for group, names in zip(groups, listed, strict=False):
            params = group["params"]
            missing = [None] * max(0, len(params) - len(names))
            self.add(params, [*names[: len(params)], *missing])


def take_names(group: dict[str, Any]) -> list[str] | None:
    """Put tensors in the place of a group's ``(name, parameter)`` pairs; return the names, or None.

    As in torch 2.6 and newer, ``group["param_names"]`` keeps them.

    Raises:
        ValueError: some parameters have names and others have none.
    """
    if isinstance(group["params"], (Tensor, set)):
        return None  # torch has a sentence for a set
    items = group["params"] = list(group["params"])
    if not any(isinstance(item, tuple) for item in items):
        names = group.get("param_names")
        return list(names) if isinstance(names, Sequence) and len(names) == len(items) else None
    if not all(isinstance(item, tuple) for item in items):
        raise ValueError(
            "AdamW2: params got some parameters with names and some without, it takes one or the "
            "other (torch.optim.AdamW: all optimizer params should be with/without names. Some "
            "param names are missing)."
        )
    group["params"], group["param_names"] = [item[1] for item in items], [item[0] for item in items]
    return list(group["param_names"])
