"""What becomes of a step whose gradients are not all finite: one NaN in a moment stays there for
good.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from .environment import LOG
from .layouts.buffers import Buffer
from .layouts.local import local_gradient

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: Names in a message, of those whose gradients are not finite.
_NAMED = 3


class Guard:
    """Decides, on all ranks alike, whether a step is made.

    Where the engine has the norm of all gradients, which every rank knows, it decides, and costs
    nothing. Elsewhere ("skip" or "raise" in plain PyTorch) the gradients are read once more, ranks
    that hold pieces of one matrix agree, and the host waits once for their device. Whose gradient
    it was is only looked for once a step is refused.

    Args:
        mode: "skip", "raise" or "off"; None: "skip" where an engine tells the norm, else "off".
        limit: RuntimeError after so many skipped steps in a row; None: never.
        others: ranks that have other parameters of the same model, where the user named them.
    """

    def __init__(
        self, mode: str | None, limit: int | None, others: ProcessGroup | None = None
    ) -> None:
        self._mode, self._limit, self.others = mode, limit, others
        #: given by an engine: returns the norm of this step's gradients
        self.norm: Callable[[], float | None] | None = None
        #: given by an engine: returns the number of this step, which may be in parts
        self.number: Callable[[], int] | None = None
        #: said by an engine: other parts or ranks of a step know nothing but its norm
        self.needs_norm = False
        self._given: float | None = None  # the user's norm, of the next step alone
        #: of the last step: the norm of all gradients, None where no engine tells it; its number
        self.total: float | None = None
        self.step = 0
        self.is_explicit = mode is not None  #: else an engine's own setting goes before the default
        self.is_on = mode in ("skip", "raise")  #: also where no engine tells the norm
        self.skipped = 0  #: steps
        self._in_a_row, self._calls, self._last_skipped = 0, 0, -1

    @torch.no_grad()
    def admits(self, buffers: Sequence[Buffer]) -> bool:
        """Return whether the step on the gradients of ``buffers`` is to be made. Collective where
        no engine tells.

        Raises:
            FloatingPointError: it is not, and the mode is "raise".
            RuntimeError: it is not, as often in a row as the limit says.
        """
        norm = self.total = self._given if self.norm is None else self.norm()
        self._given = None
        self._calls += 1
        step = self.step = self._calls if self.number is None else self.number()
        if self._mode == "off" or (self._mode is None and norm is None):
            return True
        # DeepSpeed has -1 for the norm of what is not finite.
        if 0 <= norm < math.inf if norm is not None else _agreed(buffers):
            return True
        self.refuse(non_finite(buffers), step)
        return False

    def tell(self, norm: float | Tensor) -> None:
        """Take the norm of the next step's gradients, alike on all ranks, where no engine tells."""
        whole = getattr(norm, "full_tensor", None)  # of what is spread over a mesh
        self._given = float(norm if whole is None else whole())

    def refuse(self, names: Sequence[str], step: int) -> None:
        """Count and log a step that is not made, because of ``names`` on this rank or of others
        elsewhere.

        Raises:
            FloatingPointError: the mode is "raise".
            RuntimeError: so many in a row as the limit says.
        """
        whose = ", ".join(names[:_NAMED]) + (
            f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        )
        sentence = f"the gradient of {whose or 'a parameter on another rank'} is not finite"
        if self._mode == "raise":
            raise FloatingPointError(
                f"AdamW2: {sentence}; with nonfinite='skip' the step would be skipped."
            )
        self.skip(sentence, step, is_named=bool(names))

    def made(self) -> None:
        """Note that the step is made, as far as anybody decides."""
        if self.step != self._last_skipped:
            self._in_a_row = 0

    def skip(self, sentence: str, step: int, *, is_named: bool) -> None:
        """Count and log a step that is not made.

        Args:
            sentence: why.
            step: its number.
            is_named: whether what it was is known here, and not on another rank alone.

        Raises:
            RuntimeError: so many in a row as the limit says.
        """
        if step != self._last_skipped:
            self.skipped, self._in_a_row, self._last_skipped = (
                self.skipped + 1,
                self._in_a_row + 1,
                step,
            )
        level = logging.WARNING if is_named else logging.DEBUG
        LOG.log(
            level, "AdamW2: a step is skipped, number %d in a row: %s", self._in_a_row, sentence
        )
        if self._limit is not None and self._in_a_row >= self._limit:
            raise RuntimeError(
                f"AdamW2: nonfinite_limit is {self._limit}, and as many steps in a row were "
                f"skipped: {sentence}."
            )


