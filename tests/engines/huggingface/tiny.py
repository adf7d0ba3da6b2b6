"""A tiny GPT-2 and ViT of Hugging Face, what they are trained on, and the same training in one
process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Mamba2Config,
    Mamba2ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from tests import tolerances
from weyl_megatron import AdamW2

STEPS, ACCUMULATION, WORLD, MICRO = 10, 2, 2, 4
VOCAB, LENGTH = 23, 12

#: None of the first four is the default of TrainingArguments, Accelerate or AdamW2. ε is large,
#: because the gradient of the bias of all keys is 0 but for rounding, which Adam would blow up.
LR, BETAS, EPS, DECAY, TAU, CLIP = 0.02, (0.8, 0.95), 1e-4, 0.1, 0.01, 1.0

GPT2 = GPT2Config(
    vocab_size=VOCAB,
    n_positions=LENGTH,
    n_embd=20,
    n_layer=2,
    n_head=2,
    bos_token_id=0,
    eos_token_id=0,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    initializer_range=0.1,
)
VIT = ViTConfig(
    image_size=8,
    patch_size=4,
    num_channels=1,
    hidden_size=20,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=40,
    num_labels=3,
    initializer_range=0.1,
)

#: Projections that are split per head, and in unequal parts.
MLA = DeepseekV3Config(
    vocab_size=VOCAB,
    hidden_size=20,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    q_lora_rank=12,
    kv_lora_rank=10,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    first_k_dense_replace=2,
    max_position_embeddings=LENGTH,
    initializer_range=0.1,
)
MAMBA = Mamba2Config(
    vocab_size=VOCAB,
    hidden_size=20,
    num_heads=4,
    head_dim=10,
    expand=2,
    n_groups=2,
    state_size=4,
    num_hidden_layers=2,
    initializer_range=0.1,
)


def make(kind: str) -> Any:
    """Return a "gpt2", a "vit", an "mla", a "mamba", or a "lora" of PEFT on the first."""
    torch.manual_seed(0)
    if kind == "mla":
        return DeepseekV3ForCausalLM(MLA)
    if kind == "mamba":
        return Mamba2ForCausalLM(MAMBA)
    if kind == "vit":
        return ViTForImageClassification(VIT)
    net = GPT2LMHeadModel(GPT2)
    if kind == "gpt2":
        return net
    import peft

    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    return peft.get_peft_model(net, config)


def samples(kind: str) -> list[dict[str, Tensor]]:
    """Every sample of a run, in the order in which the processes take them, a micro-batch each in
    turn.
    """
    generator = torch.Generator().manual_seed(1)
    count = STEPS * ACCUMULATION * WORLD * MICRO
    draw = torch.randint(3, (count,), generator=generator)
    if kind != "vit":  # arithmetic sequences
        start = torch.randint(VOCAB, (count, 1), generator=generator)
        rows = (start + (draw[:, None] + 1) * torch.arange(LENGTH)) % VOCAB
        labels = rows.clone()
        labels[
            :, 0
        ] = (
            -100
        )  # the Trainer divides by all labels, that of the first token, which nothing predicts, too
        return [
            {"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)
        ]
    prototypes = torch.randn(3, 1, 8, 8, generator=generator)
    images = prototypes[draw] + 0.5 * torch.randn(count, 1, 8, 8, generator=generator)
    return [
        {"pixel_values": image, "labels": label} for image, label in zip(images, draw, strict=True)
    ]


def collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def no_warmup(step: int) -> float:
    """The rate of a step, counted from 0, under examples/deepspeed: DeepSpeed makes the first at 0,
    then two at LR.
    """
    if step == 0:
        return 0.0
    progress = max(0, step - 2) / (STEPS - 2)
    return LR * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


def decays(name: str) -> bool:
    """Whether the Trainer's own parameter groups let a parameter decay; DeepSpeed's JSON lets all
    of them.
    """
    return "bias" not in name and "ln_" not in name and "layernorm" not in name


@tolerances.every_iteration()
def one_process(
    kind: str,
    rates: Sequence[float],
    groups: bool,
    tau: float | str | None = TAU,
    **options: Any,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train in one process with AdamW2 on whole parameters, or with AdamW where τ is None; return
    the weights and the last step's statistics.
    """
    model = make(kind)
    named = list(model.named_parameters())
    parts: list[dict[str, Any]] = [{"params": named}]
    if groups:
        parts = [{"params": [(n, p) for n, p in named if decays(n)]}]
        parts += [{"params": [(n, p) for n, p in named if not decays(n)], "weight_decay": 0.0}]
    options |= {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
    optimizer: Any
    if tau is None:
        optimizer = torch.optim.AdamW(parts, **options)
    else:
        # Names alone do not say what modules split.
        shown = model if kind in ("mla", "mamba") else None
        optimizer = AdamW2(parts, **options, tau=tau, model=shown)
    rows = samples(kind)
    a_step = len(rows) // STEPS
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        model(**collate(rows[step * a_step : (step + 1) * a_step])).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    stats = {} if tau is None else optimizer.stats()
    return {name: p.detach() for name, p in named}, stats
