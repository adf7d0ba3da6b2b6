"""The panels of a report that are charts: HTML, empty where no run has its data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from html import escape
from itertools import chain
from typing import Any

from .charts import Axis, Chart, Line, Mark, Rule
from .curves import (
    HEADS,
    Range,
    Shown,
    axis,
    banded,
    block_name,
    curve,
    cut,
    head_name,
    rate_curves,
    trend,
)
from .groups import Group, Place
from .maps import heats
from .page import figure, grid, legend
from .points import Points
from .run import Run, matrix_place

_SMOOTHED_FROM = 100  # points of a loss
_WIDTHS = {1: 1080, 2: 530, 3: 347, 4: 256}  # of a chart, by how many stand side by side

_TERMS = {
    "sigma_q": "σ₁(W_q)",
    "sigma_k": "σ₁(W_k)",
    "sigma_v": "σ₁(W_v)",
    "sigma_o": "σ₁(W_o)",
    "sigma_1": "σ₁(W₁)",
    "sigma_2": "σ₁(W₂)",
    "sigma_qk": "σ₁(W_qᵀW_k)",
    "sigma_ov": "σ₁(W_oW_v)",
    "sigma_21": "σ₁(W₂W₁)",
    "norm1_gain": "‖γ₁‖",
    "norm1_bias": "‖β₁‖",
    "norm2_gain": "‖γ₂‖",
    "norm2_bias": "‖β₂‖",
    "x": "‖x‖",
    "grad_x": "‖∂L/∂x‖",
}
_GRADIENTS = {f"grad_{role}": f"‖∂L/∂W_{role}‖" for role in "qkv"}
_PROJECTED = {
    "directions": "directions clipped",
    "share": "share of ‖U‖_F left",
    "unseen": "factor on the unseen part",
}
_LOGITS = {
    "max_logit": "largest logit",
    "max_logit_mean": "mean of the queries' largest",
    "max_logit_bound": "‖q‖‖k‖ bound of any query",
}
_ENERGY = {"sec": "SEC", "effective_rank": "effective rank"}
_LEAST = ("effective_rank",)  # of which a small number is the bad one
_SAID = (
    f"Of a run with more than {HEADS} heads a curve is a block: of its heads the largest number, "
    "of the effective rank the least."
)
_SHARPNESS = {
    "sharpness": "λ₁ of the Hessian",
    "sharpness_adam": "λ₁ of the preconditioned Hessian",
}


def loss(shown: Shown) -> str:
    """All runs' losses in one chart, with a mark where a norm jumped."""
    runs = [each for each in shown.runs if "loss" in each.series]
    if not runs:
        return ""
    losses = {each.title: each.series["loss"] for each in runs}
    began = [value for points in losses.values() for _, value in points[:5] if value is not None]
    roof = 1.2 * max(began, default=math.inf) + 1e-6
    y = axis("training loss", losses.values(), log=False, roof=roof)
    x = Range("step", 0, max(1, shown.steps[-1]))
    lines = [line for each in runs for line in _loss_lines(each, shown.color(each), x, y)]
    marks = _spike_marks(shown)
    margins = (24, 32, 46)
    chart = Chart("", x, y, lines, (), 1080, 380, right=220, margins=margins, marks=marks)
    colors = ((each.title, shown.color(each)) for each in shown.runs)
    marked = "a spike: a norm jumped" if marks else ""
    return grid(1, [legend(colors, marked=marked) + chart.svg()])


def _spike_marks(shown: Shown) -> list[Mark]:
    return [
        Mark(spike.step, f"step {spike.step}: {spike.action}", shown.color(each))
        for each in shown.runs
        for spike in each.spikes
    ]


