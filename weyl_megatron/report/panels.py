"""The panels of a report that are charts and tables: each is HTML, empty where no run has what it
shows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from itertools import chain
from typing import Any

from .charts import Axis, Chart, Line, Rule, smooth
from .curves import POINTS, Range, Shown, axis, block_name, curve, curves, cut, head_name
from .maps import MODES, heats
from .page import cell, figure, grid, legend, row, table
from .runs import Points, Run, evenly, matrix_place, stretches

_SMOOTHED_FROM = 100  # points of a loss
_WARNINGS = 200  # rows of the table
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
_SHARPNESS = {
    "sharpness": "λ₁ of the Hessian",
    "sharpness_adam": "λ₁ of the preconditioned Hessian",
}


def summary(shown: Shown) -> str:
    heads = (
        "run",
        "last loss",
        "mean attention entropy",
        "worst head's SEC",
        "largest σ₁(W_qᵀW_k)",
        "heads by mode",
    )
    return table((*heads, "warnings"), (_summary_row(shown, each) for each in shown.runs))


def _summary_row(shown: Shown, each: Run) -> str:
    losses, validation, uniform = (
        each.series.get("loss"),
        each.last("validation_loss"),
        each.uniform_entropy,
    )
    said = (
        f"validation {validation:.4g}"
        if validation is not None
        else f"step {losses[-1][0]}"
        if losses
        else ""
    )
    last = losses[-1][1] if losses else None
    entropies = [points[-1][1] for points in each.heads("entropy").values()]
    finite = [value for value in entropies if value is not None]
    sigma: Mapping[Any, Points] = each.heads("sigma_qk") or {
        (block, None): points for block, points in each.blocks("sigma_qk").items()
    }
    cells = [
        cell("–" if not losses else "not finite" if last is None else f"{last:.4g}", said),
        cell(
            f"{sum(finite) / len(finite):.2f}" if finite else "–",
            f"uniform {uniform:.2f}" if uniform else "",
        ),
        _largest({place: points[-1:] for place, points in each.heads("sec").items()}),
        _largest(sigma),
        f"<td>{_mode_counts(each)}</td>",
        cell(
            str(len(each.warnings)),
            f"first at step {each.warnings[0].step}" if each.warnings else "",
        ),
    ]
    return row(shown.color(each), each.title, cells)


def _largest(series: Mapping[Any, Points]) -> str:
    values = [
        (value, step, place)
        for place, points in series.items()
        for step, value in points
        if value is not None
    ]
    if not values:
        return cell("–")
    value, step, (block, head) = max(values, key=lambda found: found[0])
    return cell(
        f"{value:.4g}", f"block {block}{'' if head is None else f', head {head}'}, step {step}"
    )


def _mode_counts(each: Run) -> str:
    modes = [points[-1][1] for points in each.heads("mode").values()]
    counted = ((mode, name, modes.count(mode)) for mode, name in enumerate(MODES))
    spans = (
        f'<b style="--mode:var(--mode-{mode})">{count}</b><span>{name}</span>'
        for mode, name, count in counted
    )
    return f'<span class="modes">{"".join(spans)}</span>' if modes else "–"


def loss(shown: Shown) -> str:
    runs = [each for each in shown.runs if "loss" in each.series]
    if not runs:
        return ""
    began = [value for each in runs for _, value in each.series["loss"][:5] if value is not None]
    roof = 1.2 * max(began, default=math.inf) + 1e-6
    y = axis("training loss", (each.series["loss"] for each in runs), log=False, roof=roof)
    x = Range("step", 0, max(1, shown.steps[-1]))
    lines = [line for each in runs for line in _loss_lines(each, shown.color(each), x, y)]
    chart = Chart("", x, y, lines, width=1080, height=380, right=190, margins=(24, 32, 46))
    return grid(1, [shown.legend() + chart.svg()])


def _loss_lines(each: Run, color: str, x: Axis, y: Axis) -> list[Line]:
    """A run's loss, the single steps faint behind where there are many; its name at the end if that
    is at the edge.
    """
    points = each.series["loss"]
    lines = curve(each.title, points, color, 2.0)
    behind: list[Line] = []
    if len(points) >= _SMOOTHED_FROM:
        behind = [replace(line, faint=True, width=0.75) for line in lines]
        smoothed: Points = []
        for stretch in stretches(points):
            values = smooth([value for _, value in stretch], len(points) // 20)
            smoothed += [
                (stretch[0][0] - 1, None),
                *zip((step for step, _ in stretch), values, strict=True),
            ]
        lines = curve(each.title, smoothed, color, 2.25)
    if lines and x.fraction(lines[-1].x[-1]) > 0.98 and 0 <= y.fraction(lines[-1].y[-1]) <= 1:
        lines[-1] = replace(lines[-1], label=cut(each.title, 26))
    return [*behind, *lines]


def rates(shown: Shown) -> str:
    runs = [each for each in shown.runs if each.matrices("lr")]
    found = (
        points
        for each in runs
        for points in [*each.matrices("lr").values(), each.series.get("lr", [])]
    )
    y = axis("rate α, log scale", found, log=True)
    parts = []
    for each in runs:
        kinds: dict[str, list[Line]] = {}
        for matrix, points in each.matrices("lr").items():
            kind, block = matrix_place(matrix)
            color = "var(--ink)" if block is None else shown.block_color(block)
            name = matrix if "*" in kind else "α" if block is None else f"block {block}"
            kinds.setdefault(kind, []).extend(curve(name, points, color))
        schedule = curve("schedule", each.series.get("lr", []), "var(--ink-3)", 1.0, dashed=True)
        charts = (
            shown.chart(cut(kind, 48), y, [*schedule, *kinds[kind]], 347, 180) for kind in kinds
        )
        parts.append(f"<h3>{escape(each.title)}</h3>{grid(3, map(figure, charts))}")
    return (
        shown.block_legend('<span class="dashed">schedule</span>') + "".join(parts) if parts else ""
    )


def clipped(shown: Shown) -> str:
    runs = [each for each in shown.runs if each.shares() or each.block_shares()]
    kinds = list(dict.fromkeys(kind for each in runs for kind in each.shares()))
    colors = {kind: f"hsl({360 * at / len(kinds):.0f} 60% 52%)" for at, kind in enumerate(kinds)}
    y = Range("share of clipped matrices", 0, 1.02)
    parts = []
    for each in runs:
        of_kind = curves(each.shares(), str, colors.__getitem__)
        of_block = curves(each.block_shares(), block_name, shown.block_color)
        drawn = (("by kind of matrix", of_kind), ("by block", of_block))
        charts = (shown.chart(title, y, lines, 530, 190) for title, lines in drawn if lines)
        parts.append(f"<h3>{escape(each.title)}</h3>{grid(2, map(figure, charts))}")
    return legend(colors.items()) + shown.block_legend() + "".join(parts) if parts else ""


def terms(shown: Shown) -> str:
    """A chart for every term and run; those of a term have one range."""
    present = [tag for tag in _TERMS if any(each.blocks(tag) for each in shown.runs)]
    columns = 4 if shown.columns in (2, 4) else 3
    charts = (
        _of_blocks(shown, tag, each, [tag], columns) for tag in present for each in shown.runs
    )
    return shown.legend() + shown.block_legend() + grid(columns, charts) if present else ""


def similarity(shown: Shown) -> str:
    if not any(each.blocks("similarity") for each in shown.runs):
        return ""
    charts = (
        _of_blocks(shown, "similarity", each, ["similarity"], shown.columns) for each in shown.runs
    )
    return shown.legend() + shown.block_legend() + grid(shown.columns, charts)


def gradients(shown: Shown) -> str:
    """The three matrices of a run beside each other; all in one range."""
    runs = [each for each in shown.runs if any(each.blocks(tag) for tag in _GRADIENTS)]
    charts = (
        _of_blocks(shown, tag, each, list(_GRADIENTS), 3) for each in runs for tag in _GRADIENTS
    )
    return shown.legend() + shown.block_legend() + grid(3, charts) if runs else ""


def _of_blocks(shown: Shown, tag: str, each: Run, ranged: Sequence[str], columns: int) -> str:
    """A run's chart of a term, a curve for every block, in the range of all runs' terms
    `ranged`.
    """
    y = axis(
        "",
        (points for other in shown.runs for one in ranged for points in other.blocks(one).values()),
    )
    lines = curves(each.blocks(tag), block_name, shown.block_color)
    title = {**_TERMS, **_GRADIENTS}.get(tag, tag)
    return shown.of_run(
        each, shown.chart(title, y, lines, _WIDTHS[columns], 170), attributes=f' data-term="{tag}"'
    )


def energy(shown: Shown) -> str:
    figures = []
    for name, title in _ENERGY.items():
        if not any(each.heads(name) for each in shown.runs):
            continue
        y = axis(
            "", (points for each in shown.runs for points in each.heads(name).values()), log=False
        )
        for each in shown.runs:
            largest = f"(d, {each.header['sec']})" if name == "sec" and "sec" in each.header else ""
            lines = curves(
                each.heads(name), head_name, lambda head: shown.block_color(head[0]), 1.0
            )
            chart = shown.chart(cut(title + largest, 32), y, lines, _WIDTHS[shown.columns], 230)
            figures.append(shown.of_run(each, chart))
    return shown.legend() + shown.block_legend() + grid(shown.columns, figures) if figures else ""


def entropy(shown: Shown) -> str:
    runs = [each for each in shown.runs if each.heads("entropy")]
    if not runs:
        return ""
    uniform = sorted({told for each in runs if (told := round(each.uniform_entropy or 0.0, 3)) > 0})
    found = (points for each in runs for points in each.heads("entropy").values())
    y = axis(
        "attention entropy, nats",
        chain(found, ([(0, value * 1.08)] for value in uniform)),
        log=False,
    )
    scale = uniform[-1] if uniform else max(y.high, 1e-3)
    ramp = (
        f'<p>0<span class="ramp"></span>{scale:.3g} '
        f"nats{', uniform attention' if uniform else ''}</p>"
    )
    rules = [Rule(value, "uniform") for value in uniform]
    charts = []
    for block in sorted({block for each in runs for block, _ in each.heads("entropy")}):
        lines = [line for each in runs for line in _banded(each, block, shown.color(each))]
        charts.append(figure(shown.chart(block_name(block), y, lines, 347, 190, rules)))
    return ramp + heats(shown, "entropy", scale) + shown.legend() + grid(3, charts)


def _banded(each: Run, block: int, color: str) -> list[Line]:
    """The mean of a block's heads, and their range."""
    of_step: dict[int, list[float]] = {}
    for (number, _), points in each.heads("entropy").items():
        for step, value in points if number == block else []:
            of_step.setdefault(step, []).extend([] if value is None else [value])
    means: Points = [(step, sum(v) / len(v) if v else None) for step, v in sorted(of_step.items())]
    lines = []
    for stretch in stretches(means):
        steps = evenly([step for step, _ in stretch], POINTS)
        band = ([min(of_step[step]) for step in steps], [max(of_step[step]) for step in steps])
        drawn = curve(each.title, [(step, dict(stretch)[step]) for step in steps], color)
        lines += [replace(line, band=band) for line in drawn] if len(steps) > 1 else drawn
    return lines


