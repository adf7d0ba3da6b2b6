"""What the logs say: final numbers, the demo's claims about them, and the table in the terminal."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..report.points import Points
from .recipe import ADAMW2, ADAMW2_AUTO, ADAMW_ALONE, ADAMW_WARMUP, RUNS, Run

# How far above the warmup run the paper's τ may end, in nats per byte.
TOLERANCE = 0.10

Record = dict[str, Any]


@dataclass(frozen=True)
class RunResult:
    """One finished run, as its log has it. A value that is no finite number is None in a curve."""

    run: Run
    config: dict[str, Any]
    steps: list[Record]
    validation_loss: float
    seconds: float

    @property
    def clipped_share(self) -> float | None:
        """The share of all (matrix, step) pairs that were clipped; None of AdamW's."""
        pairs = sum(record.get("matrices", 0) for record in self.steps)
        return sum(record.get("clipped", 0) for record in self.steps) / pairs if pairs else None

    @property
    def losses(self) -> Points:
        """The training loss of every step, nats per byte."""
        return [(record["step"], _finite(record["loss"])) for record in self.steps]

    @property
    def schedule(self) -> Points:
        """The rate before the clip, at the steps that logged the rates."""
        return [(record["step"], record["lr"]) for record in self.steps if record.get("alpha")]

    @property
    def rates(self) -> dict[str, Points]:
        """The rate of every matrix."""
        rates: dict[str, Points] = {}
        for record in self.steps:
            for matrix, rate in record.get("alpha", {}).items():
                rates.setdefault(matrix, []).append((record["step"], _finite(rate)))
        return rates

    def entropy(self, layer: int) -> list[Points]:
        """The attention entropy of each head of a layer, nats."""
        heads: dict[int, Points] = {}
        for record in self.steps:
            for head, value in enumerate(record["entropy"][layer] if "entropy" in record else []):
                heads.setdefault(head, []).append((record["step"], _finite(value)))
        return list(heads.values())


@dataclass(frozen=True)
class Results:
    """All runs of one demo, and what they have in common."""

    setting: dict[str, Any]
    runs: dict[str, RunResult]

    @property
    def unigram_entropy(self) -> float:
        """The least loss of a model that ignores the context, nats per byte."""
        return float(self.setting["text"]["unigram_entropy"])

    def loss(self, run: Run) -> float:
        """The final validation loss of `run`."""
        return self.runs[run.name].validation_loss


@dataclass(frozen=True)
class Claim:
    """One sentence about the final numbers, and whether it is true of them."""

    text: str
    holds: bool


def load_results(out: Path) -> Results:
    """Reads what the worker left under `out`."""
    setting = json.loads((out / "setting.json").read_text(encoding="utf-8"))
    runs = {run.name: _load_run(run, out / run.name / "log.jsonl") for run in RUNS}
    return Results(setting, runs)


def _load_run(run: Run, log: Path) -> RunResult:
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    start, *steps, end = records
    if end["event"] != "end":
        raise RuntimeError(
            f"{log} takes an 'end' record as its last, got {end['event']!r}: an unfinished run"
        )
    return RunResult(run, start["config"], steps, end["validation_loss"], end["elapsed"])


def claims(results: Results) -> list[Claim]:
    """What the demo is there to show, held against the final validation losses."""
    unigram = results.unigram_entropy
    alone, warmup = results.loss(ADAMW_ALONE), results.loss(ADAMW_WARMUP)
    paper, auto = results.loss(ADAMW2), results.loss(ADAMW2_AUTO)
    return [
        Claim(
            f"AdamW without warmup fails: {alone:.3f} is at the unigram entropy of {unigram:.3f} "
            "or above",
            not alone < unigram,
        ),
        Claim(
            f"AdamW² with τ = 0.01 and no warmup trains to within {TOLERANCE:.2f} of AdamW with "
            f"warmup: {paper:.3f} against {warmup:.3f}",
            paper <= warmup + TOLERANCE and paper < unigram,
        ),
        Claim(
            f"AdamW² with τ = balanced and no warmup trains to no worse than AdamW with warmup: "
            f"{auto:.3f} against {warmup:.3f}",
            auto <= warmup and auto < unigram,
        ),
    ]


def summary(results: Results) -> dict[str, Any]:
    """What goes into `results.json`."""
    return {
        "unigram_entropy": results.unigram_entropy,
        "runs": {
            name: {
                "title": result.run.title,
                "validation_loss": _finite(result.validation_loss),
                "seconds": result.seconds,
                "clipped_share": result.clipped_share,
                "optimizer": result.config["optimizer"],
            }
            for name, result in results.runs.items()
        },
        "claims": [{"claim": claim.text, "holds": claim.holds} for claim in claims(results)],
        "setting": results.setting,
    }


def table(results: Results) -> str:
    """The final numbers, aligned for a terminal."""
    head = ("", "validation loss", "against warmup", "clipped", "time")
    rows = [head, *(cells(results, result) for result in results.runs.values())]
    rows.append(("unigram entropy", f"{results.unigram_entropy:.3f}", "", "", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = ([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])] for first, *rest in rows)
    lines = ["   ".join(texts).rstrip() for texts in aligned]
    rule = "─" * (sum(widths) + 3 * (len(widths) - 1))
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def cells(results: Results, result: RunResult) -> tuple[str, str, str, str, str]:
    """A run's title, validation loss, difference to the warmup run, clipped share and time."""
    warmup = result.run is ADAMW_WARMUP
    share = result.clipped_share
    return (
        result.run.title,
        f"{result.validation_loss:.3f}",
        "–" if warmup else signed(result.validation_loss - results.loss(ADAMW_WARMUP)),
        "–" if share is None else f"{share:.0%}",
        f"{result.seconds:.0f} s",
    )


def signed(value: float) -> str:
    """A difference with its sign, and a true minus."""
    return f"{value:+.3f}".replace("-", "−")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
