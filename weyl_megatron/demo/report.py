"""The report: what the demo's page shows, drawn by the library of all pages in `report/`."""

from __future__ import annotations

import difflib
import json
import math
import re
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from ..report.charts import Axis, Chart, Line, Rule, depth_color
from ..report.curves import banded, bands_of, rate_curves, run_color, trend
from ..report.page import card, cell, figure, grid, legend, page, row, section, table, tile
from .recipe import (
    ADAMW2,
    ADAMW2_AUTO,
    ADAMW2_PROJECT,
    ADAMW_ALONE,
    ADAMW_WARMUP,
    PEAK_LR,
    RUNS,
    warmup_steps,
)
from .results import Results, RunResult, cells, claims

COLORS = {
    ADAMW_ALONE.name: run_color(0),
    ADAMW_WARMUP.name: run_color(3),
    ADAMW2.name: run_color(1),
    ADAMW2_AUTO.name: run_color(2),
    ADAMW2_PROJECT.name: run_color(4),
}

#: What a chart of rates is called, by the kind of matrix; in the order of the page.
KINDS = {
    "attn.q": "query",
    "attn.k": "key",
    "attn.v": "value",
    "attn.o": "attention output",
    "mlp.fc": "MLP in",
    "mlp.proj": "MLP out",
    "wte": "token embedding",
    "wpe": "position embedding",
    "lm_head": "head",
}

_POINTS = 1000  # of a loss's curve

_LOSS = (
    "Training loss of the five runs, smoothed, the single steps faint behind. The numbers above "
    "are mean losses on held-out files after the last step. The unigram entropy is the least loss "
    "of a model that knows how often each byte occurs and ignores its context."
)
_RATES = (
    "AdamW² bounds the rate of each matrix: α = min(schedule, τ σ₁(W) / σ₁(U)), where U is Adam's "
    "update. A curve that runs below the dashed schedule is a matrix being clipped; where they "
    "meet, the step is AdamW's."
)
_ENTROPY = (
    "Mean over the heads of a layer, and the range between its heads, on fixed held-out text. At "
    "the dotted line every query looks at all its visible keys alike: attention that stays there "
    "has collapsed, and passes on nothing but an average. Layer 1 reads the raw embeddings, which "
    "are too small for its scores to leave zero in any run."
)
_NUMBERS = "Of each run, on the held-out files after the last step."
_CHANGE = (
    "DeepSpeed's configuration of AdamW without warmup, and what AdamW² changes in it. The "
    "training script is the same."
)


def write_report(results: Results, path: Path) -> None:
    """Writes the report of `results` to `path`."""
    title = "AdamW² without warmup: the demo"
    text = page(title, "".join(parts(results)), heading=headline(results))
    path.write_text(text, encoding="utf-8")


def headline(results: Results) -> str:
    """What the demo is there to show, if it does."""
    holds = all(claim.holds for claim in claims(results))
    return "AdamW² trains without warmup" if holds else "A claim is not met"


def parts(results: Results) -> list[str]:
    """The page from top to bottom."""
    tiles = "".join(run_tile(results, result) for result in results.runs.values())
    items = "".join(
        f'<li class="{"met" if claim.holds else "unmet"}">{escape(claim.text)}</li>'
        for claim in claims(results)
    )
    names = legend((run.title, COLORS[run.name]) for run in RUNS)
    entropy = grid(3, (figure(chart.svg()) for chart in entropy_charts(results)))
    settings = f"<div>{card(f'<pre>{change(results)}</pre>')}</div><dl>{facts(results)}</dl>"
    return [
        f'<p class="takeaway">{escape(takeaway(results))}</p>',
        f'<div class="tiles">{tiles}</div><ul class="claims">{items}</ul>',
        section("Loss", _LOSS, card(names + loss_chart(results).svg())),
        section("The rate of every matrix", _RATES, rates(results)),
        section("Attention entropy", _ENTROPY, names + entropy),
        section("The numbers", _NUMBERS, numbers(results)),
        section("The change", _CHANGE, f'<div class="grid of-2">{settings}</div>'),
    ]


def takeaway(results: Results) -> str:
    """The result in one sentence."""
    alone, warmup = results.loss(ADAMW_ALONE), results.loss(ADAMW_WARMUP)
    steps = results.setting["steps"]
    return (
        f"Without warmup, AdamW ends at {alone:.2f} nats per byte, where a model that ignores all "
        f"context can get to {results.unigram_entropy:.2f}. AdamW², without warmup too, trains the "
        f"same model on the same batches to {results.loss(ADAMW2):.2f} with τ = 0.01 and to "
        f"{results.loss(ADAMW2_AUTO):.2f} with τ = balanced, and with singular values clipped "
        f"(projected) to {results.loss(ADAMW2_PROJECT):.2f}. AdamW with a warmup over "
        f"{warmup_steps(steps)} of its {steps} steps ends at {warmup:.2f}."
    )


def run_tile(results: Results, result: RunResult) -> str:
    """A run's final number, and what there is to say about it."""
    steps = results.setting["steps"]
    if result.clipped_share is not None:
        note = f"{result.clipped_share:.0%} of matrix-steps clipped"
    elif result.run.warmup:
        note = f"warmup over {warmup_steps(steps)} of {steps} steps"
    else:
        note = f"the unigram entropy is {results.unigram_entropy:.3f}"
    color = COLORS[result.run.name]
    return tile(color, result.run.title, f"{result.validation_loss:.3f}", note)


