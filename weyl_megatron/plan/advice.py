"""``weyl-megatron plan --run``: which τ and which rate the first hundred steps of a run speak for.

The rules were chosen on the GPTs of ``examples/compare`` with 6 and 12 blocks, and judged on its
ViTs with as many, all in runs of 200 steps without warmup: ``python -m benchmarks.advice`` says how
often they are right, and docs/which_tau.md has its table.

1. τ is "balanced": at the same rate it ended better than 0.01 and than 0.004 in 63 of the
   comparison's 64 cells, and than AdamW in 54.
2. A run fails where its loss is not below the first, where the tokens of a block are all alike,
   where heads narrow while σ₁(W_qᵀW_k) grows (the Watch warns of them), or where σ₁ of the blocks'
   matrices grows by half. "balanced" bounds what failed, and the rate stays; where the run has it
   already, the rate is a third.
3. Else the rate is the larger, the more of it Rule 1 leaves hidden matrices, or would leave them
   under "balanced". Where it leaves them nearly nothing, a larger rate moves all else alone.
4. A log of AdamW has no σ₁(U). Where such a run does not fail the rate is three times its own, as
   "balanced" ended better at that rate.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from ..report.points import Points
from ..report.run import Run
from ..report.runs import read_run
from ..rule import HIDDEN_BUDGET
from ..settings import BALANCED, read_tau
from .forecast import kind_of

#: The steps of which one is looked at: the last measurement up to the hundredth, or else the first
#: after it.
_EARLIEST, _WANTED, _LATEST = 50, 100, 200

#: Above this mean cosine between the tokens of a block they are all alike.
_ALIKE = 0.98

#: σ₁ of the hidden matrices grew by this factor, in the median.
_GREW = 1.5

#: Of hidden matrices that have this share of the rate the rate is ten times as large, …
_FREE, _FAR = 0.3, 10.0

#: … and three times of those that have this. Of AdamW's it is as large, too, and of runs that fail
#: under "balanced" a third.
_HELD, _STEP = 0.1, 3.0

#: A log has six digits.
_ROUNDED = 1e-4

_MISSING = "not in the log"

#: The most hidden matrices of a run that the rules were chosen or judged on: 12 blocks.
_TRIED = 72

#: Kinds of matrices that take no part in the budget of "balanced".
_IO = ("embedding", "head", "positions", "position bias", "patch embedding")


@dataclass(frozen=True)
class Group:
    """What the optimizer did to the hidden matrices, or to embeddings, positions and head."""

    count: int
    clipped: int
    rate: float  #: α_W / α, the median
    #: σ₁(W) / (α σ₁(U)) of each, or less: Rule 1 is α_W / α = min(1, τ · that)
    bounds: tuple[float, ...]

    def rate_at(self, tau: float) -> float:
        """α_W / α with another τ, the median."""
        return median(min(1.0, tau * bound) for bound in self.bounds)


@dataclass(frozen=True)
class Seen:
    """What of a run is looked at: its first measurement and one about step 100."""

    first: int
    step: int
    taus: tuple[float | str, ...]  #: as they were asked for; infinity is AdamW
    lr: float  #: at the step
    peak: float  #: the largest so far
    has_warmup: bool  #: whether the rate rose
    loss: tuple[float | None, float | None] | None  #: None where it is not in the log
    similarity: float | None  #: the largest mean cosine between tokens of a block
    growth: float | None  #: of σ₁ of the blocks' matrices, the median
    growth_qk: float | None  #: of σ₁(W_qᵀW_k), the largest
    entropy: float | None  #: the least of a head, over that of uniform attention
    warned: int  #: heads that the Watch warned of
    hidden: Group | None
    io: Group | None

    @property
    def is_adamw(self) -> bool:
        """Whether nothing is bounded."""
        return all(tau == math.inf for tau in self.taus)


@dataclass(frozen=True)
class Advice:
    """A τ and a rate, and for each the reason."""

    tau: str
    lr: float
    tau_reason: str
    lr_reason: str
    seen: Seen


def look(run: Run, folder: Path) -> Seen:
    """Return what a run's log says about its first hundred steps.

    Raises:
        ValueError: it does not say enough.
    """

    def lacks(what: str) -> ValueError:
        return ValueError(f"plan: --run got {folder}, whose log {what}.")

    if not run.series:
        notes = run.notes[0].rstrip(".") if run.notes else f"{folder} has no measurement"
        raise ValueError(f"plan: --run got {folder}, it takes a Watch's folder: {notes}.")
    asked = run.header.get("tau")
    if not isinstance(asked, list) or not asked:
        raise lacks("does not name τ; it takes one that this release's Watch wrote")
    taus = tuple(math.inf if tau == "inf" else read_tau("the log's tau", tau) for tau in asked)
    if len(taus) > 1:
        names = " and ".join(map(str, taus))
        raise lacks(f"has groups with τ = {names}; it takes one τ for all groups")
    if run.matrices("directions"):
        raise lacks('is of clip="project"; it takes a run with clip="scale"')
    if "loss" not in run.series and not run.blocks("similarity"):
        raise lacks("has neither losses nor blocks, so that nothing tells whether the run fails")
    steps = [step for step, value in run.series.get("lr", []) if value]
    near = [step for step in steps if _EARLIEST <= step <= _LATEST]
    step = max((step for step in near if step <= _WANTED), default=min(near, default=0))
    first = min(steps, default=0)
    if not step or first >= step:
        raise lacks(
            f"has no measurement at steps {_EARLIEST} to {_LATEST} after an earlier one; it takes "
            "both"
        )
    rates = [value for at, value in run.series["lr"] if value and at <= step]
    lr = _at(run.series["lr"], step) or 0.0
    uniform, losses = run.uniform_entropy, run.series.get("loss")
    entropies = _values(run.heads("entropy").values(), step)
    weights = [run.blocks(f"sigma_{role}") for role in "qkvo12"]
    return Seen(
        first=first,
        step=step,
        taus=taus,
        lr=lr,
        peak=max(rates),
        has_warmup=any(after > before for before, after in pairwise(rates)),
        loss=(_at(losses, first), _at(losses, step)) if losses else None,
        similarity=max(_values(run.blocks("similarity").values(), step), default=None),
        growth=_median([ratio for series in weights for ratio in _ratios(series, first, step)]),
        growth_qk=max(_ratios(run.blocks("sigma_qk"), first, step), default=None),
        entropy=min(entropies) / uniform if entropies and uniform else None,
        warned=sum(warned.step <= step for warned in run.warnings),
        hidden=_group(run, step, lr, taus[0], is_io=False),
        io=_group(run, step, lr, taus[0], is_io=True),
    )


def _group(run: Run, step: int, lr: float, tau: float | str, is_io: bool) -> Group | None:
    """Return what was done to the matrices of a kind; None where σ₁(U) was not measured.

    It is not at τ = ∞. With a number as τ, σ₁ of what is not clipped may be bounds that settled it,
    which tell no more than that τ · σ₁(W) / (α σ₁(U)) is 1 or above.
    """
    if tau == math.inf:
        return None
    rates, sigmas, updates, clips = (
        run.matrices(name) for name in ("lr", "sigma_weight", "sigma_update", "clipped")
    )
    names = [name for name in rates if (kind_of(name) in _IO) == is_io]
    shares, bounds, clipped = [], [], 0
    for name in names:
        rate, sigma, update = (_at(each.get(name, []), step) for each in (rates, sigmas, updates))
        if rate is None or sigma is None or not update:
            continue
        is_clipped = bool(_at(clips.get(name, []), step))
        if not is_clipped and not math.isclose(rate, lr, rel_tol=_ROUNDED):
            raise ValueError(
                f"plan: --run got {run.name}, in which '{name}' has the rate {rate:.3g} and the "
                f"first group {lr:.3g}; it takes one rate for all."
            )
        shares.append(rate / lr)
        bound = sigma / (lr * update)
        if not is_clipped and isinstance(tau, (int, float)):
            bound = max(bound, 1 / tau)
        bounds.append(bound)
        clipped += is_clipped
    return Group(len(names), clipped, median(shares), tuple(bounds)) if shares else None


def _at(points: Points, step: int) -> float | None:
    return next((value for at, value in points if at == step), None)


def _values(series: Iterable[Points], step: int) -> list[float]:
    values = (_at(points, step) for points in series)
    return [value for value in values if value is not None]


def _ratios(series: Mapping[int, Points], first: int, step: int) -> list[float]:
    """Return by what each grew between the two steps; what began at zero does not tell."""
    pairs = [(_at(points, first), _at(points, step)) for points in series.values()]
    return [after / before for before, after in pairs if before and after is not None]


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def advise(seen: Seen) -> Advice:
    """Return the τ and the rate that a run's first hundred steps speak for, by the rules above."""
    is_balanced = seen.taus == (BALANCED,)
    if failures := _failures(seen):
        what = "; ".join(failures)
        if is_balanced:
            lr = seen.peak / _STEP
            kept = "τ is balanced already"
            return Advice(BALANCED, lr, kept, f"the run fails under balanced: {what}", seen)
        bounded = "balanced bounds what failed, so that the rate stays"
        return Advice(BALANCED, seen.peak, f"the run fails: {what}", bounded, seen)
    factor, lr_reason = _factor(seen)
    return Advice(BALANCED, seen.peak * factor, _tau_reason(seen), lr_reason, seen)


