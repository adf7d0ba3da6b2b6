"""The spikes of a run's optimizers, of all ranks, as they come to the one that writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..optimizer import AdamW2
from ..spikes import Jump, Spike, worst_first


class Told(NamedTuple):
    """A spike, at a step of the run."""

    step: int  #: of all steps, those that were not made among them
    action: str
    jumps: dict[str, Jump]

    def record(self) -> dict[str, Any]:
        """Return it as a line of ``stability.jsonl`` has it, the worst first."""
        return {
            "event": "spike",
            "step": self.step,
            "action": self.action,
            "matrices": [
                {"name": jump.name, "norm": jump.norm, "usual": jump.usual, "z": jump.z}
                for jump in worst_first(self.jumps.values())
            ],
        }

    def sentence(self) -> str:
        """Return what jumped most, for an alert."""
        worst = worst_first(self.jumps.values())[0]
        more = f" and {len(self.jumps) - 1} more" if len(self.jumps) > 1 else ""
        what = "is skipped" if self.action == "skip" else "is made"
        return (
            f"a step {what}: {worst.name} {worst.norm / worst.usual:.1f} times its usual "
            f"{worst.usual:.3g}, z {worst.z:.0f}{more}"
        )


class NewSpikes:
    """Tells each spike once."""

    def __init__(self) -> None:
        self._told: dict[int, Spike] = {}  # the last that was told, by id of the optimizer

    def take(self, optimizers: Sequence[torch.optim.Optimizer]) -> list[Told]:
        """Return this rank's spikes since the last call."""
        new: list[Told] = []
        for optimizer in optimizers:
            spikes = optimizer.spikes if isinstance(optimizer, AdamW2) else []
            last = self._told.get(id(optimizer))
            first = 1 + next((k for k, spike in enumerate(spikes) if spike is last), -1)
            new += [Told(s.step + s.skipped, s.action, dict(s.jumps)) for s in spikes[first:]]
            if spikes:
                self._told[id(optimizer)] = spikes[-1]
        return new


def together(ranks: Sequence[Sequence[Told]]) -> list[Told]:
    """Return the spikes of all ranks by their steps: what several saw is one."""
    spikes: dict[tuple[int, str], dict[str, Jump]] = {}
    for told in ranks:
        for step, action, jumps in told:
            spikes.setdefault((step, action), {}).update(jumps)
    return [Told(step, action, jumps) for (step, action), jumps in sorted(spikes.items())]
