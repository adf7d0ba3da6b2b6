"""The report: one HTML file with everything in it, readable without a network, in light and in dark
mode.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from ..report.charts import Axis, Chart, Line, Rule, depth_color, smooth
from .page import PAGE
from .recipe import (
    ADAMW2,
    ADAMW2_AUTO,
    ADAMW_ALONE,
    ADAMW_WARMUP,
    PEAK_LR,
    RUNS,
    warmup_steps,
)
from .results import Results, RunResult, claims, row

COLORS = {run.name: f"var(--{run.name})" for run in RUNS}
KINDS = {
    "q": "query",
    "k": "key",
    "v": "value",
    "o": "attention output",
    "fc": "MLP in",
    "proj": "MLP out",
    "wte": "token embedding",
    "wpe": "position embedding",
    "lm_head": "head",
}


def write_report(results: Results, path: Path) -> None:
    """Writes the report of `results` to `path`."""
    path.write_text(PAGE.substitute(sections(results)), encoding="utf-8")


def sections(results: Results) -> dict[str, str]:
    """The values of the page's placeholders."""
    layers = results.setting["model"]["layers"]
    judged = claims(results)
    return {
        "headline": "AdamW² trains without warmup"
        if all(claim.holds for claim in judged)
        else "A claim is not met",
        "takeaway": takeaway(results),
        "tiles": "".join(tile(results, result) for result in results.runs.values()),
        "claims": "".join(
            f'<li class="{"met" if claim.holds else "unmet"}">{escape(claim.text)}</li>'
            for claim in judged
        ),
        "legend": legend(),
        "loss": loss_chart(results).svg(),
        "rates_paper": rate_charts(results.runs[ADAMW2.name], layers),
        "rates_auto": rate_charts(results.runs[ADAMW2_AUTO.name], layers),
        "depths": depth_legend(layers),
        "entropy": "".join(f"<figure>{chart.svg()}</figure>" for chart in entropy_charts(results)),
        "rows": "".join(table_row(results, result) for result in results.runs.values()),
        "unigram": f"{results.unigram_entropy:.3f}",
        "change": change(results),
        "facts": facts(results),
    }


def takeaway(results: Results) -> str:
    """The result in one sentence."""
    alone, warmup = results.loss(ADAMW_ALONE), results.loss(ADAMW_WARMUP)
    steps = results.setting["steps"]
    return (
        f"Without warmup, AdamW ends at {alone:.2f} nats per byte, where a model that ignores all "
        f"context can get to {results.unigram_entropy:.2f}. AdamW², without warmup too, trains the "
        f"same model on the same batches to {results.loss(ADAMW2):.2f} with τ = 0.01 and to "
        f"{results.loss(ADAMW2_AUTO):.2f} with τ = balanced. AdamW with a warmup over "
        f"{warmup_steps(steps)} of its {steps} steps ends at {warmup:.2f}."
    )


def tile(results: Results, result: RunResult) -> str:
    """A run's final number, large, and what there is to say about it."""
    if result.clipped_share is not None:
        note = f"{result.clipped_share:.0%} of matrix-steps clipped"
    elif result.run.warmup:
        note = (
            f"warmup over {warmup_steps(results.setting['steps'])} of "
            f"{results.setting['steps']} steps"
        )
    else:
        note = f"the unigram entropy is {results.unigram_entropy:.3f}"
    return (
        f'<div class="tile" style="--run:{COLORS[result.run.name]}"><b>{escape(result.run.title)}</b>'
        f"<strong>{result.validation_loss:.3f}</strong><span>{note}</span></div>"
    )


def legend() -> str:
    """The runs and their colours."""
    return "".join(
        f'<span style="--run:{COLORS[run.name]}">{escape(run.title)}</span>' for run in RUNS
    )