def _loss_lines(each: Run, color: str, x: Axis, y: Axis) -> list[Line]:
    """A run's loss, smoothed where it has many points; its name at the end if that is in sight."""
    points, means = each.series["loss"], each.series.subset(["loss"]).means()
    if len(means) >= _SMOOTHED_FROM:
        lines = trend(each.title, points, color, reach=len(means) // 20, means=means)
    else:
        lines = curve(each.title, points, color, 2.0)
    if lines and x.fraction(lines[-1].x[-1]) > 0.98 and 0 <= y.fraction(lines[-1].y[-1]) <= 1:
        lines[-1] = replace(lines[-1], label=cut(each.title, 26))
    return lines


def rates(shown: Shown) -> str:
    """For each run a chart of every kind of matrix."""
    runs = [each for each in shown.runs if each.matrices("lr")]
    drawn = (
        points
        for each in runs
        for points in [*each.matrices("lr").values(), each.series.get("lr", [])]
    )
    y = axis("rate α, log scale", drawn, log=True)
    parts = []
    for each in runs:
        schedule = each.series.get("lr", [])
        rate = each.matrices("lr")
        kinds = rate_curves(rate, schedule, block_name, shown.block_color, shown.most)
        charts = (shown.chart(cut(kind, 48), y, lines, 347, 180) for kind, lines in kinds.items())
        parts.append(f"<h3>{escape(each.title)}</h3>{grid(3, map(figure, charts))}")
    return shown.block_legend("schedule") + "".join(parts) if parts else ""


def clipped(shown: Shown) -> str:
    """For each run the share of clipped matrices, by kind and by block."""
    runs = [each for each in shown.runs if each.shares() or each.block_shares()]
    colors = _kind_colors(kind for each in runs for kind in each.shares())
    y = Range("share of clipped matrices", 0, 1.02)
    parts = []
    for each in runs:
        of_kind = shown.curves(each.shares(), str, colors.__getitem__)
        of_block = shown.curves(each.block_shares(), block_name, shown.block_color)
        drawn = (("by kind of matrix", of_kind), ("by block", of_block))
        charts = (shown.chart(title, y, lines, 530, 190) for title, lines in drawn if lines)
        parts.append(f"<h3>{escape(each.title)}</h3>{grid(2, map(figure, charts))}")
    return legend(colors.items()) + shown.block_legend() + "".join(parts) if parts else ""


def _kind_colors(kinds: Iterable[str]) -> dict[str, str]:
    """The colours of kinds of matrices."""
    distinct = list(dict.fromkeys(kinds))
    hues = {kind: 360 * at / len(distinct) for at, kind in enumerate(distinct)}
    return {kind: f"hsl({hue:.0f} 60% 52%)" for kind, hue in hues.items()}


def projected(shown: Shown) -> str:
    """For each run with projected matrices a row by kind and a row by block."""
    runs = [each for each in shown.runs if each.matrices("directions")]
    kinds = list(
        dict.fromkeys(_kind(name) for each in runs for name in each.matrices("directions"))
    )
    # The colours of the panel of shares, which has the kinds that are not projected, too.
    colors = _kind_colors(chain((kind for each in shown.runs for kind in each.shares()), kinds))
    peaks = (each.matrices("directions").largest() for each in runs)
    most = max((peak.value for peak in peaks if peak is not None), default=0)
    ranges = {key: Range("", 0, 1.02) for key in _PROJECTED}
    ranges["directions"] = Range("", 0, 1.06 * max(most, 1))
    parts = []
    for each in runs:
        drawn = []
        for key, title in _PROJECTED.items():
            lines = shown.curves(_means(each.matrices(key), _kind), str, colors.__getitem__)
            drawn.append((f"{title}, by kind", ranges[key], lines))
        for key, title in _PROJECTED.items():
            of_block = _means(each.matrices(key), _block)
            lines = shown.curves(of_block, block_name, shown.block_color)
            drawn.append((f"{title}, by block", ranges[key], lines))
        charts = (shown.chart(title, y, lines, 347, 180) for title, y, lines in drawn if lines)
        parts.append(f"<h3>{escape(each.title)}</h3>{grid(3, map(figure, charts))}")
    legends = legend((kind, colors[kind]) for kind in kinds) + shown.block_legend()
    return legends + "".join(parts) if parts else ""


def _kind(matrix: str) -> str:
    return matrix_place(matrix)[0]


def _block(matrix: str) -> int | None:
    return matrix_place(matrix)[1]


def _means(series: Group[str], place_of: Callable[[str], Place | None]) -> dict[Place, Points]:
    """The mean over the matrices of each place; those that have none are left out."""
    members: dict[Place, list[str]] = {}
    for matrix in series:
        place = place_of(matrix)
        if place is not None:
            members.setdefault(place, []).append(matrix)
    return {place: series.subset(matrices).means() for place, matrices in members.items()}


def terms(shown: Shown) -> str:
    """A chart for every term and run; those of a term have one range."""
    present = [tag for tag in _TERMS if any(each.blocks(tag) for each in shown.runs)]
    columns = 4 if shown.columns in (2, 4) else 3
    charts = (
        _of_blocks(shown, tag, each, [tag], columns) for tag in present for each in shown.runs
    )
    return _legends(shown) + grid(columns, charts) if present else ""


def _legends(shown: Shown) -> str:
    return shown.legend() + shown.block_legend()


def similarity(shown: Shown) -> str:
    """A chart a run."""
    tag = "similarity"
    if not any(each.blocks(tag) for each in shown.runs):
        return ""
    charts = (_of_blocks(shown, tag, each, [tag], shown.columns) for each in shown.runs)
    return _legends(shown) + grid(shown.columns, charts)


def gradients(shown: Shown) -> str:
    """The three matrices of a run beside each other; all in one range."""
    runs = [each for each in shown.runs if any(each.blocks(tag) for tag in _GRADIENTS)]
    charts = (
        _of_blocks(shown, tag, each, list(_GRADIENTS), 3) for each in runs for tag in _GRADIENTS
    )
    return _legends(shown) + grid(3, charts) if runs else ""


def _of_blocks(shown: Shown, tag: str, each: Run, ranged: Sequence[str], columns: int) -> str:
    """A run's chart of a term, a curve for every block, in the range of all runs' `ranged`."""
    y = axis(
        "",
        (
            points
            for other in shown.runs
            for term in ranged
            for points in other.blocks(term).values()
        ),
    )
    lines = shown.curves(each.blocks(tag), block_name, shown.block_color)
    title = {**_TERMS, **_GRADIENTS}.get(tag, tag)
    chart = shown.chart(title, y, lines, _WIDTHS[columns], 170)
    return shown.of_run(each, chart, attributes=f' data-term="{tag}"')


def energy(shown: Shown) -> str:
    """A curve a head: SEC and the effective rank of W_qᵀW_k."""
    return _by_head(shown, _ENERGY)


def logits(shown: Shown) -> str:
    """A curve a head: the largest attention logit, its mean, and what no query's exceeds."""
    return _by_head(shown, _LOGITS)


def _by_head(shown: Shown, titles: Mapping[str, str]) -> str:
    figures = []
    for name, title in titles.items():
        if not any(each.heads(name) for each in shown.runs):
            continue
        drawn = [_drawn_heads(each.heads(name), is_least=name in _LEAST) for each in shown.runs]
        y = axis("", (points for series in drawn for points in series.values()), log=False)
        for each, series in zip(shown.runs, drawn, strict=True):
            largest = f"(d, {each.header['sec']})" if name == "sec" and "sec" in each.header else ""
            lines = shown.curves(series, _name, lambda at: shown.block_color(_block_at(at)), 1.0)
            chart = shown.chart(cut(title + largest, 32), y, lines, _WIDTHS[shown.columns], 230)
            figures.append(shown.of_run(each, chart))
    has_many = any(len(each.heads(name)) > HEADS for each in shown.runs for name in titles)
    said = f"<p>{_SAID}</p>" if has_many else ""
    return said + _legends(shown) + grid(shown.columns, figures) if figures else ""


def _drawn_heads(heads: Group[tuple[int, int]], is_least: bool) -> Mapping[Any, Points]:
    """The series of all heads; of very many the largest number of each block's, or the least."""
    if len(heads) <= HEADS:
        return heads
    worst: dict[int, Points] = {}
    for block in _blocks_of(heads):
        bands = _inside(heads, block).bands()
        ends = ((step, band and (band.low if is_least else band.high)) for step, band in bands)
        worst[block] = list(ends)
    return worst


def _name(place: tuple[int, int] | int) -> str:
    return block_name(place) if isinstance(place, int) else head_name(place)


def _block_at(place: tuple[int, int] | int) -> int:
    return place if isinstance(place, int) else place[0]


def _ends(heads: Group[tuple[int, int]]) -> Points:
    """The least and the largest number, for the range of an axis."""
    peaks = (heads.least(), heads.largest())
    return [(peak.step, peak.value) for peak in peaks if peak is not None]


def _blocks_of(heads: Group[tuple[int, int]]) -> list[int]:
    return sorted({block for block, _ in heads})


def _inside(heads: Group[tuple[int, int]], block: int) -> Group[tuple[int, int]]:
    return heads.subset([place for place in heads if place[0] == block])


def entropy(shown: Shown) -> str:
    """Every head as a heat map, then for each block the mean of its heads and their range."""
    runs = [(each, each.heads("entropy")) for each in shown.runs if each.heads("entropy")]
    if not runs:
        return ""
    rounded = {round(each.uniform_entropy or 0.0, 3) for each, _ in runs}
    uniform = sorted(value for value in rounded if value > 0)
    rooms: Iterable[Points] = ([(0, value * 1.08)] for value in uniform)  # for the rules' names
    y = axis(
        "attention entropy, nats", chain((_ends(heads) for _, heads in runs), rooms), log=False
    )
    scale = uniform[-1] if uniform else max(y.high, 1e-3)
    end = "nats, uniform attention" if uniform else "nats"
    ramp = f'<p>0<span class="ramp"></span>{scale:.3g} {end}</p>'
    rules = [Rule(value, "uniform") for value in uniform]
    charts = []
    for block in sorted({block for _, heads in runs for block in _blocks_of(heads)}):
        lines = [
            line
            for each, heads in runs
            for line in banded(
                each.title, _inside(heads, block).bands(), shown.color(each), shown.most
            )
        ]
        charts.append(figure(shown.chart(block_name(block), y, lines, 347, 190, rules)))
    return ramp + heats(shown, "entropy", scale) + shown.legend() + grid(3, charts)


def sharpness(shown: Shown) -> str:
    """The Hessian's largest eigenvalue, plain and preconditioned."""
    charts = []
    for tag, title in _SHARPNESS.items():
        has_threshold = tag == "sharpness_adam"
        tags = (tag, "sharpness_threshold") if has_threshold else (tag,)
        runs = [each for each in shown.runs if each.series.get(tag)]
        if not runs:
            continue
        y = axis("", (each.series.get(name, []) for each in runs for name in tags))
        lines: list[Line] = []
        for each in runs:
            lines += curve(each.title, each.series[tag], shown.color(each), 2.0)
        for each in runs if has_threshold else []:
            threshold = each.series.get("sharpness_threshold", [])
            lines += curve(f"threshold, {each.title}", threshold, shown.color(each), dashed=True)
        charts.append(figure(shown.chart(title, y, lines, 530, 230)))
    if not charts:
        return ""
    colors = ((each.title, shown.color(each)) for each in shown.runs)
    return legend(colors, "threshold (2 + 2β₁) / ((1 − β₁) η)") + grid(2, charts)
