"""The DeepSpeed examples on real processes: they learn, resume, and do not depend on how many ranks
there are.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest

from tests.processes import HANGS, ROOT, run_ranks

for module in ("deepspeed", "sentencepiece", "timm", "sklearn", "yaml"):
    pytest.importorskip(module)

EXAMPLE = ROOT / "examples" / "deepspeed"
RECIPES = EXAMPLE / "recipes"

#: Recipes whose model takes a step in seconds, and how much of it is taken; and those that need
#: their room.
SMALL = {
    "gpt_125m": ["seq_length=128"],
    "vit_b": [],
    "swin_s": [],
    "swin_b": [],
    "flatten_swin_s": [],
}
LARGE = {"vit_l": [], "gpt_774m": ["seq_length=128"], "vit_g": [], "gpt_1.3b": ["seq_length=128"]}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]
    options = ["--out", str(folder), "--vocab-size", "512", "--valid", "0.1"]
    run("-m", "examples.data.prepare_text", *map(str, sources), *options)
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    run("-m", "examples.data.digits", "--out", str(folder), "--size", "16")
    return folder


def run(*arguments: str) -> str:
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pretrain(
    script: str, recipe: str, data: Path, out: Path, *overrides: str, ranks: int = 2
) -> dict[str, list[Any]]:
    options = [option for override in overrides for option in ("--set", override)]
    run_ranks(
        "deepspeed",
        EXAMPLE / script,
        ranks,
        str(RECIPES / recipe),
        "--data",
        str(data),
        "--out",
        str(out),
        *options,
    )
    return log_of(out)


def log_of(out: Path) -> dict[str, list[Any]]:
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {
        key: [one[key] for one in records if key in one]
        for key in ("loss", "lr", "validation_loss", "accuracy")
    }


@pytest.mark.slow
def test_a_gpt_learns_without_warmup_and_adamw_is_one_key_away(text: Path, tmp_path: Path) -> None:
    ours = pretrain("pretrain_gpt.py", "gpt_tiny.yaml", text, tmp_path / "ours")
    assert len(ours["loss"]) == 100 and ours["loss"][0] > 6.0
    assert (
        ours["validation_loss"] == [pytest.approx(ours["loss"][-1], abs=0.5)]
        and ours["validation_loss"][0] < 4.9
    )
    assert ours["lr"][1] == max(ours["lr"])  # DeepSpeed's schedules step at a rate of 0 once
    adamw = pretrain(
        "pretrain_gpt.py",
        "gpt_tiny.yaml",
        text,
        tmp_path / "adamw",
        "optimizer=AdamW",
        "train_steps=3",
    )
    assert (
        adamw["loss"][:2] == pytest.approx(ours["loss"][:2], rel=1e-6)
        and adamw["loss"][2] != ours["loss"][2]
    )


def test_losses_do_not_depend_on_ranks_stage_or_recomputation(text: Path, tmp_path: Path) -> None:
    few = ["train_steps=6", "clip_grad=0"]
    one = pretrain("pretrain_gpt.py", "gpt_tiny.yaml", text, tmp_path / "one", *few, ranks=1)
    more = pretrain(
        *(
            "pretrain_gpt.py",
            "gpt_tiny.yaml",
            text,
            tmp_path / "three",
            *few,
            "deepspeed=zero3.json",
        ),
        *("activation_checkpointing=true", "micro_batch_size=2"),
        ranks=3,
    )
    # Sums in another order, in float32.
    assert more["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert more["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-5)


@pytest.mark.slow
def test_a_run_that_is_told_to_end_saves_and_goes_on_exactly(text: Path, tmp_path: Path) -> None:
    settings = ["train_steps=60", "tau=0.01", "deepspeed=zero2.json"]
    whole = pretrain("pretrain_gpt.py", "gpt_tiny.yaml", text, tmp_path / "whole", *settings)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [
        str(EXAMPLE / "pretrain_gpt.py"),
        str(RECIPES / "gpt_tiny.yaml"),
        "--data",
        str(text),
    ]
    command += ["--out", str(tmp_path / "cut")] + [
        part for one in settings for part in ("--set", one)
    ]
    environment = dict(os.environ, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", PYTHONPATH=str(ROOT))
    cut = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    log = tmp_path / "cut" / "log.jsonl"
    until = time.monotonic() + HANGS
    while not (log.is_file() and len(log.read_text().splitlines()) >= 10):
        assert cut.poll() is None and time.monotonic() < until, cut.communicate()[0]
        time.sleep(0.05)
    cut.send_signal(signal.SIGTERM)
    said, _ = cut.communicate(timeout=HANGS)
    assert "saved after a SIGTERM" in said, said
    assert 10 <= len(log_of(tmp_path / "cut")["loss"]) < 60
    resumed = pretrain("pretrain_gpt.py", "gpt_tiny.yaml", text, tmp_path / "cut", *settings)
    assert resumed["loss"] == whole["loss"]  # bit for bit: the power vectors are in the checkpoint
    assert resumed["validation_loss"][-1] == whole["validation_loss"][-1]


@pytest.mark.slow
def test_a_vit_learns_digits_through_all_augmentations(digits: Path, tmp_path: Path) -> None:
    mixing = [
        "mixup=0.2",
        "cutmix=0.2",
        "random_erasing=0.1",
        "drop_path=0.1",
        "randaugment=rand-m3-mstd0.5-inc1",
    ]
    found = pretrain(
        "pretrain_vit.py", "vit_digits.yaml", digits, tmp_path / "vit", "epochs=6", *mixing
    )
    assert found["accuracy"][-1] > 0.25, found["accuracy"]  # a tenth is chance


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_recipe_s_model_takes_a_real_step(name: str) -> None:
    step_of(name, SMALL[name])


@pytest.mark.large
@pytest.mark.parametrize("name", LARGE)
def test_a_large_recipe_s_model_takes_a_real_step(name: str) -> None:
    psutil = pytest.importorskip("psutil")
    room = {"vit_l": 7, "gpt_774m": 15, "vit_g": 19, "gpt_1.3b": 24}[name]
    free = psutil.virtual_memory().available / 2**30
    if free < room:
        pytest.skip(f"{name} takes {room} GiB, {free:.1f} are free")
    print(step_of(name, LARGE[name]))


def step_of(name: str, overrides: list[str]) -> dict[str, Any]:
    one = [*overrides, "micro_batch_size=2", "global_batch_size=2"]
    said = run("tests/examples/step_worker.py", str(RECIPES / f"{name}.yaml"), *one)
    told: dict[str, Any] = json.loads(said.splitlines()[-1])
    assert told["finite"] and told["loss"] > 1
    assert (
        told["matrices"] > 40 and told["clipped"] > 0.9 * told["matrices"]
    )  # τ holds everything at the first step
    return told


def test_what_cannot_be_trained_is_one_sentence(text: Path, digits: Path, tmp_path: Path) -> None:
    def refused(script: str, recipe: str, *arguments: str) -> str:
        command = [
            sys.executable,
            str(EXAMPLE / script),
            str(RECIPES / recipe),
            "--out",
            str(tmp_path),
            *arguments,
        ]
        done = subprocess.run(
            command, env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True, text=True
        )
        assert done.returncode == 2, done.stdout + done.stderr
        return done.stderr.splitlines()[-1]

    gpt, vit = (
        ("pretrain_gpt.py", "gpt_tiny.yaml", "--data"),
        ("pretrain_vit.py", "vit_digits.yaml", "--data"),
    )
    assert "takes RANK and WORLD_SIZE from torchrun or deepspeed" in refused(*gpt, str(text))
    assert "vocabulary takes the data's 512 tokens or more, got 16" in refused(
        *gpt, str(text), "--set", "vocabulary=16"
    )
    assert "which is not a folder" in refused(*gpt, str(tmp_path / "none"))
    assert "model takes the name of a model of timm" in refused(
        *vit, str(digits), "--set", "model=vit_x"
    )
    assert "micro_batch_size takes an even number with mixup" in refused(
        *vit, str(digits), "--set", "mixup=0.1", "--set", "micro_batch_size=1"
    )
