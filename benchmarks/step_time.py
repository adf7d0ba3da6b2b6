"""What a step of AdamW² costs beside its peers, in one run.

    python -m benchmarks.step_time                      the CPU, 2 to 4 minutes on 2 cores
    python -m benchmarks.step_time --device cuda        a GPU, whole models

--no-deepspeed takes a minute less, --only projected leaves all out but what clips singular values.
The files are written after each model.

The contenders step in turns, so that a busy neighbour slows all of them, and medians are compared.
They share the gradients; every AdamW² and each peer that it is compared with has weights and
moments of its own. That is seven to nine copies of a model: --contenders 4 holds four at once, in
heats that fused AdamW is in each of, and a ratio is taken over AdamW of the same heat. Three
states:

    inactive    the certificate settles every matrix: one pass, no iteration
    undecided   the clip is inactive, but the certificate cannot prove it: every matrix is iterated
    clipped     every matrix is clipped
    naive       the paper's algorithm written down: a loop over matrices, with 3 power iterations
                from random starts

A matrix that is iterated makes its second iteration only where the first gained (spectral/ritz.py).
Gradients that do not change let vectors settle: here none does, in training about 4 of 10 (`python
benchmarks/estimator.py`). The table's line "all iterated twice" is what it costs if all do.

Each is checked after the run by what AdamW² says of its last step. A row of the JSON is one state
beside one peer: ``seconds`` is the state's median, ``ratio`` it over the peer's (by way of AdamW
where they are in two heats),
``bytes_per_second`` the 28 bytes a parameter that AdamW has to read and write, over ``seconds``. On
a CPU a model is a slice of whole blocks that fits (--millions).
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from benchmarks.models import MODELS, Shape, is_of_a_block
from benchmarks.peers import Naive, peers
from weyl_megatron import AdamW2
from weyl_megatron.kernels.choice import pick_name

BASE = "torch.optim.AdamW(fused)"
COPY = "copy"
TWICE = "AdamW², clipped, all iterated twice"
TAU = 0.01
STD = 0.02
#: Rates at which, with weights of deviation 0.02 and updates of about ±1, all matrices of any of
#: the models are in a state: τ σ₁(W) / σ₁(U) is about 0.01 · 0.02, and ‖U‖_F / σ₁(U) is 10 and
#: more.
RATES = {"inactive": 1e-7, "undecided": 7e-5, "clipped": 1e-2}
#: With clip="project": the rate and the vectors.
PROJECTED = {
    "AdamW², inactive, would project": (RATES["inactive"], 8),
    "AdamW², projected, 4 vectors": (RATES["clipped"], 4),
    "AdamW², projected, 8 vectors": (RATES["clipped"], 8),
    "AdamW², projected, 16 vectors": (RATES["clipped"], 16),
}


class Row(NamedTuple):
    """One line of the JSON."""

    device: str
    shape: str
    state: str
    peer: str
    seconds: float
    ratio: float
    bytes_per_second: float


class Contender(Protocol):
    """What steps in turns with others."""

    def step(self) -> Any: ...


class Measured(NamedTuple):
    """The median seconds of a contender, and of fused AdamW in the same heat."""

    seconds: float
    base: float

    @property
    def ratio(self) -> float:
        return self.seconds / self.base


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--shapes", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument(
        "--millions", type=float, default=130, help="parameters of a slice on a CPU (%(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=15, help="steps of each contender (%(default)s)"
    )
    parser.add_argument(
        "--tokens", type=int, default=1024, help="of the training step beside it (%(default)s)"
    )
    parser.add_argument(
        "--no-deepspeed", action="store_true", help="leave DeepSpeed's Adam out, which it compiles"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="PART",
        help="of the contenders, beside fused AdamW, those with one of these parts in their names",
    )
    parser.add_argument(
        "--contenders",
        type=int,
        metavar="N",
        help="hold so many copies of a model at once, 2 or more (all)",
    )
    parser.add_argument("--json", type=Path, default=Path("out/step_time.json"))
    parser.add_argument("--markdown", type=Path, default=Path("out/step_time.md"))
    options = parser.parse_args()
    if options.contenders is not None and options.contenders < 2:
        parser.error(f"--contenders got {options.contenders}, it takes a whole number from 2 on")
    rows: list[Row] = []
    today = datetime.date.today().isoformat()
    sections = [f"{machine(options.device)}, {today}, torch {torch.__version__}"]
    for name in options.shapes:
        of_model, text = measure(name, MODELS[name], options)
        rows += of_model
        sections.append(text)
        print(text + "\n", flush=True)
        for path in (options.json, options.markdown):
            path.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")
        options.markdown.write_text("\n\n".join(sections) + "\n")
    print(f"wrote {options.json} and {options.markdown}")


def measure(name: str, shape: Shape, options: argparse.Namespace) -> tuple[list[Row], str]:
    """Return the rows and the table of one model."""
    device = torch.device(options.device)
    blocks = None
    if device.type == "cpu" and shape.count() > options.millions * 1e6:
        blocks = max(1, int(options.millions * 1e6 / shape.count(1)))
    named = shape.parameters(blocks)
    count = shape.count(blocks)
    generator = torch.Generator(device).manual_seed(0)
    grads = {n: torch.randn(size, generator=generator, device=device) * 1e-3 for n, size in named}

    def weights() -> dict[str, nn.Parameter]:
        made = {
            n: nn.Parameter(torch.randn(size, device=device, generator=generator) * STD)
            for n, size in named
        }
        for n, parameter in made.items():
            parameter.grad = grads[n]
        return made

    makers: dict[str, Callable[[], Contender]] = {
        state: partial(make_adamw2, weights, lr=rate) for state, rate in RATES.items()
    }
    # Of 4 iterations two are made in any case.
    makers[TWICE] = partial(make_adamw2, weights, lr=RATES["clipped"], power_iters=4)
    # Embeddings, positions and the head are scaled.
    io = [n for n, _ in named if not is_of_a_block(n)]
    for label, (rate, vectors) in PROJECTED.items():
        makers[label] = partial(
            make_adamw2, weights, lr=rate, clip="project", vectors=vectors, io=io
        )
    makers |= peers(weights, device, not options.no_deepspeed)
    makers["naive"] = lambda: Naive(weights(), lr=RATES["clipped"], tau=TAU)
    makers[COPY] = lambda: Copy(count, device)
    makers = {name: make for name, make in makers.items() if is_wanted(name, options.only)}

    measured = race_in_heats(makers, options.contenders, options.rounds, device)
    copied = 8 * count / measured[COPY].seconds
    rows = [
        Row(
            str(device),
            name,
            state,
            peer,
            measured[state].seconds,
            measured[state].ratio / measured[peer].ratio,
            28 * count / measured[state].seconds,
        )
        for state in [*RATES, *PROJECTED, "naive"]
        if state in measured
        for peer in measured
        if peer not in (*RATES, *PROJECTED, "naive", COPY, TWICE)
    ]
    memory = memory_beyond_adamw(name, blocks, options.device)
    training = training_step(shape, blocks, options.tokens, device)
    title = name if blocks is None else f"{name}, {blocks} of {shape.blocks} blocks"
    kernel = pick_name(device.type, {torch.float32})
    digits = 1 if device.type == "cpu" else 3  # of milliseconds
    lines = [
        f"**{title}**: {count / 1e6:.0f} M parameters, kernel '{kernel}', copy {copied / 1e9:.0f} "
        f"GB/s; AdamW² takes {memory:.2%} of the parameters' bytes beyond AdamW's memory, peak "
        "included",
        "",
        f"| | ms | × {BASE} | GB/s | of copy | share of a step with {options.tokens} tokens |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    labels = {state: f"AdamW², {state}" for state in RATES} | {"naive": "AdamW², naive"}
    for contender, (time_, base) in measured.items():
        if contender != COPY:
            speed = 28 * count / time_
            lines.append(
                f"| {labels.get(contender, contender)} | {time_ * 1e3:.{digits}f} | "
                f"{time_ / base:.2f} | {speed / 1e9:.1f} | {speed / copied:.0%} | "
                f"{time_ / (time_ + training):.1%} |"
            )
    return rows, "\n".join(lines)


def is_wanted(name: str, parts: Sequence[str] | None) -> bool:
    """Whether a contender takes part."""
    return parts is None or name in (BASE, COPY) or any(part in name for part in parts)


def make_adamw2(weights: Callable[[], dict[str, nn.Parameter]], **options: Any) -> AdamW2:
    return AdamW2(weights().items(), tau=TAU, **options)


class Copy:
    """The bytes of a model's weights, read and written."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.target, self.source = (
            torch.empty(count, device=device),
            torch.ones(count, device=device),
        )

    def step(self) -> None:
        self.target.copy_(self.source)


