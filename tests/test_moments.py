"""What M and V are kept in: the option, what freezes, checkpoints, memory."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn

from weyl_megatron import AdamW2
from weyl_megatron.engines.given import GivenLayout
from weyl_megatron.environment import say_once
from weyl_megatron.layouts.buffers import Buffer, Layout, Parameter, Shard

SHAPES = ((8, 6), (5, 7), (6,))


@pytest.fixture(autouse=True)
def _nothing_said() -> None:
    say_once.cache_clear()


def made(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[AdamW2, list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    params = [
        nn.Parameter((torch.randn(shape, generator=generator) * 0.1).to(dtype)) for shape in SHAPES
    ]
    named = [(f"w{number}", param) for number, param in enumerate(params)]
    return AdamW2(named, **{"lr": 1e-2, "betas": (0.9, 0.95), **options}), params


def step(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
    optimizer.step()


def kinds(optimizer: AdamW2, params: list[nn.Parameter]) -> set[tuple[torch.dtype, ...]]:
    states = [optimizer.state[param] for param in params]
    return {(state["exp_avg"].dtype, state["exp_avg_sq"].dtype) for state in states}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("bfloat16", (torch.bfloat16, torch.bfloat16)),
        ("torch.bfloat16", (torch.bfloat16, torch.bfloat16)),
        (torch.bfloat16, (torch.bfloat16, torch.bfloat16)),
        (["bfloat16", "float32"], (torch.bfloat16, torch.float32)),
        ((torch.float32, torch.bfloat16), (torch.float32, torch.bfloat16)),
        (None, (torch.float32, torch.float32)),
    ],
)
def test_the_option_names_a_dtype_or_one_for_each(given: Any, kept: tuple[Any, Any]) -> None:
    optimizer, params = made(state_dtype=given)
    step(optimizer, params, 0)
    assert kinds(optimizer, params) == {kept}


@pytest.mark.parametrize(
    "given",
    ["float16", torch.float16, "bf16", 16, ["bfloat16"], ["float32"] * 3, [None, "float32"], {}],
)
def test_another_dtype_is_refused_in_one_sentence(given: Any) -> None:
    with pytest.raises(ValueError) as refusal:
        made(state_dtype=given)
    assert str(refusal.value) == (
        f"AdamW2: state_dtype got {given!r}, it takes 'float32', 'bfloat16', a pair of them for "
        "exp_avg and exp_avg_sq, or None (the weights')."
    )


@pytest.mark.parametrize("amsgrad", [False, True])
def test_v_is_kept_in_float32_where_bfloat16_would_freeze_it(
    amsgrad: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """At β₂ 0.999 a step changes V by a thousandth, half a unit of bfloat16's last place by 2⁻⁹."""
    with caplog.at_level(logging.WARNING, logger="weyl_megatron"):
        optimizer, params = made(state_dtype="bfloat16", betas=(0.9, 0.999), amsgrad=amsgrad)
        step(optimizer, params, 0)
    assert kinds(optimizer, params) == {(torch.bfloat16, torch.float32)}
    if amsgrad:
        assert optimizer.state[params[0]]["max_exp_avg_sq"].dtype == torch.float32
    assert [record.message for record in caplog.records] == [
        "AdamW2: exp_avg_sq in torch.bfloat16 stands still at beta2 0.999, it is kept in float32; "
        "bfloat16 takes a beta2 of 0.98 at most."
    ]


@pytest.mark.parametrize("amsgrad", [False, True])
def test_v_becomes_float32_where_beta2_becomes_what_would_freeze_it(amsgrad: bool) -> None:
    """As schedules of β₂ do between steps; a run that had float32 from there on is the same."""
    ended = []
    for dtypes in ("bfloat16", ("bfloat16", "float32")):
        optimizer, params = made(state_dtype="bfloat16", amsgrad=amsgrad)
        step(optimizer, params, 0)
        state = copy.deepcopy(optimizer.state_dict())
        if dtypes != "bfloat16":
            optimizer, other = made(state_dtype=dtypes, amsgrad=amsgrad)
            for param, twin in zip(params, other, strict=True):
                twin.data.copy_(param.data)
            optimizer.load_state_dict(state)
            params = other
        optimizer.param_groups[0]["betas"] = (0.9, 0.999)
        for seed in range(1, 4):
            step(optimizer, params, seed)
        ended.append(params)
        assert kinds(optimizer, params) == {(torch.bfloat16, torch.float32)}
    assert all(map(torch.equal, *ended))


def test_bfloat16_s_v_would_stand_still_beyond_that_beta2_and_moves_below_it() -> None:
    """What the limit is for: V, one for long, and gradients of 0.7 from now on."""
    moved = {}
    for beta2 in (0.98, 0.999):
        v = torch.tensor(1.0, dtype=torch.bfloat16)
        for _ in range(1000):
            v = (v.float() * beta2 + (1 - beta2) * 0.49).bfloat16()
        moved[beta2] = float(v)
    assert moved[0.999] == 1 and moved[0.98] < 0.6


