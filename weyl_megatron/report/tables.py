"""The panels of a report that are tables: HTML, empty where no run has its data."""

from __future__ import annotations

from typing import Any

from .curves import Shown, block_name, head_name
from .events import SpikedMatrix, worst_and_last
from .groups import Group, Peak, Place
from .maps import MODES
from .page import cell, row, table
from .run import Run

_WARNINGS = 200  # rows of the table
_SPIKES = 5  # of a run, of the worst and of the last


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
    entropies = [value for _, value in each.heads("entropy").last().values()]
    finite = [value for value in entropies if value is not None]
    uniform = f"uniform {each.uniform_entropy:.2f}" if each.uniform_entropy else ""
    of_heads = each.heads("sigma_qk")
    first = f"first at step {each.warnings[0].step}" if each.warnings else ""
    cells = [
        _last_loss(each),
        cell(f"{sum(finite) / len(finite):.2f}" if finite else "–", uniform),
        _peak(_largest_last(each.heads("sec"))),
        _peak(of_heads.largest() if of_heads else each.blocks("sigma_qk").largest()),
        f"<td>{_mode_counts(each)}</td>",
        cell(str(len(each.warnings)), first),
    ]
    return row(shown.color(each), each.title, cells)


def _last_loss(each: Run) -> str:
    validation = each.last("validation_loss")
    step, last = each.table.last("loss") if "loss" in each.series else (None, None)
    said = "" if step is None else f"step {step}"
    if validation is not None:
        said = f"validation {validation:.4g}"
    if step is None:
        return cell("–", said)
    return cell("not finite" if last is None else f"{last:.4g}", said)


def _largest_last(series: Group[Place]) -> Peak[Place] | None:
    """The largest of the last numbers."""
    last = ((value, step, place) for place, (step, value) in series.last().items())
    finite = [Peak(value, step, place) for value, step, place in last if value is not None]
    return max(finite, key=lambda peak: peak.value, default=None)


def _peak(peak: Peak[Any] | None) -> str:
    if peak is None:
        return cell("–")
    is_head = isinstance(peak.place, tuple)
    where = head_name(peak.place) if is_head else block_name(peak.place)
    return cell(f"{peak.value:.4g}", f"{where}, step {peak.step}")


def _mode_counts(each: Run) -> str:
    modes = [value for _, value in each.heads("mode").last().values()]
    counted = ((mode, name, modes.count(mode)) for mode, name in enumerate(MODES))
    spans = (
        f'<b style="--mode:var(--mode-{mode})">{count}</b><span>{name}</span>'
        for mode, name, count in counted
    )
    return f'<span class="modes">{"".join(spans)}</span>' if modes else "–"


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


def spikes(shown: Shown) -> str:
    """A row for each of the worst spikes of a run, and of its last."""
    rows = []
    for each in shown.runs:
        for spike in worst_and_last(each.spikes, _SPIKES):
            worst = spike.matrices[0] if spike.matrices else SpikedMatrix("–", None, None, None)
            more = f"and {spike.spiked - 1} more" if spike.spiked > 1 else ""
            cells = [cell(str(spike.step)), cell(spike.action), cell(worst.name, more, "text")]
            numbers = (worst.norm, worst.usual, worst.z)
            cells += [cell("not finite" if it is None else f"{it:.4g}") for it in numbers]
            rows.append(row(shown.color(each), each.title, cells))
    heads = ("run", "step", "action", "worst", "norm", "usual", "z")
    count = sum(len(each.spikes) for each in shown.runs)
    more = f"<p>{len(rows)} of {count} are listed.</p>" if len(rows) < count else ""
    return table(heads, rows) + more if rows else ""
