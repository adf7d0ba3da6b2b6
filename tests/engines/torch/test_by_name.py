"""Trainers that choose an optimizer by a word know ``adamw2`` as they are imported, and hand over
their model's names.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests import tolerances
from tests.engines.torch.test_plugin import python
from tests.processes import HANGS, ROOT, environment
from weyl_megatron import AdamW2
from weyl_megatron.engines.on_import import when_imported
from weyl_megatron.engines.torch import plugin
from weyl_megatron.engines.torch.by_name import read_options

TIMM = os.environ.get("TIMM", "")
NANOGPT = os.environ.get("NANOGPT", "")

#: The τ that tests give; none is the default.
TAU = 0.02


# timm


@pytest.fixture
def vit() -> Any:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", num_classes=10, depth=2, img_size=32, patch_size=16
    )


@pytest.mark.parametrize("options", [{}, {"layer_decay": 0.75}, {"weight_decay": 0.0}])
def test_timm_makes_it_by_name_with_its_groups_and_the_models_names(
    vit: Any, options: dict[str, Any]
) -> None:
    from timm.optim import create_optimizer_v2, list_optimizers

    assert "adamw2" in list_optimizers()
    given = {"lr": 1.0, "weight_decay": 0.05, "tau": TAU, **options}
    optimizer = create_optimizer_v2(vit, opt="AdamW2", **given)
    assert type(optimizer) is AdamW2
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {0.0, given["weight_decay"]}
    vit(torch.randn(2, 3, 32, 32)).square().mean().backward()
    optimizer.step()
    stats = optimizer.stats()
    assert {f"blocks.1.attn.qkv.weight[{part}]" for part in "qkv"} < set(stats)
    assert "patch_embed.proj.weight" in stats  # as a convolution
    of_qkv = [entry for name, entry in stats.items() if "qkv" in name]
    assert all(entry.tau == TAU and entry.clipped for entry in of_qkv)


def test_timms_model_of_its_own_goes_before_and_parameters_alone_have_no_names(vit: Any) -> None:
    from timm.optim import create_optimizer_v2

    for given in (vit, vit.parameters()):
        optimizer = create_optimizer_v2(given, "adamw2", model=vit, weight_decay=0.05)
        assert "blocks.0.attn.qkv.weight" in optimizer._names.known().values()
    optimizer = create_optimizer_v2(vit.parameters(), "adamw2", weight_decay=0.05)
    assert "group0.param0" in optimizer._names.known().values()


def test_timm_makes_a_lookahead_of_it(vit: Any) -> None:
    from timm.optim import create_optimizer_v2

    optimizer = create_optimizer_v2(vit, opt="lookahead_adamw2", tau=TAU)
    for _ in range(7):  # one more than its slow weights wait for
        optimizer.zero_grad()
        vit(torch.randn(2, 3, 32, 32)).square().mean().backward()
        optimizer.step()
    assert "blocks.1.attn.qkv.weight[q]" in optimizer._base_optimizer.stats()


def test_a_release_without_what_is_joined_can_be_imported() -> None:
    for function, name in (
        ("join_timm", "timm.optim._optim_factory"),
        ("join_arguments", "transformers.training_args"),
        ("join_trainer", "transformers.trainer"),
    ):
        plugin._join(function, ModuleType(name))


@pytest.mark.slow
@pytest.mark.skipif(not Path(TIMM, "train.py").is_file(), reason="TIMM names no checkout of timm")
def test_timms_train_script_takes_the_name_and_its_options(tmp_path: Path) -> None:
    """In no wheel and no source distribution; of a checkout whose release is that installed."""
    pytest.importorskip("timm")
    from PIL import Image

    for split in ("train", "validation"):
        for label in range(2):
            (tmp_path / split / str(label)).mkdir(parents=True)
            for number in range(16):
                image = Image.new("RGB", (32, 32), (200 * label, 8 * number, 90))
                image.save(tmp_path / split / str(label) / f"{number}.png")
    model = "img_size=32 patch_size=8 depth=2 embed_dim=48 num_heads=2"
    flags = (
        f"--data-dir {tmp_path} --model vit_tiny_patch16_224 --img-size 32 --num-classes 2 -b 8 "
        f"--model-kwargs {model} --epochs 13 --warmup-epochs 0 --cooldown-epochs 0 --device cpu "
        f"-j 1 --output {tmp_path} --lr 1e-3 --weight-decay 0.05 --layer-decay 0.8 "
        "--opt adamw2 --opt-kwargs tau=balanced clip=project"
    )
    run = subprocess.run(
        [sys.executable, str(Path(TIMM, "train.py")), *flags.split()],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    printed = run.stdout + run.stderr
    assert run.returncode == 0, printed[-6000:]
    assert "Created AdamW2 (adamw2) optimizer" in printed and "tau: balanced" in printed
    [saved] = tmp_path.glob("*/last.pth.tar")
    optimizer = torch.load(saved, weights_only=False)["optimizer"]
    assert {float(state["step"]) for state in optimizer["state"].values()} == {52.0}
    groups = optimizer["param_groups"]
    assert len(groups) > 3  # of layers
    assert "blocks.1.attn.qkv.weight[v]" in str(groups[0]["adamw2_power"])


# Hugging Face's Trainer


@tolerances.every_iteration()
def test_the_trainer_makes_it_by_name_and_trains_as_one_process_does(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    from transformers import Trainer, TrainingArguments

    from tests.engines.huggingface import tiny

    model = tiny.make("gpt2")
    args = TrainingArguments(
        str(tmp_path),
        optim="adamw2",
        optim_args=f"tau={TAU}, power_iters=3",
        learning_rate=tiny.LR,
        adam_beta1=tiny.BETAS[0],
        adam_beta2=tiny.BETAS[1],
        adam_epsilon=tiny.EPS,
        weight_decay=tiny.DECAY,
        max_grad_norm=tiny.CLIP,
        use_cpu=True,
        per_device_train_batch_size=tiny.WORLD * tiny.ACCUMULATION * tiny.MICRO,
        num_train_epochs=1,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model, args, tiny.collate, train_dataset=tiny.samples("gpt2"))
    trainer.train()
    optimizer: Any = trainer.optimizer.optimizer
    assert type(optimizer) is AdamW2
    assert [group["weight_decay"] for group in optimizer.param_groups] == [tiny.DECAY, 0.0]
    rates = [tiny.LR] * tiny.STEPS
    expected, stats = tiny.one_process("gpt2", rates, groups=True, tau=TAU, power_iters=3)
    for name, param in model.named_parameters():
        distance = float((param.detach() - expected[name]).norm() / expected[name].norm())
        assert distance < 1e-5, name  # ten steps round in fp32
    assert set(optimizer.stats()) == set(stats)
    assert any(entry.clipped for entry in stats.values())


#: Of a fresh process, which has imported neither torch nor transformers.
FIRST = """
from transformers import TrainingArguments
args = TrainingArguments("out", optim="adamw2", use_cpu=True)
from transformers import HfArgumentParser
[parsed] = HfArgumentParser((TrainingArguments,)).parse_args_into_dataclasses(
    ["--output_dir", "out", "--optim", "adamw2", "--use_cpu"]
)
import pickle, sys
assert pickle.loads(pickle.dumps(parsed.optim)) is args.optim is parsed.optim
print(args.optim.value, args.to_dict()["optim"], "weyl_megatron.optimizer" in sys.modules)
"""


def test_transformers_may_import_torch_in_the_middle_of_its_arguments() -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    assert python(FIRST) == "adamw2 adamw2 False"


def test_without_the_plugin_transformers_says_which_names_it_knows() -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    code = "from transformers import TrainingArguments as T; T('out', optim='adamw2')"
    with pytest.raises(subprocess.CalledProcessError) as error:
        python(code, autoload=False)
    assert "adamw2 is not a valid OptimizerNames" in error.value.stderr


def test_the_options_in_optim_args() -> None:
    assert read_options(None) == {}
    assert read_options("tau=balanced, clip=project,vectors=4") == {
        "tau": "balanced",
        "clip": "project",
        "vectors": 4,
    }
    assert read_options("tau=inf,floor_std=1e-3,clip_vectors=True") == {
        "tau": math.inf,
        "floor_std": 1e-3,
        "clip_vectors": True,
    }
    for text, entry in (("tau", "tau"), ("tau=", "tau="), ("=1", "=1"), ("a=1,a=2", "a=2")):
        sentence = rf"^AdamW2: optim_args got '{entry}', it takes pairs such as"
        with pytest.raises(ValueError, match=sentence):
            read_options(text)


@pytest.mark.slow
def test_the_trainers_example_learns_with_nothing_but_the_name(tmp_path: Path) -> None:
    """Fifty steps on the sources of the standard library."""
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    script = ROOT / "examples/huggingface/train_gpt2.py"
    flags = "--optim adamw2 --optim_args tau=balanced --max_steps 50 --logging_steps 25"
    flags += f" --output_dir {tmp_path} --per_device_eval_batch_size 512"
    run = subprocess.run(
        [sys.executable, str(script), *flags.split()],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert run.returncode == 0, run.stderr[-6000:]
    words = run.stdout.split("validation loss ")[1].split()
    assert float(words[0].rstrip(";")) < 3.2  # ln 256 = 5.5 at the start
    assert "of 26 matrices clipped" in run.stdout and "c_attn.weight[q]: MatrixStats(" in run.stdout


# Modules whose import is under way


def test_a_module_that_is_being_imported_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "under_way.py").write_text("import asks_for_it\nready = True\n")
    (tmp_path / "asks_for_it.py").write_text(
        "from weyl_megatron.engines.on_import import when_imported\n"
        "seen = []\n"
        "when_imported('under_way', lambda module: seen.append(module.ready))\n"
        "assert not seen\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import asks_for_it  # type: ignore[import-not-found]
    import under_way  # type: ignore[import-not-found]

    assert asks_for_it.seen == [True]
    when_imported("under_way", lambda module: asks_for_it.seen.append("again"))
    assert asks_for_it.seen == [True, "again"] and under_way.ready


def test_a_module_whose_import_fails_is_not_acted_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fails.py").write_text(
        "from weyl_megatron.engines.on_import import when_imported\n"
        "when_imported('fails', lambda module: module.nothing)\n"
        "raise ImportError('of its own')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match="of its own"):
        import fails  # type: ignore[import-not-found]  # noqa: F401


# Where a class is named by its path, and where a script is edited


def test_lightnings_command_line_makes_it_by_path(tmp_path: Path) -> None:
    """Lightning's command line hands over parameters without names."""
    pytest.importorskip("lightning")
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI
    from lightning.pytorch.demos.boring_classes import BoringModel

    flags = f"fit --optimizer weyl_megatron.AdamW2 --optimizer.tau {TAU} --optimizer.lr 0.5"
    trainer = "--trainer.max_steps 5 --trainer.accelerator cpu --trainer.logger false"
    trainer += f" --trainer.default_root_dir {tmp_path} --trainer.enable_progress_bar false"
    args = [*flags.split(), *trainer.split()]
    command = LightningCLI(BoringModel, args=args, save_config_callback=None)
    [optimizer] = command.trainer.optimizers
    assert type(optimizer) is AdamW2
    assert optimizer.stats()["group0.param0"].tau == TAU


