"""What becomes of a step whose gradients are not all finite: one NaN in a moment stays there for good."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from weyl_megatron.layouts.buffers import Buffer

_log = logging.getLogger("weyl_megatron")

#: Names in a message, of those whose gradients are not finite.
_NAMED = 3


class Guard:
    """Decides, on all ranks alike, whether a step is made.

    Where the engine has the norm of all gradients, which every rank knows, it decides, and costs nothing. Elsewhere
    ("skip" or "raise" in plain PyTorch) the gradients are read once more, and ranks that hold pieces of one matrix
    agree.

    Args:
        mode: "skip", "raise" or "off"; None: "skip" where an engine tells the norm, else "off".
        limit: RuntimeError after so many skipped steps in a row; None: never.
    """

    def __init__(self, mode: str | None, limit: int | None) -> None:
        self._mode, self._limit = mode, limit
        self.norm: Callable[[], float | None] | None = None  #: set by an engine's door: of this step's gradients
        self.number: Callable[[], int] | None = None  #: set by an engine's door: of this step, which may be in parts
        self.is_on = mode in ("skip", "raise")  #: also where no engine tells the norm
        self.skipped = 0  #: steps
        self._in_a_row, self._calls = 0, 0
        self._last_skipped, self._last_made = -1, -1

    @torch.no_grad()
    def admits(self, buffers: Sequence[Buffer]) -> bool:
        """Return whether the step on the gradients of ``buffers`` is to be made. Collective where no engine tells.

        Raises:
            FloatingPointError: it is not, and the mode is "raise".
            RuntimeError: it is not, as often in a row as the limit says.
        """
        norm = None if self.norm is None else self.norm()
        if self._mode == "off" or (self._mode is None and norm is None):
            return True
        self._calls += 1
        step = self._calls if self.number is None else self.number()
        # DeepSpeed has -1 for the norm of what is not finite.
        if 0 <= norm < math.inf if norm is not None else _agreed(not non_finite(buffers), buffers):
            if step not in (self._last_made, self._last_skipped):
                self._in_a_row, self._last_made = 0, step
            return True
        self.refuse(non_finite(buffers), step)
        return False

    def refuse(self, names: Sequence[str], step: int) -> None:
        """Count and log a step that is not made, because of ``names`` on this rank or of others elsewhere.

        Raises:
            FloatingPointError: the mode is "raise".
            RuntimeError: so many in a row as the limit says.
        """
        whose = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
        sentence = f"the gradient of {whose or 'a parameter on another rank'} is not finite"
        if self._mode == "raise":
            raise FloatingPointError(f"AdamW2: {sentence}; with nonfinite='skip' the step would be skipped.")
        if step != self._last_skipped:
            self.skipped, self._in_a_row, self._last_skipped = self.skipped + 1, self._in_a_row + 1, step
        level = logging.WARNING if names else logging.DEBUG
        _log.log(level, "AdamW2: a step is skipped, number %d in a row: %s", self._in_a_row, sentence)
        if self._limit is not None and self._in_a_row >= self._limit:
            raise RuntimeError(
                f"AdamW2: nonfinite_limit is {self._limit}, and as many steps in a row were skipped: {sentence}."
            )


def non_finite(buffers: Sequence[Buffer]) -> list[str]:
    """Return the parameters of which this rank has pieces of the gradient that are not finite."""
    found: dict[str, None] = {}
    for buffer in buffers:
        grad = buffer.tensor.grad
        if grad is None or grad.is_sparse or is_finite(grad):
            continue
        flat = grad.reshape(-1) if grad.is_contiguous() else None
        for shard in buffer.shards:
            piece = grad if flat is None else flat[shard.offset : shard.offset + shard.stop - shard.start]
            if not is_finite(piece):
                found[shard.parameter.name] = None
    return list(found)


def is_finite(tensor: torch.Tensor) -> bool:
    """One read, and nothing that could overflow; NaN is its own least and greatest."""
    return not tensor.numel() or all(bool(bound.isfinite()) for bound in torch.aminmax(tensor))


def _agreed(here: bool, buffers: Sequence[Buffer]) -> bool:
    """Return whether what is so here is so on all ranks that share a matrix. Collective over their groups."""
    groups = dict.fromkeys(
        group
        for buffer in buffers
        for shard in buffer.shards
        for group in (*buffer.groups, *(spread.group for spread in shard.parameter.spreads))
    )
    if not groups:
        return here
    flag = torch.tensor(float(not here), device=buffers[0].tensor.device)
    for group in groups:
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
    return not bool(flag)
