"""Pretrains a GPT with megatron-core alone and AdamW².

Start it with torchrun; README.md shows how.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch.utils.data import Dataset

import checkpoint
from data import Batch, Tokenizer, batches, build_datasets, check_data
from model import build_model, check_layers, forward_step, parameter_count
from recipe import Recipe, read_recipe
from weyl_megatron.engines.shutdown import shutdown
from weyl_megatron.watch import Watch


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks all that can be checked on one process, then trains; returns the exit status."""
    args = _parser().parse_args(arguments)
    try:
        recipe = read_recipe(args.recipe, args.set, int(os.environ.get("WORLD_SIZE", 1)))
        check_layers(recipe)
        tokenizer = Tokenizer(args.tokenizer)
        data = check_data(args.data, tokenizer, recipe, args.data_cache)
        if args.save or args.load:
            checkpoint.check_support(recipe)
        resume = checkpoint.newest(args.load) if args.load else None
        if "RANK" not in os.environ:
            raise ValueError("pretrain_gpt.py takes RANK and WORLD_SIZE from torchrun, got neither")
    except (ValueError, OSError) as error:
        print(f"pretrain_gpt.py: error: {error}", file=sys.stderr)
        return 2
    _initialize(recipe)
    train(recipe, tokenizer.vocab_size, data, resume, args.save, args.watch)
    return 0


def train(
    recipe: Recipe,
    vocab_size: int,
    data: GPTDatasetConfig,
    resume: Path | None,
    save: Path | None,
    watched: Path | None = None,
) -> None:
    """The run: from step 0, or from the checkpoint `resume`, to the recipe's last."""
    replica = parallel_state.get_data_parallel_rank()
    replicas = parallel_state.get_data_parallel_world_size()
    train_set, valid_set = build_datasets(data, recipe)
    gpt, model = build_model(recipe, vocab_size)
    optimizer = build_optimizer(recipe, model)
    scheduler = build_scheduler(recipe, optimizer)
    gpt.config.grad_scale_func = optimizer.scale_loss
    first = checkpoint.load(resume, gpt, optimizer, scheduler) if resume else 0
    _log(
        f"{parameter_count(recipe, vocab_size) / 1e6:.1f} M parameters, {recipe.optimizer}, "
        f"tensor × pipeline × data parallel {recipe.tensor_parallel} × {recipe.pipeline_parallel} "
        f"× {replicas}, steps {first} to {recipe.train_steps}"
    )

    watch = None
    if watched:
        watch = Watch(
            [model],
            optimizer,
            every=recipe.watch_interval,
            out=watched,
            maps=[0],
            steps_done=first,
        )
    micro_batches = recipe.micro_batches(dist.get_world_size())
    train_batches = batches(train_set, recipe, range(first, recipe.train_steps), replica, replicas)
    started = time.perf_counter()
    for step in range(first + 1, recipe.train_steps + 1):
        model.train()
        model.zero_grad_buffer()
        optimizer.zero_grad()
        lr = scheduler.get_lr(optimizer.param_groups[0])
        loss = forward_backward(recipe, model, train_batches, micro_batches)
        updated, grad_norm, _ = optimizer.step()
        if updated:  # not where fp16 gradients overflowed
            scheduler.step(increment=1)
        if watch:
            watch.step(None if math.isnan(loss) else loss)  # stages but the last have none

        last = step == recipe.train_steps
        if step % recipe.log_interval == 0 or step == first + 1 or last:
            elapsed = time.perf_counter() - started
            _log(
                f"step {step}: loss {loss:.4f}, lr {lr:.2e}, grad norm {grad_norm:.3f}, "
                f"{elapsed:.1f} s"
            )
        if last or (recipe.eval_interval and step % recipe.eval_interval == 0):
            valid_loss = evaluate(recipe, model, valid_set, replica, replicas)
            _log(f"step {step}: validation loss {valid_loss:.4f}")
        if save and (last or (recipe.save_interval and step % recipe.save_interval == 0)):
            checkpoint.save(save, step, gpt, optimizer, scheduler)
            _log(f"step {step}: saved {save}/step_{step}")