def _failures(seen: Seen) -> list[str]:
    failures = []
    if seen.loss is not None:
        before, after = seen.loss
        if before is None or after is None or after >= before:
            failures.append("the loss is not below the first")
    if seen.similarity is not None and seen.similarity > _ALIKE:
        failures.append(f"the tokens of a block are all alike (cosine {seen.similarity:.3f})")
    if seen.warned:
        failures.append(f"the Watch warned of {seen.warned} heads that narrow")
    if seen.growth is not None and seen.growth > _GREW:
        failures.append(f"σ₁ of the blocks' matrices grew {seen.growth:.1f} times (median)")
    return failures


def _tau_reason(seen: Seen) -> str:
    """Return why τ is "balanced" for a run that does not fail."""
    tau = seen.taus[0]
    if tau == BALANCED:
        return "it is balanced already, and nothing failed"
    if seen.is_adamw:
        return "AdamW bounds no update"
    groups = {"hidden matrices": seen.hidden, "embeddings and head": seen.io}
    known = {name: group for name, group in groups.items() if group is not None}
    if not any(group.clipped for group in known.values()):
        return f"τ = {tau} clips nothing at step {seen.step}, and is AdamW there"
    texts = [f"{name} {group.rate:.2g} of the rate" for name, group in known.items()]
    return f"one τ = {tau} for all leaves {' and '.join(texts)}"


