"""The recipe: every number of a run from YAML, and the DeepSpeed config made of it.

It is checked before anything starts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from examples.keys import (
    BETAS,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    SWITCH,
    TAU,
    choice,
    integer,
    key,
    mapping,
    number,
    read,
    text,
)

HERE = Path(__file__).resolve().parent
RecipeType = TypeVar("RecipeType", bound="Recipe")

OPTIONS = mapping("arguments of timm's model by name")
UP_TO_ONE = number("a number above 0, at most 1", lambda x: 0 < x <= 1)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What GPT and image recipes have in common. The keys are those of the YAML file."""

    # Beside this file, or anywhere.
    deepspeed: str = key(text("the path of a DeepSpeed JSON file"), "zero1.json")
    optimizer: str = key(choice("AdamW2", "AdamW"), "AdamW2")
    tau: float | str = key(TAU, 0.01)
    lr: float = key(POSITIVE)
    min_lr: float = key(NOT_NEGATIVE, 0.0)
    lr_warmup_steps: int = key(integer(0), 0)
    betas: tuple[float, float] = key(BETAS, (0.9, 0.95))
    eps: float = key(POSITIVE, 1e-8)
    weight_decay: float = key(NOT_NEGATIVE, 0.1)
    clip_grad: float = key(NOT_NEGATIVE, 0.0)  # 0: none

    global_batch_size: int = key(integer(1))  # whatever the number of GPUs: the rest is accumulated
    micro_batch_size: int = key(integer(1))
    seed: int = key(integer(0), 1234)
    bf16: bool = key(SWITCH, True)
    activation_checkpointing: bool = key(SWITCH, False)
    dataloader_workers: int = key(integer(0), 2)

    log_interval: int = key(integer(1), 10)
    eval_interval: int = key(integer(0), 0)  # 0: at the end only
    save_interval: int = key(integer(0), 0)  # 0: at the end only
    keep_checkpoints: int = key(integer(1), 2)
    watch_interval: int = key(integer(1), 100)  # of --watch
    # Seconds until a rank that the others wait for is named; 0: never.
    hang_after: float = key(NOT_NEGATIVE, 300.0)


@dataclass(frozen=True, kw_only=True)
class GPTRecipe(Recipe):
    """A GPT-2 of any size."""

    num_layers: int = key(integer(1))
    hidden_size: int = key(integer(1))
    num_attention_heads: int = key(integer(1))
    seq_length: int = key(integer(1), 1024)
    vocabulary: int = key(integer(1), 50304)  # GPT-2's 50257, rounded up for the GPU's sake
    train_steps: int = key(integer(1))
    eval_batches: int = key(integer(1), 20)


@dataclass(frozen=True, kw_only=True)
class ImageRecipe(Recipe):
    """A model of timm's, or FLatten-Swin, that tells images apart."""

    model: str = key(text("the name of a model of timm, or flatten_swin_small"))
    image_size: int = key(integer(8), 224)
    classes: int = key(integer(2), 1000)
    model_options: dict[str, Any] | None = key(OPTIONS, None)  # noqa: RUF009
    epochs: int = key(integer(1))
    randaugment: str = key(text('timm\'s notation, "rand-m9-mstd0.5-inc1", or "none"'), "none")
    mixup: float = key(NOT_NEGATIVE, 0.0)
    cutmix: float = key(NOT_NEGATIVE, 0.0)
    random_erasing: float = key(SHARE, 0.0)
    smoothing: float = key(SHARE, 0.0)
    drop_path: float = key(SHARE, 0.0)
    scale: float = key(UP_TO_ONE, 0.08)  # smallest share of a crop
    flip: bool = key(SWITCH, True)


def read_recipe(
    kind: type[RecipeType], path: Path, overrides: Sequence[str], world_size: int
) -> RecipeType:
    """Return the recipe at `path` with `key=value` overrides, checked for `world_size` ranks."""
    recipe = read(kind, path, overrides)
    share = recipe.micro_batch_size * world_size
    if recipe.global_batch_size % share:
        raise ValueError(
            "global_batch_size takes a multiple of micro_batch_size × ranks = "
            f"{recipe.micro_batch_size} × {world_size}, got {recipe.global_batch_size}"
        )
    if recipe.min_lr > recipe.lr:
        raise ValueError(f"min_lr takes at most lr {recipe.lr}, got {recipe.min_lr}")
    if isinstance(recipe, GPTRecipe):
        if recipe.hidden_size % recipe.num_attention_heads:
            raise ValueError(
                f"num_attention_heads takes a divisor of hidden_size {recipe.hidden_size}, got "
                f"{recipe.num_attention_heads}"
            )
        check_warmup(recipe, recipe.train_steps)
    return recipe


def check_warmup(recipe: Recipe, steps: int) -> None:
    if recipe.lr_warmup_steps >= steps:
        raise ValueError(
            f"lr_warmup_steps takes less than the {steps} steps of the run, got "
            f"{recipe.lr_warmup_steps}"
        )


def deepspeed_config(
    recipe: Recipe, steps: int, world_size: int, log_every: int = 1_000_000
) -> dict[str, Any]:
    """Return the recipe's JSON file with every "auto" filled in, as Hugging Face's Trainer does.

    What the file says itself stays; the name of the optimizer and its τ are the recipe's.
    """
    path = Path(recipe.deepspeed)
    path = path if path.is_file() else HERE / recipe.deepspeed
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, optimizer = config["optimizer"], config["optimizer"]["params"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'deepspeed takes a JSON file with an "optimizer" and its "params", got {path}: '
            f"{error!r}"
        ) from None
    kind["type"] = recipe.optimizer
    optimizer.pop("tau", None)
    if recipe.optimizer == "AdamW2":
        optimizer["tau"] = recipe.tau
    else:
        optimizer["torch_adam"] = True  # DeepSpeed's own is a kernel that it compiles first
    micro_batches = recipe.global_batch_size // (recipe.micro_batch_size * world_size)
    fill = {
        "train_batch_size": recipe.global_batch_size,
        "train_micro_batch_size_per_gpu": recipe.micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": recipe.clip_grad,
        "enabled": recipe.bf16,
        "lr": recipe.lr,
        "betas": list(recipe.betas),
        "eps": recipe.eps,
        "weight_decay": recipe.weight_decay,
        "total_num_steps": steps,
    }
    config = _filled(config, fill, path)
    sizes = {"train_batch_size": "global", "train_micro_batch_size_per_gpu": "micro"}
    for name, meant in sizes.items():
        if config.setdefault(name, fill[name]) != fill[name]:
            raise ValueError(
                f'{path} takes "auto" or {meant}_batch_size {fill[name]} for "{name}", got '
                f"{config[name]}"
            )
    schedule = config.get("scheduler", {}).get("params", {})
    if recipe.lr_warmup_steps:
        warmup = {"warmup_num_steps": recipe.lr_warmup_steps, "warmup_min_ratio": 0.0}
        schedule.update(warmup, warmup_type="linear")
    if "cos_min_ratio" in schedule:
        schedule["cos_min_ratio"] = recipe.min_lr / recipe.lr
    config.setdefault("steps_per_print", log_every)  # the loop has its own lines
    return config


def _filled(value: Any, fill: dict[str, Any], path: Path) -> Any:
    if not isinstance(value, dict):
        return value
    filled = {}
    for name, entry in value.items():
        if entry == "auto":
            if name not in fill:
                raise ValueError(f'{path} takes "auto" for {", ".join(fill)}; got it for "{name}"')
            entry = fill[name]
        filled[name] = _filled(entry, fill, path)
    return filled
