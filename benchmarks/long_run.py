"""The report of a run of several hours: how long it takes to make, in what memory; to open.

    python -m benchmarks.long_run [--steps 100000] [--every 100] [--layers 48] [--heads 32]

The log is written without training. Its tags are those that a real Watch wrote of a model of two
blocks and two heads with clip="project", said of every block, head and matrix; its numbers drift,
with noise, and single ones are far away (`planted`). `--maps 1` keeps the attention map of a head
of each block.

Then the page and the summary are made of it, each in a process of its own, whose time and peak
memory are told, and Chromium opens the page.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.collapse.model import GPT, GPTConfig
from tests.browser import CHROMIUM
from tests.devtools import tab
from weyl_megatron import AdamW2
from weyl_megatron.watch import Watch

_SIZE = 2  # blocks, and heads of each, of the model that is watched
_MAP = (64, 256)  # rows and columns of an attention map


@dataclass(frozen=True)
class LongRun:
    """A run that never was."""

    steps: int = 100_000
    every: int = 100
    layers: int = 48
    heads: int = 32
    maps: int = 0  # heads of each block whose map is kept

    @cached_property
    def measured(self) -> list[int]:
        """The steps that are measured: the first, and each `every`-th."""
        return list(dict.fromkeys([1, *range(self.every, self.steps + 1, self.every)]))

    def planted(self) -> dict[str, tuple[int, float]]:
        """Numbers that are far from all others of their series: the tag, the step, the number."""
        measured, last = self.measured, self.layers - 1
        places = {
            "loss": (0.61, 0.5),
            f"block/{last}/x": (0.29, 7e5),
            f"block/{last // 2}/head/{self.heads - 1}/max_logit": (0.37, 4e4),
            f"block/{last}/head/0/entropy": (0.53, 1e-3),
            f"clip/blocks.{last}.attn.q.weight/lr": (0.83, 1e-9),
        }
        return {
            tag: (measured[int(share * len(measured))], value)
            for tag, (share, value) in places.items()
        }

    def write(self, folder: Path) -> Path:
        """Write `folder/stability.jsonl`; return its path."""
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "stability.jsonl"
        with log.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in self._records())
        return log

    def _records(self) -> Iterator[dict[str, Any]]:
        blocks = [f"blocks.{block}" for block in range(self.layers)]
        header = {"run": "long", "blocks": blocks, "heads": self.heads, "sec": 4}
        yield {"event": "start", "version": 1, **header, "interval": self.every}
        generator = torch.Generator().manual_seed(0)
        levels = _expanded(watched(), self.layers, self.heads)
        tags, base = list(levels), torch.tensor(list(levels.values()), dtype=torch.float64)
        is_fixed = torch.tensor([tag in ("uniform_entropy", "map_rows") for tag in tags])
        ends = ("/sec", "/share", "/similarity", "clip_share")
        most = [1.0 if tag.endswith(ends) or ends[-1] in tag else math.inf for tag in tags]
        roof = torch.tensor(most, dtype=torch.float64)
        is_whole = torch.tensor([tag.endswith(("/mode", "/clipped")) for tag in tags])
        drift = torch.randn(len(tags), generator=generator, dtype=torch.float64)
        planted: dict[int, list[tuple[int, float]]] = {}
        for tag, (step, value) in self.planted().items():
            planted.setdefault(step, []).append((tags.index(tag), value))
        for step in self.measured:
            noise = torch.randn(len(tags), generator=generator, dtype=torch.float64)
            numbers = base * torch.exp(drift * step / self.steps / 2 + noise / 20)
            numbers = torch.where(is_fixed, base, numbers.minimum(roof))
            numbers = torch.where(is_whole, (noise > 2).double(), numbers)
            for row, value in planted.get(step, []):
                numbers[row] = value
            short = [float(f"{number:.6g}") for number in numbers.tolist()]
            yield {"event": "step", "step": step, "values": dict(zip(tags, short, strict=True))}
            yield from self._maps(step, generator)
            yield from self._events(step)

    def _maps(self, step: int, generator: torch.Generator) -> Iterator[dict[str, Any]]:
        rows, cols = _MAP
        for block in range(self.layers):
            for head in range(self.maps):
                levels = torch.randint(256, _MAP, generator=generator, dtype=torch.uint8)
                place = {"event": "map", "step": step, "block": block, "head": head}
                text = levels.numpy().tobytes().hex()
                queries = list(range(3, 4 * rows, 4))
                yield {**place, "rows": rows, "cols": cols, "queries": queries, "levels": text}

    def _events(self, step: int) -> Iterator[dict[str, Any]]:
        """A warning at each tenth of the run, and a spike beside each."""
        at = self.measured.index(step)
        if at % max(1, len(self.measured) // 10) != 1:
            return
        block = at % self.layers
        text = f"block {block}, head 0: attention entropy fell; its energy concentrates."
        yield {"event": "warning", "step": step, "block": block, "head": 0, "text": text}
        spiked = {"name": f"blocks.{block}.attn.q.weight", "norm": 9.0 + at, "usual": 1.0}
        matrices = [{**spiked, "z": 20.0 + at}, {**spiked, "z": 12.0}]
        yield {"event": "spike", "step": step, "action": "log", "matrices": matrices}


def watched() -> dict[str, float]:
    """What a real Watch writes: of the third step, as the first update is not typical."""
    torch.manual_seed(0)
    model = GPT(GPTConfig("pre", vocabulary=50, context=64, layers=_SIZE, heads=_SIZE, width=32))
    for norm in model.modules():
        if isinstance(norm, nn.LayerNorm):  # without biases Watch has two numbers less of a block
            norm.bias = nn.Parameter(torch.full_like(norm.weight, 0.01))
    optimizer = AdamW2(model.named_parameters(), lr=1e-3, clip="project")
    watch = Watch(model, optimizer, every=1)
    for _ in range(3):
        tokens: Tensor = torch.randint(50, (2, 65))
        loss = model(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        watch.step(loss)
    watch.close()
    return dict(watch.values)


def _expanded(watched: dict[str, float], layers: int, heads: int) -> dict[str, float]:
    """The same of a model of more blocks and heads: what is said of block 1 and its head 1."""
    expanded: dict[str, float] = {}
    for tag, value in watched.items():
        inside = re.fullmatch(r"(block/|clip/blocks\.|clip_share_block/)(\d+)(.*)", tag)
        if inside is None:
            expanded[tag] = value
        elif inside[2] == "1" and not inside[3].startswith("/head/0/"):
            for block in range(layers):
                for head in range(heads if "/head/" in tag else 1):
                    rest = inside[3].replace("/head/1/", f"/head/{head}/")
                    expanded[f"{inside[1]}{block}{rest}"] = value
    return expanded


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("steps", "every", "layers", "heads", "maps"):
        parser.add_argument(f"--{name}", type=int, default=getattr(LongRun(), name))
    parser.add_argument(
        "--keep",
        type=Path,
        help="a folder for the log, which is taken if it is there, and the page",
    )
    options = vars(parser.parse_args())
    keep: Path | None = options.pop("keep")
    folder = keep or Path(tempfile.mkdtemp())
    try:
        _measure(LongRun(**options), folder)
    finally:
        if keep is None:
            shutil.rmtree(folder)


def _measure(run: LongRun, folder: Path) -> None:
    log = folder / "run" / "stability.jsonl"
    if not log.is_file():
        run.write(log.parent)
    with log.open("rb") as file:
        tags = next(len(json.loads(line)["values"]) for line in file if b'"values"' in line)
    size = log.stat().st_size
    print(f"log: {len(run.measured)} measurements of {tags} numbers, {size / 1e6:.0f} MB")
    _report("page", log.parent, ["--out", str(folder / "report.html")])
    _report("--json", log.parent, ["--json", str(folder / "report.json")])
    page = folder / "report.html"
    print(f"page: {page.stat().st_size / 1e6:.2f} MB")
    if CHROMIUM is None:
        print("opened: no chromium: apt-get install chromium")
        return
    for width in (1280, 390):
        with tempfile.TemporaryDirectory() as profile, tab(Path(profile)) as shown:
            opened = shown.open(page, width)
        times = ", ".join(
            f"{name} {opened[name]:.2f} s" for name in ("busy", "first", "loaded", "painted")
        )
        print(f"opened at {width} pixels: {times}; {opened['wide']} too wide, {shown.errors}")


def _report(name: str, run: Path, options: list[str]) -> None:
    """Run the command in a process of its own; print its time and its peak memory."""
    code = (
        "import resource, sys\n"
        "from weyl_megatron.cli import main\n"
        "status = main(sys.argv[1:])\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "seconds, peak = used.ru_utime + used.ru_stime, used.ru_maxrss / 1e6\n"
        "print(f'{seconds:.1f} s of a core, peak memory {peak:.2f} GB', file=sys.stderr)\n"
        "sys.exit(status)"
    )
    began = time.perf_counter()
    command = [sys.executable, "-c", code, "report", str(run), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    took = time.perf_counter() - began
    print(f"{name}: {took:.1f} s, {done.stderr.splitlines()[-1]}")


if __name__ == "__main__":
    main()
