"""What is to be said of runs in few numbers: as JSON for programs, as Markdown for a pull request.

docs/report.md has the shape of the JSON; `VERSION` rises when something of it changes its meaning
or goes. What is new is no new version.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .. import __version__
from .events import Spike, worst_and_last
from .groups import Group, Peak, Place
from .maps import MODES
from .run import Run, matrix_place

VERSION = 1

_WARNINGS = 20  # that are listed of a run
_SPIKES = 5  # that are listed of a run, of the worst and of the last

Summary = Mapping[str, Any]


def summarize(runs: Sequence[Run], notes: Sequence[str]) -> dict[str, Any]:
    """All runs in few numbers; nothing in it is infinite, or no number where one is due."""
    return {
        "version": VERSION,
        "weyl_megatron": __version__,
        "runs": [_of_run(each) for each in runs],
        "notes": list(notes),
    }


def as_json(summary: Summary) -> str:
    """The summary as JSON, in ASCII."""
    return json.dumps(summary, indent=1, allow_nan=False) + "\n"


def _of_run(each: Run) -> dict[str, Any]:
    steps = each.table.steps
    interval = each.header.get("interval")
    return {
        "run": each.title,
        "folder": str(each.log.parent),
        "interval": interval if isinstance(interval, int) else None,
        "steps": (
            {"first": steps[0], "last": steps[-1], "measurements": len(steps)} if steps else None
        ),
        "loss": _loss(each),
        "validation_loss": each.last("validation_loss"),
        "heads": _heads(each),
        "blocks": _blocks(each),
        "clipped": _clipped(each),
        "warnings": {
            "count": len(each.warnings),
            "listed": [vars(warned) for warned in each.warnings[:_WARNINGS]],
        },
        "spikes": _spikes(each.spikes),
    }


def _loss(each: Run) -> dict[str, Any] | None:
    if "loss" not in each.series:
        return None
    step, last = each.table.last("loss")
    least = each.series.subset(["loss"]).least()
    return {
        "last": {"value": last, "step": step},
        "least": None if least is None else {"value": least.value, "step": least.step},
    }


def _heads(each: Run) -> dict[str, Any] | None:
    names = each.head_names
    if not names:
        return None
    modes = [value for _, value in each.heads("mode").last().values()]
    counts = {name: modes.count(mode) for mode, name in enumerate(MODES)} if modes else None
    numbers = {
        name: _range(each.heads(name), ("block", "head")) for name in names if name != "mode"
    }
    count = len({place for name in names for place in each.heads(name)})
    return {
        "count": count,
        "modes": counts,
        "uniform_entropy": each.uniform_entropy,
        "numbers": numbers,
    }


def _blocks(each: Run) -> dict[str, Any] | None:
    names = each.block_names
    count = len({block for name in names for block in each.blocks(name)})
    numbers = {name: _range(each.blocks(name), ("block",)) for name in names}
    return {"count": count, "numbers": numbers} if names else None


def _range(series: Group[Place], keys: Sequence[str]) -> dict[str, Any]:
    """The least and the largest number of the whole run, its mean, and the same of the end."""
    last = [value for _, value in series.last().values() if value is not None]
    return {
        "least": _peak(series.least(), keys),
        "largest": _peak(series.largest(), keys),
        "mean": series.mean(),
        "last": (
            {"least": min(last), "largest": max(last), "mean": sum(last) / len(last)}
            if last
            else None
        ),
    }


def _peak(peak: Peak[Any] | None, keys: Sequence[str]) -> dict[str, Any] | None:
    if peak is None:
        return None
    place = peak.place if isinstance(peak.place, tuple) else (peak.place,)
    return {"value": peak.value, "step": peak.step, **dict(zip(keys, place, strict=True))}


def _clipped(each: Run) -> dict[str, Any] | None:
    """The share of matrices that were clipped, of all and of each kind."""
    of_all: Group[str] = each.matrices("clipped") or each.shares()
    if not of_all:
        return None
    kinds: dict[str, list[str]] = {}
    for matrix in each.matrices("clipped"):
        kinds.setdefault(matrix_place(matrix)[0], []).append(matrix)
    parts = {kind: of_all.subset(matrices) for kind, matrices in kinds.items()}
    return {**_share(of_all), "kinds": {kind: _share(part) for kind, part in parts.items()}}


def _share(series: Group[str]) -> dict[str, float | None]:
    last = [value for _, value in series.last().values() if value is not None]
    return {"mean": series.mean(), "last": sum(last) / len(last) if last else None}


def _spikes(spikes: Sequence[Spike]) -> dict[str, Any]:
    return {
        "count": len(spikes),
        "skipped": sum(spike.action == "skip" for spike in spikes),
        "listed": [
            {
                "step": spike.step,
                "action": spike.action,
                "matrices": spike.spiked,
                "worst": [matrix._asdict() for matrix in spike.matrices],
            }
            for spike in worst_and_last(spikes, _SPIKES)
        ],
    }


# What a column of the table says of a run; "" where the run has nothing of it.
_COLUMNS: Mapping[str, Callable[[Summary], str]] = {
    "steps": lambda run: f"{run['steps']['last']}" if run["steps"] else "",
    "last loss": lambda run: _value(run["loss"] and run["loss"]["last"]),
    "least loss": lambda run: _place(run["loss"] and run["loss"]["least"]),
    "validation loss": lambda run: _number(run["validation_loss"]),
    "mean entropy": lambda run: _number(_last(run, "entropy", "mean")),
    "heads " + " / ".join(MODES): lambda run: _modes(run["heads"] and run["heads"]["modes"]),
    "largest logit": lambda run: _place(_largest(run, "heads", "max_logit")),
    "largest σ₁(W_qᵀW_k)": lambda run: _place(
        _largest(run, "heads", "sigma_qk") or _largest(run, "blocks", "sigma_qk")
    ),
    "matrices clipped": lambda run: _percent(run["clipped"] and run["clipped"]["mean"]),
    "warnings": lambda run: str(run["warnings"]["count"] or ""),
    "spikes (skipped)": lambda run: (
        f"{run['spikes']['count']} ({run['spikes']['skipped']})" if run["spikes"]["count"] else ""
    ),
}


def as_markdown(summary: Summary) -> str:
    """A row a run; what no run has is left out. Then its spikes, and what could not be read."""
    runs: Sequence[Summary] = summary["runs"]
    said = {name: [column(run) for run in runs] for name, column in _COLUMNS.items()}
    said = {name: cells for name, cells in said.items() if any(cells)}
    heads = ["run", *map(_text, said)]
    rows = [
        [_text(run["run"]), *(cells[at] or "–" for cells in said.values())]
        for at, run in enumerate(runs)
    ]
    parts = [_table(heads, rows)]
    spikes = [[_text(run["run"]), *cells] for run in runs for cells in _spike_rows(run)]
    if spikes:
        columns = ("run", "step", "action", "worst", "norm", "usual", "z")
        parts.append("Spikes, the worst and the last:\n")
        parts.append(_table(columns, spikes))
    parts += [f"- {_text(note)}\n" for note in summary["notes"]]
    return "\n".join(parts)


def _spike_rows(run: Summary) -> Iterable[list[str]]:
    for spike in run["spikes"]["listed"]:
        worst: Summary = spike["worst"][0] if spike["worst"] else {"name": "–"}
        more = f" and {spike['matrices'] - 1} more" if spike["matrices"] > 1 else ""
        values = (worst.get(key) for key in ("norm", "usual", "z"))
        numbers = ("not finite" if value is None else _number(value) for value in values)
        yield [str(spike["step"]), _text(spike["action"]), _text(worst["name"]) + more, *numbers]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rules = ["---", *["---:"] * (len(heads) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (heads, rules, *rows))


def _text(text: str) -> str:
    """Text in which nothing is Markdown, or HTML, or ends a cell."""
    return re.sub(r"([\\`*_{}\[\]<>#|!~&@$])", r"\\\1", " ".join(text.split()))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.3g} %"


def _value(said: Summary | None) -> str:
    return "" if said is None else _number(said["value"]) or "not finite"


def _place(peak: Summary | None) -> str:
    if peak is None:
        return ""
    block = f"block {peak['block']}, " if "block" in peak else ""
    head = f"head {peak['head']}, " if "head" in peak else ""
    return f"{_number(peak['value'])} ({block}{head}step {peak['step']})"


def _modes(counts: Mapping[str, int] | None) -> str:
    return " / ".join(map(str, counts.values())) if counts else ""


def _largest(run: Summary, part: str, name: str) -> Summary | None:
    numbers = _numbers(run, part).get(name)
    largest: Summary | None = numbers and numbers["largest"]
    return largest


def _last(run: Summary, name: str, key: str) -> float | None:
    numbers = _numbers(run, "heads").get(name)
    value: float | None = numbers and numbers["last"] and numbers["last"][key]
    return value


def _numbers(run: Summary, part: str) -> Mapping[str, Any]:
    numbers: Mapping[str, Any] = run[part]["numbers"] if run[part] else {}
    return numbers
