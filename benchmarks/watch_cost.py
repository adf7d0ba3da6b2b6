"""What watching costs: a training step that is measured beside one that is not.

    python -m benchmarks.watch_cost [--device cuda]

GPT-2 124M, 1024 tokens a step; about 3 minutes on 2 cores.

All twelve blocks, every quantity of docs/watch.md but sharpness, no sink but JSON lines. Steps
with and without take turns; medians. What it costs at interval N is the difference over N steps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch

from examples.collapse.model import GPT, GPTConfig
from weyl_megatron import AdamW2
from weyl_megatron.watch import Watch


def options_of_a_gpt(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """Return a parser of what to train, and where; GPT-2 124M where nothing is said."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=1024, help="of one sequence (%(default)s)")
    parser.add_argument("--rounds", type=int, default=rounds)
    return parser


def config_of(options: argparse.Namespace) -> GPTConfig:
    """Return the model that the options ask for."""
    return GPTConfig(
        "pre",
        vocabulary=50257,
        context=options.tokens,
        layers=options.layers,
        heads=options.width // 64,
        width=options.width,
    )


def main() -> None:
    parser = options_of_a_gpt(__doc__, rounds=4)
    parser.add_argument("--interval", type=int, default=100)
    options = parser.parse_args()
    share = cost(config_of(options), options.device, options.rounds, options.interval)
    print(f"at interval {options.interval} watching takes {share:.2%} of the run's time")


def cost(config: GPTConfig, device: str, rounds: int, interval: int) -> float:
    """Return the share of a run's time that watching takes."""
    torch.manual_seed(0)
    model = GPT(config).to(device)
    optimizer = AdamW2(model.named_parameters(), lr=1e-3)
    times: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        watch = Watch(model, optimizer, every=2, out=folder)
        for step in range(2 * rounds + 2):
            x = torch.randint(config.vocabulary, (1, config.context + 1), device=device)
            began = time.perf_counter()
            loss = model(x[:, :-1], x[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            is_measured = bool(watch.step(loss))
            if device == "cuda":
                torch.cuda.synchronize()
            if step > 1:
                times[is_measured].append(time.perf_counter() - began)
        watch.close()
    plain, measured = statistics.median(times[False]), statistics.median(times[True])
    print(
        f"{device}, {config.layers} blocks of width {config.width}, {config.context} tokens: "
        f"step {plain:.3f} s, measured {measured:.3f} s"
    )
    return (measured - plain) / (interval * plain)


if __name__ == "__main__":
    main()
