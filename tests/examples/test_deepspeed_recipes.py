from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.processes import ROOT

for module in ("deepspeed", "timm", "yaml"):
    pytest.importorskip(module)

from examples.deepspeed.gpt import GPT  # noqa: E402
from examples.deepspeed.pretrain_vit import build  # noqa: E402
from examples.deepspeed.recipe import GPTRecipe, ImageRecipe, deepspeed_config, read_recipe  # noqa: E402
from examples.deepspeed.throughput import training_flops  # noqa: E402

RECIPES = ROOT / "examples" / "deepspeed" / "recipes"
GPTS = sorted(RECIPES.glob("gpt_*.yaml"))
IMAGES = sorted(set(RECIPES.glob("*.yaml")) - set(GPTS))

#: Of all parameters, and for ViT-g without the head, as the paper counts.
MILLIONS = {
    "gpt_125m": 124,
    "gpt_774m": 774,
    "gpt_1.3b": 1313,
    "vit_b": 87,
    "vit_l": 304,
    "vit_g": 1013,
    "swin_s": 50,
    "swin_b": 88,
    "flatten_swin_s": 51,
}


def recipe_of(path: Path, *overrides: str, world_size: int = 2) -> GPTRecipe | ImageRecipe:
    return read_recipe(GPTRecipe if path in GPTS else ImageRecipe, path, overrides, world_size)


def on_meta(recipe: GPTRecipe | ImageRecipe) -> torch.nn.Module:
    with torch.device("meta"):
        return GPT(recipe) if isinstance(recipe, GPTRecipe) else build(recipe)


@pytest.mark.parametrize("path", GPTS + IMAGES, ids=lambda path: path.stem)
def test_shipped_recipes_are_the_paper_s(path: Path) -> None:
    recipe = recipe_of(path)
    assert recipe.optimizer == "AdamW2" and recipe.lr_warmup_steps == 0
    if path.stem in ("gpt_125m", "gpt_774m", "gpt_1.3b"):
        assert (recipe.tau, recipe.betas, recipe.weight_decay, recipe.clip_grad) == (
            0.01,
            (0.9, 0.95),
            0.1,
            1.0,
        )
    if path.stem in ("vit_b", "vit_l", "vit_g"):
        assert (
            recipe.tau in (0.004, 0.003)
            and recipe.betas == (0.9, 0.99)
            and recipe.weight_decay in (0.05, 0.1)
        )
        assert (recipe.lr, recipe.epochs, recipe.global_batch_size, recipe.smoothing) == (
            1e-3,
            150,
            1024,
            0.1,
        )
        assert (recipe.randaugment, recipe.mixup, recipe.cutmix) == (
            "rand-m9-mstd0.5-inc1",
            0.8,
            1.0,
        )
        assert recipe.drop_path in (0.1, 0.5) and recipe.random_erasing == 0
    if "swin" in path.stem:
        assert recipe.tau == 0.004 and recipe.epochs == 300


@pytest.mark.parametrize("name", MILLIONS)
def test_parameters_are_what_the_name_says(name: str) -> None:
    model = on_meta(recipe_of(RECIPES / f"{name}.yaml"))
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == MILLIONS[name]


def test_vit_g_is_the_paper_s_of_1011_million() -> None:
    model = on_meta(recipe_of(RECIPES / "vit_g.yaml"))
    headless = [
        parameter for name, parameter in model.named_parameters() if not name.startswith("head")
    ]
    assert round(sum(parameter.numel() for parameter in headless) / 1e6) == 1011
    assert len(model.blocks) == 40 and model.embed_dim == 1408
    assert model.blocks[0].attn.num_heads == 16 and model.blocks[0].mlp.fc1.out_features == 6144


@pytest.mark.parametrize("path", GPTS + IMAGES, ids=lambda path: path.stem)
def test_a_forward_pass_on_meta_has_the_shape_of_the_answer(path: Path) -> None:
    recipe = recipe_of(path)
    model = on_meta(recipe)
    if isinstance(recipe, GPTRecipe):
        answer = model(torch.zeros(2, recipe.seq_length, dtype=torch.long, device="meta"))
        assert answer.shape == (2, recipe.seq_length, recipe.vocabulary)
    else:
        answer = model(torch.zeros(2, 3, recipe.image_size, recipe.image_size, device="meta"))
        assert answer.shape == (2, recipe.classes)


