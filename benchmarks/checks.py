"""What a step pays for checking the tensors whose addresses a kernel is handed.

    python -m benchmarks.checks [--shape gpt2-124m] [--rounds 20]        half a minute, 4 GB

Times the check of W, G, M and V of every parameter by itself, and whole steps whose clip is
inactive, the cheapest that there are; prints the medians, and the least share that a check can
have.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from time import perf_counter

import torch

from benchmarks.models import MODELS
from weyl_megatron import AdamW2
from weyl_megatron.kernels.stepped import check_form, check_memory, extent_of, form_of, has_form


def milliseconds(run: Callable[[], object], rounds: int) -> float:
    """Return the median time of ``run``."""
    times = []
    for _ in range(rounds):
        start = perf_counter()
        run()
        times.append(1e3 * (perf_counter() - start))
    return float(torch.tensor(times).median())


def measure(shape: str, rounds: int) -> tuple[float, float]:
    """Return the milliseconds of the checks of a step, and of the step."""
    torch.manual_seed(0)
    named = [
        (name, torch.nn.Parameter(0.02 * torch.randn(size)))
        for name, size in MODELS[shape].parameters()
    ]
    optimizer = AdamW2(named, lr=1e-6, tau=1.0)
    for _, param in named:
        param.grad = torch.randn_like(param)
    for _ in range(3):
        optimizer.step()
    known = [(param, form_of(param), extent_of(form_of(param)), name) for name, param in named]

    def check() -> None:
        for param, form, extent, name in known:
            state = optimizer.state[param]
            assert has_form(param, form) and param.grad is not None  # or the layout is read anew
            check_memory(param, extent, "", name)
            for tensor in (param.grad, state["exp_avg"], state["exp_avg_sq"]):
                check_form(tensor, form, extent, "", name)

    return milliseconds(check, rounds), milliseconds(optimizer.step, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=MODELS, default="gpt2-124m")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    checks, step = measure(args.shape, args.rounds)
    print(
        f"{args.shape}: checks {checks:.2f} ms of a step of {step:.1f} ms, "
        f"{100 * checks / step:.2f} %"
    )


if __name__ == "__main__":
    main()
