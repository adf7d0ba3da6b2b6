"""The report of watched runs: one HTML file with everything in it, readable without a network."""

from __future__ import annotations

import argparse
import base64
import json
import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from weyl_megatron.demo.charts import Axis, Chart, Line, Rule
from weyl_megatron.demo.report import depth_color, smooth
from weyl_megatron.stability.page import PAGE, cell, figure, figure_of_run, grid, legend, row, section, table
from weyl_megatron.stability.runs import (
    Points,
    Run,
    evenly,
    expand,
    matrix_place,
    pooled,
    read_run,
    stretches,
    thin,
)

Place = TypeVar("Place", bound=Hashable)

_POINTS = 300  # of a curve, and columns of a heat map
_PAGE_BYTES, _MAP_BYTES = 9_000_000, 4_500_000  # of a page about, and of all attention maps on it at most
_SIDES = {64: 20, 32: 6, 16: 0}  # rows and columns of a map on the page, if so many steps fit
_SMOOTHED_FROM = 100  # points of a loss
_WARNINGS = 200  # rows of the table
_LEGEND = 12  # blocks that the legend names
_COLORS = 8  # of runs
_MODES = ("normal", "benign", "malignant", "uniform")
_WIDTHS = {1: 1080, 2: 530, 3: 347, 4: 256}  # of a chart, by how many stand side by side

_TERMS = {
    **{f"sigma_{role}": f"σ₁(W_{role})" for role in "qkvo"},
    **{"sigma_1": "σ₁(W₁)", "sigma_2": "σ₁(W₂)"},
    **{"sigma_qk": "σ₁(W_qᵀW_k)", "sigma_ov": "σ₁(W_oW_v)", "sigma_21": "σ₁(W₂W₁)"},
    **{"norm1_gain": "‖γ₁‖", "norm1_bias": "‖β₁‖", "norm2_gain": "‖γ₂‖", "norm2_bias": "‖β₂‖"},
    **{"x": "‖x‖", "grad_x": "‖∂L/∂x‖"},
}
_GRADIENTS = {f"grad_{role}": f"‖∂L/∂W_{role}‖" for role in "qkv"}
_ENERGY = {"sec": "SEC", "effective_rank": "effective rank"}
_SHARPNESS = {"sharpness": "λ₁ of the Hessian", "sharpness_adam": "λ₁ of the preconditioned Hessian"}


def run(arguments: argparse.Namespace) -> int:
    """Writes the report of the folders `arguments.runs` to `arguments.out`; prints where it is, and every note."""
    notes = write_report(arguments.runs, arguments.out)
    print(f"The report: {arguments.out}")
    for note in notes:
        print(note)
    return 0


def write_report(folders: Sequence[Path], out: Path) -> list[str]:
    """Writes the report of the runs in `folders` to `out`; returns what of them could not be read.

    Raises:
        ValueError: none of the folders has anything that can be shown.
    """
    read = [read_run(folder) for folder in expand(folders)]
    notes = [note for each in read for note in each.notes]
    runs = _distinct([each for each in read if each.is_readable])
    if not runs:
        named = ", ".join(map(str, folders)) or "no folder"
        why = "; ".join(note.rstrip(".") for note in notes)
        raise ValueError(f"report: got {named} without a readable log ({why}), it takes folders of watched runs.")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(_page(_Shown(runs), notes), encoding="utf-8")
    return notes


@dataclass(frozen=True)
class _Range(Axis):
    """An axis whose ticks are short for numbers of every size."""

    def ticks(self, wanted: int) -> list[tuple[float, str]]:
        if not self.log:
            ticks = super().ticks(max(3, wanted))
            return [(value, text if len(text) < 7 else f"{value:g}") for value, text in ticks]
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        every, factors = max(1, math.ceil((last - first) / (wanted + 3))), (1, 2, 5) if last - first < 3 else (1,)
        values = (factor * 10.0**decade for decade in range(first, last + 1, every) for factor in factors)
        return [(value, f"{value:g}") for value in values if self.low <= value <= self.high]


