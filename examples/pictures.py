"""The pictures of docs/why_sigma.md: one for each way in which a run without warmup fails.

    python -m examples.pictures [--out docs]

Trains the GPT of examples/collapse (6 blocks, width 64, no warmup, a rate that stays) ten times
on the sources of Python's standard library, in 1.5 minutes of one core, and draws

- why-updates.svg: how far a step moves W, ‖ΔW‖₂ / σ₁(W), which is largest in the first steps;
- why-rank.svg: tokens that become all alike (post-LN);
- why-entropy.svg: heads that look at one token, as σ₁(W_qᵀW_k) grows (pre-LN);
- why-zero.svg: matrices that start at zero, and stay there without a floor (pre-LN).

It prints the numbers that the page has.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from examples.collapse.model import GPT, GPTConfig
from weyl_megatron import AdamW2
from weyl_megatron.demo.data import load_corpus, sequences, training_offsets
from weyl_megatron.report.charts import Axis, Chart, Line, Rule, smooth
from weyl_megatron.report.curves import Range, axis
from weyl_megatron.report.points import Points
from weyl_megatron.report.sheet import sheet
from weyl_megatron.watch import Watch

BATCH, CONTEXT, STEPS, EVERY = 8, 64, 100, 5
WIDTH, HEIGHT = 300, 220
SMOOTH = 5  # losses to either side
TAU = 0.01

ADAMW, PAPER, ZERO, BALANCED = "#c8452d", "#0f8a78", "#3b9fd8", "#5b4bd6"


@dataclass(frozen=True)
class Setting:
    """One run. AdamW² with τ = ∞ is AdamW, bit for bit."""

    title: str
    color: str
    norm: str
    lr: float
    tau: float | str
    floor_std: float = 1e-3
    is_zero: bool = False  # whether what ends a branch, W_o and W_2, starts at zero


@dataclass
class Story:
    """What a run was, and by its name what was measured: (step, value)."""

    setting: Setting
    series: dict[str, Points] = field(default_factory=dict)

    def add(self, name: str, step: int, value: float) -> None:
        self.series.setdefault(name, []).append((step, value if math.isfinite(value) else None))

    def at(self, name: str, step: int = -1) -> float:
        value = self.series[name][step][1]
        return math.nan if value is None else value


def settings(norm: str, lr: float) -> list[Setting]:
    """AdamW and AdamW² at one rate."""
    return [
        Setting("AdamW", ADAMW, norm, lr, math.inf),
        Setting(f"AdamW², τ = {TAU:g}", PAPER, norm, lr, TAU),
        Setting("AdamW², τ = balanced", BALANCED, norm, lr, "balanced"),
    ]


RANK, ENTROPY = settings("post", 3e-3), settings("pre", 0.1)
FROM_ZERO = [
    Setting("AdamW", ADAMW, "pre", 3e-3, math.inf, is_zero=True),
    Setting(f"τ = {TAU:g}, no floor", ZERO, "pre", 3e-3, TAU, floor_std=0.0, is_zero=True),
    Setting(f"τ = {TAU:g}, floor_std 0.001", PAPER, "pre", 3e-3, TAU, is_zero=True),
    Setting("τ = balanced", BALANCED, "pre", 3e-3, "balanced", is_zero=True),
]


def train(setting: Setting, steps: int, seed: int) -> Story:
    """Train one run, watched, and measure how far every step moved the matrices."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(norm=setting.norm))
    if setting.is_zero:
        for name, param in model.named_parameters():
            if name.endswith(("attn.o.weight", "mlp.fc2.weight")):
                nn.init.zeros_(param)
    optimizer = AdamW2(
        model.named_parameters(),
        lr=setting.lr,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        tau=setting.tau,
        floor_std=setting.floor_std,
    )
    corpus = load_corpus()
    offsets = training_offsets(corpus, steps, BATCH, CONTEXT, seed)
    watch, story = Watch(model, optimizer, every=EVERY), Story(setting)
    losses: list[float] = []
    queries = [param for name, param in model.named_parameters() if name.endswith("attn.q.weight")]
    for step in range(1, steps + 1):
        loss = model(*sequences(corpus.train, offsets[step - 1], CONTEXT))
        model.zero_grad()
        loss.backward()
        before = [weight.detach().clone() for weight in queries]
        optimizer.step()
        losses.append(loss.item())
        story.add("moved", step, median(map(_moved, before, queries)))
        if values := watch.step(loss):
            _tell(story, step, values)
    watch.close()
    for step, value in enumerate(smooth(losses, SMOOTH), 1):
        story.add("loss", step, value)
    return story


def _moved(before: Tensor, after: Tensor) -> float:
    """Return ‖ΔW‖₂ / σ₁(W)."""
    moved = torch.linalg.matrix_norm(after.detach() - before, 2)
    return float(moved / torch.linalg.matrix_norm(before, 2))