def test_torchtunes_component_makes_it_by_path() -> None:
    config = pytest.importorskip("torchtune.config")
    from omegaconf import OmegaConf
    from torchtune.models.llama3 import llama3

    model = llama3(
        vocab_size=64,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        embed_dim=32,
        max_seq_len=16,
        intermediate_dim=64,
    )
    made = OmegaConf.create({"_component_": "weyl_megatron.AdamW2", "lr": 0.01, "tau": TAU})
    optimizer = config.instantiate(made, model.parameters())
    tokens = torch.arange(16)[None]
    torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    optimizer.step()
    assert len(optimizer.stats()) == 2 * 7 + 2


@pytest.mark.slow
@pytest.mark.skipif(
    not Path(NANOGPT, "model.py").is_file(), reason="NANOGPT names no checkout of nanoGPT"
)
def test_nanogpts_train_script_with_the_pages_diff_learns(tmp_path: Path) -> None:
    """Fifty steps on the sources of the standard library, one character a token."""
    for name in ("train.py", "model.py", "configurator.py"):
        (tmp_path / name).write_bytes(Path(NANOGPT, name).read_bytes())
    data = Path("data/shakespeare_char/prepare.py")
    (tmp_path / data).parent.mkdir(parents=True)
    (tmp_path / data).write_bytes(Path(NANOGPT, data).read_bytes())
    sources = sorted(Path(os.__file__).parent.glob("*.py"))
    text = b"".join(source.read_bytes() for source in sources).decode("ascii", "ignore")
    (tmp_path / data).with_name("input.txt").write_text(text)
    page = (ROOT / "docs/by_name.md").read_text(encoding="utf-8")
    diff = page.split("```diff\n--- a/model.py")[1].split("```")[0]
    (tmp_path / "page.diff").write_text("--- a/model.py" + diff)

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=HANGS
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
        return done.stdout

    run("git", "apply", "page.diff")
    run(sys.executable, str(data))
    flags = (
        "--dataset=shakespeare_char --device=cpu --compile=False --eval_iters=5 --block_size=64 "
        "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --lr_decay_iters=50 --dropout=0.0 "
        "--gradient_accumulation_steps=1 --learning_rate=1e-3 --warmup_iters=0 --eval_interval=50"
    )
    printed = run(sys.executable, "train.py", *flags.split(), "--max_iters=50")
    loss = float(printed.split("step 50: train loss ")[1].split(",")[0])
    assert loss < 3.1, printed  # ln 96 = 4.6 at the start
    saved = torch.load(tmp_path / "out/ckpt.pt")["optimizer"]["param_groups"]
    assert "transformer.h.3.attn.c_attn.weight[v]" in str(saved[0]["adamw2_power"])
    printed = run(
        sys.executable, "train.py", *flags.split(), "--max_iters=60", "--init_from=resume"
    )
    assert "Resuming training" in printed and "iter 60:" in printed