def loss_chart(results: Results) -> Chart:
    """Training loss of all runs, smoothed, with their names at the ends."""
    steps = results.setting["steps"]
    lines = [line for result in results.runs.values() for line in loss_lines(result, steps)]
    finals = [result.validation_loss for result in results.runs.values()]
    smoothed = (loss for line in lines if not line.faint for loss in line.y)
    drawn = [results.unigram_entropy, *finals, *smoothed]
    lowest = min(loss for loss in drawn if math.isfinite(loss))
    return Chart(
        title="",
        x=Axis("step", 0, steps),
        y=Axis("training loss, nats per byte", lowest - 0.15, results.unigram_entropy + 0.7),
        lines=sorted(lines, key=lambda line: not line.faint),
        rules=[Rule(results.unigram_entropy, "unigram entropy", at_end=True)],
        width=1080,
        height=420,
        right=190,
        margins=(24, 32, 46),
    )


def loss_lines(result: RunResult, steps: int) -> list[Line]:
    """One run's training loss, smoothed; its name at the end, unless it diverged before that."""
    title = result.run.title
    color, reach = COLORS[result.run.name], max(1, steps // 20)
    lines = trend(title, result.losses, color, reach, most=_POINTS)
    if lines and lines[-1].x[-1] == steps:
        lines[-1] = replace(lines[-1], label=title)
    return lines


def rates(results: Results) -> str:
    """The rate of every matrix of the runs of AdamW² that scale updates."""
    layers = results.setting["model"]["layers"]
    colors = ((layer_name(layer), depth_color(layer, layers)) for layer in range(layers))
    return (
        f"{legend(colors, 'schedule')}<h3>τ = 0.01: one threshold for all matrices</h3>"
        f"{rate_charts(results.runs[ADAMW2.name], layers)}"
        "<h3>τ = balanced: the hidden matrices share a budget, embeddings and head have their "
        f"own</h3>{rate_charts(results.runs[ADAMW2_AUTO.name], layers)}"
    )


def rate_charts(result: RunResult, layers: int) -> str:
    """The rates of a run beside the schedule, one chart per kind of matrix."""
    kinds = rate_curves(
        result.rates, result.schedule, layer_name, lambda layer: depth_color(layer, layers)
    )
    x = Axis("step", 0, len(result.steps))
    y = Axis("rate α, log scale", lowest_rate(result) * 0.8, PEAK_LR * 1.4, log=True)
    charts = (
        Chart(title, x, y, kinds.get(kind, ()), width=350, height=190)
        for kind, title in KINDS.items()
    )
    return grid(3, (figure(chart.svg()) for chart in charts))


def lowest_rate(result: RunResult) -> float:
    """The smallest rate that a matrix got."""
    rates = (rate for points in result.rates.values() for _, rate in points)
    return min(rate for rate in rates if rate is not None and rate > 0)


def layer_name(layer: int) -> str:
    """A layer, counted from 1."""
    return f"layer {layer + 1}"


def entropy_charts(results: Results) -> list[Chart]:
    """Attention entropy, one chart per layer: each run's mean over the heads and their range."""
    uniform = results.setting["uniform_entropy"]
    layers = range(results.setting["model"]["layers"])
    heads = [
        points
        for result in results.runs.values()
        for layer in layers
        for points in result.entropy(layer)
    ]
    lowest = min(value for points in heads for _, value in points if value is not None)
    y = Axis("attention entropy, nats", max(0.0, lowest - 0.1), uniform + 0.35)
    return [
        Chart(
            title=layer_name(layer),
            x=Axis("step", 0, results.setting["steps"]),
            y=y,
            lines=[
                line
                for name, result in results.runs.items()
                for line in banded(result.run.title, bands_of(result.entropy(layer)), COLORS[name])
            ],
            rules=[Rule(uniform, "uniform")],
            width=350,
            height=210,
        )
        for layer in layers
    ]


def numbers(results: Results) -> str:
    """The table of the runs."""
    heads = (
        "run",
        "warmup steps",
        "validation loss",
        "against warmup",
        "matrix-steps clipped",
        "time",
    )
    rows = []
    for result in results.runs.values():
        title, *values = cells(results, result)
        warmup = warmup_steps(results.setting["steps"]) if result.run.warmup else 0
        rows.append(row(COLORS[result.run.name], title, map(cell, [str(warmup), *values])))
    unigram = f"<td>{results.unigram_entropy:.3f}</td>"
    foot = f'<tr><th scope="row">unigram entropy</th><td></td>{unigram}{"<td></td>" * 3}</tr>'
    return table(heads, rows, foot)


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
        "Model": (
            f"byte-level GPT, post-LN, {model['layers']} layers, width {model['width']}, "
            f"{model['heads']} heads, context {model['context']}, {model['parameters']:,} "
            "parameters, no biases"
        ),
        "Text": (
            f"{text['files']} files of the Python {machine['python']} standard library (sha256 "
            f"{text['digest']}…), {text['train_bytes']:,} bytes to train on and "
            f"{text['validation_bytes']:,} held out"
        ),
        "Training": (
            f"{setting['steps']} steps of {setting['batch']} sequences, cosine from {PEAK_LR:g} to "
            f"a tenth, no gradient clipping, seed {setting['seed']}; all runs start from the same "
            "weights and see the same batches"
        ),
        "Engine": (
            f"DeepSpeed {machine['deepspeed']} ZeRO-2, {setting['ranks']} processes, "
            f"{setting['precision']}, torch {machine['torch']}, weyl-megatron "
            f"{machine['weyl-megatron']}"
        ),
        "Machine": f"{setting['device']}: {machine['processor']}, {machine['system']}",
    }
    return "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in entries.items()
    )
