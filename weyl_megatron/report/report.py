"""The report of watched runs: one HTML file with everything in it, readable without a network."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

from . import maps, panels, tables
from .curves import Shown
from .page import page, section
from .run import Run
from .runs import DEMO_LOG, LOG, expand, read_run
from .summary import as_json, as_markdown, summarize

_PAGE_BYTES = 9_000_000  # of a page, about
_MAP_BYTES = 4_500_000  # of all attention maps on it, at most


def run(arguments: argparse.Namespace) -> int:
    """Write what is asked of `arguments.runs`; say where it is, and every note.

    Takes ``out`` Path or None, ``json`` and ``markdown`` str or None: a file, or ``-`` for standard
    output. Where all are None the page is ``report.html``; where it shares standard output with
    nothing, what is said goes there.
    """
    files = {"json": arguments.json, "markdown": arguments.markdown}
    asked = {key: file for key, file in files.items() if file is not None}
    for key, file in asked.items():
        _check(key, file)
    if len(asked) == 2 and len(set(asked.values())) == 1:
        both = "standard output" if arguments.json == "-" else arguments.json
        raise ValueError(f"report: --json and --markdown got {both}, it takes one of them.")
    runs, notes = _read(arguments.runs)
    out = arguments.out or (None if asked else Path("report.html"))
    lines = [*notes]
    if out is not None:
        _write(out, _page(Shown(runs, _MAP_BYTES), notes))
        lines.insert(0, f"The report: {out}")
    if asked:
        summary = summarize(runs, notes)
        for key, file in asked.items():
            text = as_json(summary) if key == "json" else as_markdown(summary)
            if file == "-":
                sys.stdout.write(text)
            else:
                _write(Path(file), text)
    for line in lines:
        print(line, file=sys.stderr if "-" in asked.values() else sys.stdout)
    return 0


def write_report(folders: Sequence[Path], out: Path) -> list[str]:
    """Writes the report of the runs in `folders` to `out`; returns what of them could not be read.

    Raises:
        ValueError: none of the folders has anything that can be shown.
    """
    runs, notes = _read(folders)
    _write(out, _page(Shown(runs, _MAP_BYTES), notes))
    return notes


def _check(key: str, file: str) -> None:
    """Refuse what is not meant: a run that stands behind the option, or a run's log."""
    if file != "-" and (Path(file).is_dir() or Path(file).name in (LOG, DEMO_LOG)):
        kind = "a folder" if Path(file).is_dir() else "a run's log"
        raise ValueError(
            f"report: --{key} got {file}, {kind}, it takes a file or -, and runs stand before it."
        )


