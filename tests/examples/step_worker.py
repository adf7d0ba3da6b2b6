"""One real step of a recipe's model in plain PyTorch: 16 bytes a parameter, where an engine takes
more.

Usage: step_worker.py RECIPE.yaml [KEY=VALUE…] prints one JSON object.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch

from examples.deepspeed.gpt import GPT
from examples.deepspeed.loop import groups
from examples.deepspeed.pretrain_vit import build, loss_of
from examples.deepspeed.recipe import GPTRecipe, ImageRecipe, read_recipe
from weyl_megatron import AdamW2


def main() -> None:
    path = Path(sys.argv[1])
    kind = GPTRecipe if path.stem.startswith("gpt") else ImageRecipe
    recipe = read_recipe(kind, path, sys.argv[2:], 1)
    torch.manual_seed(recipe.seed)
    if isinstance(recipe, GPTRecipe):
        model: torch.nn.Module = GPT(recipe)
        tokens = torch.randint(recipe.vocabulary, (recipe.micro_batch_size, recipe.seq_length + 1))
        loss = model(tokens[:, :-1], tokens[:, 1:])
    else:
        model = build(recipe)
        images = torch.randn(recipe.micro_batch_size, 3, recipe.image_size, recipe.image_size)
        loss = loss_of(recipe)(
            model, (images, torch.randint(recipe.classes, (recipe.micro_batch_size,)))
        )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    named = [
        {**group, "params": [(names[id(parameter)], parameter) for parameter in group["params"]]}
        for group in groups(model)
    ]
    settings = {"betas": recipe.betas, "weight_decay": recipe.weight_decay, "tau": recipe.tau}
    optimizer = AdamW2(named, lr=recipe.lr, **settings)
    loss.backward()
    optimizer.step()
    stats = optimizer.stats()
    assert all(stat.lr <= recipe.lr for stat in stats.values())  # a dropped block has no update
    told = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "loss": loss.item(),
        "finite": all(bool(parameter.isfinite().all()) for parameter in model.parameters()),
        "matrices": len(stats),
        "clipped": sum(stat.clipped for stat in stats.values()),
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
