"""Pretrain a ViT, Swin or FLatten-Swin on images under DeepSpeed, without warmup.

    python -m examples.data.digits --out out/digits16 --size 16
    torchrun --nproc-per-node 2 examples/deepspeed/pretrain_vit.py \\
        examples/deepspeed/recipes/vit_digits.yaml --data out/digits16 --out out/vit_digits
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup, create_transform
from timm.layers import set_reentrant_ckpt
from torch import Tensor, nn

# Where `examples` is, wherever this is started.
sys.path.append(str(Path(__file__).resolve().parents[2]))
from examples.data.images import open_images
from examples.deepspeed.flatten_swin import flatten_swin_small
from examples.deepspeed.loop import Batch, Work, fail, start, train
from examples.deepspeed.recipe import ImageRecipe, check_warmup, read_recipe
from examples.deepspeed.throughput import training_flops
from weyl_megatron.engines.shutdown import shutdown


def main(arguments: Sequence[str] | None = None) -> int:
    """Check everything that one process can check, then train; return the exit status."""
    args = parser().parse_args(arguments)
    try:
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        recipe = read_recipe(ImageRecipe, args.recipe, args.set, ranks)
        check_model(recipe)
        data = open_images(args.data, "train", transform(recipe, train=True), recipe.seed)
        valid = open_images(args.data, "valid", transform(recipe, train=False), recipe.seed)
        steps = recipe.epochs * len(data) // recipe.global_batch_size
        check_warmup(recipe, steps)
        start("pretrain_vit.py")
    except (ValueError, OSError) as error:
        return fail("pretrain_vit.py", error)
    torch.manual_seed(recipe.seed)
    work = Work(
        model=build(recipe),
        data=data,
        steps=steps,
        loss=loss_of(recipe),
        valid=valid,
        valid_samples=len(valid),
        score=score,
        unit="images",
        size=1,
        flops=training_flops(
            lambda: build(recipe), lambda: torch.zeros(1, 3, recipe.image_size, recipe.image_size)
        ),
    )
    train(recipe, work, args.out, args.out if args.watch else None)
    return 0


def check_model(recipe: ImageRecipe) -> None:
    if recipe.model != "flatten_swin_small" and not timm.is_model(recipe.model):
        raise ValueError(
            f"model takes the name of a model of timm, or flatten_swin_small, got {recipe.model!r}"
        )
    if recipe.micro_batch_size % 2 and (recipe.mixup or recipe.cutmix):
        raise ValueError(
            "micro_batch_size takes an even number with mixup or cutmix, got "
            f"{recipe.micro_batch_size}"
        )


def build(recipe: ImageRecipe) -> nn.Module:
    options: dict[str, Any] = {"num_classes": recipe.classes, "img_size": recipe.image_size}
    options |= {"drop_path_rate": recipe.drop_path, **(recipe.model_options or {})}
    if recipe.model == "flatten_swin_small":
        model: nn.Module = flatten_swin_small(**options)
    else:
        model = timm.create_model(recipe.model, **options)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "head" not in name:
            xavier(module.weight)
    if recipe.activation_checkpointing:
        # The kind that works with the weights that ZeRO-3 takes away after a block's forward.
        set_reentrant_ckpt(True)
        model.set_grad_checkpointing()
    return model


def xavier(weight: Tensor) -> None:
    """The paper's initialisation of ViTs: Xavier's deviation, truncated at two of them."""
    deviation = (2 / sum(weight.shape)) ** 0.5
    nn.init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation)


def transform(recipe: ImageRecipe, train: bool) -> Callable[[Any], Tensor]:
    """timm's augmentation of a PIL image, to (3, image_size, image_size)."""
    return create_transform(
        recipe.image_size,
        is_training=train,
        scale=(recipe.scale, 1.0),
        ratio=(1.0, 1.0) if recipe.scale == 1 else None,
        hflip=0.5 if recipe.flip else 0.0,
        color_jitter=None,
        auto_augment=None if recipe.randaugment == "none" else recipe.randaugment,
        re_prob=recipe.random_erasing,
        interpolation="bicubic",
        crop_pct=0.875 if recipe.image_size >= 224 else 1.0,
    )


def loss_of(recipe: ImageRecipe) -> Callable[[nn.Module, Batch], Tensor]:
    """Cross-entropy with label smoothing, on images that mixup and cutmix blend in pairs."""
    mix = None
    if recipe.mixup or recipe.cutmix:
        labels = {"label_smoothing": recipe.smoothing, "num_classes": recipe.classes}
        mix = Mixup(recipe.mixup, recipe.cutmix, **labels)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        images, classes = batch
        if mix is not None:
            images, shares = mix(images, classes)
            return F.cross_entropy(model(images).float(), shares.float())
        return F.cross_entropy(model(images).float(), classes, label_smoothing=recipe.smoothing)

    return loss


def score(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    images, classes = batch
    logits = model(images).float()
    right = (logits.argmax(-1) == classes).float().mean()
    return {"validation_loss": F.cross_entropy(logits, classes), "accuracy": right}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pretrain_vit.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", type=Path, help="YAML file; recipes/ has some")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="train/ and valid/: folders or tars"
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