@dataclass(frozen=True)
class _Shown:
    """The runs of a page, and what their charts have in common."""

    runs: Sequence[Run]
    map_bytes: int = _MAP_BYTES

    @cached_property
    def steps(self) -> list[int]:
        """All steps at which anything was logged."""
        steps = {step for each in self.runs for points in each.series.values() for step, _ in points}
        return sorted(steps | {kept.step for each in self.runs for kept in each.maps} or {1})

    @cached_property
    def depth(self) -> int:
        """How many blocks there are."""
        numbers = (re.match(r"block/(\d{1,6})/", tag) for each in self.runs for tag in each.series)
        return 1 + max((int(number[1]) for number in numbers if number), default=0)

    @property
    def columns(self) -> int:
        """How many runs stand side by side."""
        return len(self.runs) if len(self.runs) <= 4 else 3

    def color(self, each: Run) -> str:
        return f"var(--run-{self.runs.index(each) % _COLORS})"

    def block_color(self, block: int) -> str:
        return depth_color(min(block, self.depth - 1), self.depth)

    def legend(self) -> str:
        return legend((each.title, self.color(each)) for each in self.runs)

    def block_legend(self, more: str = "") -> str:
        named = evenly(range(self.depth), _LEGEND)
        return legend(((f"block {block}", self.block_color(block)) for block in named), more)

    def chart(
        self, title: str, y: Axis, lines: Sequence[Line], width: int, height: int, rules: Sequence[Rule] = ()
    ) -> str:
        return Chart(title, _Range("step", 0, max(1, self.steps[-1])), y, lines, rules, width, height).svg()

    def of_run(self, each: Run, body: str, is_named: bool = False, attributes: str = "") -> str:
        return figure_of_run(self.color(each), each.title if is_named else "", body, attributes)


@dataclass(frozen=True)
class _Panel:
    """A part of the page; `needs` is what would fill it where `body` finds nothing."""

    name: str
    title: str
    text: str
    needs: str
    body: Callable[[_Shown], str]


def _page(shown: _Shown, notes: Sequence[str]) -> str:
    bodies = {panel: "" if panel.body is _maps else panel.body(shown) for panel in _PANELS}
    left = (_PAGE_BYTES - sum(map(len, bodies.values()))) * 3 // 4  # a map's bytes are written in base 64
    shown = replace(shown, map_bytes=min(left, _MAP_BYTES))
    bodies |= {panel: _maps(shown) for panel in _PANELS if panel.body is _maps}
    parts = [section(panel.name, panel.title, panel.text, body) for panel, body in bodies.items() if body]
    missing = (panel for panel, body in bodies.items() if not body)
    items = "".join(
        f'<li data-missing="{each.name}">{each.title}: needs {escape(each.needs)}.</li>' for each in missing
    )
    parts += [f"<section><h2>Not in these logs</h2><ul>{items}</ul></section>"] if items else []
    if notes:
        said = "".join(f"<li>{escape(note)}</li>" for note in notes)
        parts.append(section("notes", "What could not be read", "The rest of these logs is shown.", f"<ul>{said}</ul>"))
    title = f"Stability: {shown.runs[0].title}" if len(shown.runs) == 1 else f"Stability of {len(shown.runs)} runs"
    return PAGE.substitute(
        title=escape(title),
        body="".join(parts),
        steps=json.dumps(shown.steps, separators=(",", ":")),
        maps=json.dumps(_frames(shown), separators=(",", ":")),
    )


def _distinct(runs: Sequence[Run]) -> list[Run]:
    """The runs, those of one title told apart by their folders' names, and else by numbers."""
    titles = [each.title for each in runs]
    told = [f"{each.title} ({each.name})" if titles.count(each.title) > 1 else each.title for each in runs]
    numbered = [f"{title} #{told[: at + 1].count(title)}" for at, title in enumerate(told)]
    final = [new if told.count(title) > 1 else title for title, new in zip(told, numbered, strict=True)]
    return [replace(each, title=title) for each, title in zip(runs, final, strict=True)]


