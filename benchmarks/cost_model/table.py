"""The cost model's bounds as tables, and beside what was kept or measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .gpus import UPPER
from .model import GOALS, PROJECTED, Bounds, adamw, muon

#: By "gpu model width".
Computed = Mapping[str, Mapping[str, Bounds]]

#: Between these lines of a page stands the table.
BEGIN, END = "<!-- cost model: begin -->", "<!-- cost model: end -->"

#: What a bound may grow by.
_GROWTH = 1.05

_ARITHMETIC = ("issue", "fma", "alu", "mufu", "fp64")

_WHAT = {"dram": "bytes (DRAM)", "l2": "bytes (L2)", "l1": "bytes (L1)", "waits": "waits"}


def states(computed: Computed) -> str:
    """Return the table of steps."""
    lines = [
        "| GPU | model | vectors of U | state | ms | × AdamW | goal | within |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | --- |",
    ]
    for key, of_states in computed.items():
        gpu, model, width = key.split()
        best, worst = adamw(model, gpu), adamw(model, gpu, UPPER)
        head = f"| {gpu.upper()} | {model} | {width} |"
        lines.append(f"{head} fused AdamW | {best:.2f} to {worst:.2f} | 1 | | |")
        for state, each in of_states.items():
            # Of "undecided" a goal stands for 4 vectors alone.
            goal = None if state == "undecided" and width != "4" else GOALS.get(state)
            ratios = each.lower / best, each.upper / worst
            within = "" if goal is None else _within(ratios, goal)
            lines.append(
                f"{head} {state} | {each.lower:.2f} to {each.upper:.2f} | "
                f"{ratios[0]:.2f} to {ratios[1]:.2f} | "
                f"{'' if goal is None else f'{goal:.2f}'} | {within} |"
            )
        low, high = muon(model, gpu)
        lines.append(
            f"{head} Muon | {low:.2f} to {high:.2f} | {low / best:.1f} to {high / worst:.1f} | | |"
        )
    return "\n".join(lines)


def _within(ratios: tuple[float, float], goal: float) -> str:
    if max(ratios) <= goal:
        return "yes"
    return "one bound" if min(ratios) <= goal else "no"


def binding(computed: Computed) -> str:
    """Return what binds the launches that take most, at each bound."""
    lines = [
        "| GPU | model | vectors of U | launch | ms | bound by |",
        "| --- | --- | ---: | --- | ---: | --- |",
    ]
    for key, of_states in computed.items():
        gpu, model, width = key.split()
        states = "clipped, all iterated twice", PROJECTED
        launches = next(of_states[state].launches for state in states if state in of_states)
        inactive = of_states["inactive"].launches
        chosen = [("step", *next(each for each in inactive if each[0] == "step")[1:])]
        numbers: dict[str, int] = {}
        for name, low, high in launches:
            numbers[name] = numbers.get(name, 0) + 1
            if name in ("products", "collect", "orthonormalize") and numbers[name] <= 2:
                chosen.append((f"{name}, iteration {numbers[name]}", low, high))
            elif name in ("move", "clip", "project"):
                chosen.append((name, low, high))
        for name, low, high in chosen:
            what = " to ".join(dict.fromkeys([_what(low.binds), _what(high.binds)]))
            lines.append(
                f"| {gpu.upper()} | {model} | {width} | {name} | {low.seconds * 1e3:.3f} to "
                f"{high.seconds * 1e3:.3f} | {what} |"
            )
    return "\n".join(lines)


def _what(binds: str) -> str:
    return f"arithmetic ({binds})" if binds in _ARITHMETIC else _WHAT[binds]


def check(kept: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what has grown, or why nothing is compared, a line that begins with "skipped".

    Args:
        kept, now: what ``--json`` writes.
    """
    if kept["triton"] != now["triton"]:
        return [
            f"skipped: the bounds were kept with Triton {kept['triton']}, this is {now['triton']}, "
            "whose code is another"
        ]
    faults: list[str] = []
    for key, of_states in now["bounds"].items():
        for state, values in of_states.items():
            before = kept["bounds"].get(key, {}).get(state)
            if before is None:
                faults.append(f"{key}: {state}: nothing is kept of it")
                continue
            for name, old, new in zip(("lower", "upper"), before, values, strict=True):
                if new > old * _GROWTH:
                    faults.append(
                        f"{key}: {state}: the {name} bound grew from {old:.3f} to {new:.3f} ms"
                    )
    return faults


def measured(results: Mapping[str, Any], computed: Computed) -> str:
    """Return what benchmarks.gpu measured beside the bounds; nothing, where it has no such GPU.

    Args:
        results: its results.json.
        computed: of which the entries of its GPU are shown.
    """
    entries = [
        entry
        for part in results.get("parts", {}).values()
        for entry in part.get("results", [])
        if entry.get("name") == "step_time"
    ]
    said = str(results).upper()
    lines = ["| GPU | model | state | bounds, ms | measured, ms | beyond the nearer |"]
    lines.append("| --- | --- | --- | ---: | ---: | ---: |")
    for key, of_states in computed.items():
        gpu, model, width = key.split()
        if width != "4" or gpu.upper() not in said:
            continue
        for entry in entries:
            for state, milliseconds in entry["ms"].items():
                if entry["model"] == model and state in of_states:
                    each = of_states[state]
                    nearer = min(max(milliseconds, each.lower), each.upper)
                    error = f"{milliseconds / nearer - 1:+.0%}"
                    lines.append(
                        f"| {gpu.upper()} | {model} | {state} | {each.lower:.2f} to "
                        f"{each.upper:.2f} | {milliseconds:.2f} | {error} |"
                    )
    return "\n".join(lines) if len(lines) > 2 else ""


def document(page: Path, of_states: str, of_launches: str) -> str:
    """Return a page with the tables between its marks, or the tables alone where there are none."""
    between = f"{BEGIN}\n\n{of_states}\n\n{of_launches}\n\n{END}\n"
    text = page.read_text() if page.is_file() else ""
    if BEGIN not in text:
        return between
    before, rest = text.split(BEGIN)
    return before + between + rest.split(END)[1].removeprefix("\n")
