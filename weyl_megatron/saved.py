"""The power vectors in a state dict, so that a run that is resumed goes on bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any

import torch

from weyl_megatron.walk import Carried, Walk

#: Where a state dict holds the vectors: in its first parameter group, because formats know what is in ``state``.
KEY = "adamw2_power"


class SavedVectors:
    """What a state dict brought of matrices that have not been stepped since, by the matrix's name."""

    def __init__(self) -> None:
        self._pending: dict[str, Carried] = {}

    def take(self, groups: Iterable[MutableMapping[str, Any]]) -> bool:
        """Take out of parameter groups what a state dict left there; return whether anything was."""
        records = [record for group in groups for record in group.pop(KEY, ())]
        if records:
            self.clear()
        for record in records:
            bounds = map(list, zip(*record["bounds"], strict=True))
            for name, *of_matrix in zip(record["matrices"], record["blocks"], bounds, strict=True):
                self._pending[name] = Carried(record["step"], *of_matrix)
        return bool(records)

    def clear(self) -> None:
        """Drop what was taken."""
        self._pending.clear()

    def give(self, walk: Walk, steps: float) -> None:
        """Give a walk, ``steps`` steps of which are done, what was saved of its matrices."""
        names = [name for name in walk.names if name in self._pending]
        saved = {name: self._pending.pop(name) for name in names}
        # Another optimizer, which does not know them, may have passed the vectors on in its own checkpoints.
        if {one.step for one in saved.values()} == {steps}:
            walk.carry_on(saved)

    def records(self, walks: Iterable[tuple[Walk, float]]) -> list[dict[str, Any]]:
        """Return, for a state dict, what the next step of each walk takes from its last, and what is still pending.

        Args:
            walks: with the number of steps done.
        """
        done, found = 0.0, []
        for walk, steps in walks:
            done = max(done, steps)
            if (of_walk := walk.carried()) is not None:
                found.append({**of_walk, "step": steps})
        for steps in sorted({one.step for one in self._pending.values() if one.step >= done}):
            pending = {name: one for name, one in self._pending.items() if one.step == steps}
            found.append({**_columns(list(pending), list(pending.values())), "step": steps})
        return found


def _columns(names: list[str], saved: Sequence[Carried]) -> dict[str, Any]:
    """Return matrices as :meth:`Walk.carried` does."""
    bounds = [torch.stack(column) for column in zip(*(one.bounds for one in saved), strict=True)]
    return {"matrices": names, "blocks": [one.blocks for one in saved], "bounds": bounds}