def non_finite(buffers: Sequence[Buffer]) -> list[str]:
    """Return the parameters of which this rank has pieces of the gradient that are not finite."""
    names: dict[str, None] = {}
    for buffer in buffers:
        grad = local_gradient(buffer.tensor)
        if grad is None or grad.is_sparse or is_finite(grad):
            continue
        flat = grad.reshape(-1) if grad.is_contiguous() else None
        for shard in buffer.shards:
            piece = (
                grad
                if flat is None
                else flat[shard.offset : shard.offset + shard.stop - shard.start]
            )
            if not is_finite(piece):
                names[shard.parameter.name] = None
    return list(names)


def is_finite(*tensors: Tensor) -> bool:
    """Return whether all elements are finite; the host waits once, however many tensors there
    are.
    """
    devices = sorted({tensor.device for tensor in tensors}, key=lambda device: device.type == "cpu")
    return not devices or not bool(_non_finite_anywhere(tensors, devices[0]))


def _non_finite_anywhere(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Return on ``device``, without a wait, whether an element of a dense tensor is not finite."""
    alike: defaultdict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        if tensor.numel() and not tensor.is_sparse:
            alike[tensor.device, tensor.dtype].append(tensor)
    if not alike:
        return torch.zeros((), dtype=torch.bool, device=device)
    finite = [torch.stack(_bounds(each)).isfinite().all() for each in alike.values()]
    waits = device.type == "cpu"  # or it would read what is not there yet
    return (
        torch.stack([flag.to(device, non_blocking=not waits) for flag in finite])
        .all()
        .logical_not()
    )


def _bounds(tensors: list[Tensor]) -> list[Tensor]:
    """Return numbers that are finite where all elements are, by one read; nothing can overflow.

    NaN is its own least and greatest, and the largest norm.

    Args:
        tensors: of one device and dtype, none of them empty.
    """
    if tensors[0].device.type == "cpu":  # the norm takes 30 times as long there
        return [bound for tensor in tensors for bound in torch.aminmax(tensor)]
    return list(torch._foreach_norm(tensors, math.inf))


def _agreed(buffers: Sequence[Buffer]) -> bool:
    """Return whether gradients are finite on all ranks that share a matrix. Collective over
    these.
    """
    held = [local_gradient(buffer.tensor) for buffer in buffers]
    grads = [grad for grad in held if grad is not None]
    if not _groups_of(buffers):
        return is_finite(*grads)
    flag = _non_finite_anywhere(grads, buffers[0].tensor.device).float()
    return not is_on_any_rank(flag, buffers)


def is_on_any_rank(flag: Tensor, buffers: Sequence[Buffer], *others: ProcessGroup) -> bool:
    """Return whether a flag is not 0 on a rank that shares a matrix, or is in a group of others.
    Collective over these.
    """
    for group in dict.fromkeys((*_groups_of(buffers), *others)):
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
    return bool(flag)


def _groups_of(buffers: Sequence[Buffer]) -> dict[ProcessGroup, None]:
    """Return the groups of ranks that share a matrix, in an order that these have alike."""
    return dict.fromkeys(
        group
        for buffer in buffers
        for shard in buffer.shards
        for group in (*buffer.groups, *(spread.group for spread in shard.parameter.spreads))
    )
