"""What ``spike="log"`` adds to a step: the time in what it does, beside the optimizer's step and a
whole training step.

    python -m benchmarks.spike_cost [--device cuda]

GPT-2 124M, 1024 tokens a step; about 2 minutes on 2 cores. The difference of two runs would drown
in what steps vary by, so that the calls themselves are timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.watch_cost import config_of, options_of_a_gpt
from examples.collapse.model import GPT, GPTConfig
from weyl_megatron import AdamW2
from weyl_megatron.spikes import WINDOW, Spikes


class Timed:
    """Sums the time in a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self.seconds = function, 0.0

    def __call__(self, *args: Any) -> Any:
        began = time.perf_counter()
        value = self._function(*args)
        self.seconds += time.perf_counter() - began
        return value


def main() -> None:
    options = options_of_a_gpt(__doc__, rounds=3).parse_args()
    config = config_of(options)
    spikes, step, training = cost(config, options.device, options.rounds)
    print(
        f"{options.device}, {config.layers} blocks of width {config.width}: {1e3 * spikes:.2f} ms "
        f"a step, {spikes / step:.2%} of the optimizer's {1e3 * step:.0f} ms, "
        f"{spikes / training:.3%} of a training step of {training:.2f} s"
    )


def cost(config: GPTConfig, device: str, rounds: int) -> tuple[float, float, float]:
    """Return the seconds a step in ``spike``, in the optimizer, and in training."""
    torch.manual_seed(0)
    model = GPT(config).to(device)
    optimizer = AdamW2(model.named_parameters(), lr=1e-3, spike="log")
    timed = Timed(Spikes.admits), Timed(Spikes.observe)
    Spikes.admits, Spikes.observe = (  # type: ignore[method-assign,assignment]
        lambda *args: timed[0](*args),
        lambda *args: timed[1](*args),
    )
    training: list[float] = []
    for _ in range(rounds + 1):
        tokens = torch.randint(config.vocabulary, (1, config.context + 1), device=device)
        began = time.perf_counter()
        loss = model(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        training.append(time.perf_counter() - began)
    for _ in range(WINDOW):  # as the window fills, its median is one of more numbers
        optimizer.step()
    steps: list[float] = []
    before = sum(each.seconds for each in timed)
    for _ in range(WINDOW // 2):
        began = time.perf_counter()
        optimizer.step()
        steps.append(time.perf_counter() - began)
    spent = sum(each.seconds for each in timed) - before
    return spent / len(steps), statistics.median(steps), statistics.median(training[1:])


if __name__ == "__main__":
    main()
