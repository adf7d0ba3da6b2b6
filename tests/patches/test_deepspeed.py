"""The installed DeepSpeed with its patch knows AdamW2 itself: PyTorch's plugins are off, and it
trains as with ours.
"""

from __future__ import annotations

import json
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.patches.trees import PATCHES, SITE, SUPPORTED, check_round_trip
from tests.processes import torchrun

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("deepspeed_worker.py")

CASES: list[dict[str, Any]] = [
    {"name": "z2", "stage": 2, "dtype": "fp32"},
    {"name": "z2-bf16-torch-adam", "stage": 2, "dtype": "bf16", "params": {"torch_adam": True}},
    {"name": "z3", "stage": 3, "dtype": "fp32"},
]
#: Of the patched tree alone, against "z2".
NAMES: list[dict[str, Any]] = [
    {"name": "lower-case", "stage": 2, "dtype": "fp32", "type": "adamw2"},
]
REFUSED: list[dict[str, Any]] = [
    {"name": "max-grad-norm", "stage": 2, "dtype": "fp32", "params": {"max_grad_norm": 1.0}},
    {"name": "unknown-key", "stage": 2, "dtype": "fp32", "params": {"tua": 0.01}},
    {"name": "l2", "stage": 2, "dtype": "fp32", "params": {"adam_w_mode": False}},
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        pytest.skip("deepspeed is not installed")
    patch = SUPPORTED["deepspeed"].get(found)
    if patch is None:
        pytest.skip(f"deepspeed {found} is installed, for which there is no patch")
    tree = tmp_path_factory.mktemp("deepspeed-patched")
    shutil.copytree(SITE / "deepspeed", tree / "deepspeed")
    check_round_trip(tree, PATCHES / patch)
    folders = {}
    for way, path, cases in (
        ("patched", str(tree), [*CASES, *NAMES, *REFUSED]),
        ("plugin", "", CASES),
    ):
        folders[way] = folder = tmp_path_factory.mktemp(way)
        (folder / "cases.json").write_text(json.dumps(cases))
        with pytest.MonkeyPatch.context() as patched:
            if path:
                patched.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
            torchrun(WORKER, 2, path, str(folder / "cases.json"), str(folder))
    return folders


def load(folder: Path, name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(folder / f"{name}.pt", weights_only=False)
    return loaded


@pytest.mark.parametrize(
    ("name", "against"),
    [*((case["name"], case["name"]) for case in CASES), *((case["name"], "z2") for case in NAMES)],
)
def test_the_patched_tree_trains_as_the_plugin_does_bit_for_bit(
    runs: dict[str, Path], name: str, against: str
) -> None:
    patched, plugin = load(runs["patched"], name), load(runs["plugin"], against)
    assert "error" not in patched, patched["error"]
    assert "error" not in plugin, plugin["error"]
    assert all(
        torch.equal(weight, plugin["weights"][key]) for key, weight in patched["weights"].items()
    )
    assert patched["stats"] == plugin["stats"] and patched["wrapper"] == plugin["wrapper"]
    assert any(entry[3] for entry in patched["stats"][0].values()), (
        "nothing was clipped: the case shows nothing"
    )


def test_what_adamw2_does_not_take_stops(runs: dict[str, Path]) -> None:
    said = {
        case["name"]: load(runs["patched"], case["name"])["error"].rstrip().splitlines()[-1]
        for case in REFUSED
    }
    assert said["max-grad-norm"].startswith(
        "ValueError: 'max_grad_norm' is not supported as an optimizer parameter"
    )
    assert said["unknown-key"].startswith("ValueError: AdamW2: unknown key 'tua' got 0.01;")
    assert said["l2"] == "ValueError: AdamW2: adam_w_mode got False, it takes True."
