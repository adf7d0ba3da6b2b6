"""The panels of a report that are charts and tables: HTML, empty where no run has its data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from html import escape
from itertools import chain
from typing import Any

from .charts import Axis, Chart, Line, Rule
from .curves import (
    Place,
    Range,
    Shown,
    axis,
    banded,
    block_name,
    by_step,
    curve,
    curves,
    cut,
    head_name,
    means,
    rate_curves,
    trend,
)
from .maps import MODES, heats
from .page import cell, figure, grid, legend, row, table
from .runs import Points, Run, matrix_place

_SMOOTHED_FROM = 100  # points of a loss
_WARNINGS = 200  # rows of the table
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
_SHARPNESS = {
    "sharpness": "λ₁ of the Hessian",
    "sharpness_adam": "λ₁ of the preconditioned Hessian",
}


def summary(shown: Shown) -> str:
    """A row a run."""
    heads = (
        "run",
        "last loss",
        "mean attention entropy",
        "worst head's SEC",
        "largest σ₁(W_qᵀW_k)",
        "heads by mode",
        "warnings",
    )
    return table(heads, (_summary_row(shown, each) for each in shown.runs))


def _summary_row(shown: Shown, each: Run) -> str:
    entropies = [points[-1][1] for points in each.heads("entropy").values()]
    finite = [value for value in entropies if value is not None]
    uniform = f"uniform {each.uniform_entropy:.2f}" if each.uniform_entropy else ""
    sigma: Mapping[Any, Points] = each.heads("sigma_qk") or {
        (block, None): points for block, points in each.blocks("sigma_qk").items()
    }
    first = f"first at step {each.warnings[0].step}" if each.warnings else ""
    cells = [
        _last_loss(each),
        cell(f"{sum(finite) / len(finite):.2f}" if finite else "–", uniform),
        _largest({place: points[-1:] for place, points in each.heads("sec").items()}),
        _largest(sigma),
        f"<td>{_mode_counts(each)}</td>",
        cell(str(len(each.warnings)), first),
    ]
    return row(shown.color(each), each.title, cells)


def _last_loss(each: Run) -> str:
    losses, validation = each.series.get("loss"), each.last("validation_loss")
    said = f"step {losses[-1][0]}" if losses else ""
    if validation is not None:
        said = f"validation {validation:.4g}"
    if not losses:
        return cell("–", said)
    last = losses[-1][1]
    return cell("not finite" if last is None else f"{last:.4g}", said)


def _largest(series: Mapping[Any, Points]) -> str:
    values = [
        (value, step, place)
        for place, points in series.items()
        for step, value in points
        if value is not None
    ]
    if not values:
        return cell("–")
    value, step, (block, head) = max(values, key=lambda point: point[0])
    where = block_name(block) if head is None else head_name((block, head))
    return cell(f"{value:.4g}", f"{where}, step {step}")


def _mode_counts(each: Run) -> str:
    modes = [points[-1][1] for points in each.heads("mode").values()]
    counted = ((mode, name, modes.count(mode)) for mode, name in enumerate(MODES))
    spans = (
        f'<b style="--mode:var(--mode-{mode})">{count}</b><span>{name}</span>'
        for mode, name, count in counted
    )
    return f'<span class="modes">{"".join(spans)}</span>' if modes else "–"


def loss(shown: Shown) -> str:
    """All runs' losses in one chart."""
    runs = [each for each in shown.runs if "loss" in each.series]
    if not runs:
        return ""
    began = [value for each in runs for _, value in each.series["loss"][:5] if value is not None]
    roof = 1.2 * max(began, default=math.inf) + 1e-6
    y = axis("training loss", (each.series["loss"] for each in runs), log=False, roof=roof)
    x = Range("step", 0, max(1, shown.steps[-1]))
    lines = [line for each in runs for line in _loss_lines(each, shown.color(each), x, y)]
    chart = Chart("", x, y, lines, width=1080, height=380, right=220, margins=(24, 32, 46))
    return grid(1, [shown.legend() + chart.svg()])


