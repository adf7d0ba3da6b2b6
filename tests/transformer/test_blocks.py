"""Every model that is recognised, against its own weights by plain indexing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from examples.collapse.model import GPT, GPTConfig
from weyl_megatron.demo import model as demo
from weyl_megatron.transformer.blocks import find_blocks

Expected = Callable[[nn.Module], dict[str, Tensor]]


def hf(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            n_layer=2,
            n_head=2,
            n_embd=16,
            vocab_size=50,
            n_positions=32,
            bos_token_id=0,
            eos_token_id=0,
        )
        return transformers.GPT2LMHeadModel(config)
    if kind == "vit":
        sizes = {
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
        }
        return transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=32))
    if kind == "bert":
        sizes = {
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
        }
        return transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=50))
    config = transformers.LlamaConfig(
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_size=16,
        intermediate_size=24,
        vocab_size=50,
    )
    return transformers.LlamaForCausalLM(config)


def timm_vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model(
        "vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=3, img_size=32
    )


def torch_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def separate(block: Any, attention: Any, names: str, mlp: Any, mlp_names: str) -> dict[str, Tensor]:
    layers = [getattr(attention, name) for name in names.split()] + [
        getattr(mlp, name) for name in mlp_names.split()
    ]
    return {role: layer.weight for role, layer in zip("qkvo12", layers, strict=True)}


def of_gpt2(block: Any) -> dict[str, Tensor]:
    q, k, v = block.attn.c_attn.weight.T.chunk(3)
    mlp = {"1": block.mlp.c_fc.weight.T, "2": block.mlp.c_proj.weight.T}
    return {"q": q, "k": k, "v": v, "o": block.attn.c_proj.weight.T, **mlp}


def of_timm(block: Any) -> dict[str, Tensor]:
    q, k, v = block.attn.qkv.weight.chunk(3)
    return {
        "q": q,
        "k": k,
        "v": v,
        "o": block.attn.proj.weight,
        "1": block.mlp.fc1.weight,
        "2": block.mlp.fc2.weight,
    }


def of_torch(block: Any) -> dict[str, Tensor]:
    q, k, v = block.self_attn.in_proj_weight.chunk(3)
    out = block.self_attn.out_proj.weight
    return {"q": q, "k": k, "v": v, "o": out, "1": block.linear1.weight, "2": block.linear2.weight}


def of_bert(block: Any) -> dict[str, Tensor]:
    own = block.attention.self
    layers = [
        own.query,
        own.key,
        own.value,
        block.attention.output.dense,
        block.intermediate.dense,
        block.output.dense,
    ]
    return {role: layer.weight for role, layer in zip("qkvo12", layers, strict=True)}


CASES: dict[str, tuple[Callable[[], nn.Module], Expected, int, int]] = {
    "demo": (
        lambda: demo.GPT(demo.GPTConfig(layers=2)),
        lambda b: separate(b, b.attn, "q k v o", b.mlp, "fc proj"),
        4,
        4,
    ),
    "collapse": (
        lambda: GPT(GPTConfig(layers=2)),
        lambda b: separate(b, b.attn, "q k v o", b.mlp, "fc1 fc2"),
        4,
        4,
    ),
    "hf-gpt2": (lambda: hf("gpt2"), of_gpt2, 2, 2),
    "hf-vit": (
        lambda: hf("vit"),
        lambda b: separate(b, b.attention, "q_proj k_proj v_proj o_proj", b.mlp, "fc1 fc2"),
        2,
        2,
    ),
    "hf-llama": (
        lambda: hf("llama"),
        lambda b: separate(
            b, b.self_attn, "q_proj k_proj v_proj o_proj", b.mlp, "up_proj down_proj"
        ),
        4,
        2,
    ),
    "hf-bert": (lambda: hf("bert"), of_bert, 2, 2),
    "timm": (timm_vit, of_timm, 3, 3),
    "torch": (torch_encoder, of_torch, 4, 4),
}


@pytest.mark.parametrize("name", CASES)
def test_a_model_s_matrices_are_found(name: str) -> None:
    make, expected, heads, key_heads = CASES[name]
    blocks = find_blocks(make())
    assert [block.number for block in blocks] == [0, 1]
    for block in blocks:
        weights = expected(block.module)
        assert block.weights.keys() == weights.keys()
        for role, weight in weights.items():
            assert torch.equal(block.weights[role].read(), weight), role
        assert (block.heads, block.key_heads) == (heads, key_heads)
        gains = [block.norm(which, "weight") for which in (0, 1)]
        assert all(gain is not None and gain.shape == (weights["q"].shape[1],) for gain in gains)
        assert gains[0] is not gains[1]


def test_scores_that_are_not_the_plain_product_are_known() -> None:
    known = {name: find_blocks(CASES[name][0]())[0].has_bias for name in CASES}
    assert known == {
        **{"demo": False, "collapse": False, "hf-gpt2": True, "hf-vit": True, "hf-bert": True},
        **{"hf-llama": True, "timm": True, "torch": True},  # rotated; biases
    }


class Strange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"mix": StrangeAttention()}) for _ in range(2))


class StrangeAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.abc = nn.Linear(8, 24)


def test_what_is_not_recognised_is_said_with_what_was_looked_at() -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.mix \(StrangeAttention\).*names=\{'block'"):
        find_blocks(Strange())
    with pytest.raises(ValueError, match=r"no module whose class name has 'Attention'"):
        find_blocks(nn.Linear(3, 3))


def test_names_tell_it() -> None:
    model = Strange()
    named = {
        "block": "layers.*",
        "q": "mix.a",
        "k": "mix.b",
        "v": "mix.c",
        "o": "mix.d",
        "heads": 2,
    }
    blocks = find_blocks(model, named)
    assert len(blocks) == 2 and torch.equal(
        blocks[1].weights["k"].read(), model.layers[1]["mix"].b.weight
    )  # type: ignore[index]
    stacked = find_blocks(model, {"block": "layers.*", "qkv": "mix.abc", "heads": 2})[0]
    assert torch.equal(stacked.weights["k"].read(), model.layers[0]["mix"].abc.weight[8:16])  # type: ignore[index]


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (
            {"block": "layers.*", "q": "mix.z", "k": "mix.b", "heads": 2},
            r"names\['q'\] got 'mix.z'",
        ),
        (
            {"block": "blocks.*", "q": "mix.a", "k": "mix.b", "heads": 2},
            r"names\['block'\] got 'blocks.\*'",
        ),
        ({"block": "layers.*", "q": "mix.a", "heads": 2}, r"it takes 'q' and 'k', or 'qkv'"),
        ({"q": "mix.a"}, r"it takes 'block'"),
        ({"block": "layers.*", "query": "mix.a", "heads": 2}, r"it takes 'block'"),
    ],
)
def test_a_wrong_name_is_said(names: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        find_blocks(Strange(), names)