def test_weights_in_bfloat16_keep_torch_s_moments_and_the_log_says_what_becomes_of_v(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="weyl_megatron"):
        optimizer, params = made(torch.bfloat16, betas=(0.9, 0.999), tau=float("inf"))
        other = torch.optim.AdamW(
            twins := [nn.Parameter(param.detach().clone()) for param in params],
            lr=1e-2,
            betas=(0.9, 0.999),
            foreach=False,
        )
        for seed in range(3):
            step(optimizer, params, seed)
            step(other, twins, seed)
    assert all(map(torch.equal, params, twins))
    (said,) = [r.message for r in caplog.records if "stands still" in r.message]
    assert "it is kept so, as by torch.optim.AdamW" in said


@pytest.mark.parametrize("state_dtype", ["bfloat16", ("bfloat16", "float32")])
@pytest.mark.parametrize("clip", ["scale", "project"])
def test_a_run_that_is_resumed_goes_on_bit_for_bit(state_dtype: Any, clip: str) -> None:
    io: dict[str, Any] = {"io": []} if clip == "project" else {}
    optimizer, params = made(state_dtype=state_dtype, clip=clip, **io)
    for seed in range(3):
        step(optimizer, params, seed)
    saved = copy.deepcopy(optimizer.state_dict())
    assert {saved["state"][0][key].dtype for key in ("exp_avg",)} == {torch.bfloat16}
    resumed, others = made(state_dtype=state_dtype, clip=clip, **io)
    for param, other in zip(params, others, strict=True):
        other.data.copy_(param.data)
    resumed.load_state_dict(saved)
    assert kinds(resumed, others) == kinds(optimizer, params)
    for seed in range(3, 6):
        step(optimizer, params, seed)
        step(resumed, others, seed)
    assert all(map(torch.equal, params, others))


def test_float32_moments_of_weights_in_bfloat16_lose_no_digit_in_a_checkpoint() -> None:
    """torch gives loaded moments the weight's dtype."""
    optimizer, params = made(torch.bfloat16, state_dtype="float32")
    step(optimizer, params, 0)
    resumed, others = made(torch.bfloat16, state_dtype="float32")
    resumed.load_state_dict(optimizer.state_dict())
    for param, other in zip(params, others, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            kept = resumed.state[other][key]
            assert kept.dtype == torch.float32
            assert torch.equal(kept, optimizer.state[param][key])


def test_a_run_may_change_what_they_are_kept_in_when_it_is_resumed() -> None:
    adamw = torch.optim.AdamW(made()[1], lr=1e-2, betas=(0.9, 0.95))
    step(adamw, adamw.param_groups[0]["params"], 0)
    narrow, params = made(state_dtype="bfloat16")
    narrow.load_state_dict(adamw.state_dict())
    assert kinds(narrow, params) == {(torch.bfloat16, torch.bfloat16)}
    wide, others = made()
    wide.load_state_dict(narrow.state_dict())
    assert kinds(wide, others) == {(torch.float32, torch.float32)}
    step(wide, others, 1)


def test_moments_of_a_dtype_that_was_not_asked_for_are_refused() -> None:
    for state_dtype in (None, "bfloat16"):
        optimizer, params = made(state_dtype=state_dtype)
        step(optimizer, params, 0)
        state = optimizer.state[params[0]]
        state["exp_avg"] = state["exp_avg"].half()
        with pytest.raises(ValueError, match=r"'exp_avg' of parameter 'w0' is .*float16"):
            step(optimizer, params, 1)


def test_moments_that_go_to_files_are_kept_as_the_weight() -> None:
    """As DeepSpeed's NVMe offload keeps them: its files have room for float32."""
    weight = nn.Parameter(torch.ones(12))
    for state_dtype in ("bfloat16", ("float32", "bfloat16")):
        optimizer = AdamW2([weight], state_dtype=state_dtype, betas=(0.9, 0.95))
        buffer = Buffer(weight, (Shard(Parameter("w", (4, 3)), 0, 12, 0),), swapped=12)
        optimizer.engine = GivenLayout(lambda buffer=buffer: Layout([buffer]))  # type: ignore[misc]
        weight.grad = torch.ones(12)
        with pytest.raises(ValueError, match=r"state_dtype got torch.bfloat16 .*'w' and is in"):
            optimizer.step()
    assert torch.equal(weight, torch.ones(12))


def test_bytes_of_states(capsys: pytest.CaptureFixture[str]) -> None:
    """Of M and V, for a parameter: beside them are the power vectors (docs/memory.md)."""
    found = {}
    for name, options in {
        "AdamW": {},
        "exp_avg in bfloat16": {"state_dtype": ("bfloat16", "float32")},
        "both": {"state_dtype": "bfloat16"},
    }.items():
        optimizer, params = made(**options)
        step(optimizer, params, 0)
        states = [optimizer.state[param] for param in params]
        taken = sum(state[key].nbytes for state in states for key in ("exp_avg", "exp_avg_sq"))
        found[name] = taken / sum(param.numel() for param in params)
    print(f"\nbytes a parameter: {found}")
    assert found == {"AdamW": 8, "exp_avg in bfloat16": 6, "both": 4}
