"""docs/switching.md: its snippets run, one after the other, and do what the page says."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch

from examples.collapse.model import GPT, GPTConfig
from tests.processes import ROOT
from weyl_megatron import AdamW2

PAGE = (ROOT / "docs" / "switching.md").read_text(encoding="utf-8")


def step(model: GPT, optimizer: torch.optim.Optimizer, seed: int) -> None:
    tokens = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()


def moments(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [
        state[key].clone()
        for state in optimizer.state.values()
        for key in ("step", "exp_avg", "exp_avg_sq")
    ]


@pytest.fixture
def names() -> dict[str, Any]:
    """What the snippets have: a model, and the AdamW that stepped it."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(layers=2, width=32, context=16))
    adamw = torch.optim.AdamW(model.named_parameters(), lr=1e-2, weight_decay=0.3)
    for seed in range(3):
        step(model, adamw, seed)
    return {"model": model, "adamw": adamw}


def test_the_page_s_snippets_switch_there_and_back(names: dict[str, Any]) -> None:
    there, look, back = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    exec(there, names)
    model, switched = names["model"], names["switched"]
    (group,) = switched.param_groups
    assert (group["lr"], group["weight_decay"], group["tau"]) == (1e-2, 0.3, "balanced")
    before, after = moments(names["adamw"]), moments(switched)
    assert len(before) == len(after) and all(map(torch.equal, before, after))
    step(model, switched, 3)
    exec(look, names)
    assert names["held"] and len(names["stats"]) == 3 + 2 * 6
    exec(back, names)
    before, after = moments(switched), moments(names["back"])
    assert len(before) == len(after) and all(map(torch.equal, before, after))
    step(model, names["back"], 4)
    assert all(float(state["step"]) == 5 for state in names["back"].state.values())


def test_at_infinity_the_run_goes_on_as_adamw(names: dict[str, Any]) -> None:
    model, adamw = names["model"], names["adamw"]
    weights = {name: param.detach().clone() for name, param in model.named_parameters()}
    switched = AdamW2(model.named_parameters(), tau=float("inf"))
    switched.load_state_dict(copy.deepcopy(adamw.state_dict()))  # else both step the same moments
    step(model, switched, 3)
    ended = [param.detach().clone() for param in model.parameters()]
    model.load_state_dict(weights)
    step(model, adamw, 3)
    assert all(map(torch.equal, ended, model.parameters()))