def _summary(shown: _Shown) -> str:
    heads = ("run", "last loss", "mean attention entropy", "worst head's SEC", "largest σ₁(W_qᵀW_k)", "heads by mode")
    return table((*heads, "warnings"), (_summary_row(shown, each) for each in shown.runs))


def _summary_row(shown: _Shown, each: Run) -> str:
    losses, validation, uniform = each.series.get("loss"), each.last("validation_loss"), each.uniform_entropy
    said = f"validation {validation:.4g}" if validation is not None else f"step {losses[-1][0]}" if losses else ""
    last = losses[-1][1] if losses else None
    entropies = [points[-1][1] for points in each.heads("entropy").values()]
    finite = [value for value in entropies if value is not None]
    sigma: Mapping[Any, Points] = each.heads("sigma_qk") or {
        (block, None): points for block, points in each.blocks("sigma_qk").items()
    }
    cells = [
        cell("–" if not losses else "not finite" if last is None else f"{last:.4g}", said),
        cell(f"{sum(finite) / len(finite):.2f}" if finite else "–", f"uniform {uniform:.2f}" if uniform else ""),
        _largest({place: points[-1:] for place, points in each.heads("sec").items()}),
        _largest(sigma),
        f"<td>{_mode_counts(each)}</td>",
        cell(str(len(each.warnings)), f"first at step {each.warnings[0].step}" if each.warnings else ""),
    ]
    return row(shown.color(each), each.title, cells)


def _largest(series: Mapping[Any, Points]) -> str:
    values = [(value, step, place) for place, points in series.items() for step, value in points if value is not None]
    if not values:
        return cell("–")
    value, step, (block, head) = max(values, key=lambda found: found[0])
    return cell(f"{value:.4g}", f"block {block}{'' if head is None else f', head {head}'}, step {step}")


def _mode_counts(each: Run) -> str:
    modes = [points[-1][1] for points in each.heads("mode").values()]
    counted = ((mode, name, modes.count(mode)) for mode, name in enumerate(_MODES))
    spans = (f'<b style="--mode:var(--mode-{mode})">{count}</b><span>{name}</span>' for mode, name, count in counted)
    return f'<span class="modes">{"".join(spans)}</span>' if modes else "–"


def _loss(shown: _Shown) -> str:
    runs = [each for each in shown.runs if "loss" in each.series]
    if not runs:
        return ""
    began = [value for each in runs for _, value in each.series["loss"][:5] if value is not None]
    roof = 1.2 * max(began, default=math.inf) + 1e-6
    y = _axis("training loss", (each.series["loss"] for each in runs), log=False, roof=roof)
    x = _Range("step", 0, max(1, shown.steps[-1]))
    lines = [line for each in runs for line in _loss_lines(each, shown.color(each), x, y)]
    chart = Chart("", x, y, lines, width=1080, height=380, right=190, margins=(24, 32, 46))
    return grid(1, [shown.legend() + chart.svg()])


