"""How long AdamW² will bound each kind of matrix: a forecast from measured runs.

A matrix is clipped at step t while α_t σ₁(U) > τ max(σ₁(W), floor). σ₁(W) is measured on the
weights, τ and the floor are the optimizer's own; σ₁(U) is not known before training, and is taken
from measured runs as r √(mn) for an (m, n) matrix. U's entries are ±1 at the first step, so that
σ₁(U) lies between √max(m, n) and √(mn) there, and Adam's averages make them smaller and less alike
within about 20 steps. r was measured at betas (.9, .95), weight decay .1:

- text: the demo's GPT (post-LN, Xavier, widths 64 and 192, rates 1e-3 to 5e-3) and Hugging Face's
  GPT-2 (pre-LN, std .02, tied, widths 256 and 768), bytes of source code, 512 tokens a step, τ .01
  and auto, 60 to 300 steps, one of 1500;
- images: timm's ViT (width 64, 6 blocks) on 8 × 8 digits, 64 a step, rate 3e-3, τ .004, 200 steps.

What σ₁(W) does decides the rest. Weyl's inequality lets it grow by (1 + τ) a step, but hidden
matrices hardly grow, because U turns: after 1500 steps at τ = .01, which allow 3 million times, q
and k were 1.8 times what they were, w1 1.6, w2 1.1, v and o .85. Their clip ends where U becomes
small or the schedule's rate does. A language model's head grows as it may, because U keeps the
direction of the tokens' frequencies: the part of W along U is τ t σ₁(W), so that σ₁(W) stays for
1 / τ steps and grows by (1 + τ) a step from then on; where the rate stays, its clip ends after
about (1 + ln(α σ₁(U) / (τ σ₁(W)))) / τ steps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..settings import BALANCED

#: Steps, from 1, at which r was read off; in between it follows a power of the step, afterwards it
#: stays.
_STEPS = (1, 6, 21, 101, 301)

#: r = σ₁(U) / √(mn), the typical value over the runs above.
_TEXT: Mapping[str, tuple[float, ...]] = {
    "q": (0.58, 0.40, 0.16, 0.15, 0.12),
    "k": (0.40, 0.26, 0.13, 0.15, 0.12),
    "v": (0.78, 0.52, 0.21, 0.13, 0.12),
    "o": (0.79, 0.54, 0.23, 0.12, 0.12),
    "w1": (0.69, 0.48, 0.20, 0.12, 0.10),
    "w2": (0.74, 0.50, 0.22, 0.12, 0.10),
    "head": (0.88, 0.74, 0.71, 0.65, 0.35),
    "embedding": (0.21, 0.18, 0.07, 0.08, 0.06),  # of 256 rows, a fifth of which the first step met
    "positions": (0.57, 0.45, 0.16, 0.14, 0.10),
}
_IMAGES: Mapping[str, tuple[float, ...]] = {
    "q": (0.87, 0.40, 0.30, 0.40, 0.36),
    "k": (0.73, 0.31, 0.24, 0.35, 0.31),
    "v": (0.82, 0.33, 0.14, 0.18, 0.20),
    "o": (0.81, 0.33, 0.13, 0.17, 0.20),
    "w1": (0.86, 0.32, 0.11, 0.12, 0.16),
    "w2": (0.84, 0.32, 0.11, 0.12, 0.16),
    "head": (0.81, 0.33, 0.13, 0.14, 0.26),
    "positions": (0.85, 0.37, 0.12, 0.25, 0.23),
    "patch embedding": (0.84, 0.40, 0.16, 0.25, 0.26),
}
_OF_OTHERS = {"qkv": "q", "gate": "w1", "tied head": "head", "position bias": "positions"}

#: How far r may be off: by this factor either way.
_SPREAD = 2.0

#: Where no number of steps is given the rate stays, and a clip that lasts so long does not end.
_FOREVER = 1_000_000

#: A matrix's kind is the first whose pattern is in its name.
_PATTERNS = (
    ("position bias", r"relative_(position_bias|attention_bias)"),
    ("positions", r"(^|\.)(wpe|pos_emb|pos_embed|embed_positions|position_embeddings?)(\.|$)"),
    ("patch embedding", r"(^|\.)patch_embed(ding|dings)?(\.|$)"),
    ("head", r"(^|\.)(lm_head|heads?|classifier|score|output_layer)(\.|$)"),
    ("head", r"(^|\.)(embed_out|unembed(ding)?)(\.|$)"),
    ("embedding", r"(^|\.)(wte|tok_emb|embed_(tokens|in)|shared)(\.weight|$)"),
    ("embedding", r"(^|\.)(word_|token_)?embed(ding|dings)?(\.weight|$)"),
    ("q", r"\[q\]$|(^|\.)(q|q_proj|query|to_q|w_?q|q_lin)\.weight"),
    ("k", r"\[k\]$|(^|\.)(k|k_proj|key|to_k|w_?k|k_lin)\.weight"),
    ("v", r"\[v\]$|(^|\.)(v|v_proj|value|to_v|w_?v|v_lin)\.weight"),
    ("qkv", r"(^|\.)(c_attn|qkv|qkv_proj|Wqkv|query_key_value)(\.weight|_weight)"),
    ("qkv", r"(^|\.)(linear_qkv|in_proj)(\.weight|_weight)"),
    ("o", r"att(n|ention)[^.]*\.(.*\.)?(o|o_proj|out_proj|c_proj|proj|dense)\."),
    ("o", r"att(n|ention)[^.]*\.(.*\.)?(wo|w_o|out_lin|linear_proj|to_out\.0)\."),
    ("gate", r"\[gate\]$|(^|\.)(gate_proj|wi_0|w1)\.weight"),
    ("w1", r"\[up\]$|(^|\.)(fc|fc1|c_fc|up_proj|linear_fc1|linear1|dense_h_to_4h)\."),
    ("w1", r"(^|\.)(w3|wi|wi_1|lin1|intermediate\.dense)\."),
    ("w2", r"(^|\.)(fc2|c_proj|proj|down_proj|linear_fc2|linear2|dense_4h_to_h)\."),
    ("w2", r"(^|\.)(w2|wo|lin2|output\.dense)\."),
)
_KINDS = tuple((kind, re.compile(pattern)) for kind, pattern in _PATTERNS)


@dataclass(frozen=True)
class Row:
    """What one τ does to the matrices of one kind and shape; steps count from 0."""

    kind: str
    count: int
    rows: int
    cols: int
    is_hidden: bool  #: not an embedding, positions or the head
    sigma_weight: float  #: σ₁(W), the median
    floor: float  #: what σ₁(W) is taken for at least
    asked: float | str  #: τ as it was asked for
    tau: float  #: τ of these matrices: a number where "balanced" was asked
    #: σ₁(U) at the first step: its bounds, and the typical value in between
    sigma_update: tuple[float, float, float]
    rate_first: float  #: α_W / α_t at the first step, typical
    rate_settled: float  #: α_W / α_t at step 100 (or the last), typical
    #: from this step on nothing is clipped any more, at the earliest; None: not within the schedule
    earliest: int | None
    typical: int | None
    latest: int | None
    #: ln(α σ₁(U) / (τ σ₁(W))) / τ with the first step's typical σ₁(U): σ₁(W) growing all the time
    formula: int


def kind_of(name: str) -> str:
    """Return the kind of a matrix by its name, as ``h.0.attn.c_attn.weight[q]``, or "other"."""
    name = re.sub(r"(\[\d+\])+$", "", name)  # of experts
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), "other")


class Case(NamedTuple):
    """Matrices of one kind and shape under one τ; σ₁(W) is their median."""

    kind: str
    rows: int
    cols: int
    members: int
    sigma: float
    floor: float
    asked: float | str
    tau: float
    is_text: bool
    is_hidden: bool

    @property
    def ratios(self) -> tuple[float, ...]:
        """r at the steps of ``_STEPS``; of a kind that was not measured, that of w1."""
        table = _TEXT if self.is_text else _IMAGES
        return table.get(_OF_OTHERS.get(self.kind, self.kind), table["w1"])

    @property
    def grows(self) -> bool:
        """Whether W grows as fast as it may.

        It does where U keeps its direction, or where W is nothing but updates.
        """
        keeps = self.is_text and self.kind in ("head", "tied head")
        return keeps or (self.asked != BALANCED and self.sigma < self.floor)


class Schedule(NamedTuple):
    """A linear warmup, then a cosine from ``lr`` to ``end``."""

    lr: float
    end: float  # the rate at step ``steps``
    steps: int | None  # None: after the warmup the rate stays ``lr``
    warmup: int

    def rate(self, step: int) -> float:
        """α of a step, from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.steps is None:
            return self.lr
        share = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.end + (self.lr - self.end) * (1 + math.cos(math.pi * min(1.0, share))) / 2

    def grid(self) -> list[int]:
        """Every step at first, then such that neighbours differ by half a percent."""
        last, steps = self.steps or self.warmup + _FOREVER, [0]
        while steps[-1] < last:
            steps.append(min(last, steps[-1] + max(1, steps[-1] // 200)))
        return steps


def follow(cases: Sequence[Case], schedule: Schedule) -> list[Row]:
    """Follow all cases through the schedule at once.

    Each is followed three times: at the earliest, typically, at the latest.
    """

    def column(values: Iterable[float]) -> Tensor:
        return torch.tensor([list(values)], dtype=torch.float64)

    tau, floor = column(c.tau for c in cases), column(c.floor for c in cases)
    weight, root = column(c.sigma for c in cases), column(math.sqrt(c.rows * c.cols) for c in cases)
    grows = column(c.grows for c in cases)
    spread = torch.tensor([[1 / _SPREAD], [1.0], [_SPREAD]], dtype=torch.float64)
    logs = torch.tensor([c.ratios for c in cases], dtype=torch.float64).log()  # (cases, knots)
    growth = torch.cat([torch.ones_like(grows), grows, grows])
    # Of W along U, see the module's docstring.
    part = torch.cat([weight, torch.zeros_like(weight), torch.zeros_like(weight)])
    ends = torch.zeros(3, len(cases), dtype=torch.float64)
    rates: dict[int, Tensor] = {}
    grid = schedule.grid()
    settled = min(100, grid[-1] - 1)
    for step, following in pairwise(grid):
        update = (spread * root * _interpolated(logs, step + 1)).minimum(root)
        width, rate = following - step, schedule.rate(step)
        base = torch.maximum(torch.maximum(weight, part), floor)
        bound = tau * base / update
        ends = torch.where(rate > bound, float(following), ends)
        if step in (0, settled):
            rates[step] = (bound[1] / rate).clamp(max=1.0)
        compounded = part * torch.expm1(width * torch.log1p(tau))
        most = torch.where(part >= base, compounded, width * tau * base)
        part = part + growth * torch.minimum(most, width * rate * update)
    rows = []
    for number, case in enumerate(cases):
        largest = math.sqrt(case.rows * case.cols)  # that σ₁(U) can be
        first, least = largest * case.ratios[0], math.sqrt(max(case.rows, case.cols))
        steps = ends[:, number].tolist()
        early, usual, late = (None if end >= grid[-1] else int(end) for end in steps)
        excess = schedule.lr * first / (case.tau * max(case.sigma, case.floor, 1e-300))
        rows.append(
            Row(
                kind=case.kind,
                count=case.members,
                rows=case.rows,
                cols=case.cols,
                is_hidden=case.is_hidden,
                sigma_weight=case.sigma,
                floor=case.floor,
                asked=case.asked,
                tau=case.tau,
                sigma_update=(least, max(first, least), largest),
                rate_first=float(rates[0][number]),
                rate_settled=float(rates[settled][number]),
                earliest=early,
                typical=usual,
                latest=late,
                formula=math.ceil(math.log(excess) / case.tau) if excess > 1 else 0,
            )
        )
    return rows


def _interpolated(logs: Tensor, step: int) -> Tensor:
    """Return r of every case at a step, from 1, as ``(1, cases)``."""
    after = next((number for number, knot in enumerate(_STEPS) if knot >= step), None)
    if after is None or after == 0:
        return logs[:, -1 if after is None else 0].exp().unsqueeze(0)
    low, high = _STEPS[after - 1], _STEPS[after]
    share = math.log(step / low) / math.log(high / low)
    return torch.lerp(logs[:, after - 1], logs[:, after], share).exp().unsqueeze(0)
