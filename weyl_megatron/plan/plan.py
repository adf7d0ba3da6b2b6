"""``weyl-megatron plan``: what AdamW² will do to a model under a schedule, and which τ to take.

No step is made for it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from statistics import median
from typing import NamedTuple

from torch import Tensor, nn

from ..engines.torch.dtensor import placed
from ..layouts.buffers import Buffer, Layout, Parameter, Shard, plan_of
from ..layouts.kinds import Kind
from ..layouts.local import is_on_mesh, local
from ..layouts.modules import kinds_of
from ..layouts.plain import mesh_buffer
from ..settings import BALANCED, check_settings, read_tau
from ..spectral import PowerIteration
from ..thresholds import Thresholds
from ..transformer.roles import io_parameters
from . import advice
from .forecast import Case, Row, Schedule, follow, kind_of
from .models import load

__all__ = ["TAUS", "Row", "plan", "run", "suggest"]

#: What is planned for where no τ is named.
TAUS: tuple[float | str, ...] = (0.001, 0.003, 0.004, 0.01, 0.02, 0.05, BALANCED)

#: The paper's τ, and the most hidden matrices that it was tried with: 40 blocks of ViT-g, six in
#: each.
_PAPER_TEXT, _PAPER_IMAGES, _PAPER_HIDDEN = 0.01, 0.004, 240

#: A head that is clipped for more than this share of a run is held back.
_HELD_BACK = 0.2

#: "balanced" is not suggested where it lets hidden matrices have less of the schedule's rate than
#: in the runs it was tried in.
_AUTO_LEAVES = 0.1

#: AdamW2's defaults.
_SETTINGS = check_settings(
    tau=0.01, power_iters=2, floor_std=1e-3, clip_vectors=False, io=None, overrides=(), others={}
)


class _Matrix(NamedTuple):
    parameter: Parameter
    name: str
    rows: int
    cols: int
    sigma: float


def plan(
    named: Iterable[tuple[str, Tensor]],
    lr: float,
    *,
    taus: Sequence[float | str] = TAUS,
    steps: int | None = None,
    warmup: int = 0,
    min_lr: float | None = None,
    module: nn.Module | None = None,
) -> list[Row]:
    """Return what each τ will do to each kind of matrix.

    The rows are in the order of ``taus`` and then of the parameters.

    Args:
        named: (name, parameter); read once and not kept, so that they may be made one at a time.
            Of DTensors no rank needs more than it has: collective then, in the same order on all
            ranks, which get the same rows.
        lr: α, the schedule's highest.
        taus: numbers and "balanced".
        steps: of a cosine from ``lr`` to ``min_lr``; None: the rate stays.
        warmup: steps of a linear warmup before it.
        min_lr: None: a tenth of ``lr``.
        module: says what each parameter is: convolutions and experts, embeddings and the head.

    Raises:
        ValueError: a number that is none, no matrix among the parameters, "balanced" where nothing
            says which is the head, or a DTensor that is spread in a way that AdamW2 refuses.
    """
    taus = _check(lr, taus, steps, warmup)
    end = lr / 10 if min_lr is None else min_lr
    owned = {} if module is None else kinds_of(module)
    return _forecast(_measured(named, owned), Schedule(lr, end, steps, warmup), taus, owned)


def _forecast(
    matrices: Sequence[_Matrix],
    schedule: Schedule,
    taus: Sequence[float | str],
    owned: Mapping[str, Kind],
) -> list[Row]:
    if not matrices:
        raise ValueError("plan: the model has no matrix, it takes one with 2-D parameters.")
    for matrix in matrices:
        if not math.isfinite(matrix.sigma):
            raise ValueError(
                f"plan: σ₁ of '{matrix.name}' is {matrix.sigma}, it takes finite weights."
            )
    parameters = {matrix.parameter.name: matrix.parameter for matrix in matrices}
    layout = Layout([], owned, list(parameters.values()))
    thresholds = Thresholds(_SETTINGS, layout, BALANCED in taus)
    try:
        io = io_parameters(parameters, owned, None)
    except ValueError:  # nothing says which; with "balanced" that was raised above
        io = set()
    kinds = [kind_of(matrix.name) for matrix in matrices]
    is_text = "embedding" in kinds
    if is_text and "head" not in kinds:
        kinds = ["tied head" if kind == "embedding" else kind for kind in kinds]
    groups: dict[tuple[str, int, int], list[_Matrix]] = {}
    for kind, matrix in zip(kinds, matrices, strict=True):
        groups.setdefault((kind, matrix.rows, matrix.cols), []).append(matrix)
    cases = []
    for asked in taus:
        for (kind, rows, cols), members in groups.items():
            first = members[0].parameter
            floor, tau = thresholds.floor_and_tau(first, rows, cols, asked)
            sigma = median(member.sigma for member in members)
            cases.append(
                Case(
                    kind=kind,
                    rows=rows,
                    cols=cols,
                    members=len(members),
                    sigma=sigma,
                    floor=floor,
                    asked=asked,
                    tau=tau,
                    is_text=is_text,
                    is_hidden=first.name not in io,
                )
            )
    return follow(cases, schedule)


def _measured(named: Iterable[tuple[str, Tensor]], owned: Mapping[str, Kind]) -> list[_Matrix]:
    """Return every matrix of the parameters with its σ₁.

    That is by the optimizer's own power iteration from a cold start.
    """
    matrices = []
    for name, tensor in named:
        if not (tensor.is_floating_point() and tensor.numel()):
            continue
        flat, buffer = _buffer(name, tensor, owned.get(name))
        grids = Thresholds(_SETTINGS, Layout([], None, [buffer.shards[0].parameter]), False)
        pieces = plan_of([buffer], grids.grid)
        if not pieces.matrices:
            continue
        power = PowerIteration(pieces.matrices, pieces.tiles, device=flat.device)
        matrices += [
            _Matrix(parameter, spec.name, spec.rows, spec.cols, sigma)
            for parameter, spec, sigma in zip(
                pieces.parameters, pieces.matrices, power.sigmas([[flat]])[0].tolist(), strict=True
            )
        ]
    return matrices


def _buffer(name: str, tensor: Tensor, kind: Kind | None) -> tuple[Tensor, Buffer]:
    """Return what this rank has of a parameter, flat, and where it lies in it."""
    if is_on_mesh(tensor):
        place = placed([(name, tensor)])[id(tensor)]
        # On the device whose ranks can sum: a process group may be for GPUs alone.
        held = local(tensor).detach().contiguous().view(-1)
        return held, mesh_buffer(tensor, name, *place, kind)
    parameter = Parameter(name, tuple(tensor.shape), kind=kind)
    buffer = Buffer(tensor, (Shard(parameter, 0, tensor.numel(), 0),))
    return tensor.detach().cpu().contiguous().view(-1), buffer


def _check(
    lr: float, taus: Sequence[float | str], steps: int | None, warmup: int
) -> list[float | str]:
    """Return every τ as the optimizer knows it."""
    if not 0 < lr < math.inf:
        raise ValueError(f"plan: lr got {lr!r}, it takes a number above 0.")
    if not taus:
        raise ValueError("plan: taus got none, it takes numbers above 0 and 'balanced'.")
    read = [read_tau("plan's tau", tau) for tau in taus]
    if math.inf in read:
        raise ValueError("plan: tau got inf, which is AdamW and bounds nothing; it takes a number.")
    if steps is not None and steps < 1:
        raise ValueError(f"plan: steps got {steps}, it takes 1 or more.")
    if not 0 <= warmup < (steps or math.inf):
        raise ValueError(
            f"plan: warmup got {warmup}, it takes 0 or more and less than steps ({steps})."
        )
    return read


def suggest(rows: Sequence[Row], steps: int | None = None) -> tuple[float | str, str]:
    """Return τ, the paper's or "balanced", and the reason in a sentence.

    Args:
        rows: of a plan that has the paper's τ (.01, and .004 for images) and, if it can,
            "balanced".
        steps: of the run, where they are known.
    """
    kinds = {row.kind for row in rows}
    is_text = bool(kinds & {"embedding", "tied head"})
    is_image = "patch embedding" in kinds
    paper = _PAPER_IMAGES if is_image and not is_text else _PAPER_TEXT
    of_paper = [row for row in rows if row.asked == paper]
    of_balanced = [row for row in rows if row.asked == BALANCED]
    hidden = sum(row.count for row in of_paper if row.is_hidden)
    whose = "ViT and Swin" if paper == _PAPER_IMAGES else "GPT"
    if not of_balanced:
        asks = "nothing tells the embeddings and the head that balanced asks for"
        return paper, f"it is the paper's for {whose}, and {asks}"
    left = _median([(row.rate_settled, row.count) for row in of_balanced if row.is_hidden])
    if left < _AUTO_LEAVES:
        deep = ""
        if hidden > _PAPER_HIDDEN:
            deep = f" with {hidden} hidden matrices, which is more than it was tried with,"
        return paper, (
            f"it is the paper's for {whose},{deep} and balanced would leave hidden matrices "
            f"{left:.1%} of the rate, less than it was tried with"
        )
    if not (is_text or is_image):
        nothing = "the model has neither a token nor a patch embedding by name"
        return BALANCED, f"{nothing}, so that the paper has no τ for it"
    zero = sum(row.count for row in of_paper if row.is_hidden and row.sigma_weight < row.floor)
    if zero:
        start = f"{zero} hidden matrices start at or near zero"
        return BALANCED, f"{start}, and balanced has a higher floor under σ₁(W) there"
    if hidden > _PAPER_HIDDEN:
        share = next(row.tau for row in of_balanced if row.is_hidden)
        return BALANCED, (
            f"{hidden} hidden matrices are more than the {_PAPER_HIDDEN} of the paper's deepest "
            f"model; balanced shares its budget out among them, τ = {share:.2g} each"
        )
    of_head = [next(_heads(of_tau), None) for of_tau in (of_paper, of_balanced)]
    by_paper, by_balanced = of_head
    if steps is not None and by_paper is not None and by_balanced is not None:
        # How a language model's head grows is measured; how soon others are free is only bounded.
        late = by_paper.typical if is_text else by_paper.earliest
        soon = by_balanced.typical if is_text else by_balanced.earliest
        paper_says = (
            f"at the paper's τ = {paper:g} the head would be clipped for "
            f"{_share_of(late, steps, is_text)} steps"
        )
        if (late is None or late > _HELD_BACK * steps) and late != soon:
            return BALANCED, f"{paper_says}, with balanced for {_share_of(soon, steps, is_text)}"
        return paper, f"it is the paper's for {whose}, and {paper_says}"
    ask = "--steps tells whether the run is long enough for it"
    return paper, f"it is the paper's for {whose}; {ask}"


def _heads(rows: Sequence[Row]) -> Iterator[Row]:
    return (row for row in rows if row.kind in ("head", "tied head"))


def _median(weighted: Sequence[tuple[float, int]]) -> float:
    return median([value for value, count in weighted for _ in range(count)] or [1.0])


def _share_of(step: int | None, steps: int, is_measured: bool) -> str:
    if step is None:
        return f"all {steps}"
    return f"{'about' if is_measured else 'at least'} {step} of the {steps}"


def run(arguments: argparse.Namespace) -> int:
    """Print the plan of ``arguments.model``, write it to ``arguments.json`` if given; return 0.

    With ``arguments.run`` it is the advice for that run.

    Takes ``model`` str, ``run`` None, ``lr`` float or None, ``steps`` and ``warmup`` int or None,
    ``tau`` list of str or None, ``json`` Path or None. What is None is the recipe's, where the
    model is one; else lr is 6e-4, without warmup.
    """
    if arguments.run is not None:
        return advice.run(arguments)
    if arguments.model is None:
        raise ValueError("plan: MODEL got nothing, it takes a model, or --run and a run's folder.")
    asked = [_number(text) for text in arguments.tau or ()]
    source = load(arguments.model)
    lr = source.lr if arguments.lr is None else arguments.lr
    steps = source.steps if arguments.steps is None else arguments.steps
    warmup = source.warmup if arguments.warmup is None else arguments.warmup
    end = source.min_lr if arguments.lr is None and source.min_lr is not None else lr / 10
    known = list(TAUS) if source.tau is None else [*TAUS, source.tau]
    shown = list(dict.fromkeys(asked or known))
    taus = list(dict.fromkeys([*shown, _PAPER_TEXT, _PAPER_IMAGES, BALANCED]))
    taus = _check(lr, taus, steps, warmup)
    owned = {} if source.module is None else kinds_of(source.module)
    matrices, schedule = _measured(source.named, owned), Schedule(lr, end, steps, warmup)
    try:
        rows = _forecast(matrices, schedule, taus, owned)
    except ValueError as error:
        if BALANCED in asked or "nothing tells which" not in str(error):
            raise
        shown = [tau for tau in shown if tau != BALANCED]
        taus = [tau for tau in taus if tau != BALANCED]
        rows = _forecast(matrices, schedule, taus, owned)
    tau, reason = suggest(rows, steps)
    printed = [row for row in rows if row.asked in shown]
    print("\n".join([f"{source.label}, {_words(schedule)}", "", *_table(printed, schedule), ""]))
    print(f"Suggested: τ = {tau}, because {reason}.")
    for kind in dict.fromkeys(row.kind for row in rows):
        of_kind = [row for row in rows if row.kind == kind and row.asked == tau]
        first = _shares([row.rate_first for row in of_kind])
        later = _shares([row.rate_settled for row in of_kind])
        print(
            f"  {kind:<16}α_W starts at {first} of the schedule's rate; about step 100 it is "
            f"{later}"
        )
    if arguments.json is not None:
        content = {
            "model": arguments.model,
            **schedule._asdict(),
            "suggested": tau,
            "reason": reason,
            "rows": [asdict(row) for row in printed],
        }
        text = json.dumps(content, indent=1, ensure_ascii=False)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    return 0


def _number(text: str) -> float | str:
    with suppress(ValueError):
        return float(text)
    with suppress(ValueError):
        return read_tau("plan's tau", text)
    raise ValueError(f"plan: --tau got {text!r}, it takes a number above 0 or balanced.")


def _words(schedule: Schedule) -> str:
    warmup = f", warmup {schedule.warmup} steps" if schedule.warmup else ""
    shape = "constant"
    if schedule.steps is not None:
        shape = f"cosine to {schedule.end:g} in {schedule.steps} steps"
    return f"rate {schedule.lr:g}, {shape}{warmup}"


def _table(rows: Sequence[Row], schedule: Schedule) -> Iterator[str]:
    """Yield the lines: a kind each, and for every τ when its clip ends."""
    taus = list(dict.fromkeys(row.asked for row in rows))
    kinds: dict[tuple[str, int, int], list[Row]] = {}
    for row in rows:
        kinds.setdefault((row.kind, row.rows, row.cols), []).append(row)
    lines = [["kind", "count", "shape", "σ₁(W)", *(f"τ = {tau}" for tau in taus)]]
    for (kind, height, width), of_kind in kinds.items():
        first = of_kind[0]
        shape, sigma = f"{height}×{width}", f"{first.sigma_weight:.3g}"
        lines.append([kind, str(first.count), shape, sigma, *(_cell(row) for row in of_kind)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        yield "  ".join(cells).rstrip()
    within = "while the rate stays"
    if schedule.steps is not None:
        within = f"within the {schedule.steps} steps"
    yield (
        "The step from which on nothing is clipped: typical (earliest to latest); – is not "
        f"{within}."
    )
    yield (
        "Only the earliest allows for hidden matrices that grow; within the 1500 steps measured "
        "they hardly did."
    )


def _shares(values: Sequence[float]) -> str:
    low, high = f"{min(values):.1%}", f"{max(values):.1%}"
    return low if low == high else f"{low} to {high}"


def _cell(row: Row) -> str:
    ends = (row.earliest, row.typical, row.latest)
    early, usual, late = ("–" if step is None else str(step) for step in ends)
    return usual if early == usual == late else f"{usual} ({early} to {late})"
