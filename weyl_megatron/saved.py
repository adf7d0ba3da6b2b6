"""The power vectors in a state dict, so that a run that is resumed goes on bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch

from .matrices import MatrixGroup, SavedMatrix

#: Where a state dict holds the vectors: in its first parameter group, because formats know what is
#: in ``state``.
KEY = "adamw2_power"


class SavedVectors:
    """What a state dict brought of matrices that have not been stepped since, by the matrix's name.

    In a file a parameter may have another name than here: see :meth:`match`.
    """

    def __init__(self) -> None:
        self._pending: dict[str, SavedMatrix] = {}
        self._written: dict[str, str] = {}  # the parameter's name in files, where it is not ours

    def match(self, ours: Sequence[Sequence[str]], saved: Sequence[Sequence[str]]) -> None:
        """Read, and write, each of our parameters by the name of the one at its place in the saved
        groups.

        As torch matches all other state, so that what was saved without names is found with them,
        and the reverse.
        """
        pairs = (
            pair for groups in zip(ours, saved, strict=False) for pair in zip(*groups, strict=False)
        )
        self._written = {name: written for name, written in pairs if name != written}

    def with_matrix_groups(
        self, matrix_groups: Iterable[tuple[MatrixGroup, float]]
    ) -> SavedVectors:
        """Return what a copy of the optimizer takes on, which has no matrix_groups yet; ``matrix_groups`` as in
        :meth:`records`.
        """
        copied = SavedVectors()
        copied._written = dict(self._written)
        copied.take([{KEY: self.records(matrix_groups)}])
        return copied

    def take(self, groups: Iterable[MutableMapping[str, Any]]) -> bool:
        """Take out of parameter groups what a state dict left there; return whether anything
        was.
        """
        records = [record for group in groups for record in group.pop(KEY, ())]
        if records:
            self.clear()
        names = {written: name for name, written in self._written.items()}
        for record in records:
            bounds = map(list, zip(*record["bounds"], strict=True))
            for name, *of_matrix in zip(record["matrices"], record["blocks"], bounds, strict=True):
                self._pending[_renamed(name, names)] = SavedMatrix(record["step"], *of_matrix)
        return bool(records)

    @property
    def is_pending(self) -> bool:
        """Whether anything waits for its matrix."""
        return bool(self._pending)

    def clear(self) -> None:
        """Drop what was taken."""
        self._pending.clear()

    def give(self, matrix_group: MatrixGroup, steps: float) -> None:
        """Give a group, ``steps`` steps of which are done, what was saved of its matrices."""
        names = [name for name in matrix_group.names if name in self._pending]
        saved = {name: self._pending.pop(name) for name in names}
        # Another optimizer, which does not know them, may have passed the vectors on in its own
        # checkpoints.
        if {one.step for one in saved.values()} == {steps}:
            matrix_group.restore(saved)

    def records(self, matrix_groups: Iterable[tuple[MatrixGroup, float]]) -> list[dict[str, Any]]:
        """Return, for a state dict, what the next step of each matrix_group takes from its last, and what
        is still pending.

        Args:
            matrix_groups: with the number of steps done.
        """
        done, found = 0.0, []
        for matrix_group, steps in matrix_groups:
            done = max(done, steps)
            if (record := matrix_group.saved()) is not None:
                found.append({**record, "step": steps})
        for steps in sorted({one.step for one in self._pending.values() if one.step >= done}):
            pending = {name: one for name, one in self._pending.items() if one.step == steps}
            found.append({**_columns(list(pending), list(pending.values())), "step": steps})
        for record in found:
            record["matrices"] = [_renamed(name, self._written) for name in record["matrices"]]
        return found


def _renamed(matrix: str, names: Mapping[str, str]) -> str:
    """Return a matrix's name with its parameter's, which is all before a bracket, replaced."""
    parameter, bracket, part = matrix.partition("[")
    return names.get(parameter, parameter) + bracket + part


def _columns(names: list[str], saved: Sequence[SavedMatrix]) -> dict[str, Any]:
    """Return matrices as :meth:`MatrixGroup.carried` does."""
    bounds = [torch.stack(column) for column in zip(*(one.bounds for one in saved), strict=True)]
    return {"matrices": names, "blocks": [one.blocks for one in saved], "bounds": bounds}
