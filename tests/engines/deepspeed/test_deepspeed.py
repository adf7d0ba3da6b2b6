"""Real DeepSpeed processes train as the one-process reference does, in every way that DeepSpeed
spreads matrices.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import net as nets
from tests.processes import run_ranks
from tests.selection import values_of

WORKER = Path(__file__).with_name("train_worker.py")


DEEPSPEED = tuple(map(int, version("deepspeed").split(".")[:2]))


def engine_fault(case: dict[str, Any]) -> str | None:
    """Say where this release of DeepSpeed does not train its own AdamW right on CPU and gloo, or
    cannot be told to.
    """
    if DEEPSPEED < (0, 19):
        if case["stage"] == 2 and case.get("offload"):
            return (
                "DeepSpeed before 0.19 loses accumulated gradients under ZeRO-2 with offload, "
                "with its AdamW too"
            )
        if case.get("label") == "bf16-optimizer":
            return (
                "DeepSpeed before 0.19 does not reduce the last micro-batch in BF16_Optimizer, "
                "with its AdamW too"
            )
        if case["stage"] == 3 and "tp" in case:
            return "DeepSpeed before 0.19 has no tensor parallelism under ZeRO-3"
    if DEEPSPEED < (0, 18):
        if case.get("tp") == "auto":
            return "DeepSpeed before 0.18 has AutoTP for known Hugging Face models only"
        if case["stage"] == 0 and case["dtype"] == "bf16":
            return (
                "DeepSpeed before 0.18 steps bf16 without ZeRO in BF16_Optimizer, which gloo "
                "refuses"
            )
    return None


AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}


def cases_of(world: int) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = []
    for stage, dtype, offload in product((0, 1, 2, 3), ("fp32", "bf16"), (False, True)):
        if stage == 0 and offload:
            continue  # DeepSpeed offloads the optimizer from stage 1 on
        cases.append(
            {"stage": stage, "dtype": dtype, "offload": offload, "round_robin": stage in (1, 2)}
        )
    for stage in (0, 1, 2, 3):
        cases.append({"stage": stage, "dtype": "fp32", "mixed": True, "label": "mixed"})
    if world == 3:
        cases += [
            {"stage": stage, "dtype": "fp32", "mixed": "modules", "label": "modules"}
            for stage in (2, 3)
        ]
        cases += [
            {"stage": stage, "dtype": "fp32", "params": PROJECT, "label": "project"}
            for stage in (2, 3)
        ]
    # DeepSpeed gives this combination to BF16_Optimizer instead of its ZeRO-1 optimizer.
    cases.append({"stage": 1, "dtype": "bf16", "grad_dtype": "fp32", "label": "bf16-optimizer"})
    cases.append({"stage": 3, "dtype": "fp32", "zero_init": True, "label": "zero-init"})
    cases.append(
        {"stage": 3, "dtype": "fp32", "zero": {"sub_group_size": 500}, "label": "sub-groups"}
    )
    if world == 2:
        for stage in (2, 3):
            cases.append({"stage": stage, "dtype": "fp32", "params": nets.AUTO, "label": "auto"})
        for stage in (0, 1, 2, 3):
            project = {"stage": stage, "dtype": "fp32", "params": PROJECT}
            cases.append({**project, "label": "project"})
            cases.append({**project, "mixed": True, "label": "project-mixed"})
        for tp in ("auto", "mpu"):
            project = {"stage": 0, "dtype": "fp32", "params": PROJECT, "tp": tp, "tp_size": 2}
            cases.append({**project, "label": f"project-{tp}"})
        # Not stage 0: DeepSpeed 0.19.8 divides its fp16 gradients by a loss scale that it never
        # applied to the loss.
        cases += [
            {"stage": stage, "dtype": "fp16", "overflow_at": 4, "label": "overflow"}
            for stage in (1, 2, 3)
        ]
        cases.append({"stage": 0, "dtype": "fp32", "tp": "auto", "tp_size": 2, "label": "autotp"})
        cases.append({"stage": 0, "dtype": "fp32", "tp": "mpu", "tp_size": 2, "label": "mpu"})
        if DEEPSPEED >= (0, 19):
            cases += mode_cases()
    for case in cases:
        words = [
            f"z{case['stage']}",
            case["dtype"],
            "offload" if case.get("offload") else "",
            case.get("label", ""),
        ]
        case["name"] = "-".join(filter(None, words))
    return cases


def mode_cases() -> list[dict[str, Any]]:
    """Return modes of DeepSpeed that change where weights, states or gradients are, or when."""
    zero3 = {"stage": 3, "dtype": "fp32"}
    cpu = {"device": "cpu"}
    return [
        {**zero3, "zero": {"zero_hpz_partition_size": 2}, "label": "hpz"},
        {**zero3, "zero": {"offload_param": cpu}, "label": "offload-param"},
        {**zero3, "offload": True, "zero": {"offload_param": cpu}, "label": "offload-both"},
        {**zero3, "leaf": True, "label": "leaf"},
        {**zero3, "compile": True, "label": "compile"},
        {**zero3, "config": {"sequence_parallel_size": 2}, "label": "sequence"},
        {"stage": 3, "dtype": "bf16", "grad_dtype": "fp32", "label": "accumulated-fp32"},
        {"stage": 1, "dtype": "fp32", "offload_states": True, "label": "offload-states"},
        {"stage": 2, "dtype": "fp32", "offload_states": True, "label": "offload-states"},
        {"stage": 2, "dtype": "fp32", "config": AUTOCAST, "label": "autocast"},
        {"stage": 3, "dtype": "fp32", "config": AUTOCAST, "label": "autocast"},
    ]


def tensor_parallel_cases() -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = []
    for stage, tp in product((0, 1, 2, 3), ("auto", "mpu")):
        cases.append(
            {
                "stage": stage,
                "dtype": "fp32",
                "tp": tp,
                "tp_size": 2,
                "name": f"z{stage}-{tp}-tp2-dp2",
            }
        )
    return cases


#: Hidden matrices are projected; blocks of 8 vectors see some of them whole.
PROJECT = {"clip": "project", "vectors": 8}

CASES = {2: cases_of(2), 3: cases_of(3), 4: tensor_parallel_cases()}

#: What `make test` runs: each of DeepSpeed's optimizers, by number of ranks.
QUICK = {
    2: {
        "z0-fp32",
        "z1-fp32",
        "z2-bf16",
        "z3-fp32",
        "z2-fp32-offload",
        "z3-bf16-offload",
        "z1-fp32-mixed",
        "z1-bf16-bf16-optimizer",
        "z3-fp32-zero-init",
        "z3-fp32-sub-groups",
        "z2-fp32-auto",
        "z1-fp32-project",
        "z3-fp32-project-mixed",
        "z0-fp32-project-auto",
        "z1-fp16-overflow",
        "z3-fp16-overflow",
        "z0-fp32-autotp",
        "z0-fp32-mpu",
    },
    3: {"z2-fp32", "z2-fp32-modules", "z3-fp32-modules", "z2-fp32-project"},
    4: {"z1-auto-tp2-dp2"},
}
ALL = [
    pytest.param(
        world,
        case,
        id=f"{world}-ranks-{case['name']}",
        marks=() if case["name"] in QUICK[world] else pytest.mark.slow,
    )
    for world in CASES
    for case in CASES[world]
]


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[int, Path]:
    """Every case of a world size that is tested runs in one launch: starting DeepSpeed costs more
    than training.
    """
    folders = {}
    for world, cases in CASES.items():
        tested = values_of(request, "case", world=world)
        sound = [case for case in cases if case in tested and not engine_fault(case)]
        if not sound:
            continue
        folders[world] = tmp_path_factory.mktemp(f"world{world}")
        (folders[world] / "cases.json").write_text(json.dumps(sound))
        run_ranks(
            "deepspeed", WORKER, world, str(folders[world] / "cases.json"), str(folders[world])
        )
    return folders


@pytest.fixture
def result(runs: dict[int, Path], world: int, case: dict[str, Any]) -> dict[str, Any]:
    if fault := engine_fault(case):
        pytest.skip(fault)
    loaded: dict[str, Any] = torch.load(runs[world] / f"{case['name']}.pt", weights_only=False)
    assert "error" not in loaded, loaded["error"]
    return loaded


@pytest.mark.parametrize(("world", "case"), ALL)
def test_ten_steps_follow_the_reference(
    result: dict[str, Any], world: int, case: dict[str, Any]
) -> None:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[case["dtype"]]
    skip = (
        (lambda step: step == case["overflow_at"])
        if "overflow_at" in case
        else (lambda step: False)
    )
    replicas = world // case.get("tp_size", 1)
    expected, rates = nets.one_process(
        replicas, dtype, skip, case.get("mixed", False), case.get("params")
    )
    assert result["steps"] == nets.STEPS - ("overflow_at" in case)
    if case.get("label") == "autocast":
        # Half of it is in bfloat16: it moves the run no farther than bfloat16 everywhere does.
        low, _ = nets.one_process(replicas, torch.bfloat16)
        assert distance(result["weights"], expected) < distance(low, expected)
        tolerance = 0.02
    elif dtype == torch.float32:
        # Sums are made in another order in every layout; Adam divides by √V, which keeps that near
        # float32's 6e-8.
        assert max(distances(result["weights"], expected).values()) < 1e-5
        tolerance = 1e-4
    else:
        # DeepSpeed also reduces gradients in the low precision. That may move the run as far as the
        # low precision moved the reference; in fp16, which moved it by 2e-4, one sign of a
        # vanishing gradient, worth 2·lr, is more already.
        exact, _ = nets.one_process(replicas, torch.float32, skip)
        assert distance(result["weights"], expected) < {"bf16": 1, "fp16": 4}[
            case["dtype"]
        ] * distance(expected, exact)
        tolerance = 0.02
    for name, entry in result["stats"][0].items():
        assert entry[2] == pytest.approx(rates[name], rel=tolerance)
    assert any(entry[3] for entry in result["stats"][0].values()), (
        "nothing was clipped: the case shows nothing"
    )
    if "project" in case.get("label", ""):
        assert any(entry[6] for entry in result["stats"][0].values()), "nothing was projected"
    start = nets.make_net(case.get("mixed", False)).state_dict()
    assert min(distances(result["weights"], start).values()) > 0.001, "a weight did not move"


def distances(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, float]:
    return {
        name: float((one[name] - other[name]).norm() / (other[name].norm() + 1e-12)) for name in one
    }


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    gap = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return (gap / sum(float(other[name].square().sum()) for name in one)) ** 0.5


@pytest.mark.parametrize(("world", "case"), ALL)
def test_stats_are_the_same_on_every_rank(
    result: dict[str, Any], world: int, case: dict[str, Any]
) -> None:
    names = {name for name, weight in result["weights"].items() if weight.ndim >= 2}
    if case.get("mixed") == "modules":
        split = {
            "experts": range(nets.WIDTH),
            "spread.weight": range(2),
            "attention.in_proj_weight": "qkv",
        }
        split |= {"gru.weight_ih_l0": "rzn", "gru.weight_hh_l0": "rzn"}
        names = names - split.keys() | {
            f"{name}[{part}]" for name, parts in split.items() for part in parts
        }
    elif case.get("mixed"):
        names = names - {"c_attn.weight", "experts"} | {f"c_attn.weight[{x}]" for x in "qkv"}
        names |= {f"experts[{number}]" for number in range(3)}
    assert set(result["stats"][0]) == names
    for other in result["stats"][1:]:
        assert other == result["stats"][0]


@pytest.mark.parametrize(("world", "case"), [p for p in ALL if "overflow_at" in p.values[1]])
def test_an_overflow_step_changes_nothing(
    result: dict[str, Any], world: int, case: dict[str, Any]
) -> None:
    assert result["overflow_kept"]


@pytest.mark.parametrize(("world", "case"), [p for p in ALL if p.values[1]["stage"] > 0])
def test_matrices_straddle_ranks_in_mid_row(
    result: dict[str, Any], world: int, case: dict[str, Any]
) -> None:
    assert result["straddled"]


def test_collectives_per_step_are_the_same_for_3_and_for_49_layers() -> None:
    output = run_ranks("deepspeed", Path(__file__).with_name("collectives_worker.py"), 2)
    table = json.loads(
        next(line for line in output.splitlines() if "collectives {" in line).split("collectives ")[
            1
        ]
    )
    print(f"collectives per step with 3 and with 49 layers: {table}")
    # Two per power iteration, as rows are cut between the ranks, the norms riding with the first;
    # or the norms alone.
    expected = {"measured": [4, 4], "settled": [1, 1]}
    assert table == {
        f"ZeRO-{stage}, {state}": expected[state] for stage in (1, 2, 3) for state in expected
    }


@pytest.fixture(scope="module")
def refusals() -> dict[str, Any]:
    kinds = "refusals {", "modes {", "another {"
    output = run_ranks("deepspeed", Path(__file__).with_name("refusals_worker.py"), 1)
    lines = [line for line in output.splitlines() if line.startswith(kinds)]
    return {kind: json.loads(said) for kind, said in (line.split(" ", 1) for line in lines)}


def test_what_is_not_understood_is_refused_in_one_sentence_that_names_it(
    refusals: dict[str, Any],
) -> None:
    said = refusals["refusals"]
    expected = {
        "unknown key": "unknown key 'tua' got 0.01",
        "max_grad_norm": "'max_grad_norm' is not supported",  # DeepSpeed's own sentence comes first
        "adam_w_mode": "adam_w_mode got False, it takes True",
        "clip": "built: ValueError: AdamW2: clip got 'svd', it takes 'scale' or 'project'.",
        "clip null": "built: ValueError: AdamW2: clip got None, it takes 'scale' or 'project'.",
        "vectors": (
            "built: ValueError: AdamW2: vectors got 2.5, it takes a whole number from 1 to 64."
        ),
        "vectors a string": "AdamW2: vectors got '8', it takes a whole number from 1 to 64.",
        "vectors for nothing": (
            "AdamW2: vectors got 8 beside clip 'scale', it takes clip 'project'."
        ),
        "vectors of an override": (
            "AdamW2: overrides' vectors got 65, it takes a whole number from 1 to 64."
        ),
        "moved weights": (
            "stepped: ValueError: AdamW2: DeepSpeed ZeRO's partition does not hold the weights of"
        ),
        "unknown wrapper": (
            "DeepSpeed's ZeroOptimizerOfTheFuture gives out parameter 'embed.weight'"
        ),
        "another layout": (
            "built: ValueError: AdamW2: DeepSpeed ZeRO's partition does not hold the weights of"
        ),
    }
    for name, sentence in expected.items():
        assert sentence in said[name], (name, said[name])


@pytest.fixture(scope="module")
def named() -> dict[str, Any]:
    output = run_ranks("torch", Path(__file__).with_name("names_worker.py"), 1)
    found: dict[str, Any] = json.loads(
        next(line[6:] for line in output.splitlines() if line.startswith("names {"))
    )
    return found


@pytest.mark.parametrize(
    "kind", ["compiled", "compiled in place", "layer compiled", "checkpointed"]
)
def test_a_wrapped_model_has_the_names_and_the_rates_of_the_model(
    named: dict[str, Any], kind: str
) -> None:
    """As in pytorch #96960: an override by name did not match what torch.compile had put
    "_orig_mod." before.
    """
    runs = {case: stats for case, stats in named.items() if case.startswith(f"{kind}, ")}
    assert len(runs) >= 6
    for case, stats in runs.items():
        assert stats == named[case.replace(kind, "plain", 1)], case
    assert runs[f"{kind}, ZeRO-1, overrides"]["up.weight"][0] == 0.5
    assert "head.weight" not in runs[f"{kind}, ZeRO-1, overrides"]


def test_two_parameters_of_one_model_keep_two_names(named: dict[str, Any]) -> None:
    assert named["odd"] == [
        "down.weight",
        "embed.weight",
        "head.weight",
        "module.up.weight",
        "up.weight",
    ]


def test_an_optimizer_that_was_made_before_deepspeed_was_imported_is_taken(
    named: dict[str, Any],
) -> None:
    assert named["early"] == [2, []]


def test_an_optimizer_that_was_made_and_is_not_stepped_is_told_once_with_what_is(
    named: dict[str, Any],
) -> None:
    said = (
        "AdamW2: an AdamW2 was made for parameters of this model, but DeepSpeedEngine "
        "does not step it: its first "
    )
    assert len(named["ignored"]) == 1
    assert named["ignored"][0].startswith(f"{said}step was that of torch.optim.sgd.SGD.")
    assert named["made anew"] == []


@pytest.mark.parametrize("by", ["json", "client", "callable"])
def test_no_mode_of_deepspeed_steps_an_adam_of_its_own_in_its_place(
    refusals: dict[str, Any], by: str
) -> None:
    """As in Accelerate #3255: with offload another optimizer was trained, or DeepSpeed asked for
    its own.
    """
    said = {name: ways[by] for name, ways in refusals["modes"].items()}
    masters = (
        "bf16.bf16_master_weights_and_grads got True, it takes False, or True with "
        "bf16_optimizer_states"
    )
    refused = {
        "zenflow": "zero_optimization.zenflow got a configuration, it takes none",
        "zenflow 3": "zero_optimization.zenflow got a configuration, it takes none",
        "superoffload": "offload_optimizer.super_offload got True, it takes False",
        "superoffload alone": "offload_optimizer.super_offload got True, it takes False",
        "ratio": "offload_optimizer.ratio got 0.3, it takes 1.0",
        "nvme": "offload_optimizer.device got 'nvme', it takes 'cpu' or 'none' before DeepSpeed",
        "bf16 masters": masters,
        "bf16 masters 3": masters,
        "bf16 states": masters,
        "bf16 masters alone": masters,
        "fp16 masters": "fp16.fp16_master_weights_and_grads got True, it takes False",
    }
    if by != "json":  # where DeepSpeed does not ask
        refused["forced"] = "zero_force_ds_cpu_optimizer got True, it takes False"
    for name, sentence in refused.items():
        if name not in said and (DEEPSPEED < (0, 19) or name == "nvme"):
            continue
        assert said.pop(name).startswith(f"built: ValueError: AdamW2: {sentence}"), name
    assert said == dict.fromkeys(said, "AdamW2 made {1} steps")
    assert {"offload 1", "offload 2", "offload 3"} <= said.keys()


def test_what_deepspeed_says_of_another_optimizer_under_offload_is_left_to_it(
    refusals: dict[str, Any],
) -> None:
    """Also where an AdamW2 of the same parameters was made before, and not given to the engine."""
    said = refusals["another"]["said"]
    assert said.startswith("built: ZeRORuntimeException: You are using ZeRO-Offload with a client")


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_pipeline_engine_follows_the_reference_projected_and_balanced_too(ranks: int) -> None:
    output = run_ranks("deepspeed", Path(__file__).with_name("pipeline_worker.py"), ranks)
    assert "pipeline follows; AdamW2: overrides got the match '5.weight', which" in output, output


def test_the_cosine_without_warmup_of_the_readme_works_from_json_at_every_stage() -> None:
    output = run_ranks("deepspeed", Path(__file__).with_name("schedule_worker.py"), 1)
    stages = json.loads(
        next(line for line in output.splitlines() if "rates [[" in line).split("rates ", 1)[1]
    )
    for rates in stages:
        first, *rest = rates
        assert first in (0.0, 0.01)  # DeepSpeed makes the very first step at 0
        assert rest[0] > 0.009 and rest == sorted(rest, reverse=True) and 0.001 <= rest[-1] < 0.002


def test_experts_on_their_ranks_are_matrices_of_their_own_and_share_one_budget() -> None:
    output = run_ranks("deepspeed", Path(__file__).with_name("moe_worker.py"), 2)
    assert "moe agrees" in output
