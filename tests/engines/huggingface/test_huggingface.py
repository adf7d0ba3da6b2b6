"""Hugging Face's Trainer and Accelerate train with our JSON files as one process does, on real
DeepSpeed processes.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tolerances
from tests.processes import HANGS, ROOT, run_ranks
from tests.selection import quick_and_slow, values_of
from weyl_megatron import AdamW2

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
pytest.importorskip("deepspeed")

from transformers import Trainer, TrainingArguments

from tests.engines.huggingface import tiny

EXAMPLES = ROOT / "examples/huggingface"

CASES: list[dict[str, Any]] = [
    {"by": "trainer", "model": "gpt2", "stage": 1, "config": "dict"},
    {"by": "trainer", "model": "gpt2", "stage": 2, "config": "file"},
    {"by": "trainer", "model": "gpt2", "stage": 3, "config": "file"},
    {"by": "trainer", "model": "vit", "stage": 1, "config": "file"},
    {"by": "trainer", "model": "vit", "stage": 3, "config": "dict"},
    {"by": "trainer", "model": "gpt2", "stage": 2, "config": "no optimizer"},
    {"by": "trainer", "model": "gpt2", "stage": 2, "config": "no optimizer", "offload": True},
    {"by": "trainer", "model": "vit", "stage": 3, "config": "no optimizer", "offload": True},
    {"by": "trainer", "model": "gpt2", "stage": 1, "config": "dict", "tau": "balanced"},
    {"by": "trainer", "model": "gpt2", "stage": 3, "config": "no optimizer", "optim": "adamw2"},
    {"by": "accelerate", "model": "vit", "stage": 2},
    {"by": "accelerate", "model": "gpt2", "stage": 3},
    {"by": "accelerate", "model": "mla", "stage": 3},
    {"by": "accelerate", "model": "mamba", "stage": 2},
    {"by": "accelerate", "model": "gpt2", "stage": 1, "config": "no optimizer", "offload": True},
    {"by": "accelerate", "model": "gpt2", "stage": 2, "config": "no optimizer", "tau": "auto"},
    {"by": "accelerate", "model": "gpt2", "stage": 3, "config": "no optimizer", "offload": True},
    {"by": "accelerate", "model": "gpt2", "stage": 2, "tau": "balanced"},
]

#: An optimizer that the Trainer drops under DeepSpeed.
IGNORED: dict[str, Any] = {
    "by": "trainer",
    "model": "gpt2",
    "stage": 2,
    "config": "ignored optimizer",
}

for case in (*CASES, IGNORED):
    words = [case["by"], case["model"], f"zero{case['stage']}", case.get("config", "")]
    words += ["offload" if case.get("offload") else "", case.get("tau", "")]
    words += [case.get("optim", "")]
    case["name"] = "-".join(filter(None, words)).replace(" ", "-")


#: What `make test` runs: each way to give the optimizer, at each stage.
QUICK = {
    "trainer-gpt2-zero2-file",
    "trainer-vit-zero3-dict",
    "trainer-gpt2-zero2-no-optimizer-offload",
    "trainer-gpt2-zero1-dict-balanced",
    "trainer-gpt2-zero3-no-optimizer-adamw2",
    "accelerate-vit-zero2",
    "accelerate-gpt2-zero3",
    "accelerate-mla-zero3",
    "accelerate-gpt2-zero1-no-optimizer-offload",
}


def cases(**wanted: str) -> pytest.MarkDecorator:
    chosen = [
        case for case in CASES if all(case.get(key) == value for key, value in wanted.items())
    ]
    return pytest.mark.parametrize("case", quick_and_slow(chosen, QUICK))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Every case that is tested runs in one launch: starting costs more than training."""
    folder = tmp_path_factory.mktemp("huggingface")
    tested = values_of(request, "case")
    tested = [case for case in CASES if case in tested]
    (folder / "cases.json").write_text(json.dumps([*tested, IGNORED]))
    run_ranks(
        "huggingface",
        ROOT / "tests/engines/huggingface/worker.py",
        tiny.WORLD,
        str(folder / "cases.json"),
        str(folder),
    )
    return folder