def _loss_lines(each: Run, color: str, x: Axis, y: Axis) -> list[Line]:
    """A run's loss, the single steps faint behind where there are many; its name at the end if that is at the edge."""
    points = each.series["loss"]
    lines = _lines(each.title, points, color, 2.0)
    behind: list[Line] = []
    if len(points) >= _SMOOTHED_FROM:
        behind = [replace(line, faint=True, width=0.75) for line in lines]
        smoothed: Points = []
        for stretch in stretches(points):
            values = smooth([value for _, value in stretch], len(points) // 20)
            smoothed += [(stretch[0][0] - 1, None), *zip((step for step, _ in stretch), values, strict=True)]
        lines = _lines(each.title, smoothed, color, 2.25)
    if lines and x.fraction(lines[-1].x[-1]) > 0.98 and 0 <= y.fraction(lines[-1].y[-1]) <= 1:
        lines[-1] = replace(lines[-1], label=_cut(each.title, 26))
    return [*behind, *lines]


def _rates(shown: _Shown) -> str:
    runs = [each for each in shown.runs if each.matrices("lr")]
    rates = (points for each in runs for points in [*each.matrices("lr").values(), each.series.get("lr", [])])
    y = _axis("rate α, log scale", rates, log=True)
    parts = []
    for each in runs:
        kinds: dict[str, list[Line]] = {}
        for matrix, points in each.matrices("lr").items():
            kind, block = matrix_place(matrix)
            color = "var(--ink)" if block is None else shown.block_color(block)
            name = matrix if "*" in kind else "α" if block is None else f"block {block}"
            kinds.setdefault(kind, []).extend(_lines(name, points, color))
        schedule = _lines("schedule", each.series.get("lr", []), "var(--ink-3)", 1.0, dashed=True)
        charts = (shown.chart(_cut(kind, 48), y, [*schedule, *kinds[kind]], 347, 180) for kind in kinds)
        parts.append(f"<h3>{escape(each.title)}</h3>{grid(3, map(figure, charts))}")
    return shown.block_legend('<span class="dashed">schedule</span>') + "".join(parts) if parts else ""


def _clipped(shown: _Shown) -> str:
    runs = [each for each in shown.runs if each.shares() or each.block_shares()]
    kinds = list(dict.fromkeys(kind for each in runs for kind in each.shares()))
    colors = {kind: f"hsl({360 * at / len(kinds):.0f} 60% 52%)" for at, kind in enumerate(kinds)}
    y = _Range("share of clipped matrices", 0, 1.02)
    parts = []
    for each in runs:
        of_kind = _curves(each.shares(), str, colors.__getitem__)
        of_block = _curves(each.block_shares(), _block_name, shown.block_color)
        drawn = (("by kind of matrix", of_kind), ("by block", of_block))
        charts = (shown.chart(title, y, lines, 530, 190) for title, lines in drawn if lines)
        parts.append(f"<h3>{escape(each.title)}</h3>{grid(2, map(figure, charts))}")
    return legend(colors.items()) + shown.block_legend() + "".join(parts) if parts else ""


def _terms(shown: _Shown) -> str:
    """A chart for every term and run; those of a term have one range."""
    present = [tag for tag in _TERMS if any(each.blocks(tag) for each in shown.runs)]
    columns = 4 if shown.columns in (2, 4) else 3
    charts = (_of_blocks(shown, tag, each, [tag], columns) for tag in present for each in shown.runs)
    return shown.legend() + shown.block_legend() + grid(columns, charts) if present else ""


def _similarity(shown: _Shown) -> str:
    if not any(each.blocks("similarity") for each in shown.runs):
        return ""
    charts = (_of_blocks(shown, "similarity", each, ["similarity"], shown.columns) for each in shown.runs)
    return shown.legend() + shown.block_legend() + grid(shown.columns, charts)


def _gradients(shown: _Shown) -> str:
    """The three matrices of a run beside each other; all in one range."""
    runs = [each for each in shown.runs if any(each.blocks(tag) for tag in _GRADIENTS)]
    charts = (_of_blocks(shown, tag, each, list(_GRADIENTS), 3) for each in runs for tag in _GRADIENTS)
    return shown.legend() + shown.block_legend() + grid(3, charts) if runs else ""


def _of_blocks(shown: _Shown, tag: str, each: Run, ranged: Sequence[str], columns: int) -> str:
    """A run's chart of a term, a curve for every block, in the range of all runs' terms `ranged`."""
    y = _axis("", (points for other in shown.runs for one in ranged for points in other.blocks(one).values()))
    lines = _curves(each.blocks(tag), _block_name, shown.block_color)
    title = {**_TERMS, **_GRADIENTS}.get(tag, tag)
    return shown.of_run(each, shown.chart(title, y, lines, _WIDTHS[columns], 170), attributes=f' data-term="{tag}"')


def _energy(shown: _Shown) -> str:
    figures = []
    for name, title in _ENERGY.items():
        if not any(each.heads(name) for each in shown.runs):
            continue
        y = _axis("", (points for each in shown.runs for points in each.heads(name).values()), log=False)
        for each in shown.runs:
            largest = f"(d, {each.header['sec']})" if name == "sec" and "sec" in each.header else ""
            lines = _curves(each.heads(name), _head_name, lambda head: shown.block_color(head[0]), 1.0)
            chart = shown.chart(_cut(title + largest, 32), y, lines, _WIDTHS[shown.columns], 230)
            figures.append(shown.of_run(each, chart))
    return shown.legend() + shown.block_legend() + grid(shown.columns, figures) if figures else ""


def _entropy(shown: _Shown) -> str:
    runs = [each for each in shown.runs if each.heads("entropy")]
    if not runs:
        return ""
    uniform = sorted({told for each in runs if (told := round(each.uniform_entropy or 0.0, 3)) > 0})
    found = (points for each in runs for points in each.heads("entropy").values())
    y = _axis("attention entropy, nats", chain(found, ([(0, value * 1.08)] for value in uniform)), log=False)
    scale = uniform[-1] if uniform else max(y.high, 1e-3)
    ramp = f'<p>0<span class="ramp"></span>{scale:.3g} nats{", uniform attention" if uniform else ""}</p>'
    rules = [Rule(value, "uniform") for value in uniform]
    charts = []
    for block in sorted({block for each in runs for block, _ in each.heads("entropy")}):
        lines = [line for each in runs for line in _banded(each, block, shown.color(each))]
        charts.append(figure(shown.chart(_block_name(block), y, lines, 347, 190, rules)))
    return ramp + _heats(shown, "entropy", scale) + shown.legend() + grid(3, charts)


def _banded(each: Run, block: int, color: str) -> list[Line]:
    """The mean of a block's heads, and their range."""
    of_step: dict[int, list[float]] = {}
    for (number, _), points in each.heads("entropy").items():
        for step, value in points if number == block else []:
            of_step.setdefault(step, []).extend([] if value is None else [value])
    means: Points = [(step, sum(v) / len(v) if v else None) for step, v in sorted(of_step.items())]
    lines = []
    for stretch in stretches(means):
        steps = evenly([step for step, _ in stretch], _POINTS)
        band = ([min(of_step[step]) for step in steps], [max(of_step[step]) for step in steps])
        drawn = _lines(each.title, [(step, dict(stretch)[step]) for step in steps], color)
        lines += [replace(line, band=band) for line in drawn] if len(steps) > 1 else drawn
    return lines


def _modes(shown: _Shown) -> str:
    if not any(each.heads("mode") for each in shown.runs):
        return ""
    names = ((name, f"var(--mode-{mode})") for mode, name in enumerate(_MODES))
    return legend(names) + _heats(shown, "mode", 1.0)


def _heats(shown: _Shown, name: str, scale: float) -> str:
    """Each run's heads over its steps, as canvases that the page's script paints."""
    bodies = ((each, _heat(each.heads(name), name, scale)) for each in shown.runs)
    return grid(shown.columns, (shown.of_run(each, body, is_named=True) for each, body in bodies))


def _heat(series: Mapping[tuple[int, int], Points], name: str, scale: float) -> str:
    if not series:
        return "<p>Not logged.</p>"
    steps = evenly(sorted({step for points in series.values() for step, _ in points}), _POINTS)
    values = (dict(points).get(step) for points in series.values() for step in steps)
    levels = bytes(_level(value, scale, name == "mode") for value in values)
    blocks = [block for block, _ in series]
    numbers = evenly(sorted(set(blocks)), 16)
    height = max(15 * len(numbers), max(3, min(10, 240 // len(series))) * len(series))
    middles = {block: (blocks.index(block) + blocks.count(block) / 2) / len(blocks) for block in numbers}
    labels = "".join(f'<span style="top:{100 * at:.1f}%">block {block}</span>' for block, at in middles.items())
    return (
        f'<div class="heat" style="grid-template-rows:{height}px auto"><div class="rows">{labels}</div>'
        f'<canvas data-kind="{name}" data-steps="{",".join(map(str, steps))}" data-scale="{scale:g}" '
        f'data-heads="{"|".join(map(_head_name, series))}" data-levels="{_base64(levels)}"></canvas>'
        f'<div class="steps"><span>step {steps[0]}</span><span>{steps[-1]}</span></div></div>'
    )


def _level(value: float | None, scale: float, is_mode: bool) -> int:
    """A byte of a heat map; 0 is a gap."""
    if value is None:
        return 0
    if is_mode:
        return 1 + int(value) if value in range(len(_MODES)) else 0
    return 1 + round(254 * min(1.0, max(0.0, value / scale)))


def _maps(shown: _Shown) -> str:
    runs = [each for each in shown.runs if each.maps]
    canvas = '<canvas class="map" width="1" height="1"></canvas>'
    big, small = [], []
    for number, each in enumerate(runs):
        big.append(shown.of_run(each, f'<div class="big" id="big-{number}">{canvas}<p></p></div>', is_named=True))
        cells = _map_places(each)
        heads = sorted({head for _, head in cells})
        parts = ["<span></span>", *(f"<span>{head if len(heads) > 6 else f'head {head}'}</span>" for head in heads)]
        for block in sorted({block for block, _ in cells}):
            parts.append(f"<span>block {block}</span>")
            for place in ((block, head) for head in heads):
                at = cells.index(place) if place in cells else None
                button = f'<button type="button" data-cell="{at}" aria-label="{_head_name(place)}">{canvas}</button>'
                parts.append("<span></span>" if at is None else button)
        template = f"grid-template-columns:auto repeat({len(heads)},minmax(0,1fr))"
        body = f'<div class="small" id="small-{number}" style="{template}">{"".join(parts)}</div>'
        small.append(shown.of_run(each, body))
    last = len(_map_steps(shown)[0]) - 1
    scrubber = (
        '<div class="scrubber"><button id="play" type="button">▶ play</button><input id="step" type="range" min="0" '
        f'max="{last}" value="{last}" aria-label="step of the maps"><output id="at" for="step"></output></div>'
    )
    columns = len(runs) if len(runs) <= 4 else 3
    return scrubber + grid(columns, big) + grid(columns, small) if runs else ""


def _map_places(each: Run) -> list[tuple[int, int]]:
    return sorted({(kept.block, kept.head) for kept in each.maps})


def _map_steps(shown: _Shown) -> tuple[list[int], int]:
    """The steps that the scrubber has, and the rows and columns of a map, so that all of them fit."""
    logged = sorted({kept.step for each in shown.runs for kept in each.maps})
    sizes = {(number, m.block, m.head): (m.rows, m.cols) for number, each in enumerate(shown.runs) for m in each.maps}
    for side, least in _SIDES.items():
        of_a_step = sum(min(rows, side) * min(cols, side) for rows, cols in sizes.values())
        fit = shown.map_bytes // max(1, of_a_step)
        if fit >= min(least, len(logged)):
            break
    return evenly(logged, max(2, fit)), side


def _frames(shown: _Shown) -> dict[str, Any]:
    """The maps for the page's script: at every step each run's newest."""
    steps, side = _map_steps(shown)
    runs = ({"color": shown.color(each)[4:-1], "cells": _cells(each, steps, side)} for each in shown.runs if each.maps)
    return {"steps": steps, "runs": list(runs)}


def _cells(each: Run, steps: Sequence[int], side: int) -> list[dict[str, Any]]:
    told = {name: each.heads(name) for name in ("entropy", "map_rank", "mode")}
    cells = []
    for place in _map_places(each):
        here = {kept.step: kept for kept in each.maps if (kept.block, kept.head) == place}
        facts = {name: dict(series.get(place, [])) for name, series in told.items()}
        newest = [max((at for at in here if at <= step), default=-1) for step in steps]
        used = sorted(set(newest) - {-1})
        frames = []
        for step in used:
            small = pooled(here[step], side)
            numbers = {name: values.get(step) for name, values in facts.items()}
            numbers["mode"] = numbers["mode"] if numbers["mode"] in range(len(_MODES)) else None
            size = {"step": step, "rows": small.rows, "cols": small.cols}
            frames.append({**size, **numbers, "levels": _base64(small.levels)})
        at = [used.index(step) if step in used else -1 for step in newest]
        cells.append({"block": place[0], "head": place[1], "at": at, "frames": frames})
    return cells


def _sharpness(shown: _Shown) -> str:
    charts = []
    for tag, title in _SHARPNESS.items():
        tags = (tag, "sharpness_threshold") if tag == "sharpness_adam" else (tag,)
        runs = [each for each in shown.runs if each.series.get(tag)]
        if not runs:
            continue
        y = _axis("", (each.series.get(one, []) for each in runs for one in tags))
        lines = [line for each in runs for line in _lines(each.title, each.series[tag], shown.color(each), 2.0)]
        for each in runs if len(tags) > 1 else []:
            threshold = each.series.get("sharpness_threshold", [])
            lines += _lines(f"threshold, {each.title}", threshold, shown.color(each), dashed=True)
        charts.append(figure(shown.chart(title, y, lines, 530, 230)))
    if not charts:
        return ""
    dashed = '<span class="dashed">threshold (2 + 2β₁) / ((1 − β₁) η)</span>'
    return legend(((each.title, shown.color(each)) for each in shown.runs), dashed) + grid(2, charts)


def _warnings(shown: _Shown) -> str:
    given = [(each, warned) for each in shown.runs for warned in each.warnings]
    rows = (
        row(
            shown.color(each),
            each.title,
            [cell(str(it.step)), cell(str(it.block)), cell(str(it.head)), cell(it.text, kind="text")],
        )
        for each, it in given[:_WARNINGS]
    )
    more = f"<p>and {len(given) - _WARNINGS} more.</p>" if len(given) > _WARNINGS else ""
    return table(("run", "step", "block", "head", "warning"), rows) + more if given else ""


def _axis(label: str, series: Iterable[Points], log: bool | None = None, roof: float = math.inf) -> Axis:
    """A range around all numbers below `roof`; logarithmic as `log` says, or where they span much."""
    found = [value for points in series for _, value in points if value is not None]
    low, high = min(found, default=0.0), min(max(found, default=1.0), roof)
    positive = [value for value in found if value > 0]
    if log or (log is None and low > 0 and high / low > 30):
        low, high = min(positive, default=0.1), max(positive, default=1.0)
        return _Range(label, max(low, high * 1e-12) / 1.25, high * 1.25, log=True)
    low = min(low, high)
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return _Range(label, 0.0 if 0 <= low < 0.35 * high else low - pad, high + pad)


def _curves(
    series: Mapping[Place, Points], name: Callable[[Place], str], color: Callable[[Place], str], width: float = 1.25
) -> list[Line]:
    return [line for place, points in series.items() for line in _lines(name(place), points, color(place), width)]


def _lines(name: str, points: Points, color: str, width: float = 1.25, dashed: bool = False) -> list[Line]:
    """A curve: a line for each stretch between gaps; one that is a point is drawn as a dot."""
    found = []
    for stretch in stretches(thin(points, _POINTS)):
        steps, values = zip(*(stretch if len(stretch) > 1 else stretch * 2), strict=True)
        found.append(Line(name, steps, values, color, dashed=dashed, width=width if len(stretch) > 1 else 3.5))
    return found


def _block_name(block: int) -> str:
    return f"block {block}"


def _head_name(place: tuple[int, int]) -> str:
    return f"block {place[0]}, head {place[1]}"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


_PANELS = (
    _Panel(
        "summary",
        "Summary",
        "Where the runs stand at their last measurement; σ₁(W_qᵀW_k) is the largest of the whole run.",
        "any measurement",
        _summary,
    ),
    _Panel(
        "loss",
        "Loss",
        "Of the steps that were measured; where there are many of them smoothed, the single ones faint behind. "
        "A loss that is a fifth above the highest of the first is cut off.",
        "loss: watch.step(loss)",
        _loss,
    ),
    _Panel(
        "rates",
        "The rate of every matrix",
        "α = min(schedule, τ σ₁(W) / σ₁(U)). A curve below the dashed schedule is a matrix that is being "
        "clipped; where they meet, the step is AdamW's. All charts have the same range.",
        "clip/…/lr: an AdamW² optimizer",
        _rates,
    ),
    _Panel(
        "clipped",
        "How many matrices are clipped",
        "The share of those of a kind, and of those in a block.",
        "clip_share/…: an AdamW² optimizer",
        _clipped,
    ),
    _Panel(
        "terms",
        "Fifteen numbers of every block",
        "Spectral norms of the weights and of their products, norms of the gains and biases, of the block's "
        "input and of its gradient. The charts of one term have the same range in all runs.",
        "block/…/sigma_q and its like",
        _terms,
    ),
    _Panel(
        "energy",
        "Where the energy of W_qᵀW_k is",
        "SEC is the share of Σσ² in the largest singular values of a head, the effective rank is over how "
        "many the energy spreads. In a malignant collapse SEC goes to 1 and the rank to a few. A curve is a "
        "head.",
        "block/…/head/…/sec or effective_rank",
        _energy,
    ),
    _Panel(
        "entropy",
        "Attention entropy",
        "Of every head over the steps, then for each block the mean of its heads and their range. At 0 a "
        "query looks at one key; at the uniform value it looks at all alike, and attention passes on nothing "
        "but an average.",
        "block/…/head/…/entropy",
        _entropy,
    ),
    _Panel(
        "modes",
        "Modes of the heads",
        "In a benign collapse tokens look at themselves; in a malignant one all look at the same few keys.",
        "block/…/head/…/mode",
        _modes,
    ),
    _Panel(
        "maps",
        "Attention maps over time",
        "A row is a query, a column a key; colour is as dense as √p. A small map that is pressed is shown "
        "large, in every run. A map with more rows or columns than are shown has the maximum of those that a "
        "pixel stands for.",
        "maps: Watch(…, maps=[0, 1])",
        _maps,
    ),
    _Panel(
        "similarity",
        "Token similarity",
        "The mean cosine between the tokens at a block's input; at 1 all tokens are alike (rank collapse).",
        "block/…/similarity",
        _similarity,
    ),
    _Panel(
        "gradients",
        "Gradients of queries and keys beside those of values",
        "Where attention has collapsed, W_q and W_k get hardly any gradient. All charts have the same range.",
        "block/…/grad_q, grad_k and grad_v",
        _gradients,
    ),
    _Panel(
        "sharpness",
        "Sharpness",
        "The largest eigenvalue of the Hessian, and of the Hessian as Adam preconditions it: above the "
        "threshold its steps overshoot.",
        "sharpness or sharpness_adam: watch.step(loss, sharpness=…)",
        _sharpness,
    ),
    _Panel(
        "warnings",
        "Warnings",
        "As they were given while the runs were training.",
        "a warning; none was given",
        _warnings,
    ),
)
