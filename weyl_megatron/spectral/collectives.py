"""Sums over process groups of vectors that lie side by side in one buffer."""

from __future__ import annotations

from collections.abc import Sequence
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
    for group in dict.fromkeys(group for span in spans for group in span.groups):
        runs: list[tuple[int, int]] = []
        for span in spans:
            if group in span.groups:
                if runs and runs[-1][1] == span.start:
                    runs[-1] = runs[-1][0], span.stop
                else:
                    runs.append((span.start, span.stop))
        parts = [buffer[start:stop] for start, stop in runs]
        _all_reduce(parts, group)


def _all_reduce(parts: list[Tensor], group: ProcessGroup) -> None:
    """Sum ``parts`` over ``group`` in one collective, through the device that its backend works on."""
    device = _collective_device(dist.get_backend(group), parts[0].device)
    if len(parts) == 1 and device == parts[0].device:
        dist.all_reduce(parts[0], group=group)
        return
    joined = torch.cat(parts).to(device)
    dist.all_reduce(joined, group=group)
    for part, summed in zip(parts, torch.split(joined, [part.numel() for part in parts]), strict=True):
        part.copy_(summed)


def _collective_device(backend: str, device: torch.device) -> torch.device:
    """Return where a collective has to run: under CPU offload the tensors are on the CPU, the group may be NCCL."""
    if backend == "nccl" and device.type == "cpu":
        return torch.device("cuda", torch.cuda.current_device())
    return device