def _tell(story: Story, step: int, values: Mapping[str, float]) -> None:
    heads = [value for tag, value in values.items() if tag.endswith("/entropy")]
    story.add("entropy", step, min(heads))
    story.add("mean entropy", step, sum(heads) / len(heads) / values["uniform_entropy"])
    story.add("similarity", step, max(_blocks(values, "similarity")))
    story.add("sigma_qk", step, max(_blocks(values, "sigma_qk")))
    story.add("sigma_2", step, median(_blocks(values, "sigma_2")))


def _blocks(values: Mapping[str, float], name: str) -> list[float]:
    return [
        value for tag, value in values.items() if tag.endswith(f"/{name}") and "head" not in tag
    ]


class Panel(NamedTuple):
    """One chart: of some runs, what is measured under a name."""

    stories: Sequence[Story]
    name: str
    y: Axis
    title: str = ""
    rules: Sequence[Rule] = ()


def picture(panels: Sequence[Panel]) -> str:
    """Charts side by side, under a legend of the runs of the first."""
    stories = panels[0].stories
    last = stories[0].series["loss"][-1][0]
    row = [
        Chart(
            title=panel.title,
            x=Range("step", 0, last),
            y=panel.y,
            lines=[_line(story, panel.name) for story in panel.stories],
            rules=panel.rules,
            width=WIDTH,
            height=HEIGHT,
            right=14,
        )
        for panel in panels
    ]
    return sheet([row], [_line(story) for story in stories], len(row))


def _line(story: Story, name: str = "") -> Line:
    """A run's curve; without a name, its entry in the legend."""
    points = [(step, value) for step, value in story.series.get(name, []) if value is not None]
    setting = story.setting
    x, y = [step for step, _ in points], [value for _, value in points]
    return Line(setting.title, x, y, setting.color, width=2.0)


def _axis(label: str, name: str, stories: Sequence[Story], log: bool = False) -> Axis:
    return axis(label, [story.series[name] for story in stories], log)


def draw(out: Path, steps: int, seed: int) -> None:
    """Train all runs, draw the pictures, and print what they show."""
    rank, entropy, zero = (
        [_trained(setting, steps, seed) for setting in each] for each in (RANK, ENTROPY, FROM_ZERO)
    )
    loss, bound = Axis("loss, nats", 2.4, 5.4), [Rule(TAU, f"τ = {TAU:g}")]
    moves = _axis("‖ΔW_q‖₂ / σ₁(W_q), median", "moved", [*rank, *entropy], True)
    pictures = {
        "why-updates.svg": [
            Panel(rank, "moved", moves, "post-LN, lr 0.003", bound),
            Panel(entropy, "moved", moves, "pre-LN, lr 0.1", bound),
        ],
        "why-rank.svg": [
            Panel(rank, "loss", loss),
            Panel(rank, "similarity", Axis("cosine between tokens, largest", 0, 1.02)),
            Panel(rank, "mean entropy", Axis("entropy / uniform, mean", 0.6, 1.02)),
        ],
        "why-entropy.svg": [
            Panel(entropy, "loss", loss),
            Panel(entropy, "sigma_qk", _axis("σ₁(W_qᵀW_k), largest", "sigma_qk", entropy, True)),
            Panel(entropy, "entropy", _axis("entropy of a head, least", "entropy", entropy)),
        ],
        "why-zero.svg": [
            Panel(zero, "loss", loss),
            Panel(zero, "sigma_2", _axis("σ₁(W_2), median", "sigma_2", zero, True)),
        ],
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, panels in pictures.items():
        (out / name).write_text(picture(panels), encoding="utf-8")
        print(f"wrote {out / name}")


def _trained(setting: Setting, steps: int, seed: int) -> Story:
    story = train(setting, steps, seed)
    last = [value for _, value in story.series["loss"][-20:] if value is not None]
    numbers = {
        "loss": sum(last) / max(1, len(last)),
        "moved at step 1": story.at("moved", 0),
        "moved at the end": story.at("moved"),
        "similarity": story.at("similarity"),
        "entropy / uniform": story.at("mean entropy"),
        "least entropy": min(value for _, value in story.series["entropy"] if value is not None),
        "σ₁(WqᵀWk)": max(value for _, value in story.series["sigma_qk"] if value is not None),
        "σ₁(W2)": story.at("sigma_2"),
    }
    start = " from zero" if setting.is_zero else ""
    what = f"{setting.norm}-LN{start}, lr {setting.lr:g}, {setting.title}"
    said = ", ".join(f"{name} {number:.3g}" for name, number in numbers.items())
    print(f"{what}: {said}", flush=True)
    return story


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw(options.out, options.steps, options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
