"""The installed megatron-core with its patch trains as it does through the adapter, and adam as
without the patch.
"""

from __future__ import annotations

import ast
import inspect
import json
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.patches.trees import CORE, PATCHES, SITE, SUPPORTED, check_round_trip
from tests.processes import run_ranks
from weyl_megatron.engines.megatron import enable

WORKER = Path(__file__).with_name("megatron_worker.py")

ADAM = {"optimizer": "adam", "enable": False}
DIST_OPT = {"dist_opt": True}

#: By number of ranks. Adam goes first: enable() counts from then on in its process.
CASES: dict[int, list[dict[str, Any]]] = {
    1: [
        {"name": "adam", **ADAM},
        {"name": "one"},
        {
            "name": "every-option",
            "options": {"tau": "auto", "power_iters": 3, "floor_std": 0.0, "clip_vectors": True},
        },
        {
            "name": "whole",
            "options": {
                "split_fused": False,
                "overrides": [{"match": "*.linear_fc1.*", "tau": 0.1}],
            },
        },
        {"name": "moe", "moe": True},
    ],
    2: [
        {"name": "adam-dp2-distopt", **DIST_OPT, **ADAM},
        {"name": "dp2-distopt", **DIST_OPT},
        {"name": "dp2-bf16-distopt-overlap", **DIST_OPT, "dtype": "bf16", "overlap": True},
        {"name": "tp2", "tp": 2},
        {"name": "pp2-distopt", "pp": 2, **DIST_OPT},
    ],
}
TRAINED = [case["name"] for cases in CASES.values() for case in cases]

#: What Megatron would give to another optimizer or another path; of the patched tree alone.
REFUSED: list[dict[str, Any]] = [
    {"name": "offload", "fields": {"optimizer_cpu_offload": True}},
    {"name": "bad-tau", "options": {"tau": -1}},
    {"name": "unknown", "optimizer": "adamw3"},
]


def installed() -> tuple[str, str | None]:
    """Return the version of the installed megatron-core and the name of its patch."""
    try:
        found = version("megatron-core")
    except PackageNotFoundError:
        pytest.skip("megatron-core is not installed")
    return found, SUPPORTED["megatron-core"].get(found)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found, patch = installed()
    if patch is None:
        pytest.skip(f"megatron-core {found} is installed, for which there is no patch")
    root = tmp_path_factory.mktemp("megatron-patched")
    shutil.copytree(SITE / "megatron" / "core", root / "megatron" / "core")
    check_round_trip(root, PATCHES / patch, *CORE)
    return root


@pytest.fixture(scope="module")
def runs(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for way, path in {"patched": str(tree), "adapter": ""}.items():
        folders[way] = folder = tmp_path_factory.mktemp(way)
        for ranks, cases in CASES.items():
            more = REFUSED if way == "patched" and ranks == 1 else []
            (folder / "cases.json").write_text(json.dumps([*cases, *more]))
            run_ranks("torch", WORKER, ranks, path, str(folder / "cases.json"), str(folder))
    return folders


def load(folder: Path, name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(folder / f"{name}.pt", weights_only=False)
    return loaded


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_the_patched_tree_trains_as_the_door_does_bit_for_bit(
    runs: dict[str, Path], name: str
) -> None:
    patched, adapter = load(runs["patched"], name), load(runs["adapter"], name)
    assert "error" not in patched, patched["error"]
    assert "error" not in adapter, adapter["error"]
    assert (
        patched["inner"] == adapter["inner"] == ("AdamW" if name.startswith("adam") else "AdamW2")
    )
    assert patched["wrappers"] == adapter["wrappers"]
    assert all(
        torch.equal(weight, adapter["weights"][key]) for key, weight in patched["weights"].items()
    )
    assert patched["stats"] == adapter["stats"]  # σ₁ and rates of every matrix, on every rank
    assert name.startswith("adam") or any(
        entry[3] for mine in patched["stats"] for entry in mine.values()
    )


@pytest.mark.slow
def test_what_another_path_would_take_stops(runs: dict[str, Path]) -> None:
    said = {
        case["name"]: load(runs["patched"], case["name"])["error"].rstrip().splitlines()[-1]
        for case in REFUSED
    }
    assert said["offload"] == (
        "ValueError: AdamW2: optimizer_cpu_offload got True in a patched Megatron, it takes False "
        "there, or enable() in an unpatched one."
    )
    assert said["bad-tau"].startswith("ValueError: AdamW2: tau got -1, it takes a number above 0")
    assert "adamw3" in said["unknown"]


def test_the_fields_are_the_options_of_enable(tree: Path) -> None:
    source = (tree / "megatron" / "core" / "optimizer" / "optimizer_config.py").read_text()
    fields = {
        node.target.id.removeprefix("adamw2_"): ast.literal_eval(node.value)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and node.target.id.startswith("adamw2_")
        if node.value is not None
    }
    assert fields == {
        key: parameter.default for key, parameter in inspect.signature(enable).parameters.items()
    }