@pytest.fixture
def result(runs: Path, case: dict[str, Any]) -> dict[str, Any]:
    return load(runs, case)


def load(runs: Path, case: dict[str, Any]) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(runs / f"{case['name']}.pt", weights_only=False)
    assert "error" not in loaded, loaded["error"]
    return loaded


def weights(folder: Path, kind: str) -> dict[str, Tensor]:
    return dict(type(tiny.make(kind)).from_pretrained(folder).named_parameters())


def farthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    # The gradient of the bias of all keys is 0 but for rounding, and so is what it becomes.
    names = [name for name in other if not name.endswith("k_proj.bias")]
    with torch.no_grad():
        return max(
            float((one[name] - other[name]).norm() / (other[name].norm() + 1e-12)) for name in names
        )


@cases()
def test_ten_steps_follow_one_process(
    runs: Path, result: dict[str, Any], case: dict[str, Any]
) -> None:
    groups = case.get("config") == "no optimizer" and case["by"] == "trainer"
    expected, stats = tiny.one_process(
        case["model"], result["rates"], groups, case.get("tau", tiny.TAU)
    )
    assert farthest(weights(runs / case["name"] / "trained", case["model"]), expected) < 1e-5
    start = tiny.make(case["model"]).state_dict()
    assert (
        min(
            float((expected[name] - start[name]).norm())
            for name in expected
            if "k_proj.bias" not in name
        )
        > 0.001
    )

    seen = result["stats"][0]
    assert all(other == seen for other in result["stats"])
    assert set(seen) == set(stats)
    for name, entry in seen.items():
        assert entry[2] == pytest.approx(stats[name].lr, rel=1e-4)
    assert any(entry[3] for entry in seen.values()), "nothing was clipped: the case shows nothing"
    if case["model"] == "gpt2":
        assert {f"transformer.h.1.attn.c_attn.weight[{part}]" for part in "qkv"} < set(seen)
    elif case["model"] == "mla":
        assert {f"model.layers.1.self_attn.kv_b_proj.weight[{part}]" for part in "kv"} < set(seen)
    elif case["model"] == "mamba":
        parts = {
            f"backbone.layers.1.mixer.in_proj.weight[{part}]" for part in ("z", "x", "B", "dt")
        }
        assert parts < set(seen)
    else:
        assert {f"vit.layers.1.attention.{part}_proj.weight" for part in "qkv"} < set(seen)


@cases()
def test_what_is_auto_in_the_json_arrives(result: dict[str, Any], case: dict[str, Any]) -> None:
    assert result["optimizer"] == "weyl_megatron.optimizer.AdamW2"
    assert result["stage"] == case["stage"]
    assert result["batch"] == [tiny.WORLD * tiny.ACCUMULATION * tiny.MICRO, tiny.MICRO]
    assert result["accumulation"] == tiny.ACCUMULATION
    assert result["clipping"] == tiny.CLIP
    assert '"auto"' not in json.dumps(result["filled"])
    has_groups = case.get("config") == "no optimizer" and case["by"] == "trainer"
    decay = [tiny.DECAY, 0.0] if has_groups else [tiny.DECAY]
    assert [group["weight_decay"] for group in result["groups"]] == decay
    for group in result["groups"]:
        tau = "balanced" if "tau" in case else tiny.TAU
        assert (tuple(group["betas"]), group["eps"], group["tau"]) == (tiny.BETAS, tiny.EPS, tau)


@cases()
def test_there_is_no_warmup(result: dict[str, Any], case: dict[str, Any]) -> None:
    if case.get("config") == "no optimizer":
        assert result["rates"] == [tiny.LR] * tiny.STEPS
        return
    assert result["filled"]["scheduler"]["params"]["total_num_steps"] == tiny.STEPS
    assert result["rates"] == pytest.approx([tiny.no_warmup(step) for step in range(tiny.STEPS)])


