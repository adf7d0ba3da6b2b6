"""From AdamW to AdamW² and back in the middle of a run, in plain PyTorch and under DeepSpeed."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.processes import run_ranks
from weyl_megatron import AdamW2

Optimizer = torch.optim.Optimizer
Record = Callable[[str, object], None]

OPTIONS: dict[str, Any] = {"lr": 0.05, "betas": (0.9, 0.95), "weight_decay": 0.1}
KINDS: dict[str, dict[str, Any]] = {"": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}
STAGES = (0, 1, 2, 3)


class Run:
    """Two matrices and a vector that are given the same gradients, whoever steps them."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = (24, 10), (7, 24), (24,)
        self.weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        self.gradients = [
            [torch.randn(shape, generator=generator) for shape in shapes] for _ in range(12)
        ]
        self.optimizer: Optimizer | None = None
        self.step = 0

    def on(self, optimizer: Optimizer, steps: int, forget: bool = False) -> Run:
        """Go on with another optimizer, from the state dict of the one before, through a file."""
        if self.optimizer is not None:
            optimizer.load_state_dict(through_a_file(self.optimizer.state_dict()))
        if forget:
            optimizer.forget()
        self.optimizer = optimizer
        for gradients in self.gradients[self.step : self.step + steps]:
            for weight, gradient in zip(self.weights, gradients, strict=True):
                weight.grad = gradient.clone()
            optimizer.step()
        self.step += steps
        return self

    def adamw(self, steps: int, **kind: Any) -> Run:
        return self.on(torch.optim.AdamW(self.weights, **OPTIONS, **kind), steps)

    def adamw2(self, steps: int, tau: float = 0.01, forget: bool = False) -> Run:
        return self.on(AdamW2(self.weights, **OPTIONS, tau=tau), steps, forget)

    def moments(self) -> list[Tensor]:
        assert self.optimizer is not None
        return [
            state[key]
            for state in self.optimizer.state.values()
            for key in ("exp_avg", "exp_avg_sq")
        ]


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def equal(one: list[Any], other: list[Any]) -> bool:
    return all(map(torch.equal, one, other))


@pytest.mark.parametrize("kind", KINDS)
def test_with_infinite_tau_a_run_that_switches_is_adamw_s(
    kind: str, record_property: Record
) -> None:
    record_property(
        "tried",
        f"PyTorch, AdamW{f' ({kind})' if kind else ''} → AdamW² with τ = ∞ → AdamW, 4 steps each",
    )
    switched, stayed = Run(), Run().adamw(12, **KINDS[kind])
    switched.adamw(4, **KINDS[kind]).adamw2(4, tau=float("inf")).adamw(4, **KINDS[kind])
    if kind:  # torch's own kinds differ by rounding, and AdamW² computes as its default does
        apart = max(
            float((a - b).detach().abs().max())
            for a, b in zip(switched.weights, stayed.weights, strict=True)
        )
        assert apart < 1e-6
        record_property("survived", f"weights within {apart:.0e} of AdamW's")
    else:
        assert equal(switched.weights, stayed.weights) and equal(
            switched.moments(), stayed.moments()
        )
        record_property("survived", "weights and moments of AdamW, bit for bit")


