"""WEYL_MEGATRON: AdamW2 in scripts of others, which know Megatron's Adam."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.processes import HANGS, environment, run_ranks, torchrun
from weyl_megatron.engines.megatron import arguments, variable

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

HERE = Path(__file__).parent
OPTIONS: dict[str, Any] = {"tau": 0.02, "clip": "project"}
CASES = ("dp2", "dp2-distopt", "tp2-bf16", "ep2-distopt")  # of variable_worker.py
VALUE = "adamw2:tau=0.02,clip=project"


# The value.


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("adamw2", {}),
        ("AdamW2", {}),
        ("adamw2:tau=auto,clip=project", {"tau": "auto", "clip": "project"}),
        ("tau=1e-2, power-iters=3", {"tau": 0.01, "power_iters": 3}),
        ("clip_vectors=true,split_fused=False", {"clip_vectors": True, "split_fused": False}),
        ("io=*.wte *.head", {"io": ["*.wte", "*.head"]}),
        ("vectors=none", {"vectors": None}),
        (
            'adamw2:{"tau": 0.1, "overrides": [{"match": "*", "tau": 0.2}]}',
            {"tau": 0.1, "overrides": [{"match": "*", "tau": 0.2}]},
        ),
        ('{"tau": "balanced"}', {"tau": "balanced"}),
    ],
)
def test_a_value_is_the_options_of_enable(text: str, options: dict[str, Any]) -> None:
    assert variable.read(text) == options


FORMS = "it takes 'adamw2', 'adamw2:tau=balanced,clip=project' or a JSON object of options."


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("1", f"AdamW2: WEYL_MEGATRON got '1', {FORMS}"),
        (" ", f"AdamW2: WEYL_MEGATRON got ' ', {FORMS}"),
        (",", f"AdamW2: WEYL_MEGATRON got ',', {FORMS}"),
        (
            '{"tau": 0.1, "tau": 0.2}',
            'AdamW2: WEYL_MEGATRON got \'{"tau": 0.1, "tau": 0.2}\' (tau is there twice), '
            f"{FORMS}",
        ),
        (
            "adamw2:tau=0",
            "AdamW2: WEYL_MEGATRON's tau got 0, it takes a number above 0 (infinity is AdamW) or "
            "'balanced'.",
        ),
        ("split_fused=1", "AdamW2: WEYL_MEGATRON's split_fused got 1, it takes True or False."),
        ("adam", f"AdamW2: WEYL_MEGATRON got 'adam', {FORMS}"),
        ("adamw2:tau", f"AdamW2: WEYL_MEGATRON got 'adamw2:tau', {FORMS}"),
        ("muon:tau=1", f"AdamW2: WEYL_MEGATRON got 'muon:tau=1', {FORMS}"),
        ("tau=1,tau=2", f"AdamW2: WEYL_MEGATRON got 'tau=1,tau=2', {FORMS}"),
        (
            "taw=1",
            "AdamW2: WEYL_MEGATRON got the option 'taw', it takes tau, power_iters, floor_std, "
            "clip_vectors, io, overrides, nonfinite, nonfinite_limit, spike, clip, vectors, "
            "split_fused.",
        ),
    ],
)
def test_what_cannot_be_read_is_said_in_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        variable.read(text)
    assert str(error.value) == sentence


# A script that knows Megatron alone.


def train(folder: Path, value: str | None, *args: str) -> str:
    worker = HERE / "variable_worker.py"
    if value is None:
        return run_ranks("megatron", worker, 2, str(folder), *args)
    return torchrun(worker, 2, str(folder), *args, variables={"WEYL_MEGATRON": value})


@pytest.fixture(scope="module")
def enabled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of the same script with the line for AdamW2 in it."""
    folder = tmp_path_factory.mktemp("enabled")
    assert "is AdamW2 in this process" not in train(folder, None, "adamw2", json.dumps(OPTIONS))
    return folder


