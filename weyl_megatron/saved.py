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
        # of whole parameters, whose matrices' names are not known yet
        self._packed: dict[str, list[SavedMatrix]] = {}

    def match(self, names: Sequence[Sequence[str]], saved: Sequence[Sequence[str]]) -> None:
        """Read, and write, each parameter of ``names`` by the name at its place in the saved
        groups.

        As torch matches all other state, so that what was saved without names is found with them,
        and the reverse.
        """
        pairs = (
            pair
            for groups in zip(names, saved, strict=False)
            for pair in zip(*groups, strict=False)
        )
        self._written = {name: written for name, written in pairs if name != written}

    def with_groups(self, groups: Iterable[tuple[MatrixGroup, float]]) -> SavedVectors:
        """Return what a copy of the optimizer takes on, which has no groups yet.

        Args:
            groups: as in :meth:`records`.
        """
        copied = SavedVectors()
        copied._written = dict(self._written)
        copied.take([{KEY: self.records(groups)}])
        return copied

    def take(self, groups: Iterable[MutableMapping[str, Any]]) -> bool:
        """Take out of parameter groups what a state dict left there; return whether anything
        was.
        """
        records = [record for group in groups for record in group.pop(KEY, ())]
        if records:
            self.clear()
        known = {written: name for name, written in self._written.items()}
        for record in records:
            bounds = map(list, zip(*record["bounds"], strict=True))
            for name, *of_matrix in zip(record["matrices"], record["blocks"], bounds, strict=True):
                self._pending[_renamed(name, known)] = SavedMatrix(record["step"], *of_matrix)
        return bool(records)

    def take_packed(self, packed: Mapping[str, list[SavedMatrix]]) -> None:
        """Take the matrices of parameters, by the parameter's name, in the parameter's order."""
        self.clear()
        self._packed = dict(packed)

    def packed(self, name: str) -> list[SavedMatrix]:
        """Return what :meth:`take_packed` took of a parameter and no step has used yet."""
        return self._packed.get(name, [])

    @property
    def is_pending(self) -> bool:
        """Whether anything waits for its matrix."""
        return bool(self._pending or self._packed)

    def clear(self) -> None:
        """Drop what was taken."""
        self._pending.clear()
        self._packed.clear()

    def give(self, group: MatrixGroup, steps: float) -> None:
        """Give a group, ``steps`` steps of which are done, what was saved of its matrices."""
        for parameter, matrices in group.names_by_parameter().items():
            packed = self._packed.pop(parameter, [])
            if len(packed) == len(matrices):
                self._pending |= zip(matrices, packed, strict=True)
        names = [name for name in group.names if name in self._pending]
        saved = {name: self._pending.pop(name) for name in names}
        # Another optimizer, which does not know them, may have passed the vectors on in its own
        # checkpoints.
        if {matrix.step for matrix in saved.values()} == {steps}:
            group.restore(saved)

    def records(self, groups: Iterable[tuple[MatrixGroup, float]]) -> list[dict[str, Any]]:
        """Return, for a state dict, what the next step of each group takes from its last, and what
        is still pending.

        Args:
            groups: with the number of steps done.
        """
        done, records = 0.0, []
        for group, steps in groups:
            done = max(done, steps)
            if (record := group.saved()) is not None:
                records.append({**record, "step": steps})
        later = {matrix.step for matrix in self._pending.values() if matrix.step >= done}
        for steps in sorted(later):
            pending = {
                name: matrix for name, matrix in self._pending.items() if matrix.step == steps
            }
            records.append({**_columns(pending), "step": steps})
        for record in records:
            record["matrices"] = [_renamed(name, self._written) for name in record["matrices"]]
        return records


def write(
    vectors: list[dict[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    written: Sequence[MutableMapping[str, Any]],
) -> None:
    """Put what :meth:`SavedVectors.records` returned into a state dict's parameter groups.

    Args:
        vectors: the records.
        groups: the optimizer's.
        written: the state dict's.
    """
    for group, each in zip(groups, written, strict=True):
        if group is groups[0]:  # it may be there twice, and is written alike
            each[KEY] = vectors


def _renamed(matrix: str, names: Mapping[str, str]) -> str:
    """Return a matrix's name with its parameter's, which is all before a bracket, replaced."""
    parameter, bracket, part = matrix.partition("[")
    return names.get(parameter, parameter) + bracket + part


def _columns(saved: Mapping[str, SavedMatrix]) -> dict[str, Any]:
    """Return matrices as :meth:`MatrixGroup.saved` does."""
    bounds = zip(*(matrix.bounds for matrix in saved.values()), strict=True)
    return {
        "matrices": list(saved),
        "blocks": [matrix.blocks for matrix in saved.values()],
        "bounds": [torch.stack(column) for column in bounds],
    }