def heats(names: Sequence[str], at_once: int | None) -> list[list[str]]:
    """Return who steps in turns with whom: at most ``at_once`` of them (None: all), fused AdamW in
    each heat.
    """
    if at_once is None or len(names) <= at_once:
        return [list(names)]
    others = [name for name in names if name != BASE]
    size = at_once - 1
    return [[BASE, *others[at : at + size]] for at in range(0, len(others), size)]


def race_in_heats(
    makers: dict[str, Callable[[], Contender]],
    at_once: int | None,
    rounds: int,
    device: torch.device,
) -> dict[str, Measured]:
    """Return what was measured of each, in the order of ``makers``; fused AdamW's is that of the
    first heat.
    """
    measured: dict[str, Measured] = {}
    for names in heats(list(makers), at_once):
        contenders = {name: makers[name]() for name in names}
        seconds = race(
            {name: contender.step for name, contender in contenders.items()}, rounds, device
        )
        check_states({name: each for name, each in contenders.items() if isinstance(each, AdamW2)})
        for name, time_ in seconds.items():
            measured.setdefault(name, Measured(time_, seconds[BASE]))
        del contenders  # before the next heat's are made
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {name: measured[name] for name in makers}


def race(
    contenders: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, float]:
    """Return the median seconds of each; they take turns. Those that take more than a second have
    three turns.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 2):
        for name, step in contenders.items():
            is_slow = bool(times[name]) and times[name][-1] > 1 and device.type == "cpu"
            if is_slow and len(times[name]) >= 3:
                continue
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            taken = time.perf_counter() - start
            if turn > 1 or is_slow or taken > 1:  # the first turns make states and vectors
                times[name].append(taken)
    return {
        name: statistics.median(each[1:] if len(each) > 2 else each) for name, each in times.items()
    }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def check_states(optimizers: dict[str, AdamW2]) -> None:
    """Raise RuntimeError where an optimizer was not in the state that its time is given for."""
    for state, optimizer in optimizers.items():
        entries = optimizer.stats().values()
        is_so = {
            "inactive": all(entry.certified for entry in entries),
            "undecided": not any(entry.certified or entry.clipped for entry in entries),
            "clipped": all(entry.clipped for entry in entries),
            TWICE: all(entry.clipped for entry in entries),
        }
        for label, (rate, _) in PROJECTED.items():
            is_so[label] = is_so["clipped" if rate == RATES["clipped"] else "inactive"]
        if not is_so[state]:
            raise RuntimeError(f"not every matrix is {state}: {optimizer.stats()}")


def memory_beyond_adamw(name: str, blocks: int | None, device: str) -> float:
    """Return what AdamW² takes at its peak, in a process of its own, beyond weights, gradients and
    AdamW's state.
    """
    command = [sys.executable, "-m", "benchmarks.memory", name, str(blocks or 0), device]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(run.stderr[-2000:])
    return float(run.stdout.split()[-1])


def training_step(shape: Shape, blocks: int | None, tokens: int, device: torch.device) -> float:
    """Return the seconds of a forward and backward pass over ``tokens`` tokens of the same blocks,
    in float32.
    """
    length = min(tokens, shape.context)
    heads = max(1, shape.width // 64)
    named = shape.parameters(blocks)
    weights = {
        n: nn.Parameter(torch.randn(size, device=device) * STD)
        for n, size in named
        if len(size) < 4
    }
    norm, linear = nn.functional.layer_norm, nn.functional.linear
    prefixes = list(dict.fromkeys(n.split(".attn.")[0] for n, _ in named if ".attn." in n))
    qkv, out, up, down = "qkv", "proj", "fc1", "fc2"
    if shape.kind == "gpt":
        qkv, out, up, down = "c_attn", "c_proj", "c_fc", "c_proj"

    def dense(x: Tensor, layer: str) -> Tensor:
        return linear(x, weights[layer + ".weight"], weights[layer + ".bias"])

    def forward() -> Tensor:
        x = torch.randn(max(1, tokens // length), length, shape.width, device=device)
        for prefix in prefixes:
            size = (shape.width,)
            h = norm(x, size, weights[f"{prefix}.norm1.weight"], weights[f"{prefix}.norm1.bias"])
            q, k, v = (
                dense(h, f"{prefix}.attn.{qkv}")
                .unflatten(-1, (3, heads, -1))
                .permute(2, 0, 3, 1, 4)
            )
            h = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=shape.kind == "gpt")
            x = x + dense(h.transpose(1, 2).flatten(2), f"{prefix}.attn.{out}")
            h = norm(x, size, weights[f"{prefix}.norm2.weight"], weights[f"{prefix}.norm2.bias"])
            h = nn.functional.gelu(dense(h, f"{prefix}.mlp.{up}"))
            x = x + dense(h, f"{prefix}.mlp.{down}")
        if "wte.weight" in weights:
            x = linear(x, weights["wte.weight"])
        return x.square().mean()

    taken = []
    for _ in range(3):
        synchronize(device)
        start = time.perf_counter()
        forward().backward()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    return min(taken)


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    model = next(names, platform.processor())
    return f"{model}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
