"""Sums over process groups of vectors that lie side by side in one buffer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Span(NamedTuple):
    """``buffer[start:stop]`` belongs to matrices that are spread over ``groups``."""

    groups: tuple[ProcessGroup, ...]
    start: int
    stop: int


def all_reduce_spans(buffer: Tensor, spans: Sequence[Span]) -> None:
    """Sum every span over each of its groups, in place, with one collective per group."""
    start_all_reduce(buffer, spans)()


def start_all_reduce(buffer: Tensor, spans: Sequence[Span]) -> Callable[[], None]:
    """Begin to sum every span over each of its groups, in place; the function that is returned ends
    it.

    One collective per group. That of the first group runs while the caller computes; until the end
    the spans must be left alone.
    """
    spans = [span for span in spans if span.start < span.stop]
    groups = list(dict.fromkeys(group for span in spans for group in span.groups))
    if not groups:
        return lambda: None
    finish_first = _start(buffer, spans, groups[0])

    def finish() -> None:
        finish_first()
        for group in groups[1:]:
            _start(buffer, spans, group)()

    return finish


def _start(buffer: Tensor, spans: Sequence[Span], group: ProcessGroup) -> Callable[[], None]:
    """Begin one collective over what belongs to ``group``, through the device that its backend
    works on.
    """
    runs: list[tuple[int, int]] = []
    for span in spans:
        if group in span.groups:
            if runs and runs[-1][1] == span.start:
                runs[-1] = runs[-1][0], span.stop
            else:
                runs.append((span.start, span.stop))
    parts = [buffer[start:stop] for start, stop in runs]
    device = _collective_device(dist.get_backend(group), buffer.device)
    alone = len(parts) == 1 and device == buffer.device
    joined = parts[0] if alone else torch.cat(parts).to(device)
    work = dist.all_reduce(joined, group=group, async_op=True)

    def finish() -> None:
        if work is not None:  # None on a rank that is not in the group
            work.wait()
        if not alone:
            for part, summed in zip(
                parts, torch.split(joined, [part.numel() for part in parts]), strict=True
            ):
                part.copy_(summed)

    return finish


def _collective_device(backend: str, device: torch.device) -> torch.device:
    """Return where a collective has to run: under CPU offload the tensors are on the CPU, the group
    may be NCCL.
    """
    if backend == "nccl" and device.type == "cpu":
        return torch.device("cuda", torch.cuda.current_device())
    return device