@pytest.fixture(
    scope="module",
    params=[pytest.param("adam"), pytest.param("adamw2", marks=pytest.mark.slow)],
)
def by_variable(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[str, Path, str]:
    folder = tmp_path_factory.mktemp("variable")
    return request.param, folder, train(folder, VALUE, request.param)


@pytest.mark.parametrize("case", CASES)
def test_a_script_that_knows_megatron_alone_trains_adamw2_bit_for_bit(
    enabled: Path, by_variable: tuple[str, Path, str], case: str
) -> None:
    name, folder, _ = by_variable
    result = torch.load(folder / f"{case}.pt")
    expected = torch.load(enabled / f"{case}.pt")
    assert result["inner"] == expected["inner"] == {"AdamW2"}
    assert result["name"] == name, "the script's configuration is its own"
    assert result["weights"].keys() == expected["weights"].keys()
    for key, weight in expected["weights"].items():
        assert torch.equal(result["weights"][key], weight), key


def test_the_first_rank_says_once_what_trains(by_variable: tuple[str, Path, str]) -> None:
    name, _, printed = by_variable
    assert re.findall(r"AdamW2: .*", printed) == [
        f"AdamW2: Megatron's optimizer '{name}' is AdamW2 in this process, tau=0.02, "
        "clip='project' (WEYL_MEGATRON)."
    ]


def test_what_adamw2_is_not_is_refused_in_one_sentence() -> None:
    printed = torchrun(
        HERE / "variable_refusals_worker.py", 1, variables={"WEYL_MEGATRON": "adamw2"}
    )
    said = json.loads(re.findall(r"^refusals (.*)$", printed, re.MULTILINE)[0])
    other = "where WEYL_MEGATRON is set, it takes 'adam' or 'adamw2'."
    if find_spec("megatron.core.optimizer.muon") is not None:  # from 0.16 on
        assert said.pop("muon") == f"AdamW2: OptimizerConfig.optimizer got 'muon' {other}"
    assert said == {
        "sgd": f"AdamW2: OptimizerConfig.optimizer got 'sgd' {other}",
        "another Adam": (
            "AdamW2: WEYL_MEGATRON is set, but this script has put StatelessAdam in the place of "
            "Megatron's Adam; it takes one of them."
        ),
        "option": "AdamW2: decoupled_weight_decay got False, it takes True.",
        "warmup": (
            "AdamW2: lr_warmup_steps got 10 of 100 steps of the schedule, it takes 0: a small tau "
            "acts like a warmup, and both together start slowly."
        ),
        "late": (
            "AdamW2: WEYL_MEGATRON was read after Megatron had built a FP32Optimizer, it takes a "
            "process in which `import torch` loads plugins (TORCH_DEVICE_BACKEND_AUTOLOAD)."
        ),
    }


def python(code: str, value: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**environment(), "WEYL_MEGATRON": value},
        capture_output=True,
        text=True,
        timeout=HANGS,
    )


def test_a_bad_option_stops_the_import_however_often_it_is_made() -> None:
    code = """
for _ in range(2):
    try:
        import megatron.core.optimizer
    except ValueError as error:
        print(error)
"""
    sentence = (
        "AdamW2: WEYL_MEGATRON's tau got -1, it takes a number above 0 (infinity is AdamW) or "
        "'balanced'."
    )
    assert python(code, "tau=-1").stdout.splitlines() == 2 * [sentence]


def test_without_megatron_the_variable_is_silent() -> None:
    run = python("import torch, sys; print('weyl_megatron.optimizer' in sys.modules)", "nonsense")
    assert run.stdout == "False\n" and not run.stderr


def test_the_command_refuses_the_variable() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "weyl_megatron.engines.megatron", __file__],
        env={**environment(), "WEYL_MEGATRON": "adamw2"},
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert run.returncode == 2 and run.stderr.splitlines()[-1] == (
        "weyl_megatron.engines.megatron got WEYL_MEGATRON='adamw2', which is for scripts that it "
        "does not start; it takes --optimizer adamw2 and the --adamw2- flags instead."
    )


# Megatron-LM's command line.


def test_the_name_is_a_choice_and_megatron_validates_it_as_adam(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []

    def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser.add_argument("--optimizer", default="adam", choices=["adam", "sgd"])
        return parser

    module = ModuleType("megatron.training.arguments")
    module.add_megatron_arguments = add_megatron_arguments  # type: ignore[attr-defined]
    module.validate_args = lambda args: seen.append(args.optimizer)  # type: ignore[attr-defined]
    module._print_args = lambda _, args: seen.append(args.optimizer)  # type: ignore[attr-defined]
    monkeypatch.setitem(os.environ, "WEYL_MEGATRON", "adamw2")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "megatron.training.training", ModuleType("training"))
    monkeypatch.setattr(arguments, "enable", lambda **_: pytest.fail("the variable has enabled it"))
    variable.act(module)
    for name in ("adam", "adamw2"):
        parser = module.add_megatron_arguments(argparse.ArgumentParser())
        args = parser.parse_args(["--optimizer", name])
        module.validate_args(args)
        assert args.optimizer == name and vars(args) == {"optimizer": name}
    assert seen == ["adam", "adam"]
