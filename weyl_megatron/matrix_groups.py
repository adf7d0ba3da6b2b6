"""The groups of matrices that an optimizer steps, kept from step to step, and saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .matrices import MatrixGroup
from .names import ParameterNames
from .packed import pack, unpack
from .saved import SavedVectors
from .settings import Settings, clip_of
from .stats import MatrixStats
from .steady import Gathered, Members
from .thresholds import Thresholds

#: Returns how many steps of some tensors were made.
StepsDone = Callable[[Sequence[Tensor]], float]


class Turn(NamedTuple):
    """What one step works on, on one device: W, as a dense copy where it is not dense, and G, M and
    V.
    """

    group: MatrixGroup
    members: Members
    weights: list[Tensor]
    gathered: Gathered


class MatrixGroups:
    """One :class:`MatrixGroup` for each list of tensors that is stepped together.

    Engines may step one parameter group at a time, and users freeze and thaw: then there are
    several.
    """

    def __init__(self, saved: SavedVectors | None = None) -> None:
        self._groups: dict[tuple[int, ...], MatrixGroup] = {}  # by the ids of the tensors
        self._saved = SavedVectors() if saved is None else saved  # until their group is there

    def __iter__(self) -> Iterator[MatrixGroup]:
        return iter(self._groups.values())

    def group(
        self,
        members: Members,
        thresholds: Thresholds,
        settings: Settings,
        steps_done: StepsDone,
    ) -> MatrixGroup:
        """Return the group of what is stepped together.

        Args:
            members: what that is, on one device.
            thresholds, settings: for a group that is new.
            steps_done: for one that finds its vectors saved.
        """
        adamw = is_adamw(settings, members.groups)
        amsgrad = any(param_group["amsgrad"] for param_group in members.groups)
        key = tuple(map(id, members.tensors))
        group = self._groups.get(key)
        clips = [clip_of(param_group, settings) for param_group in members.groups]
        form = adamw, amsgrad, clips
        if group is None or (group.is_adamw, group.is_amsgrad, group.clips) != form:
            # It takes the place of older ones over some of these tensors, from before others were
            # frozen or thawed.
            self._groups = {
                other: kept for other, kept in self._groups.items() if not set(other) & set(key)
            }
            group = self._groups[key] = MatrixGroup(
                members.buffers,
                thresholds,
                settings.power_iters,
                is_adamw=adamw,
                is_amsgrad=amsgrad,
                param_groups=members.param_groups,
                clips=clips,
            )
        if self._saved.is_pending:
            self._saved.give(group, steps_done(group.tensors))
        return group

    def clear(self) -> None:
        """Drop the groups: what lies in the tensors was read anew."""
        self._groups = {}

    def forget(self) -> None:
        """Have every group measure afresh at its next step, and drop what was saved."""
        self._saved.clear()
        for group in self:
            group.forget()

    def stats(self) -> dict[str, MatrixStats]:
        """Return what the last steps did, by the matrix's name."""
        return {name: entry for group in self for name, entry in group.stats().items()}

    def take(self, param_groups: Sequence[MutableMapping[str, Any]]) -> None:
        """Take out of parameter groups what a state dict left there for the groups to come."""
        if self._saved.take(param_groups):
            for group in self:
                group.forget()

    def match(
        self,
        names: ParameterNames,
        were_named: Sequence[bool],
        param_groups: Sequence[Mapping[str, Any]],
        saved_groups: Sequence[Mapping[str, Any]],
    ) -> None:
        """Match parameters by their places, where either side has no names for them.

        Args:
            names: the optimizer's.
            were_named: whether its parameter groups had names before those of a state dict came.
            param_groups: the optimizer's.
            saved_groups: the state dict's.
        """
        if list(were_named) == ["param_names" in saved for saved in saved_groups]:
            self._saved.match([], [])
            return
        saved_names = ParameterNames()
        listed = [saved.get("param_names", ()) for saved in saved_groups]
        saved_names.restore(param_groups, listed)
        self._saved.match(names.listed(), saved_names.listed())

    def take_packed(self, packed: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take what a state dict had in the states of parameters, by the parameter's name."""
        if packed:
            self._saved.take_packed({name: unpack(each) for name, each in packed.items()})
            for group in self:
                group.forget()

    def packed(
        self, steps_done: StepsDone, names: Mapping[int, str]
    ) -> dict[int, dict[str, Tensor]]:
        """Return, for the states of parameters, what the next step takes from the last ones.
        Collective over the groups of the matrices.

        Args:
            steps_done: see above.
            names: of the parameters, by ``id``.
        """
        matrices = {number: self._saved.packed(name) for number, name in names.items()}
        for group in self:
            if not group.is_adamw:
                for number, of_tensor in group.saved_by_tensor(steps_done(group.tensors)).items():
                    matrices[number] = matrices.get(number) or of_tensor
        return {number: pack(each) for number, each in matrices.items() if each}

    def records(self, steps_done: StepsDone) -> list[dict[str, Any]]:
        """Return, for a state dict, what the next step takes from the last ones."""
        return self._saved.records((group, steps_done(group.tensors)) for group in self)

    def copied(self, steps_done: StepsDone) -> SavedVectors:
        """Return what a copy of the optimizer takes on, which has no groups yet."""
        return self._saved.with_groups((group, steps_done(group.tensors)) for group in self)


def is_adamw(settings: Settings, param_groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every τ is infinite."""
    taus = [param_group["tau"] for param_group in param_groups]
    return not settings.overrides and all(tau == float("inf") for tau in taus)