def _read(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs that can be shown, and what of all could not be read."""
    read = [read_run(folder) for folder in expand(folders)]
    notes = [note for each in read for note in each.notes]
    runs = _distinct([each for each in read if each.is_readable])
    if not runs:
        named = ", ".join(map(str, folders)) or "no folder"
        why = "; ".join(note.rstrip(".") for note in notes)
        raise ValueError(
            f"report: got {named} without a readable log ({why}), it takes folders of watched runs."
        )
    return runs, notes


def _write(out: Path, text: str) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class _Panel:
    """A part of the page.

    `needs` is what would fill it where `body` finds nothing; where it is empty nothing is said.
    """

    name: str
    title: str
    text: str
    needs: str
    body: Callable[[Shown], str]


def _page(shown: Shown, notes: Sequence[str]) -> str:
    bodies = {
        panel: "" if panel.body is maps.attention_maps else panel.body(shown) for panel in _PANELS
    }
    # The attention maps get what the others leave; in base 64, four bytes hold three of a map.
    left = (_PAGE_BYTES - sum(map(len, bodies.values()))) * 3 // 4
    shown = replace(shown, map_bytes=min(left, _MAP_BYTES))
    for panel in _PANELS:
        if panel.body is maps.attention_maps:
            bodies[panel] = panel.body(shown)
    parts = [
        section(panel.title, escape(panel.text), body, panel.name)
        for panel, body in bodies.items()
        if body
    ]
    parts += [
        _missing([panel for panel, body in bodies.items() if panel.needs and not body]),
        _noted(notes),
    ]
    title = f"Stability of {len(shown.runs)} runs"
    if len(shown.runs) == 1:
        title = f"Stability: {shown.runs[0].title}"
    data = {"steps": shown.steps, "maps": maps.frames(shown)}
    return page(title, "".join(parts), data=data, parts=("maps",))


def _missing(panels: Sequence[_Panel]) -> str:
    items = "".join(
        f'<li data-missing="{panel.name}">{panel.title}: needs {escape(panel.needs)}.</li>'
        for panel in panels
    )
    return f"<section><h2>Not in these logs</h2><ul>{items}</ul></section>" if items else ""


def _noted(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    lead = "The rest of these logs is shown."
    return section("What could not be read", lead, f"<ul>{items}</ul>", "notes")


def _distinct(runs: Sequence[Run]) -> list[Run]:
    """The runs, those of one title told apart by their folders' names, and else by numbers."""
    titles = [each.title for each in runs]
    named = [
        f"{each.title} ({each.name})" if titles.count(each.title) > 1 else each.title
        for each in runs
    ]
    numbered = [f"{title} #{named[: at + 1].count(title)}" for at, title in enumerate(named)]
    final = [
        new if named.count(title) > 1 else title for title, new in zip(named, numbered, strict=True)
    ]
    return [replace(each, title=title) for each, title in zip(runs, final, strict=True)]


_PANELS = (
    _Panel(
        "summary",
        "Summary",
        "Where the runs stand at their last measurement; σ₁(W_qᵀW_k) is the largest of the whole "
        "run.",
        "any measurement",
        tables.summary,
    ),
    _Panel(
        "loss",
        "Loss",
        "Of the steps that were measured; where there are many of them smoothed, the single ones "
        "faint behind. A loss that is a fifth above the highest of the first is cut off.",
        "loss: watch.step(loss)",
        panels.loss,
    ),
    _Panel(
        "rates",
        "The rate of every matrix",
        "α = min(schedule, τ σ₁(W) / σ₁(U)). A curve below the dashed schedule is a matrix that is "
        "being clipped; where they meet, the step is AdamW's. Where singular values are clipped, α "
        "is the schedule times the share of ‖U‖_F that is left. All charts have the same range.",
        "clip/…/lr: an AdamW² optimizer",
        panels.rates,
    ),
    _Panel(
        "clipped",
        "How many matrices are clipped",
        "The share of those of a kind, and of those in a block.",
        "clip_share/…: an AdamW² optimizer",
        panels.clipped,
    ),
    _Panel(
        "projected",
        "Clipped singular values",
        'Of matrices with clip="project": how many singular values of the update were clipped, '
        "of those that the vectors see; the share of its Frobenius norm that is left; and what "
        "multiplied the part that they do not see. Means over the matrices of a kind, then over "
        "those in a block; where an update keeps the rule they are 0, 1 and 1.",
        'clip/…/directions: an AdamW² optimizer with clip="project"',
        panels.projected,
    ),
    _Panel(
        "terms",
        "Fifteen numbers of every block",
        "Spectral norms of the weights and of their products, norms of the gains and biases, of "
        "the block's input and of its gradient. The charts of one term have the same range in all "
        "runs.",
        "block/…/sigma_q and its like",
        panels.terms,
    ),
    _Panel(
        "energy",
        "Where the energy of W_qᵀW_k is",
        "SEC is the share of Σσ² in the largest singular values of a head, the effective rank is "
        "over how many the energy spreads. In a malignant collapse SEC goes to 1 and the rank to a "
        "few. A curve is a head.",
        "block/…/head/…/sec or effective_rank",
        panels.energy,
    ),
    _Panel(
        "logits",
        "The largest attention logits",
        "What attention's softmax is taken of: of the sampled queries the largest, and the mean of "
        "their largest; and ‖q‖‖k‖ of the longest query and key, which no query's exceeds. Where "
        "they grow without end, a query ends with one key. A curve is a head.",
        "block/…/head/…/max_logit",
        panels.logits,
    ),
    _Panel(
        "entropy",
        "Attention entropy",
        "Of every head over the steps, then for each block the mean of its heads and their range. "
        "At 0 a query looks at one key; at the uniform value it looks at all alike, and attention "
        "passes on nothing but an average.",
        "block/…/head/…/entropy",
        panels.entropy,
    ),
    _Panel(
        "modes",
        "Modes of the heads",
        "In a benign collapse tokens look at themselves; in a malignant one all look at the same "
        "few keys.",
        "block/…/head/…/mode",
        maps.modes,
    ),
    _Panel(
        "maps",
        "Attention maps over time",
        "A row is a query, a column a key; colour is as dense as √p. A small map that is pressed "
        "is shown large, in every run. A map with more rows or columns than are shown has the "
        "maximum of those that a pixel stands for.",
        "maps: Watch(…, maps=[0, 1])",
        maps.attention_maps,
    ),
    _Panel(
        "similarity",
        "Token similarity",
        "The mean cosine between the tokens at a block's input; at 1 all tokens are alike (rank "
        "collapse).",
        "block/…/similarity",
        panels.similarity,
    ),
    _Panel(
        "gradients",
        "Gradients of queries and keys beside those of values",
        "Where attention has collapsed, W_q and W_k get hardly any gradient. All charts have the "
        "same range.",
        "block/…/grad_q, grad_k and grad_v",
        panels.gradients,
    ),
    _Panel(
        "sharpness",
        "Sharpness",
        "The largest eigenvalue of the Hessian, and of the Hessian as Adam preconditions it: above "
        "the threshold its steps overshoot.",
        "sharpness or sharpness_adam: watch.step(loss, sharpness=…)",
        panels.sharpness,
    ),
    _Panel(
        "warnings",
        "Warnings",
        "As they were given while the runs were training.",
        "a warning; none was given",
        tables.warnings,
    ),
    _Panel(
        "spikes",
        "Spikes",
        "Steps at which the norm of an update or of a gradient jumped: z says how far it is from "
        "the usual, by its spread; action whether the step was made (log) or not (skip). The worst "
        "and the last of each run, in the order of their steps.",
        "",
        tables.spikes,
    ),
)
