"""Adapters of PEFT on Hugging Face's tiny GPT-2, what they are trained on, and the same training in
one process.
"""

from __future__ import annotations

import warnings
from typing import Any

import peft
import torch
from torch import Tensor, nn

from tests import tolerances
from tests.engines.huggingface import tiny
from weyl_megatron import AdamW2, MatrixStats

STEPS, WORLD, MICRO = 8, 2, 4

CASES: list[dict[str, Any]] = [
    {"method": "LoRA", "stage": 2, "tau": "balanced"},
    {"method": "LoRA", "stage": 3, "tau": 0.01},
    {"method": "LoRA and a head", "stage": 2, "tau": "auto"},
    {"method": "DoRA", "stage": 1, "tau": 0.01},
    {"method": "VeRA", "stage": 2, "tau": "balanced"},
    {"method": "prompt", "stage": 2, "tau": "balanced"},
    {"method": "home-made", "stage": 2, "tau": "balanced"},
]
for case in CASES:
    case["name"] = f"{case['method']} z{case['stage']} {case['tau']}"


class HomeMade(nn.Module):
    """LoRA without a library, beside the frozen layer."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        rows, cols = layer.weight.shape  # (in, out): Hugging Face's Conv1D
        self.layer = layer
        self.first = nn.Parameter(torch.randn(2, rows) / rows**0.5)
        self.second = nn.Parameter(torch.zeros(cols, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) + x @ self.first.T @ self.second.T
        return out


def make(method: str) -> nn.Module:
    net = tiny.make("gpt2")
    if method == "home-made":
        net.requires_grad_(False)
        for block in net.transformer.h:
            block.attn.c_attn = HomeMade(block.attn.c_attn)
        return net
    wide: dict[str, Any] = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    config = {
        "LoRA": lambda: peft.LoraConfig(r=4, **wide),
        "LoRA and a head": lambda: peft.LoraConfig(r=4, modules_to_save=["lm_head"], **wide),
        "DoRA": lambda: peft.LoraConfig(r=4, use_dora=True, **wide),
        "VeRA": lambda: peft.VeraConfig(r=4, **wide),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }[method]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, on GPT-2's tied head
        return peft.get_peft_model(net, config)


def trained(net: nn.Module) -> dict[str, nn.Parameter]:
    return {name: param for name, param in net.named_parameters() if param.requires_grad}


def options(case: dict[str, Any]) -> dict[str, Any]:
    """Return a high rate, at which τ bounds it."""
    return {"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": 0.0, "eps": 1e-4, "tau": case["tau"]}


def batches() -> Tensor:
    """All tokens of a run, ``(STEPS, WORLD, MICRO, length)``."""
    length = tiny.LENGTH - 3  # a prompt takes places, too
    return torch.randint(
        tiny.VOCAB, (STEPS, WORLD, MICRO, length), generator=torch.Generator().manual_seed(1)
    )


@tolerances.every_iteration()
def one_process(case: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, MatrixStats]]:
    """Return the trained weights, and what the last step did."""
    net = make(case["method"])
    optimizer = AdamW2(net.named_parameters(), **options(case), model=net)
    for batch in batches():
        tokens = batch.flatten(0, 1)
        optimizer.zero_grad()
        net(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    return {name: param.detach() for name, param in trained(net).items()}, optimizer.stats()