def _loss_lines(each: Run, color: str, x: Axis, y: Axis) -> list[Line]:
    """A run's loss, smoothed where it has many points; its name at the end if that is in sight."""
    points = each.series["loss"]
    if len(points) >= _SMOOTHED_FROM:
        lines = trend(each.title, points, color, reach=len(points) // 20)
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
        kinds = rate_curves(each.matrices("lr"), schedule, block_name, shown.block_color)
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
        of_kind = curves(each.shares(), str, colors.__getitem__)
        of_block = curves(each.block_shares(), block_name, shown.block_color)
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
    directions = [points for each in runs for points in each.matrices("directions").values()]
    most = max((value for points in directions for _, value in points if value), default=0)
    ranges = {key: Range("", 0, 1.02) for key in _PROJECTED}
    ranges["directions"] = Range("", 0, 1.06 * max(most, 1))
    parts = []
    for each in runs:
        drawn = []
        for key, title in _PROJECTED.items():
            lines = curves(_means(each.matrices(key), _kind), str, colors.__getitem__)
            drawn.append((f"{title}, by kind", ranges[key], lines))
        for key, title in _PROJECTED.items():
            lines = curves(_means(each.matrices(key), _block), block_name, shown.block_color)
            drawn.append((f"{title}, by block", ranges[key], lines))
        charts = (shown.chart(title, y, lines, 347, 180) for title, y, lines in drawn if lines)
        parts.append(f"<h3>{escape(each.title)}</h3>{grid(3, map(figure, charts))}")
    legends = legend((kind, colors[kind]) for kind in kinds) + shown.block_legend()
    return legends + "".join(parts) if parts else ""


def _kind(matrix: str) -> str:
    return matrix_place(matrix)[0]


def _block(matrix: str) -> int | None:
    return matrix_place(matrix)[1]


def _means(
    series: Mapping[str, Points], place_of: Callable[[str], Place | None]
) -> dict[Place, Points]:
    """The mean over the matrices of each place; those that have none are left out."""
    members: dict[Place, list[Points]] = {}
    for matrix, points in series.items():
        place = place_of(matrix)
        if place is not None:
            members.setdefault(place, []).append(points)
    return {place: means(by_step(some)) for place, some in members.items()}


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
    lines = curves(each.blocks(tag), block_name, shown.block_color)
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
        drawn = (points for each in shown.runs for points in each.heads(name).values())
        y = axis("", drawn, log=False)
        for each in shown.runs:
            largest = f"(d, {each.header['sec']})" if name == "sec" and "sec" in each.header else ""
            lines = curves(each.heads(name), head_name, lambda at: shown.block_color(at[0]), 1.0)
            chart = shown.chart(cut(title + largest, 32), y, lines, _WIDTHS[shown.columns], 230)
            figures.append(shown.of_run(each, chart))
    return _legends(shown) + grid(shown.columns, figures) if figures else ""


def entropy(shown: Shown) -> str:
    """Every head as a heat map, then for each block the mean of its heads and their range."""
    runs = [each for each in shown.runs if each.heads("entropy")]
    if not runs:
        return ""
    rounded = {round(each.uniform_entropy or 0.0, 3) for each in runs}
    uniform = sorted(value for value in rounded if value > 0)
    drawn = (points for each in runs for points in each.heads("entropy").values())
    rooms: Iterable[Points] = ([(0, value * 1.08)] for value in uniform)  # for the rules' names
    y = axis("attention entropy, nats", chain(drawn, rooms), log=False)
    scale = uniform[-1] if uniform else max(y.high, 1e-3)
    end = "nats, uniform attention" if uniform else "nats"
    ramp = f'<p>0<span class="ramp"></span>{scale:.3g} {end}</p>'
    rules = [Rule(value, "uniform") for value in uniform]
    charts = []
    for block in sorted({block for each in runs for block, _ in each.heads("entropy")}):
        lines = [line for each in runs for line in _of_block(each, block, shown.color(each))]
        charts.append(figure(shown.chart(block_name(block), y, lines, 347, 190, rules)))
    return ramp + heats(shown, "entropy", scale) + shown.legend() + grid(3, charts)


def _of_block(each: Run, block: int, color: str) -> list[Line]:
    """A run's entropy in a block."""
    series = each.heads("entropy")
    return banded(each.title, (points for at, points in series.items() if at[0] == block), color)


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


def warnings(shown: Shown) -> str:
    """A row a warning."""
    given = [(each, warned) for each in shown.runs for warned in each.warnings]
    if not given:
        return ""
    rows = []
    for each, warned in given[:_WARNINGS]:
        numbers = (warned.step, warned.block, warned.head)
        cells = [cell(str(number)) for number in numbers] + [cell(warned.text, kind="text")]
        rows.append(row(shown.color(each), each.title, cells))
    more = f"<p>and {len(given) - _WARNINGS} more.</p>" if len(given) > _WARNINGS else ""
    return table(("run", "step", "block", "head", "warning"), rows) + more