def test_flops_are_six_for_each_parameter_of_a_matrix_and_token() -> None:
    recipe = recipe_of(RECIPES / "gpt_125m.yaml")
    counted = training_flops(lambda: GPT(recipe), lambda: torch.zeros(1, 1024, dtype=torch.long))
    matrices = 12 * 12 * 768**2 + 768 * 50304  # the blocks', and the head
    attention = (
        12 * 2 * 2 * 768 * 1024**2
    )  # q kᵀ and its product with v, forward; torch computes the masked half, too
    assert counted == pytest.approx(6 * matrices * 1024 + 3 * attention, rel=1e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_auto_of_the_json_files_is_filled(stage: int) -> None:
    recipe = recipe_of(
        RECIPES / "gpt_tiny.yaml", f"deepspeed=zero{stage}.json", "min_lr=1e-3", world_size=2
    )
    config = deepspeed_config(recipe, 100, world_size=2)
    assert config["zero_optimization"]["stage"] == stage
    assert (config["train_batch_size"], config["gradient_accumulation_steps"]) == (24, 3)
    kind, params = config["optimizer"]["type"], config["optimizer"]["params"]
    assert kind == "AdamW2" and params.pop("tau") == "balanced"
    assert '"auto"' not in json.dumps(config)
    assert params == {"lr": 5e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
    schedule = config["scheduler"]["params"]
    assert schedule["total_num_steps"] == 100 and schedule["warmup_min_ratio"] == 1.0
    assert schedule["cos_min_ratio"] == pytest.approx(0.2)


def test_adamw_with_a_warmup_is_two_keys_away() -> None:
    recipe = recipe_of(RECIPES / "gpt_tiny.yaml", "optimizer=AdamW", "lr_warmup_steps=10")
    config = deepspeed_config(recipe, 100, world_size=1)
    assert config["optimizer"]["type"] == "AdamW" and "tau" not in config["optimizer"]["params"]
    schedule = config["scheduler"]["params"]
    assert (schedule["warmup_num_steps"], schedule["warmup_min_ratio"]) == (10, 0.0)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optimizer=Adam2", "optimizer takes AdamW2 or AdamW, got 'Adam2'"),
        ("tau=0", "tau takes a number above 0 or balanced, got 0"),
        (
            "global_batch_size=10",
            "global_batch_size takes a multiple of micro_batch_size × ranks = 4 × 2, got 10",
        ),
        ("num_attention_heads=3", "num_attention_heads takes a divisor of hidden_size 64, got 3"),
        ("min_lr=1", "min_lr takes at most lr 0.005, got 1.0"),
        (
            "lr_warmup_steps=100",
            "lr_warmup_steps takes less than the 100 steps of the run, got 100",
        ),
        ("model=vit", "takes the keys deepspeed, optimizer, tau"),
    ],
)
def test_a_wrong_value_is_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(ValueError) as refusal:
        recipe_of(RECIPES / "gpt_tiny.yaml", "global_batch_size=16", override)
    assert sentence in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_json_file_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "empty.json").write_text("{}")
    for name in ("broken.json", "empty.json", "missing.json"):
        recipe = recipe_of(RECIPES / "gpt_tiny.yaml", f"deepspeed={tmp_path / name}", world_size=1)
        with pytest.raises(
            ValueError,
            match=r'deepspeed takes a JSON file with an "optimizer" and its "params", got',
        ):
            deepspeed_config(recipe, 100, 1)
    (tmp_path / "auto.json").write_text(
        '{"optimizer": {"params": {}}, "prescale_gradients": "auto"}'
    )
    recipe = recipe_of(
        RECIPES / "gpt_tiny.yaml", f"deepspeed={tmp_path / 'auto.json'}", world_size=1
    )
    with pytest.raises(ValueError, match='got it for "prescale_gradients"'):
        deepspeed_config(recipe, 100, 1)
    (tmp_path / "batch.json").write_text('{"optimizer": {"params": {}}, "train_batch_size": 8}')
    recipe = recipe_of(
        RECIPES / "gpt_tiny.yaml", f"deepspeed={tmp_path / 'batch.json'}", world_size=1
    )
    with pytest.raises(
        ValueError, match='takes "auto" or global_batch_size 24 for "train_batch_size", got 8'
    ):
        deepspeed_config(recipe, 100, 1)
