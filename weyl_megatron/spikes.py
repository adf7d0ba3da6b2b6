"""Updates and gradients that jump: they often do before the loss does, or while it does not."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .environment import LOG
from .matrix_groups import Turn
from .nonfinite import Guard, is_on_any_rank
from .settings import SKIP

#: Steps that a new one is compared with, and how many of them there have to be.
WINDOW, LEAST = 64, 32

#: From which z-score on an update has jumped, and a gradient, whose norms vary more from batch to
#: batch (docs/spikes.md).
UPDATE_Z, GRADIENT_Z = 6.0, 10.0

#: What a logarithm varies by at least: a jump by a twentieth is none, however steady it was before.
_LEAST_SPREAD = 0.05

#: The median absolute deviation of normal numbers is their standard deviation over this.
_NORMAL = 1.4826

#: Steps for which a median holds: one step more or less hardly moves it.
_REFRESH = 4

#: Skipped steps in a row after which one is taken: it is no spike but what gradients are now.
_MOST_SKIPPED = 8

#: Steps after which the host reads what a device told, so that it waits for nothing.
_LATE = 2

#: Spikes that are kept, and names in a sentence.
_KEPT, _NAMED = 100, 3

#: What the norm of all gradients is called among the matrices.
ALL = "all gradients"

#: What jumped, by whether it is an update, and of everything.
_WHAT = {(True, False): "update", (False, False): "gradient", (False, True): "norm"}


class Jump(NamedTuple):
    """A norm that jumped; all but the first three are of updates alone."""

    name: str  #: of a matrix, or :data:`ALL`
    norm: float  #: ‖U‖_F or ‖G‖_F
    usual: float  #: its median over the steps before
    z: float
    ratio: float | None = None  #: α_W ‖U‖_F / ‖W‖_F
    clipped: bool | None = None  #: whether Rule 1 bounded the update

    @property
    def is_update(self) -> bool:
        return self.clipped is not None


def worst_first(jumps: Iterable[Jump]) -> list[Jump]:
    """Return jumps, the largest z-score first."""
    return sorted(jumps, key=lambda jump: -jump.z)


@dataclass
class Spike:
    """Steps in a row in which something jumped."""

    step: int  #: the first of them
    action: str  #: "log": they were made; "skip": not
    last: int  #: the last of them
    skipped: int = 0  #: steps that were not made before, which have no number
    jumps: dict[str, Jump] = field(default_factory=dict)  #: by name, as each was at first

    def has(self, step: int, action: str) -> bool:
        """Whether something that jumped in a step is part of it."""
        return self.action == action and self.step - 1 <= step <= self.last + 1

    def worst(self) -> list[Jump]:
        """Return the jumps, the largest z-score first."""
        return worst_first(self.jumps.values())


class Window:
    """The last values of several series, and how far new ones are from them.

    The z-score is (ln x − m) / √((1.4826 d)² + 0.05²), with the median m and the median absolute
    deviation d of ln x over the window, which the jumps in it hardly move.

    Args:
        count: of the series.
    """

    def __init__(self, count: int) -> None:
        self._rows = torch.full((WINDOW, count), math.nan)
        self._next = 0  # steps that were added
        self._median = torch.full((count,), math.nan)
        self._spread = torch.ones(count)

    def scores(self, values: Tensor) -> Tensor:
        """Return the z-score of each value, ``(count,)``; 0 while too few are known, and of what is
        not positive and finite.
        """
        return (_logarithms(values) - self._median).div_(self._spread).nan_to_num_(nan=0.0)

    def usual(self) -> Tensor:
        """Return the medians."""
        return self._median.exp()

    def add(self, values: Tensor) -> None:
        """Take the values of a step."""
        self._rows[self._next % WINDOW] = _logarithms(values)
        self._next += 1
        if self._next >= LEAST and self._next % _REFRESH == 0:
            rows = self._rows[: self._next]
            median = rows.nanmedian(0).values
            deviation = (rows - median).abs_().nanmedian(0).values
            self._spread = deviation.mul_(_NORMAL).square_().add_(_LEAST_SPREAD**2).sqrt_()
            is_known = rows.isfinite().sum(0) >= LEAST
            self._median = torch.where(is_known, median, math.nan)


class _Moved(NamedTuple):
    """What a step did to the matrices of a group, as it arrives."""

    step: int
    names: Sequence[str]
    first_here: Collection[str]  # those that this rank tells of
    rows: Tensor  # (4, matrices), see MatrixGroup.moved
    arrival: torch.Event | None  # None: it is there


class Spikes:
    """Watches the norms of updates, and the norm of all gradients where an engine tells it.

    Updates cost no pass: a step knows their norms. Before a step moves anything, only gradients are
    known, so that "skip" goes by these: by the norm of all that the engine took, before it clipped
    them, or else by those of every matrix, for which the gradients are read once more.

    Args:
        mode: "log", "skip", or None: nothing is watched.
    """

    def __init__(self, mode: str | None) -> None:
        self._is_on, self._skips = mode is not None, mode == SKIP
        self.spikes: deque[Spike] = deque(maxlen=_KEPT)  #: the last ones
        self._windows: dict[tuple[str, ...], Window] = {}  # by the names of a group's matrices
        self._of_gradients: dict[tuple[str, ...], Window] = {}
        self._moved: deque[_Moved] = deque()
        self._decision: tuple[int, bool] | None = None  # on a step, which may be in parts
        self._in_a_row, self._skipped = 0, 0  # skipped steps, in a row and in all

    def admits(self, guard: Guard, turns: Sequence[Turn]) -> bool:
        """Return whether a step is to be made; before it moves anything. Collective where no engine
        tells the norm of the gradients and steps may be skipped.

        Args:
            guard: has just admitted the step.
            turns: of it, or of a part.

        Raises:
            ValueError: steps may be skipped, and no norm tells all parts and ranks alike.
            RuntimeError: so many steps in a row were skipped as the guard's limit says.
        """
        if self._is_on and (self._decision is None or self._decision[0] != guard.step):
            self._decision = guard.step, self._decide(guard, turns)
        is_admitted = self._decision is None or self._decision[1]
        if is_admitted:
            guard.made()
        return is_admitted

    def _decide(self, guard: Guard, turns: Sequence[Turn]) -> bool:
        self._skipped = guard.skipped
        if guard.total is not None:
            norms = {ALL: guard.total}
        elif not self._skips:
            return True
        elif guard.needs_norm:
            raise ValueError(
                "AdamW2: spike got 'skip' where no norm of all gradients is told, it takes an "
                "engine that takes their norm before it steps, as to clip them, or 'log'."
            )
        else:
            norms = {}
            for turn in turns:
                norms |= turn.group.gradient_norms(turn.gathered.stepped)
        names, values = tuple(norms), torch.tensor(list(norms.values()))
        window = _window_of(self._of_gradients, names)
        jumps = _jumps(names, values, window, GRADIENT_Z)
        window.add(values)
        has_jumped = self._skips and self._agreed(jumps, guard, turns)
        is_refused = has_jumped and self._in_a_row < _MOST_SKIPPED
        self._in_a_row = self._in_a_row + is_refused if has_jumped else 0
        if not (jumps or is_refused):
            return True
        step = _step_of(turns)
        first_here = {name for turn in turns for name in turn.group.first_here}
        if not dist.is_initialized() or dist.get_rank() == 0:
            first_here.add(ALL)
        if jumps and step is not None:
            self._note(step, SKIP if is_refused else "log", jumps, first_here)
        if is_refused:
            told = [jump for jump in jumps if jump.name in first_here]
            whose = _told(told) if told else "gradients on another rank"
            guard.skip(f"{whose} jumped", guard.step, is_named=bool(told))
        return not is_refused

    def _agreed(self, jumps: Sequence[Jump], guard: Guard, turns: Sequence[Turn]) -> bool:
        """Return whether something jumped on any rank; the engine's norm is alike on all."""
        if guard.total is not None:
            return bool(jumps)
        buffers = [buffer for turn in turns for buffer in turn.members.buffers]
        device = buffers[0].tensor.device if buffers else "cpu"
        flag = torch.full((), float(bool(jumps)), device=device)
        others = () if guard.others is None else (guard.others,)
        return is_on_any_rank(flag, buffers, *others)

    def observe(self, turns: Sequence[Turn]) -> None:
        """Take what a step did. Collective over the groups of the matrices."""
        if not self._is_on:
            return
        for turn in turns:
            rows, step = turn.group.moved(), _step_of([turn])
            names = turn.group.names, turn.group.first_here
            if step is None:
                continue
            if rows.device.type != "cuda":
                self._judge(_Moved(step, *names, rows, None))
                continue
            copy = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            copy.copy_(rows, non_blocking=True)
            arrival = torch.Event("cuda")
            arrival.record()
            self._moved.append(_Moved(step, *names, copy, arrival))
        while self._moved and self._moved[0].step + _LATE <= self._moved[-1].step:
            self._judge(self._moved.popleft())

    def _judge(self, moved: _Moved) -> None:
        if moved.arrival is not None:
            moved.arrival.synchronize()
        norm, rate, squares, clipped = moved.rows
        names = tuple(moved.names)
        window = _window_of(self._windows, names)
        jumps = _jumps(names, norm, window, UPDATE_Z)
        window.add(norm)
        if not jumps:
            return
        ratios = dict(zip(names, (rate * norm / squares.sqrt()).tolist(), strict=True))
        is_clipped = dict(zip(names, clipped.bool().tolist(), strict=True))
        updates = [
            jump._replace(ratio=ratios[jump.name], clipped=is_clipped[jump.name]) for jump in jumps
        ]
        self._note(moved.step, "log", updates, moved.first_here)

    def _note(
        self, step: int, action: str, jumps: Sequence[Jump], first_here: Collection[str]
    ) -> None:
        """Add to the spike that these steps are, or begin a new one, and say so once, on the first
        of the ranks that know.
        """
        spike = next((each for each in self.spikes if each.has(step, action)), None)
        if spike is None:
            spike = Spike(step, action, step, self._skipped)
            self.spikes.append(spike)
        is_new = all(jump.is_update != jumps[0].is_update for jump in spike.jumps.values())
        spike.step, spike.last = min(step, spike.step), max(step, spike.last)
        spike.jumps = {jump.name: jump for jump in jumps} | spike.jumps
        told = [jump for jump in jumps if jump.name in first_here]
        if is_new and told and action == "log":  # the guard tells of a step that is skipped
            LOG.warning("AdamW2: step %d: %s jumped", step, _told(told))


