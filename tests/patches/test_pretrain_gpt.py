"""A Megatron-LM checkout with its patch runs pretrain_gpt.py as it is, and trains as the unpatched
one with the adapter.

MEGATRON_LM names the checkout, of which a copy is patched.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engines import megatron
from tests.engines.megatron.test_pretrain_gpt import SMALL
from tests.patches.trees import PATCHES, SUPPORTED, check_round_trip
from tests.processes import HANGS, ROOT, run_ranks

INTEGRATION = Path(megatron.__file__).parent
CHECKOUT = os.environ.get("MEGATRON_LM", "")

pytestmark = pytest.mark.skipif(
    not Path(CHECKOUT, "pretrain_gpt.py").is_file(),
    reason="MEGATRON_LM names no checkout of Megatron-LM",
)

Losses = list[tuple[str, ...]]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    version = runpy.run_path(str(Path(CHECKOUT, "megatron/core/package_info.py")))[
        "__shortversion__"
    ]
    patch = SUPPORTED["megatron-core"].get(version)
    if patch is None:
        pytest.skip(f"MEGATRON_LM is of version {version}, for which there is no patch")
    root = tmp_path_factory.mktemp("megatron-lm-patched")
    shutil.copytree(Path(CHECKOUT, "megatron"), root / "megatron")
    for script in Path(CHECKOUT).glob("*.py"):
        shutil.copy(script, root)
    check_round_trip(root, PATCHES / patch)
    return root


@pytest.fixture(scope="module")
def pretrain(tree: Path) -> Callable[[str, str], tuple[Losses, set[str]]]:
    def run(way: str, flags: str) -> tuple[Losses, set[str]]:
        """Return iteration, rate, loss and gradient norm as printed, and the classes that made the
        steps.
        """
        checkout, adapter = {
            "patched": (str(tree), "plain"),
            "plain": (CHECKOUT, "plain"),
            "adapter": (CHECKOUT, "adapter"),
        }[way]
        argv = [
            adapter,
            checkout,
            *SMALL.split(),
            "--tensor-model-parallel-size",
            "2",
            *flags.split(),
        ]
        printed = run_ranks("torch", INTEGRATION / "pretrain_worker.py", 2, *argv)
        number = r"([-+.\dE]+|nan|inf)"
        losses = (
            rf"iteration +(\d+)/.*learning rate: {number} .*lm loss: {number} .*"
            rf"grad norm: {number} "
        )
        return re.findall(losses, printed), set(re.findall(r"stepped (\w+)", printed))

    return run


@pytest.mark.parametrize(
    "flags",
    [
        "--adamw2-tau 0.01",
        "--adamw2-tau auto --adamw2-no-split-fused --use-distributed-optimizer "
        "--overlap-grad-reduce --overlap-param-gather",
    ],
    ids=["tau", "auto-distopt-overlap"],
)
def test_the_patched_script_prints_the_losses_of_the_door(
    pretrain: Callable[[str, str], tuple[Losses, set[str]]], flags: str
) -> None:
    patched, classes = pretrain("patched", f"--optimizer adamw2 {flags}")
    adapter, _ = pretrain("adapter", f"--optimizer adamw2 {flags}")
    assert classes == {"AdamW2"}
    assert len(patched) == 5 and patched == adapter


def test_adam_of_the_patched_script_is_adam(
    pretrain: Callable[[str, str], tuple[Losses, set[str]]],
) -> None:
    patched, classes = pretrain("patched", "--optimizer adam")
    assert (patched, classes) == pretrain("plain", "--optimizer adam")
    assert len(patched) == 5 and "AdamW2" not in classes


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            "--optimizer adam --adamw2-tau 0.01",
            "--adamw2-tau takes --optimizer adamw2, but --optimizer got 'adam'.",
        ),
        (
            "--optimizer adamw2 --adamw2-tau 0",
            "--adamw2-tau got 0.0, it takes a number above 0 (infinity is AdamW) or",
        ),
        (
            "--optimizer adamw2 --adamw2-overrides {",
            "argument --adamw2-overrides: invalid loads value: '{'",
        ),
    ],
)
def test_flags_that_cannot_be_right_stop(tree: Path, flags: str, sentence: str) -> None:
    command = [
        sys.executable,
        str(INTEGRATION / "pretrain_script.py"),
        *SMALL.split(),
        *flags.split(),
    ]
    environment = dict(
        os.environ, PYTHONPATH=f"{tree}:{ROOT}", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"
    )
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGS)
    assert run.returncode != 0 and sentence in run.stderr, run.stderr[-2000:]
