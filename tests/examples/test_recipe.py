from __future__ import annotations

from pathlib import Path

import pytest

from tests.examples.example import RECIPES

import model  # isort: skip
import recipe as recipes  # isort: skip

GPT2_VOCABULARY = 50257
MILLIONS = {"gpt_125m": 124, "gpt_774m": 774, "gpt_1.3b": 1313}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_pass_on_four_ranks(path: Path) -> None:
    recipe = recipes.read_recipe(path, world_size=4)
    assert (recipe.optimizer, recipe.tau, recipe.betas, recipe.weight_decay) == (
        "adamw2",
        0.01,
        (0.9, 0.95),
        0.1,
    )
    assert recipe.lr_warmup_steps == 0 and recipe.clip_grad == 1.0


@pytest.mark.parametrize("name", MILLIONS)
def test_parameters_are_what_the_name_says(name: str) -> None:
    recipe = recipes.read_recipe(RECIPES / f"{name}.yaml", world_size=8)
    assert recipe.seq_length == 1024
    assert round(model.parameter_count(recipe, GPT2_VOCABULARY) / 1e6) == pytest.approx(
        MILLIONS[name], abs=1
    )


def test_overrides_are_put_over_the_file() -> None:
    recipe = recipes.read_recipe(
        RECIPES / "tiny.yaml", ["tau=auto", "lr=6e-3", "betas=[0.8, 0.9]"], 4
    )
    assert (recipe.tau, recipe.lr, recipe.betas) == ("balanced", 6e-3, (0.8, 0.9))
    assert recipe.data_parallel(4) == 2 and recipe.micro_batches(4) == 1


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("taus=1", "takes the keys num_layers, "),
        ("tau", "--set takes key=value, got 'tau'"),
        ("tau=-1", "tau takes a number above 0 or balanced, got -1"),
        ("tau=always", "tau takes a number above 0 or balanced, got 'always'"),
        ("lr=nan", "lr takes a number above 0, got 'nan'"),
        ("lr=true", "lr takes a number above 0, got True"),
        ("num_layers=2.0", "num_layers takes an integer of 1 or more, got 2.0"),
        ("num_layers=true", "num_layers takes an integer of 1 or more, got True"),
        ("num_layers=", "num_layers takes an integer of 1 or more, got None"),
        ("optimizer=sgd", "optimizer takes adamw2 or adam, got 'sgd'"),
        ("bf16=1", "bf16 takes true or false, got 1"),
        ("betas=0.9", "betas takes two numbers from 0 up to but not 1, got 0.9"),
        ("betas=[0.9, 1.0]", "betas takes two numbers from 0 up to but not 1, got [0.9, 1.0]"),
        ("split=[1, 0]", "split takes two weights above 0, of training and validation, got [1, 0]"),
        ("split=[", "take YAML, got "),
        ("num_attention_heads=3", "num_attention_heads takes a divisor of hidden_size 64, got 3"),
        ("tensor_parallel=3", "tensor_parallel takes a divisor of num_attention_heads 4, got 3"),
        ("pipeline_parallel=3", "pipeline_parallel takes a divisor of num_layers 2, got 3"),
        (
            "seq_length=63",
            "sequence_parallel takes a tensor_parallel above 1 that divides seq_length 63, got 2",
        ),
        (
            "global_batch_size=12",
            "global_batch_size takes a multiple of micro_batch_size × data-parallel ranks = 8 × 2",
        ),
        ("min_lr=1", "min_lr takes at most lr 0.005, got 1.0"),
        ("lr_warmup_steps=100", "lr_warmup_steps takes less than train_steps 100, got 100"),
    ],
)
def test_a_wrong_value_is_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(ValueError) as refusal:
        recipes.read_recipe(RECIPES / "tiny.yaml", ["sequence_parallel=true", override], 4)
    assert sentence in str(refusal.value) and "\n" not in str(refusal.value)


def test_ranks_that_do_not_make_up_whole_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"WORLD_SIZE takes a multiple of .* = 2 × 1, got 3"):
        recipes.read_recipe(RECIPES / "tiny.yaml", world_size=3)


@pytest.mark.parametrize("text", ["", "- 1", "lr: [", "hidden_size: 8"])
def test_a_file_that_is_no_recipe_is_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError) as refusal:
        recipes.read_recipe(tmp_path / "recipe.yaml")
    assert "\n" not in str(refusal.value)