@pytest.mark.parametrize("kind", KINDS)
def test_moments_go_on_from_adamw_to_adamw2_and_back(kind: str, record_property: Record) -> None:
    record_property(
        "tried",
        f"PyTorch, AdamW{f' ({kind})' if kind else ''} → AdamW² → AdamW through torch.save files",
    )
    run = Run().adamw(4, **KINDS[kind])
    before = copy.deepcopy(run.moments())
    assert equal(run.adamw2(0).moments(), before)
    run = Run().adamw(4, **KINDS[kind]).adamw2(1)
    assert isinstance(run.optimizer, AdamW2) and any(
        entry.clipped for entry in run.optimizer.stats().values()
    )
    run = Run().adamw(4, **KINDS[kind]).adamw2(4)
    after = copy.deepcopy(run.moments())
    assert equal(run.adamw(0, **KINDS[kind]).moments(), after)
    run.adamw(4, **KINDS[kind])
    assert run.optimizer is not None
    assert {float(state["step"]) for state in run.optimizer.state.values()} == {12.0}
    # Moments depend on the gradients alone, which all runs share.
    for ours, theirs in zip(run.moments(), Run().adamw(12, **KINDS[kind]).moments(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    record_property(
        "survived", "moments and steps bit for bit at both loads; clipped from the first step on"
    )


def test_vectors_that_an_adamw_run_passed_on_are_not_used(record_property: Record) -> None:
    record_property(
        "tried", "PyTorch, AdamW² → AdamW → AdamW²: AdamW's checkpoint passes old power vectors on"
    )
    old, none = Run().adamw2(4).adamw(4), Run().adamw2(4).adamw(4)
    assert (
        old.optimizer is not None
        and "adamw2_power" in old.optimizer.state_dict()["param_groups"][0]
    )
    assert equal(old.adamw2(4).weights, none.adamw2(4, forget=True).weights)
    used = Run().adamw2(8).adamw2(4), Run().adamw2(8).adamw2(4, forget=True)
    assert not equal(used[0].weights, used[1].weights), (
        "vectors make no difference: the test shows nothing"
    )
    record_property(
        "survived", "their step count gives them away: the run is one without them, bit for bit"
    )


def test_a_group_s_own_tau_outlives_an_adamw_s_checkpoint() -> None:
    run = Run().adamw(1)
    assert run.optimizer is not None
    groups = [{"params": run.weights[:2], "tau": 0.1}, {"params": run.weights[2:]}]
    adamw = torch.optim.AdamW([{"params": group["params"]} for group in groups])
    ours = AdamW2(groups, tau=0.02)
    ours.load_state_dict(adamw.state_dict())
    assert [group["tau"] for group in ours.param_groups] == [0.1, 0.02]


def test_deepspeed_s_cpu_adam_s_state_is_taken_over(record_property: Record) -> None:
    # What DeepSpeedCPUAdam 0.19 saves, which takes minutes to compile: whole numbers for steps,
    # groups of other keys.
    record_property(
        "tried",
        "AdamW² from the state of DeepSpeedCPUAdam: steps that are no tensors, other group keys",
    )
    run = Run().adamw(4)
    assert run.optimizer is not None
    state = copy.deepcopy(run.optimizer.state_dict())
    for entry in state["state"].values():
        entry["step"] = int(entry["step"])
    keys = {"lr", "betas", "eps", "weight_decay", "params"}
    state["param_groups"] = [
        {**{key: group[key] for key in keys}, "bias_correction": True, "amsgrad": False}
        for group in state["param_groups"]
    ]
    ours = AdamW2(run.weights, **OPTIONS, tau=float("inf"))
    ours.load_state_dict(state)
    run.optimizer = None
    assert equal(run.on(ours, 4).weights, Run().adamw(8).weights)
    assert (
        ours.state_dict()["param_groups"][0]["bias_correction"] is True
    )  # which it asks for on the way back
    record_property("survived", "goes on as AdamW, bit for bit with τ = ∞")


@pytest.fixture(scope="module")
def switched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("switch")
    run_ranks(
        "deepspeed",
        Path(__file__).with_name("switch_worker.py"),
        2,
        json.dumps(STAGES),
        str(folder),
    )
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_runs_switch_in_the_middle(
    switched: dict[str, Any], stage: int, record_property: Record
) -> None:
    record_property(
        "tried",
        f"ZeRO-{stage}, 2 ranks: AdamW's checkpoint into AdamW², AdamW²'s into AdamW, and again",
    )
    found = switched[str(stage)]
    assert "error" not in found, found["error"]
    assert found["clipped"] > 0, "nothing was clipped: the case shows nothing"
    assert found["passed on"], "AdamW passed no vectors on: the case shows nothing"
    for key in ("infinite tau", "into adamw2", "into adamw", "and again", "old vectors"):
        assert found[key] == [[], []], (key, found[key])
    told = (
        "weights, moments, steps bit for bit at each load; with τ = ∞ AdamW's whole run; "
        "old vectors are not used"
    )
    record_property("survived", told)