def build_optimizer(recipe: Recipe, model: DistributedDataParallel) -> MegatronOptimizer:
    """Megatron's own Adam, or AdamW² in its place: nothing else differs."""
    if recipe.optimizer == "adamw2":
        from weyl_megatron.engines.megatron import enable

        enable(tau=recipe.tau)
    config = OptimizerConfig(
        optimizer=recipe.optimizer,
        lr=recipe.lr,
        min_lr=recipe.min_lr,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        adam_eps=recipe.eps,
        weight_decay=recipe.weight_decay,
        clip_grad=recipe.clip_grad,
        bf16=recipe.bf16,
        params_dtype=torch.bfloat16 if recipe.bf16 else torch.float32,
        use_distributed_optimizer=recipe.distributed_optimizer,
    )
    return get_megatron_optimizer(config, [model])


def build_scheduler(recipe: Recipe, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """A cosine from lr to min_lr over the run, behind a linear warmup if the recipe has one."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=recipe.lr,
        min_lr=recipe.min_lr,
        lr_warmup_steps=recipe.lr_warmup_steps,
        lr_decay_steps=recipe.train_steps,
        lr_decay_style="cosine",
        start_wd=recipe.weight_decay,
        end_wd=recipe.weight_decay,
        wd_incr_steps=recipe.train_steps,
        wd_incr_style="constant",
    )


def forward_backward(
    recipe: Recipe,
    model: DistributedDataParallel,
    data: Iterator[Batch],
    micro_batches: int,
    train: bool = True,
) -> float:
    """The next global batch's mean loss on the last pipeline stage, NaN on others.

    And gradients, if it is to train.
    """
    losses = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=data,
        model=model,
        num_microbatches=micro_batches,
        seq_length=recipe.seq_length,
        micro_batch_size=recipe.micro_batch_size,
        forward_only=not train,
    )
    if not losses:
        return float("nan")
    loss = torch.stack([report["loss"] for report in losses]).mean()
    dist.all_reduce(loss, group=parallel_state.get_data_parallel_group())
    return loss.item() / parallel_state.get_data_parallel_world_size()


@torch.no_grad()
def evaluate(
    recipe: Recipe, model: DistributedDataParallel, dataset: Dataset, replica: int, replicas: int
) -> float:
    """The mean loss of the same eval_batches global batches each time."""
    model.eval()
    data = batches(dataset, recipe, range(recipe.eval_batches), replica, replicas)
    micro_batches = recipe.eval_batches * recipe.micro_batches(dist.get_world_size())
    return forward_backward(recipe, model, data, micro_batches, train=False)


def _initialize(recipe: Recipe) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    parallel_state.initialize_model_parallel(recipe.tensor_parallel, recipe.pipeline_parallel)
    # Pipeline stages draw different weights; the replicas of one stage, and the CPU at every
    # tensor_parallel, the same.
    seed = recipe.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _log(line: str) -> None:
    if dist.get_rank() == dist.get_world_size() - 1:  # the last pipeline stage has the losses
        print(line, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pretrain_gpt.py", description="Pretrains a GPT on megatron-core."
    )
    parser.add_argument("recipe", type=Path, help="YAML file; recipes/ has some")
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="PREFIX",
        help="what prepare.py wrote, or WEIGHT PREFIX WEIGHT PREFIX",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        help="the SentencePiece model that prepared the data",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="replaces a recipe's value"
    )
    parser.add_argument("--save", type=Path, metavar="DIR", help="folder for checkpoints")
    parser.add_argument(
        "--load", type=Path, metavar="DIR", help="go on from the last checkpoint of --save"
    )
    parser.add_argument(
        "--watch", type=Path, metavar="DIR", help="folder for what `weyl-megatron report DIR` draws"
    )
    parser.add_argument(
        "--data-cache", type=Path, metavar="DIR", help="folder for Megatron's sample order"
    )
    return parser


if __name__ == "__main__":
    shutdown(main())
