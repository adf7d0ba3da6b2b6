from __future__ import annotations

import pytest
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from weyl_megatron.layouts.kinds import Kind
from weyl_megatron.transformer.reparam import sigma_reparam
from weyl_megatron.transformer.roles import io_parameters


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 3)
        self.layer = nn.Linear(3, 3)
        self.out = nn.Linear(3, 5, bias=False)

    def get_output_embeddings(self) -> nn.Linear:
        return self.out


HF_GPT2 = [
    "transformer.wte.weight",
    "transformer.wpe.weight",
    "transformer.h.0.attn.c_attn.weight",
    "lm_head.weight",
]
TIMM_VIT = [
    "cls_token",
    "pos_embed",
    "patch_embed.proj.weight",
    "blocks.0.attn.qkv.weight",
    "head.weight",
    "head.bias",
]
MEGATRON = [
    "embedding.word_embeddings.weight",
    "embedding.position_embeddings.weight",
    "decoder.layers.0.self_attention.linear_qkv.weight",
    "output_layer.weight",
]
LLAMA = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"]


@pytest.mark.parametrize(
    ("names", "hidden"),
    [
        (HF_GPT2, {"transformer.h.0.attn.c_attn.weight"}),
        (TIMM_VIT, {"blocks.0.attn.qkv.weight"}),
        (MEGATRON, {"decoder.layers.0.self_attention.linear_qkv.weight"}),
        (LLAMA, {"model.layers.0.self_attn.q_proj.weight"}),
    ],
    ids=["Hugging Face GPT-2", "timm ViT", "Megatron", "Llama"],
)
def test_well_known_names_tell_embeddings_and_head(names: list[str], hidden: set[str]) -> None:
    assert set(names) - io_parameters(names, None, None) == hidden


def test_the_model_s_modules_tell_what_names_do_not() -> None:
    names = [name for name, _ in Tied().named_parameters()]
    assert io_parameters(names, Tied(), None) == {"words.weight", "out.weight"}


def test_where_nothing_tells_it_says_so() -> None:
    with pytest.raises(
        ValueError, match="tau got 'balanced', but nothing tells which of the 1 parameters"
    ):
        io_parameters(["group0.param0"], None, None)


def test_patterns_tell_and_must_match() -> None:
    assert io_parameters(["a.weight", "b.weight"], None, ["a*"]) == {"a.weight"}
    assert io_parameters(["a.weight"], None, []) == set()
    with pytest.raises(ValueError, match="io got the pattern 'z', which matches no parameter"):
        io_parameters(["a.weight"], None, ["z"])


class Frozen(Tied):
    """LoRA beside frozen weights."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_A, self.lora_B = nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False)


def test_a_model_whose_embeddings_are_frozen_has_none_that_are_stepped() -> None:
    adapters = ["lora_A.weight", "lora_B.weight", "layer.weight"]
    assert io_parameters(adapters, Frozen(), None) == set()
    with pytest.raises(ValueError, match="nothing tells"):
        io_parameters(adapters, None, None)


def test_adapters_alone_are_no_embeddings_and_no_head() -> None:
    names = ["0.lora_A.weight", "0.lora_B.weight", "0.scale"]
    assert io_parameters(names[:2], None, None) == set()
    assert io_parameters(names, {"0.scale": Kind("vector")}, None) == set()
    with pytest.raises(ValueError, match="nothing tells which of the 3 parameters"):
        io_parameters(names, {"0.scale": Kind("matrix")}, None)


def test_parametrized_embeddings_and_heads_are_what_they_were() -> None:
    net = Tied()
    sigma_reparam(net)
    weight_norm(net.words)
    names = [name for name, _ in net.named_parameters()]
    found = io_parameters(names, net, None)
    assert {
        "words.parametrizations.weight.original1",
        "out.parametrizations.weight.original",
    } <= found
    assert not any(name.startswith("layer") for name in found)


def test_a_bag_of_embeddings_is_one() -> None:
    net = nn.ModuleDict({"bag": nn.EmbeddingBag(5, 3), "layer": nn.Linear(3, 3)})
    assert io_parameters([name for name, _ in net.named_parameters()], net, None) == {"bag.weight"}
