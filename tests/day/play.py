"""Plays a day: the same actions in AdamW's world and in AdamW2's, judged after every one."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from tests.day.actions import Action, GradOfDtype, Load, Step, StepByHand
from tests.day.judge import DIFFERENCES, Wrong, check_error, check_near, check_same
from tests.day.worlds import KINDS, World

STEPS = (Step, StepByHand, GradOfDtype)


@dataclass(frozen=True)
class Day:
    """What is drawn: a model, and what is done to it."""

    pieces: tuple[str, ...]
    actions: tuple[Action, ...]
    named: bool = False
    is_fenced: bool = True
    kernel: str = ""


@dataclass
class Verdict:
    """What became of a day."""

    failure: str | None = None
    played: list[str] = field(default_factory=list)  #: the actions that all worlds did, by name
    steps: int = 0  #: of them that stepped
    refused: int = 0  #: actions that AdamW refused, and so did AdamW2
    early: int = 0  #: days that AdamW2 ended before AdamW did


def play(day: Day, told: Callable[[int], None] = lambda number: None) -> Verdict:
    """Play a day in this process, and say so before each action."""
    torch.set_default_dtype(torch.float32)
    worlds: list[World] = []
    for kind in KINDS:
        worlds.append(World(kind, day.kernel, day.pieces, day.named, day.is_fenced, worlds))
    verdict = Verdict()
    for number, action in enumerate(day.actions):
        told(number)
        try:
            goes_on = _act(worlds, action, verdict)
        except Wrong as wrong:
            verdict.failure = f"action {number}, {type(action).__name__}: {wrong}"
            return verdict
        if not goes_on:
            break
    return verdict


def _act(worlds: list[World], action: Action, verdict: Verdict) -> bool:
    """Do one action in all worlds; return whether the day goes on."""
    theirs, *ours = worlds
    before = [[param.detach().clone() for param in world.params] for world in worlds]
    if isinstance(action, Load):
        for world in worlds:
            try:
                world.current = copy.deepcopy(world.optimizer.state_dict())
            except Exception as failed:
                raise Wrong(
                    f"[{world.kind}] no state dict: {type(failed).__name__}: {failed}"
                ) from None
    error = _raised(theirs, action)
    will_raise = functools.cache(lambda: _will_raise(theirs))
    refusals: list[BaseException] = []
    wrongs: list[str] = []
    for world in ours:
        found = _raised(world, action)
        if any(difference.holds(error, found) for difference in DIFFERENCES):
            return False
        try:
            if found is not None:
                refusals.append(found)
                check_error(found, error)
                if error is None and (isinstance(action, STEPS) or not will_raise()):
                    raise Wrong(f"refused, but AdamW takes it: {type(found).__name__}: {found}")
            elif error is not None:
                raise Wrong(
                    f"taken{_foreign(world)}, but AdamW refuses: {type(error).__name__}: {error}"
                )
        except Wrong as wrong:
            wrongs.append(f"[{world.kind}] {wrong}")
    if wrongs:
        raise Wrong("; ".join(wrongs))
    if not all(world.fences.are_whole() for world in worlds):
        raise Wrong("foreign memory was written")
    if refusals and error is None:
        if len(refusals) < len(ours):
            raise Wrong(f"refused in {len(refusals)} of {len(ours)} worlds: {refusals[0]}")
        verdict.early += 1
        return False
    if error is not None:
        verdict.refused += 1
        if not action.is_whole or isinstance(
            error, KeyError
        ):  # which torch raises halfway through loading
            return False
    for world, old in zip(ours, before[1:], strict=True):
        try:
            if world.kind == "inf":
                check_same(theirs, world)
            elif isinstance(action, STEPS) and error is None:
                check_near(theirs, world, old)
        except Wrong as wrong:
            wrongs.append(f"[{world.kind}] {wrong}")
        stats = getattr(world.optimizer, "stats", dict)()
        assert all(entry.tau > 0 for entry in stats.values())
    if wrongs:
        raise Wrong("; ".join(wrongs))
    if error is None:
        verdict.played.append(type(action).__name__)
        verdict.steps += isinstance(action, STEPS)
    for world in worlds:
        world.fence()
        world.fence_state()
    return True


def _raised(world: World, action: Action) -> BaseException | None:
    try:
        action.play(world)
    except Exception as error:
        return error
    return None


def _foreign(world: World) -> str:
    """Whether weights took on what lies in the fences."""
    if not world.fences.are_whole():
        return ", and foreign memory was written"
    are_finite = all(bool(param.isfinite().all()) for param in world.params if param.numel())
    return "" if are_finite else ", and foreign memory was read"


def _will_raise(world: World) -> bool:
    """Whether the next step of a world raises, whatever has a gradient; its day is over then."""
    for param in world.params:
        if param.is_floating_point():
            param.grad = torch.ones_like(param)
    try:
        world.optimizer.step()
    except Exception:
        return True
    return False
