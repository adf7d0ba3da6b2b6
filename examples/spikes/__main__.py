"""What ``spike="log"`` tells of bad batches, and what ``"skip"`` leaves out; about 8 minutes on one
core.

    python -m examples.spikes [--steps 640] [--seeds 10 11]
"""

from __future__ import annotations

import argparse

import torch

from examples.spikes.plant import KINDS, Planted, train


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=640)
    parser.add_argument("--seeds", nargs="+", type=int, default=[10, 11])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| | " + " | ".join(KINDS) + " | false alarms per 1,000 steps | loss |")
    print("| --- |" + " ---: |" * (len(KINDS) + 2))
    for spike in ("log", "skip"):
        for beta2, clip, tells in (
            (0.95, None, False),
            (0.95, 1.0, False),
            (0.95, 1.0, True),
            (0.999, None, False),
        ):
            planted = [
                Planted(options.steps, seed, spike, beta2=beta2, clip=clip, tells_norm=tells)
                for seed in options.seeds
            ]
            runs = list(map(train, planted))
            cells = [
                f"{sum(run.told[kind] for run in runs)} of {sum(run.planted[kind] for run in runs)}"
                for kind in KINDS
            ]
            steps = sum(run.clean_steps for run in runs)
            rate = 1000 * sum(run.false_alarms for run in runs) / steps
            loss = sum(run.loss for run in runs) / len(runs)
            what = f"{spike}, β₂ {beta2}" + (", gradients clipped to 1" if clip else "")
            what += ", norm told" if tells else ""
            print(f"| {what} | {' | '.join(cells)} | {rate:.1f} | {loss:.3f} |", flush=True)


if __name__ == "__main__":
    main()
