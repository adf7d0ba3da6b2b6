from __future__ import annotations

import math

import pytest
import torch

from weyl_megatron.demo.model import GPT, GPTConfig, uniform_entropy

SHAPE = GPTConfig(context=16, layers=2, heads=2, width=16)


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(SHAPE)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(256, (3, 16), generator=torch.Generator().manual_seed(1))


def test_a_later_token_does_not_change_earlier_logits(model: GPT, tokens: torch.Tensor) -> None:
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 256
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_loss_is_the_mean_cross_entropy_of_the_logits(model: GPT, tokens: torch.Tensor) -> None:
    logits = model(tokens)
    picked = logits.log_softmax(-1).gather(-1, tokens[..., None])
    assert model(tokens, tokens).item() == pytest.approx(-picked.mean().item(), rel=1e-5)


def test_entropy_of_attention_without_preference(model: GPT, tokens: torch.Tensor) -> None:
    torch.nn.init.zeros_(model.h[1].attn.q.weight)
    per_query = model.h[1].attn.entropy(torch.randn(3, 16, 16))
    visible = torch.arange(1, 17).log()
    assert torch.allclose(per_query, visible.expand(2, 16), atol=1e-6)
    assert torch.allclose(
        model.attention_entropy(tokens)[1], torch.tensor(uniform_entropy(16)), atol=1e-6
    )


def test_entropy_of_attention_to_one_key_is_zero(model: GPT) -> None:
    attention = model.h[0].attn
    torch.nn.init.eye_(attention.q.weight)
    torch.nn.init.eye_(attention.k.weight)
    x = 100 * torch.eye(16)[None].repeat(1, 1, 1)
    entropy = attention.entropy(x)
    assert entropy[0, :8].max() < 1e-6, (
        "head 0 sees the first eight coordinates, in which each key is its own"
    )


def test_entropy_is_per_layer_and_head(model: GPT, tokens: torch.Tensor) -> None:
    entropy = model.attention_entropy(tokens)
    assert entropy.shape == (2, 2)
    assert bool((entropy > 0).all()) and entropy.max() <= uniform_entropy(16) + 1e-6


def test_uniform_entropy_is_the_mean_logarithm() -> None:
    assert uniform_entropy(3) == pytest.approx((math.log(2) + math.log(3)) / 3)


def test_more_tokens_than_the_context_are_refused(model: GPT) -> None:
    with pytest.raises(ValueError, match="tokens takes at most 16 positions, got 17"):
        model(torch.zeros(1, 17, dtype=torch.long))
