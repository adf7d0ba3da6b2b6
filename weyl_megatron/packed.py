"""The power vectors in the state of their parameters, for ``torch.distributed.checkpoint``.

It knows parameters by their names and drops, or repeats for every parameter, what else is in their
groups, so that a run could not go on exactly at another number of ranks. Of every parameter that
has matrices its state then has two plain tensors more, alike on all ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .matrices import SavedMatrix
from .settings import VECTORS
from .spectral.power import BLOCK

#: The keys in a state: the blocks of all matrices, and zeros, so that a checkpoint of one ``clip``
#: has the size that the other expects; and the step, how many matrices these are, the lengths of
#: their blocks, and the certificate's numbers.
KEYS = ("adamw2_vectors", "adamw2_bounds")

#: What keeps a state dict by parameters' names, and its function that calls ``step`` to have the
#: state made: torch, and torchtitan from 0.3 on.
_MODULES = {
    "torch.distributed.checkpoint.state_dict": "_init_optim_state",
    "torchtitan.components.optimizer.utils": "init_optim_state",
}

#: Frames between torch's function and ours: hooks, schedulers and wrappers of step.
_DEEPEST = 16


def is_asking(*, is_initializing: bool = False) -> bool:
    """Whether ``torch.distributed.checkpoint`` is calling, on all ranks that share a matrix.

    Args:
        is_initializing: the function that has the state made, and no other.
    """
    frame = sys._getframe(1)
    for _ in range(_DEEPEST):
        if frame.f_back is None:
            return False
        frame = frame.f_back
        function = _MODULES.get(frame.f_globals.get("__name__", ""))
        if function is not None:
            return not is_initializing or frame.f_code.co_name == function
    return False


def is_initializing() -> bool:
    """Whether ``torch.distributed.checkpoint`` calls ``step``, with gradients of zero, to have the
    state made.
    """
    # In this order: thousands of modules are imported, and every step asks.
    is_imported = any(module in sys.modules for module in _MODULES)
    return is_imported and is_asking(is_initializing=True)


def pack(matrices: Sequence[SavedMatrix]) -> dict[str, Tensor]:
    """Return what a parameter's state has of its matrices."""
    blocks = [block.flatten() for matrix in matrices for block in matrix.blocks]
    bounds = [bound.double() for matrix in matrices for bound in matrix.bounds]
    header = [matrices[0].step, len(matrices), *(block.numel() for block in blocks)]
    numbers = torch.tensor(header, dtype=torch.float64, device=bounds[0].device)
    missing = (  # of U's vectors, of which W's tell the length
        of_weight.numel() // BLOCK * VECTORS - of_update.numel()
        for of_weight, of_update in zip(blocks[::2], blocks[1::2], strict=True)
    )
    padding = blocks[0].new_zeros(sum(max(0, count) for count in missing))
    vectors = torch.cat([*blocks, padding])
    return dict(zip(KEYS, (vectors, torch.cat([numbers, torch.stack(bounds)])), strict=True))


def unpack(packed: Mapping[str, Tensor]) -> list[SavedMatrix]:
    """Return the matrices that :func:`pack` packed; none where it is not that."""
    vectors, numbers = (packed[key].detach() for key in KEYS)
    if numbers.numel() < 2:
        return []
    step, count = float(numbers[0]), int(numbers[1])
    if count < 1 or (numbers.numel() - 2) % count:
        return []
    lengths = [int(length) for length in numbers[2 : 2 + 2 * count].tolist()]
    bounds = numbers[2 + 2 * count :]
    if sum(lengths) > vectors.numel() or bounds.numel() % count:
        return []
    blocks = torch.split(vectors[: sum(lengths)], lengths)
    each = bounds.view(count, -1)
    return [
        SavedMatrix(step, list(blocks[2 * k : 2 * k + 2]), list(each[k].unbind()), is_global=True)
        for k in range(count)
    ]


def write(
    state_dict: MutableMapping[str, Any],
    param_groups: Sequence[Mapping[str, Any]],
    state: MutableMapping[Tensor, Any],
    packed: Mapping[int, Mapping[str, Tensor]],
) -> None:
    """Put what :func:`pack` packed into a state dict.

    The optimizer's own state gets empty tensors under these keys: torch asks it for its keys.

    Args:
        state_dict: of the optimizer.
        param_groups, state: the optimizer's.
        packed: by ``id`` of the parameter.
    """
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    tensors = [tensor for group in param_groups for tensor in group["params"]]
    for key, tensor in zip(keys, tensors, strict=True):
        entry = state_dict["state"].get(key)
        if entry is not None and id(tensor) in packed:
            state_dict["state"][key] = {**entry, **packed[id(tensor)]}
            reserve([state[tensor]])


def reserve(states: Iterable[MutableMapping[str, Any]]) -> None:
    """Give the states of parameters the keys."""
    for state in states:
        for key in KEYS:
            state.setdefault(key, torch.empty(0))


def take_out(state: MutableMapping[Any, Any]) -> dict[Any, dict[str, Tensor]]:
    """Take what :func:`pack` packed out of the states of a state dict, whose entries are replaced;
    return it by the keys of these.
    """
    taken = {}
    for key, entry in state.items():
        if isinstance(entry, Mapping) and all(name in entry for name in KEYS):
            taken[key] = {name: entry[name] for name in KEYS}
            state[key] = {name: value for name, value in entry.items() if name not in KEYS}
    return taken


def by_name(
    taken: Mapping[Any, dict[str, Tensor]],
    saved_groups: Sequence[Mapping[str, Any]],
    names: Sequence[Sequence[str]],
) -> dict[str, dict[str, Tensor]]:
    """Return what :func:`take_out` took by the names of the parameters at the same places.

    Args:
        taken: by the keys of the state dict.
        saved_groups: its parameter groups.
        names: of the optimizer's parameters, per group.
    """
    keys = (key for group in saved_groups for key in group["params"])
    listed = (name for group in names for name in group)
    return {name: taken[key] for key, name in zip(keys, listed, strict=False) if key in taken}