@cases()
def test_nothing_is_said_of_an_optimizer_that_is_stepped(
    result: dict[str, Any], case: dict[str, Any]
) -> None:
    assert result["said"] == []


def test_an_optimizer_that_the_trainer_drops_is_named_with_what_steps_in_its_place(
    runs: Path,
) -> None:
    result = load(runs, IGNORED)
    assert result["optimizer"] == "torch.optim.adamw.AdamW"
    assert len(result["said"]) == 1
    assert result["said"][0].startswith(
        "AdamW2: an AdamW2 was made for parameters of this model, but DeepSpeedEngine does not "
        "step it: its first step was that of torch.optim.adamw.AdamW."
    )


@cases()
def test_the_loss_falls(result: dict[str, Any], case: dict[str, Any]) -> None:
    third = len(result["losses"]) // 3
    assert sum(result["losses"][-third:]) / third < sum(result["losses"][:third]) / third - 0.1


@cases(by="trainer")
def test_a_resumed_run_ends_at_the_same_weights(
    runs: Path, result: dict[str, Any], case: dict[str, Any]
) -> None:
    assert result["resumed"]["rates"] == pytest.approx(result["rates"][tiny.STEPS // 2 :])
    folder = runs / case["name"]
    assert (
        farthest(
            weights(folder / "resumed", case["model"]), weights(folder / "trained", case["model"])
        )
        == 0
    )


@tolerances.every_iteration()
def test_the_trainer_without_deepspeed_takes_the_optimizer_itself(tmp_path: Path) -> None:
    model = tiny.make("gpt2")
    options: dict[str, Any] = {
        "lr": tiny.LR,
        "betas": tiny.BETAS,
        "eps": tiny.EPS,
        "weight_decay": tiny.DECAY,
    }
    optimizer = AdamW2(model.named_parameters(), **options, tau=tiny.TAU)
    args = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        per_device_train_batch_size=tiny.WORLD * tiny.ACCUMULATION * tiny.MICRO,
        num_train_epochs=1,
        max_grad_norm=tiny.CLIP,
        lr_scheduler_type="cosine",
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = tiny.samples("gpt2")
    Trainer(model, args, tiny.collate, train_dataset=rows, optimizers=(optimizer, None)).train()
    rates = [
        tiny.LR * (1 + math.cos(math.pi * step / tiny.STEPS)) / 2 for step in range(tiny.STEPS)
    ]
    expected, stats = tiny.one_process("gpt2", rates, groups=False)
    assert farthest(dict(model.named_parameters()), expected) < 1e-5
    assert set(optimizer.stats()) == set(stats)
    assert "transformer.h.0.attn.c_attn.weight[q]" in stats


def test_the_trainers_example_runs(tmp_path: Path) -> None:
    options = [
        "--deepspeed",
        str(ROOT / "examples/deepspeed/zero2.json"),
        "--output_dir",
        str(tmp_path),
    ]
    sizes = [
        "--layers",
        "2",
        "--width",
        "32",
        "--context",
        "16",
        "--max_steps",
        "4",
        "--logging_steps",
        "2",
    ]
    printed = run_ranks(
        "huggingface",
        EXAMPLES / "train_gpt2.py",
        2,
        *options,
        *sizes,
        "--per_device_eval_batch_size",
        "512",
    )
    assert "'learning_rate': '0.003'" in printed
    assert "of 14 matrices clipped" in printed and "c_attn.weight[q]: MatrixStats(" in printed


@pytest.mark.slow
def test_accelerates_example_runs() -> None:
    pytest.importorskip("sklearn")
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "accelerate_vit.yaml",
    ]
    environment = dict(
        os.environ, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES=""
    )
    run = subprocess.run(
        [*launch, "--main_process_port", "0", "accelerate_vit.py", "--epochs", "2"],
        cwd=EXAMPLES,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=HANGS,
    )
    assert run.returncode == 0, run.stdout[-6000:]
    assert "epoch 2: loss" in run.stdout and "lr 3.00e-04" in run.stdout
    assert "of 27 matrices clipped" in run.stdout