def _factor(seen: Seen) -> tuple[float, str]:
    """Return what to multiply the rate by, and why."""
    if seen.hidden is None:
        return _STEP, "the run does not fail at a third of it, and balanced bounds hidden matrices"
    share, leaves = seen.hidden.rate, "leaves"
    if seen.taus != (BALANCED,):
        share, leaves = seen.hidden.rate_at(HIDDEN_BUDGET / seen.hidden.count), "would leave"
        if seen.hidden.clipped < seen.hidden.count:  # of the others a bound is known
            leaves = "would leave at least"
    what = f"at step {seen.step} balanced {leaves} {share:.2g} of the rate to hidden matrices"
    if share >= _HELD:
        return _FAR if share >= _FREE else _STEP, f"{what}, and they could move more"
    return 1.0, f"{what}, and a larger one would move all else alone"


def run(arguments: argparse.Namespace) -> int:
    """Print the advice for ``arguments.run``, write it to ``arguments.json`` if given; return 0.

    Takes ``run`` Path, ``json`` Path or None; what is said of a MODEL's run has to be None.
    """
    for key in ("model", "lr", "steps", "warmup", "tau"):
        value = getattr(arguments, key)
        if value is not None:
            what = "MODEL" if key == "model" else f"--{key}"
            raise ValueError(f"plan: {what} got {value} beside --run, it takes one of the two.")
    # So few measurements are kept one by one, which a long log's are not.
    advice = advise(look(read_run(arguments.run, _LATEST), arguments.run))
    print("\n".join(_lines(advice, arguments.run)))
    if arguments.json is not None:
        text = json.dumps(_content(advice), indent=1, ensure_ascii=False)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    return 0


def _content(advice: Advice) -> dict[str, object]:
    """Return what the JSON has; τ = ∞, which it lacks, is "inf", as in the Watch's log."""
    content = asdict(advice)
    content["seen"]["taus"] = ["inf" if tau == math.inf else tau for tau in advice.seen.taus]
    return content


def _lines(advice: Advice, folder: Path) -> Iterator[str]:
    """Yield what was seen, and the advice."""
    seen = advice.seen
    what = "AdamW" if seen.is_adamw else f"AdamW², τ = {seen.taus[0]}"
    yield f"{folder}: {what}, rate {seen.lr:.3g} at step {seen.step}, {seen.peak:.3g} at most"
    losses = ["not finite" if loss is None else f"{loss:.3f}" for loss in seen.loss or ()]
    rows = [
        ("loss", " → ".join(losses) or _MISSING),
        ("tokens' cosine", _number(seen.similarity, "{:.3f} (largest of a block)")),
        ("σ₁ of matrices", _number(seen.growth, "{:.2f} times the first (median)")),
        ("σ₁(W_qᵀW_k)", _number(seen.growth_qk, "{:.2f} times the first (largest)")),
        ("entropy", _number(seen.entropy, "{:.2f} of uniform attention's (least head)")),
    ]
    for name, group in (("hidden matrices", seen.hidden), ("embeddings, head", seen.io)):
        text = "σ₁(U) is not in the log"
        if group is not None:
            text = f"{group.clipped} of {group.count} clipped, α_W / α {group.rate:.2g} (median)"
        rows.append((name, text))
    for name, text in rows:
        yield f"  {name:<18}{text}"
    yield f"Advice: τ = {advice.tau}, because {advice.tau_reason}."
    yield f"        rate {advice.lr:.3g}, because {advice.lr_reason}."
    if seen.has_warmup:
        yield "The run has a warmup, and the rules are of runs without one."
    if seen.hidden is not None and seen.hidden.count > _TRIED:
        yield f"It has {seen.hidden.count} hidden matrices; the rules are of {_TRIED} at most."
    yield "They are of 200 steps of small models; docs/which_tau.md says how often they were right."


def _number(value: float | None, text: str) -> str:
    return _MISSING if value is None else text.format(value)
