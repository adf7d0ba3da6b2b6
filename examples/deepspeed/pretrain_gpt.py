"""Pretrain a GPT under DeepSpeed, without warmup.

    python -m examples.data.prepare_text --stdlib --vocab-size 512 --out out/text512
    torchrun --nproc-per-node 2 examples/deepspeed/pretrain_gpt.py \\
        examples/deepspeed/recipes/gpt_tiny.yaml --data out/text512 --out out/gpt_tiny
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

# Where `examples` is, wherever this is started.
sys.path.append(str(Path(__file__).resolve().parents[2]))
from examples.data.tokens import Tokens
from examples.deepspeed.gpt import GPT
from examples.deepspeed.loop import Batch, Work, fail, start, train
from examples.deepspeed.recipe import GPTRecipe, read_recipe
from examples.deepspeed.throughput import training_flops
from weyl_megatron.engines.shutdown import shutdown


def main(arguments: Sequence[str] | None = None) -> int:
    """Check everything that one process can check, then train; return the exit status."""
    args = parser().parse_args(arguments)
    try:
        recipe = read_recipe(GPTRecipe, args.recipe, args.set, int(os.environ.get("WORLD_SIZE", 1)))
        windows = {"context": recipe.seq_length, "seed": recipe.seed}
        data, valid = (Tokens(args.data, split, **windows) for split in ("train", "valid"))
        if data.vocab_size > recipe.vocabulary:
            raise ValueError(
                f"vocabulary takes the data's {data.vocab_size} tokens or more, got "
                f"{recipe.vocabulary}"
            )
        start("pretrain_gpt.py")
    except (ValueError, OSError) as error:
        return fail("pretrain_gpt.py", error)
    torch.manual_seed(recipe.seed)
    work = Work(
        model=GPT(recipe),
        data=data,
        steps=recipe.train_steps,
        loss=loss,
        valid=valid,
        valid_samples=min(len(valid), recipe.eval_batches * recipe.global_batch_size),
        score=score,
        unit="tokens",
        size=recipe.seq_length,
        flops=training_flops(
            lambda: GPT(recipe), lambda: torch.zeros(1, recipe.seq_length, dtype=torch.long)
        ),
    )
    train(recipe, work, args.out, args.out if args.watch else None)
    return 0


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(*batch)


def score(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    return {"validation_loss": model(*batch)}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pretrain_gpt.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", type=Path, help="YAML file; recipes/ has some")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="what examples.data.prepare_text wrote",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="log and checkpoints; goes on from these",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="replaces a recipe's value"
    )
    parser.add_argument(
        "--watch", action="store_true", help="write what `weyl-megatron report DIR` draws, too"
    )
    # What the deepspeed launcher appends.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    shutdown(main())