def _window_of(windows: dict[tuple[str, ...], Window], names: tuple[str, ...]) -> Window:
    if names not in windows:  # not at every step, as by setdefault
        windows[names] = Window(len(names))
    return windows[names]


def _logarithms(values: Tensor) -> Tensor:
    return torch.where((values > 0) & values.isfinite(), values.log(), math.nan).float()


def _jumps(names: Sequence[str], values: Tensor, window: Window, least: float) -> list[Jump]:
    """Return what jumped, the largest z-score first."""
    scores = window.scores(values)
    if not bool((scores >= least).any()):
        return []
    columns = zip(names, values.tolist(), window.usual().tolist(), scores.tolist(), strict=True)
    jumps = [Jump(*row) for row in columns if row[3] >= least]
    return worst_first(jumps)


def _told(jumps: Sequence[Jump]) -> str:
    """Return what jumped, and how far, for a sentence."""
    shown = ", ".join(
        f"the {_WHAT[jump.is_update, jump.name == ALL]} of {jump.name} "
        f"({jump.norm / jump.usual:.1f} times its usual {jump.usual:.3g}, z {jump.z:.0f})"
        for jump in jumps[:_NAMED]
    )
    return shown + (f" and {len(jumps) - _NAMED} more" if len(jumps) > _NAMED else "")


def _step_of(turns: Sequence[Turn]) -> int | None:
    """Return the number of the step that is made; None: of nothing here."""
    steps = (each.hyper.step for turn in turns for each in turn.gathered.stepped if each)
    return int(max(steps, default=0)) or None
