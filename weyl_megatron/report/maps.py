"""The canvases of a report: heat maps of heads over steps, attention maps and their frames."""

from __future__ import annotations

import base64
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from .curves import POINTS, Shown, block_name, head_name
from .events import MapPlace, pooled
from .page import grid, legend
from .points import evenly
from .run import Run

MODES = ("normal", "benign", "malignant", "uniform")
_SIDES = {64: 20, 32: 6, 16: 0}  # rows and columns of a map on the page, if so many steps fit
_FACTS = ("entropy", "map_rank", "mode")  # that stand beside a map
_TALL = 320  # heads of a heat map from which on each has one pixel
_SMALL = 132  # pixels of a small map at most
_MANY_BLOCKS, _COLUMNS = 12, 9  # of more blocks, several are in a row of so many columns
_HEAT_BYTES = 1_200_000  # of the heat maps of a panel
_CANVAS = '<canvas class="map" width="1" height="1"></canvas>'


def modes(shown: Shown) -> str:
    """Each head's mode over the steps."""
    if not any(each.heads("mode") for each in shown.runs):
        return ""
    names = ((name, f"var(--mode-{mode})") for mode, name in enumerate(MODES))
    return legend(names) + heats(shown, "mode", 1.0)


def heats(shown: Shown, name: str, scale: float) -> str:
    """Each run's heads over its steps, as canvases that the page's script paints."""
    # In base 64, four bytes hold the levels of three heads.
    heads = sum(len(each.heads(name)) for each in shown.runs)
    most = min(POINTS, max(1, _HEAT_BYTES * 3 // 4 // max(1, heads)))
    bodies = ((each, _heat(each, name, scale, most)) for each in shown.runs)
    return grid(shown.columns, (shown.of_run(each, body, is_named=True) for each, body in bodies))


def _heat(each: Run, name: str, scale: float, most: int) -> str:
    """A row a head; a column stands for some steps: for their lowest entropy or worst mode."""
    series = each.heads(name)
    if not series:
        return "<p>Not logged.</p>"
    extremes = series.lowest if name == "entropy" else series.highest
    steps, rows = extremes(most)
    levels = bytes(_level(value, scale, name == "mode") for row in rows for value in row)
    blocks = [block for block, _ in series]
    numbers = evenly(sorted(set(blocks)), 16)
    # A head has three pixels at least, of very many heads one.
    least = 3 if len(series) <= _TALL else 1
    height = max(15 * len(numbers), max(least, min(10, 240 // len(series))) * len(series))
    middles = {
        block: (blocks.index(block) + blocks.count(block) / 2) / len(blocks) for block in numbers
    }
    labels = "".join(
        f'<span style="top:{100 * at:.1f}%">{block_name(block)}</span>'
        for block, at in middles.items()
    )
    canvas = (
        f'<canvas data-kind="{name}" data-scale="{scale:g}" '
        f'data-steps="{",".join(map(str, steps))}" data-heads="{"|".join(map(head_name, series))}" '
        f'data-levels="{_base64(levels)}"></canvas>'
    )
    ends = f'<div class="steps"><span>step {steps[0]}</span><span>{steps[-1]}</span></div>'
    return (
        f'<div class="heat" style="grid-template-rows:{height}px auto">'
        f'<div class="rows">{labels}</div>{canvas}{ends}</div>'
    )


def _level(value: float | None, scale: float, is_mode: bool) -> int:
    """A byte of a heat map; 0 is a gap."""
    if value is None:
        return 0
    if is_mode:
        return 1 + int(value) if value in range(len(MODES)) else 0
    return 1 + round(254 * min(1.0, max(0.0, value / scale)))


def attention_maps(shown: Shown) -> str:
    """The scrubber, each run's chosen head large, and all heads small."""
    runs = [each for each in shown.runs if each.maps]
    if not runs:
        return ""
    large, small = [], []
    for number, each in enumerate(runs):
        body = f'<div class="big" id="big-{number}">{_CANVAS}<p></p></div>'
        large.append(shown.of_run(each, body, is_named=True))
        small.append(shown.of_run(each, _small_maps(each, number, len(runs) == 1)))
    columns = len(runs) if len(runs) <= 4 else 3
    return _scrubber(len(_map_steps(shown)[0])) + grid(columns, large) + grid(columns, small)


def _scrubber(steps: int) -> str:
    span = f'min="0" max="{steps - 1}" value="{steps - 1}"'
    return (
        '<div class="scrubber"><button id="play" type="button">▶ play</button>'
        f'<input id="step" type="range" {span} aria-label="step of the maps">'
        '<output id="at" for="step"></output></div>'
    )


def _small_maps(each: Run, number: int, is_alone: bool) -> str:
    """A run's maps as buttons: a row a block, a column a head; of many blocks some in a row."""
    cells = _map_places(each)
    heads = sorted({head for _, head in cells})
    blocks = sorted({block for block, _ in cells})
    is_tall = is_alone and len(blocks) > _MANY_BLOCKS
    beside = max(1, _COLUMNS // (len(heads) + 1)) if is_tall else 1
    names = [f"<span>{head if len(heads) > 6 else f'head {head}'}</span>" for head in heads]
    parts = ["<span></span>", *names] * beside
    for block in blocks:
        parts.append(f"<span>{block_name(block)}</span>")
        for place in ((block, head) for head in heads):
            at = cells.index(place) if place in cells else None
            button = (
                f'<button type="button" data-cell="{at}" '
                f'aria-label="{head_name(place)}">{_CANVAS}</button>'
            )
            parts.append("<span></span>" if at is None else button)
    columns = f"auto repeat({len(heads)},minmax(0,{_SMALL}px)) " * beside
    template = f"grid-template-columns:{columns.strip()}"
    return f'<div class="small" id="small-{number}" style="{template}">{"".join(parts)}</div>'


def _map_places(each: Run) -> list[tuple[int, int]]:
    return sorted({(kept.block, kept.head) for kept in each.maps})


def _map_steps(shown: Shown) -> tuple[list[int], int]:
    """The steps of the scrubber, and the rows and columns of a map, so that all of them fit."""
    logged = sorted({kept.step for each in shown.runs for kept in each.maps})
    sizes = {
        (number, kept.block, kept.head): (kept.rows, kept.cols)
        for number, each in enumerate(shown.runs)
        for kept in each.maps
    }
    for side, least in _SIDES.items():
        of_a_step = sum(min(rows, side) * min(cols, side) for rows, cols in sizes.values())
        fit = shown.map_bytes // max(1, of_a_step)
        if fit >= min(least, len(logged)):
            break
    return evenly(logged, max(2, fit)), side


def frames(shown: Shown) -> dict[str, Any]:
    """The maps for the page's script: at every step each run's newest."""
    steps, side = _map_steps(shown)
    runs = (
        {"color": shown.color(each)[4:-1], "cells": _cells(each, steps, side)}
        for each in shown.runs
        if each.maps
    )
    return {"steps": steps, "runs": list(runs)}


def _cells(each: Run, steps: Sequence[int], side: int) -> list[dict[str, Any]]:
    cells = []
    facts: dict[int, dict[str, float | None]] = {}  # of the steps that are shown
    of_place: dict[tuple[int, int], dict[int, MapPlace]] = {}
    for kept in each.maps:
        of_place.setdefault((kept.block, kept.head), {})[kept.step] = kept
    for place in sorted(of_place):
        here = of_place[place]
        newest = _newest(sorted(here), steps)
        used = sorted(set(newest) - {-1})
        drawn = []
        for step in used:
            if step not in facts:
                facts[step] = each.numbers_at(step)
            small = pooled(each.map_at(here[step]), side)
            frame: dict[str, Any] = {"step": step, "rows": small.rows, "cols": small.cols}
            head = f"block/{place[0]}/head/{place[1]}"
            frame |= {name: facts[step].get(f"{head}/{name}") for name in _FACTS}
            frame["mode"] = frame["mode"] if frame["mode"] in range(len(MODES)) else None
            drawn.append({**frame, "levels": _base64(small.levels)})
        at = [used.index(step) if step in used else -1 for step in newest]
        cells.append({"block": place[0], "head": place[1], "at": at, "frames": drawn})
    return cells


def _newest(logged: Sequence[int], steps: Sequence[int]) -> list[int]:
    """For each of the steps the last logged one until there; -1 before the first."""
    counts = (bisect_right(logged, step) for step in steps)
    return [logged[count - 1] if count else -1 for count in counts]


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
