"""A ViT on scikit-learn's digits: AdamW² without warmup, AdamW with the best of several.

    python -m examples.deepspeed.digits

Each run is pretrain_vit.py on recipes/vit_digits.yaml under torchrun, so that what is compared is
what a user runs. The warmup is the one that ends best over all seeds, which favours it. Exits with
1 if AdamW², over the seeds, is more than a point of accuracy below it. A run that is there already
is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent

#: Shares of the steps.
WARMUPS = (0.05, 0.1, 0.2, 0.5)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.deepspeed.digits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("out/digits"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--procs", type=int, default=2)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="replaces a recipe's value"
    )
    args = parser.parse_args(arguments)
    data = args.out / "images"
    if not (data / "train").is_dir():
        run([sys.executable, "-m", "examples.data.digits", "--out", str(data), "--size", "16"])
    steps = int(run([sys.executable, "-c", COUNT, str(data), *args.set]).split()[-1])
    methods = {
        "AdamW², no warmup": [],
        "AdamW, no warmup": ["optimizer=AdamW"],
    }
    for share in WARMUPS:
        warmup = f"lr_warmup_steps={round(share * steps)}"
        methods[f"AdamW, warmup {share:.0%}"] = ["optimizer=AdamW", warmup]
    accuracies = {
        name: [accuracy(args, data, name, [*args.set, *overrides], seed) for seed in args.seeds]
        for name, overrides in methods.items()
    }
    for name, shares in accuracies.items():
        print(f"{name:<20}{mean(shares):7.2%}   ({', '.join(f'{share:.2%}' for share in shares)})")
    ours = mean(accuracies["AdamW², no warmup"])
    best = max(mean(shares) for name, shares in accuracies.items() if "warmup " in name)
    ahead = f"{100 * (ours - best):+.2f} points"
    print(f"AdamW² without warmup against AdamW with the best warmup: {ahead}")
    return int(ours < best - 0.01)


COUNT = """
import sys
from pathlib import Path
from examples.data.images import open_images
from examples.deepspeed.recipe import HERE, ImageRecipe, read_recipe
recipe = read_recipe(ImageRecipe, HERE / "recipes" / "vit_digits.yaml", sys.argv[2:], 1)
images = open_images(Path(sys.argv[1]), "train", None, 0)
print(recipe.epochs * len(images) // recipe.global_batch_size)
"""


def accuracy(
    args: argparse.Namespace, data: Path, name: str, overrides: Sequence[str], seed: int
) -> float:
    """Return a run's accuracy at its end; make the run where it is not there."""
    folder = name.replace(", ", "-").replace(" ", "-").replace("²", "2").replace("%", "")
    out = args.out / f"{folder}-{seed}"
    records = logged(out)
    if not any("accuracy" in record for record in records):
        options = [part for value in [*overrides, f"seed={seed}"] for part in ("--set", value)]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command.append(f"--nproc-per-node={args.procs}")
        command += [str(HERE / "pretrain_vit.py"), str(HERE / "recipes" / "vit_digits.yaml")]
        run([*command, "--data", str(data), "--out", str(out), *options])
        records = logged(out)
    return next(record["accuracy"] for record in reversed(records) if "accuracy" in record)


def logged(out: Path) -> list[dict[str, float]]:
    log = out / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []


def run(command: Sequence[str]) -> str:
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
