"""Megatron's distributed checkpoints: a run goes on from the file as if it had not stopped, cut
alike or not.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.megatron.test_megatron import distances
from tests.processes import run_ranks
from tests.selection import quick_and_slow, values_of

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

MCORE = tuple(map(int, version("megatron-core").split(".")[:2]))

#: The formats of the distributed optimizer that this release saves, and which layouts may load
#: each. The others that it names it cannot save with its own Adam: 0.14 fully_sharded_bucket_space,
#: from 0.16 on fully_sharded_model_space.
TP2, TP1, PP2 = {"tp": 2}, {}, {"tp": 1, "pp": 2}
ANY = {"the same layout": TP2, "TP 1 × DP 4": TP1, "PP 2 × DP 2": PP2}
SAME = {"the same layout": TP2}
SAME_DP = {"the same layout": {}}
FORMATS: dict[str, dict[str, Any]] = {"dp_zero_gather_scatter": SAME}
if MCORE < (0, 16):
    FORMATS["fully_sharded_model_space"] = ANY
else:
    FORMATS |= {"fully_reshardable": ANY, "dp_reshardable": SAME}

#: Options that save memory, as they are in Megatron's configuration.
PRECISION = {
    "use_precision_aware_optimizer": True,
    "exp_avg_dtype": "bf16",
    "exp_avg_sq_dtype": "bf16",
    "main_grads_dtype": "bf16",
}
OFFLOAD = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 1.0}
MEMORY = {"precision": PRECISION, "offload": OFFLOAD, "both": {**PRECISION, **OFFLOAD}}


def cases() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"name": "no-distopt", "save": TP2, "loads": ANY},
        {"name": "no-distopt-bf16", "dtype": "bf16", "save": TP2, "loads": SAME},
    ]
    for kind, loads in FORMATS.items():
        metadata = {"distrib_optim_sharding_type": kind}
        distopt = {"dist_opt": True, "save": TP2, "metadata": metadata}
        found.append({"name": kind, **distopt, "loads": loads})
        # As where Transformer Engine or apex is installed: Megatron then wants the step in the
        # parameter groups.
        found.append(
            {"name": f"{kind}-step-in-group", **distopt, "step_in_group": True, "loads": SAME}
        )
    reshardable = "fully_reshardable" if MCORE >= (0, 16) else "fully_sharded_model_space"
    metadata = {"distrib_optim_sharding_type": reshardable}
    project = {"dist_opt": True, "metadata": metadata, "options": {"clip": "project"}}
    found.append({"name": "project", **project, "save": TP2, "loads": ANY})
    experts = {"dist_opt": True, "moe": True, "metadata": metadata}
    found.append(
        {
            "name": "moe",
            **experts,
            "save": {"ep": 2},
            "loads": {"the same": {"ep": 2}, "EP 4": {"ep": 4}},
        }
    )
    for name, config in MEMORY.items():
        for kind in FORMATS:
            form = {"distrib_optim_sharding_type": kind}
            saving = {"dist_opt": True, "dtype": "bf16", "metadata": form, "config": config}
            found.append({"name": f"{name}-{kind}", **saving, "save": TP2, "loads": SAME})
    if MCORE >= (0, 16):
        form = {"distrib_optim_sharding_type": "fsdp_dtensor"}
        sharded = {"dist_opt": True, "fsdp": "optim_grads_params", "metadata": form, "save": {}}
        loads = {"the same layout": {}, "HSDP 2 × 2": {"instances": 2}}
        found.append({"name": "fsdp", **sharded, "loads": loads})
        narrow = {"dtype": "bf16", "config": PRECISION}
        found.append({"name": "fsdp-precision", **sharded, **narrow, "loads": SAME_DP})
    # Megatron's own Adam, as most who try AdamW² will come from; with τ = ∞ both are the same.
    infinite = {"optimizer": "adamw2", "options": {"tau": float("inf")}}
    adam = {"optimizer": "adam", "save": TP2, "loads": {"the same layout": {**TP2, **infinite}}}
    found.append({"name": "adam", **adam})
    found.append(
        {
            "name": "adam-after",
            **infinite,
            "save": TP2,
            "loads": {"the same layout": {"optimizer": "adam", **TP2}},
        }
    )
    if "dp_reshardable" in FORMATS:
        found.append(
            {
                "name": "adam-distopt",
                "dist_opt": True,
                **adam,
                "metadata": {"distrib_optim_sharding_type": "dp_reshardable"},
            }
        )
    if "fully_reshardable" in FORMATS:
        metadata = {**metadata, "distrib_optim_fully_reshardable_mem_efficient": True}
        found.append(
            {
                "name": "memory-efficient",
                "dist_opt": True,
                "metadata": metadata,
                "save": TP2,
                "loads": ANY,
            }
        )
    return found


CASES = cases()
#: What `make test` runs: AdamW² from its own file in every layout, and from Megatron's Adam.
QUICK = {"fully_reshardable", "fully_sharded_model_space", "adam", "project"} | {
    "both-fully_reshardable"
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    (folder / "cases.json").write_text(json.dumps(values_of(request, "case")))
    run_ranks(
        "megatron",
        Path(__file__).with_name("checkpoint_worker.py"),
        4,
        str(folder / "cases.json"),
        str(folder),
    )
    return folder


@pytest.mark.parametrize("case", quick_and_slow(CASES, QUICK))
def test_a_run_goes_on_as_if_it_had_not_stopped(
    runs: Path, case: dict[str, Any], record_property: Callable[[str, object], None]
) -> None:
    loads = ", ".join(case["loads"])
    record_property(
        "tried",
        f"Megatron dist_checkpointing, {case['name']}, saved at {case['save']}, loaded at {loads}",
    )
    loaded: dict[str, Any] = torch.load(runs / f"{case['name']}.pt", weights_only=False)
    assert "error" not in loaded, loaded["error"]
    went_on = loaded.pop("went on")
    assert loaded.keys() == case["loads"].keys()
    for layout, resumed in loaded.items():
        assert resumed["steps"] == went_on["steps"] == [6.0]
        expected = {"exp_avg", "exp_avg_sq"} | (set() if case.get("step_in_group") else {"step"})
        if "optimizer_cpu_offload" in case.get("config", {}):
            expected.add("master_param")
        assert [set(keys) for keys in resumed["keys"]] == [expected]
        apart = max(distances(resumed["weights"], went_on["weights"]).values())
        # Bit for bit; another layout adds numbers up in another order, three steps long.
        assert apart == 0 if layout in ("the same layout", "the same") else apart < 1e-6, (
            layout,
            apart,
        )
    record_property("survived", "the same layout goes on bit for bit, others to 1e-6")
