"""Train the small GPT of examples/compare on batches some of which are bad, and count what is seen.

What is bad about a batch says how it can be seen: text of random tokens has other gradients in
every matrix, text whose targets were shuffled has hardly any that are larger.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from examples.compare.train import TASKS, schedule
from weyl_megatron import AdamW2
from weyl_megatron.spikes import LEAST

#: Steps between bad batches, the first of them, and after one what is not held against the rest.
GAP, FIRST, AFTERMATH = 40, 160, 20

#: What is made of inputs and targets, ``(batch, context)``, by a generator.
Spoil = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


def _random(inputs: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens of another language: each as likely as any."""
    most = int(targets.max()) + 1
    noise = torch.randint(most, (2, *inputs.shape), generator=generator)
    return noise[0], noise[1]


def _shuffled(inputs: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The right targets in wrong places."""
    order = torch.randperm(targets.numel(), generator=generator)
    return inputs, targets.flatten()[order].view_as(targets)


def _stuck(inputs: Tensor, _: Tensor, __: torch.Generator) -> tuple[Tensor, Tensor]:
    """One token, over and over."""
    stuck = torch.full_like(inputs, int(inputs[0, 0]))
    return stuck, stuck.clone()


def _repeated(inputs: Tensor, targets: Tensor, _: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same sequence in all of the batch."""
    return inputs[:1].expand_as(inputs), targets[:1].expand_as(targets)


def _backwards(inputs: Tensor, targets: Tensor, _: torch.Generator) -> tuple[Tensor, Tensor]:
    return inputs.flip(1), targets.flip(1)


def _as_it_is(inputs: Tensor, targets: Tensor, _: torch.Generator) -> tuple[Tensor, Tensor]:
    return inputs, targets


#: By its name; of "scaled" the gradients are 30 times what they should be.
KINDS: dict[str, Spoil] = {
    "random": _random,
    "stuck": _stuck,
    "scaled": _as_it_is,
    "backwards": _backwards,
    "shuffled": _shuffled,
    "repeated": _repeated,
}


@dataclass(frozen=True)
class Planted:
    """A run."""

    steps: int = 640
    seed: int = 0
    spike: str = "log"
    tau: float | str = "balanced"
    beta2: float = 0.95
    lr: float = 3e-3
    clip: float | None = None  # of the norm of all gradients, as most runs have it
    tells_norm: bool = False  # that from before, as engines do

    def bad(self) -> dict[int, str]:
        """Return the kind of every bad batch, by its step, from 0."""
        names = list(KINDS)
        steps = range(FIRST, self.steps, GAP)
        return {step: names[number % len(names)] for number, step in enumerate(steps)}


@dataclass
class Seen:
    """What a run had, and what of it was told or skipped."""

    planted: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    told: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    clean_steps: int = 0
    false_alarms: int = 0
    loss: float = 0.0  # mean of the last 20 good steps


def train(run: Planted) -> Seen:
    """Make a run, and count."""
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(run.seed + 1000)
    task = TASKS["gpt"]
    model = task.model(6, "pre", 64)
    optimizer = AdamW2(
        model.named_parameters(),
        lr=run.lr,
        betas=(0.9, run.beta2),
        weight_decay=0.1,
        tau=run.tau,
        model=model,
        spike=run.spike,
    )
    bad, seen, losses = run.bad(), Seen(), []
    alarms: list[int] = []
    for step, (inputs, targets) in enumerate(task.batches(run.steps, run.seed, task.batch)):
        for group in optimizer.param_groups:
            group["lr"] = run.lr * schedule(step, run.steps, 0.0)
        kind = bad.get(step)
        if kind is not None:
            inputs, targets = KINDS[kind](inputs, targets, generator)
        loss = model(inputs, targets)
        model.zero_grad()
        loss.backward()
        if kind == "scaled":
            for parameter in model.parameters():
                parameter.grad.mul_(30.0)
        if run.clip is not None:
            norm = nn.utils.clip_grad_norm_(model.parameters(), run.clip)
            if run.tells_norm:
                optimizer.tell_norm(norm)
        before = len(optimizer.spikes)
        optimizer.step()
        if len(optimizer.spikes) > before:
            alarms.append(step)
        if kind is None:
            losses.append(loss.item())
    for step, kind in bad.items():
        seen.planted[kind] += 1
        seen.told[kind] += step in alarms
    near = {later for step in bad for later in range(step, step + AFTERMATH)}
    seen.clean_steps = len(set(range(LEAST, run.steps)) - near)
    seen.false_alarms = len(set(alarms) - near)
    seen.loss = sum(losses[-20:]) / 20
    return seen
