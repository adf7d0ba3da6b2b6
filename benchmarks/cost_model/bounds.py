"""From what a launch's programs take to the time that it takes on a GPU."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from . import gpus
from .code import Usage
from .gpus import Assumed, Gpu


class Work(NamedTuple):
    """What one program does. Bytes, but for ``warp``."""

    warp: Usage  #: of one of its warps
    stream: float = 0.0  #: has to cross DRAM
    x: float = 0.0  #: of vectors that other programs read, too
    x_held: float = 0.0  #: all of those vectors
    handed: float = 0.0  #: to another kernel, or from one

    def plus(self, other: Work, times: float) -> Work:
        """Return what this program and so many others do together."""
        moved = (a + times * b for a, b in zip(self[1:], other[1:], strict=True))
        return Work(self.warp.plus(other.warp, times), *moved)


class Launch(NamedTuple):
    """Programs that are begun together."""

    name: str
    warps: int  #: of a program
    at_once: int  #: programs on a multiprocessor
    programs: Sequence[tuple[int, Work]]  #: so many of a kind, in the order that they begin in
    are_dependent: bool  #: whether most instructions of a program need the ones before


class Time(NamedTuple):
    """How long a launch takes, without the gap to the next, and what of a GPU binds it."""

    seconds: float
    binds: str


def time_of(launch: Launch, gpu: Gpu, assumed: Assumed) -> Time:
    """Return the time of a launch under assumptions."""
    clock = gpu.sustained if assumed.is_sustained else gpu.boost
    taken = _resources(launch, gpu, assumed, clock)
    beyond = taken.pop("l2 beyond dram")
    binds = max(taken, key=lambda name: taken[name])
    longest = taken[binds]
    if not assumed.waits:
        alone = max((_alone(launch, work, gpu) for _, work in launch.programs), default=0.0) / clock
        return Time(longest, binds) if longest >= alone else Time(alone, "waits")
    bytes_between = max(beyond if binds == "dram" else taken["l2"], taken["l1"])
    durations = [(number, _waits(launch, work) / clock) for number, work in launch.programs]
    each = (duration for number, duration in durations for _ in range(number))
    groups = {
        "dram": taken["dram"],
        "l2": bytes_between,
        "pipes": max(taken[name] for name in PIPES),
        "waits": makespan(each, gpu.sms * launch.at_once),
    }
    if groups["waits"] > longest:
        binds, longest = "waits", groups["waits"]
    group = "l2" if binds == "l1" else "pipes" if binds in PIPES else binds
    others = sum(seconds for name, seconds in groups.items() if name != group)
    return Time(longest + assumed.exposed * others, binds)


#: What executes instructions.
PIPES = ("issue", "fma", "alu", "mufu", "fp64")


def _resources(launch: Launch, gpu: Gpu, assumed: Assumed, clock: float) -> dict[str, float]:
    """Return the seconds that each part of a GPU takes, if it had nothing to wait for."""
    all_of = Work(Usage())
    x_held = 0.0
    for number, work in launch.programs:
        all_of = all_of.plus(work, number)
        x_held = max(x_held, work.x_held)
    warp = Usage().plus(all_of.warp, launch.warps)  # of all warps
    in_l1 = min(1.0, gpu.l1 * assumed.l1_size / x_held) if x_held else 0.0
    dram = all_of.stream + (all_of.handed if assumed.sums_leave else 0.0)
    beyond = all_of.handed + (1 - in_l1) * all_of.x
    pipes = gpu.sms * clock * assumed.pipes
    return {
        "dram": dram / (gpu.dram * assumed.dram),
        "l2": (all_of.stream + beyond) / (gpu.l2_per_clock * clock * assumed.l2),
        # A copy's rate is reached by way of L2.
        "l2 beyond dram": beyond / (gpu.l2_per_clock * clock * assumed.l2),
        "l1": warp.l1 / (gpus.L1_PER_CLOCK * pipes),
        "issue": warp.issue / (gpus.ISSUE * pipes),
        "fma": warp.fma / (gpu.fma * pipes),
        "alu": warp.alu / (gpu.alu * pipes),
        "mufu": warp.mufu / (gpu.mufu * pipes),
        "fp64": warp.fp64 / (gpu.fp64 * pipes),
    }


def makespan(durations: Iterable[float], slots: int) -> float:
    """Return when the last program ends, each being begun, in order, where one has ended."""
    ends = [0.0] * slots
    for duration in durations:
        heapq.heapreplace(ends, ends[0] + duration)
    return max(ends)


def _alone(launch: Launch, work: Work, gpu: Gpu) -> float:
    """Return the clocks that a program takes at least, alone on a multiprocessor."""
    warps = launch.warps
    on_sm = max(warps * work.warp.issue / gpus.ISSUE, warps * work.warp.fp64 / gpu.fp64)
    return max(work.warp.issue, on_sm)


def _waits(launch: Launch, work: Work) -> float:
    """Return the clocks that a program takes if it waits for all that it loads, among others."""
    warp = work.warp
    own = warp.dependent if launch.are_dependent else warp.apart
    return own + warp.l2_waits * gpus.L2_WAIT + warp.dram_waits * gpus.DRAM_WAIT
