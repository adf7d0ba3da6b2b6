"""What watching costs: a training step that is measured beside one that is not.

    python -m benchmarks.watch_cost                    GPT-2 124M, 1024 tokens a step, about 3 minutes on 2 cores
    python -m benchmarks.watch_cost --device cuda

All twelve blocks, every quantity of docs/stability.md but sharpness, no sink but JSON lines. Steps
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
from weyl_megatron.watch.watch import Watch


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=1024, help="of one sequence (%(default)s)")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--interval", type=int, default=100)
    options = parser.parse_args()
    share = cost(
        options.device,
        options.layers,
        options.width,
        options.tokens,
        options.rounds,
        options.interval,
    )
    print(f"at interval {options.interval} watching takes {share:.2%} of the run's time")


def cost(device: str, layers: int, width: int, tokens: int, rounds: int, interval: int) -> float:
    """Return the share of a run's time that watching takes."""
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(
            "pre", vocabulary=50257, context=tokens, layers=layers, heads=width // 64, width=width
        )
    )
    model.to(device)
    optimizer = AdamW2(model.named_parameters(), lr=1e-3)
    times: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        watch = Watch(model, optimizer, every=2, out=folder)
        for step in range(2 * rounds + 2):
            x = torch.randint(50257, (1, tokens + 1), device=device)
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
        f"{device}, {layers} blocks of width {width}, {tokens} tokens: step {plain:.3f} s, "
        f"measured {measured:.3f} s"
    )
    return (measured - plain) / (interval * plain)


if __name__ == "__main__":
    main()
