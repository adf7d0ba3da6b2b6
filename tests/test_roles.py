from __future__ import annotations

import pytest
from torch import nn

from weyl_megatron.roles import io_parameters


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 3)
        self.layer = nn.Linear(3, 3)
        self.out = nn.Linear(3, 5, bias=False)

    def get_output_embeddings(self) -> nn.Linear:
        return self.out


HF_GPT2 = ["transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.attn.c_attn.weight", "lm_head.weight"]
TIMM_VIT = ["cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "head.weight", "head.bias"]
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
    with pytest.raises(ValueError, match="tau got 'balanced', but nothing tells which of the 1 parameters"):
        io_parameters(["group0.param0"], None, None)


def test_patterns_tell_and_must_match() -> None:
    assert io_parameters(["a.weight", "b.weight"], None, ["a*"]) == {"a.weight"}
    assert io_parameters(["a.weight"], None, []) == set()
    with pytest.raises(ValueError, match="io got the pattern 'z', which matches no parameter"):
        io_parameters(["a.weight"], None, ["z"])