def loss_chart(results: Results) -> Chart:
    """Training loss of all runs, smoothed, with the final validation loss as the end point's
    label.
    """
    steps = results.setting["steps"]
    smooth_lines = [
        loss_line(result, reach=max(1, steps // 20)) for result in results.runs.values()
    ]
    faint_lines = [
        replace(loss_line(result), faint=True, width=0.75) for result in results.runs.values()
    ]
    finals = [result.validation_loss for result in results.runs.values()]
    drawn = [results.unigram_entropy, *finals, *(loss for line in smooth_lines for loss in line.y)]
    lowest = min(loss for loss in drawn if math.isfinite(loss))
    return Chart(
        title="",
        x=Axis("step", 0, steps),
        y=Axis("training loss, nats per byte", lowest - 0.15, results.unigram_entropy + 0.7),
        lines=[*faint_lines, *smooth_lines],
        rules=[Rule(results.unigram_entropy, "unigram entropy", at_end=True)],
        width=1080,
        height=420,
        right=160,
        margins=(24, 32, 46),
    )


def loss_line(result: RunResult, reach: int = 0) -> Line:
    """One run's training loss, with a `reach` smoothed and labelled."""
    losses = [record["loss"] for record in result.steps]
    return Line(
        name=result.run.title,
        x=[record["step"] for record in result.steps],
        y=smooth(losses, reach) if reach else losses,
        color=COLORS[result.run.name],
        label=result.run.title if reach else "",
        width=2.25,
    )


def place(matrix: str) -> tuple[str, int | None]:
    """A matrix's kind, and its layer where it is in one."""
    inside = re.fullmatch(r"h\.(\d+)\.(?:attn|mlp)\.(\w+)\.weight", matrix)
    return (inside[2], int(inside[1])) if inside else (matrix.removesuffix(".weight"), None)


def rate_charts(result: RunResult, layers: int) -> str:
    """The rate of every matrix of a run beside the schedule, one chart per kind."""
    logged = [record for record in result.steps if record.get("alpha")]
    steps = [record["step"] for record in logged]
    schedule = Line(
        "schedule", steps, [record["lr"] for record in logged], "var(--ink-3)", dashed=True, width=1
    )
    lines = {kind: [schedule] for kind in KINDS}
    for matrix in logged[0]["alpha"]:
        kind, layer = place(matrix)
        name, color = (
            ("α", "var(--ink)")
            if layer is None
            else (f"layer {layer + 1}", depth_color(layer, layers))
        )
        lines[kind].append(
            Line(name, steps, [record["alpha"][matrix] for record in logged], color, width=1.25)
        )
    x = Axis("step", 0, len(result.steps))
    y = Axis("rate α, log scale", lowest_rate(result) * 0.8, PEAK_LR * 1.4, log=True)
    charts = (
        Chart(title, x, y, lines[kind], width=350, height=190) for kind, title in KINDS.items()
    )
    return "".join(f"<figure>{chart.svg()}</figure>" for chart in charts)


def lowest_rate(result: RunResult) -> float:
    """The smallest rate that a matrix got."""
    rates: list[float] = [
        rate for record in result.steps for rate in record.get("alpha", {}).values()
    ]
    return min(rate for rate in rates if rate > 0)


def depth_legend(layers: int) -> str:
    """The layers and their colours."""
    names = (
        f'<span style="--run:{depth_color(layer, layers)}">layer {layer + 1}</span>'
        for layer in range(layers)
    )
    return "".join(names) + '<span class="dashed">schedule</span>'


def entropy_charts(results: Results) -> list[Chart]:
    """Attention entropy, one chart per layer: each run's mean over the heads and their range."""
    uniform = results.setting["uniform_entropy"]
    layers = results.setting["model"]["layers"]
    lowest = min(
        min(map(min, record["entropy"]))
        for result in results.runs.values()
        for record in snapshots(result)
    )
    return [
        Chart(
            title=f"layer {layer + 1}",
            x=Axis("step", 0, results.setting["steps"]),
            y=Axis("attention entropy, nats", max(0.0, lowest - 0.1), uniform + 0.35),
            lines=[entropy_line(result, layer) for result in results.runs.values()],
            rules=[Rule(uniform, "uniform")],
            width=350,
            height=210,
        )
        for layer in range(layers)
    ]


def snapshots(result: RunResult) -> list[dict[str, list[list[float]]]]:
    """The steps of a run that logged the attention entropy."""
    return [record for record in result.steps if "entropy" in record]


def entropy_line(result: RunResult, layer: int) -> Line:
    """One run's attention entropy in one layer."""
    heads = [record["entropy"][layer] for record in snapshots(result)]
    return Line(
        name=result.run.title,
        x=[record["step"] for record in result.steps if "entropy" in record],
        y=[sum(values) / len(values) for values in heads],
        color=COLORS[result.run.name],
        band=([min(values) for values in heads], [max(values) for values in heads]),
    )


def table_row(results: Results, result: RunResult) -> str:
    """A run's row of the table."""
    title, *numbers = row(results, result)
    warmup = warmup_steps(results.setting["steps"]) if result.run.warmup else 0
    cells = "".join(f"<td>{escape(cell)}</td>" for cell in [str(warmup), *numbers])
    return (
        f'<tr style="--run:{COLORS[result.run.name]}"><th '
        f'scope="row">{escape(title)}</th>{cells}</tr>'
    )


def change(results: Results) -> str:
    """The DeepSpeed configurations of AdamW and of AdamW² with τ = balanced, as a diff."""
    before, after = (printed(results.runs[run.name].config) for run in (ADAMW_ALONE, ADAMW2_AUTO))
    element = {"-": "del", "+": "ins", " ": "span"}
    marked = (line for line in difflib.ndiff(before, after) if line[0] in element)
    return "".join(
        f"<{element[line[0]]}>{escape(line, quote=False)}</{element[line[0]]}>" for line in marked
    )


def printed(config: dict[str, Any]) -> list[str]:
    """A configuration as lines of JSON, lists of numbers on one line."""
    text = json.dumps(config, indent=2, ensure_ascii=False)
    return re.sub(r"\[[^\[\]{}]*\]", lambda match: " ".join(match[0].split()), text).splitlines()


def facts(results: Results) -> str:
    """Model, text, machine and versions."""
    setting = results.setting
    model, text, machine = setting["model"], setting["text"], setting["machine"]
    entries = {
        "Model": f"byte-level GPT, post-LN, {model['layers']} layers, width {model['width']}, "
        f"{model['heads']} heads, context {model['context']}, {model['parameters']:,} parameters, "
        "no biases",
        "Text": f"{text['files']} files of the Python {machine['python']} standard library (sha256 {text['digest']}…), "
        f"{text['train_bytes']:,} bytes to train on and {text['validation_bytes']:,} held out",
        "Training": f"{setting['steps']} steps of {setting['batch']} sequences, cosine from {PEAK_LR:g} to a tenth, "
        f"no gradient clipping, seed {setting['seed']}; all runs start from the same weights and "
        "see the same batches",
        "Engine": f"DeepSpeed {machine['deepspeed']} ZeRO-2, {setting['ranks']} processes, {setting['precision']}, "
        f"torch {machine['torch']}, weyl-megatron {machine['weyl-megatron']}",
        "Machine": f"{setting['device']}: {machine['processor']}, {machine['system']}",
    }
    return "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in entries.items()
    )