def sharpness(shown: Shown) -> str:
    charts = []
    for tag, title in _SHARPNESS.items():
        tags = (tag, "sharpness_threshold") if tag == "sharpness_adam" else (tag,)
        runs = [each for each in shown.runs if each.series.get(tag)]
        if not runs:
            continue
        y = axis("", (each.series.get(one, []) for each in runs for one in tags))
        lines = [
            line
            for each in runs
            for line in curve(each.title, each.series[tag], shown.color(each), 2.0)
        ]
        for each in runs if len(tags) > 1 else []:
            threshold = each.series.get("sharpness_threshold", [])
            lines += curve(f"threshold, {each.title}", threshold, shown.color(each), dashed=True)
        charts.append(figure(shown.chart(title, y, lines, 530, 230)))
    if not charts:
        return ""
    dashed = '<span class="dashed">threshold (2 + 2β₁) / ((1 − β₁) η)</span>'
    return legend(((each.title, shown.color(each)) for each in shown.runs), dashed) + grid(
        2, charts
    )


def warnings(shown: Shown) -> str:
    given = [(each, warned) for each in shown.runs for warned in each.warnings]
    rows = (
        row(
            shown.color(each),
            each.title,
            [
                cell(str(it.step)),
                cell(str(it.block)),
                cell(str(it.head)),
                cell(it.text, kind="text"),
            ],
        )
        for each, it in given[:_WARNINGS]
    )
    more = f"<p>and {len(given) - _WARNINGS} more.</p>" if len(given) > _WARNINGS else ""
    return table(("run", "step", "block", "head", "warning"), rows) + more if given else ""
