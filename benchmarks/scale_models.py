"""The models and spreads over ranks that benchmarks/scale.py counts, as their parameters alone."""

from __future__ import annotations

from typing import NamedTuple


class Weight(NamedTuple):
    """A parameter of the whole model."""

    name: str
    shape: tuple[int, ...]
    dim: int | None = None  # that tensor parallelism cuts
    # of a QKV: rows of a head's q, k and v, which follow each other (Megatron's order)
    head: int = 0
    is_hidden: bool = False
    is_tied: bool = False  # the last pipeline stage has a copy


class Model(NamedTuple):
    first: tuple[Weight, ...]
    layer: tuple[Weight, ...]
    layers: int
    last: tuple[Weight, ...]

    def stage(self, number: int, stages: int) -> list[Weight]:
        """Return the parameters of a pipeline stage, in order."""
        each, is_last = self.layers // stages, number == stages - 1
        weights = list(self.first) if number == 0 else []
        for layer in range(number * each, (number + 1) * each):
            weights += [w._replace(name=f"layers.{layer}.{w.name}") for w in self.layer]
        if is_last:
            weights += self.last
        if is_last and number > 0:
            weights += [weight for weight in self.first if weight.is_tied]
        return weights


def _layer(width: int, heads: int, mlp: int) -> tuple[Weight, ...]:
    return (
        *_vectors("input_layernorm", width),
        Weight("self_attention.linear_proj.weight", (width, width), 1, is_hidden=True),
        Weight("self_attention.linear_proj.bias", (width,)),
        Weight(
            "self_attention.linear_qkv.weight",
            (3 * width, width),
            0,
            width // heads,
            is_hidden=True,
        ),
        Weight("self_attention.linear_qkv.bias", (3 * width,), 0),
        *_vectors("pre_mlp_layernorm", width),
        Weight("mlp.linear_fc1.weight", (mlp, width), 0, is_hidden=True),
        Weight("mlp.linear_fc1.bias", (mlp,), 0),
        Weight("mlp.linear_fc2.weight", (width, mlp), 1, is_hidden=True),
        Weight("mlp.linear_fc2.bias", (width,)),
    )


def _vectors(norm: str, width: int) -> tuple[Weight, ...]:
    return tuple(Weight(f"{norm}.{leaf}", (width,)) for leaf in ("weight", "bias"))


def gpt(layers: int, width: int, heads: int, *, tokens: int = 50304, context: int = 1024) -> Model:
    """GPT-2, whose head is the embedding."""
    words = Weight("embedding.word_embeddings.weight", (tokens, width), 0, is_tied=True)
    positions = Weight("embedding.position_embeddings.weight", (context, width))
    return Model(
        (words, positions),
        _layer(width, heads, 4 * width),
        layers,
        _vectors("final_layernorm", width),
    )


def vit(layers: int, width: int, heads: int, mlp: int) -> Model:
    """A ViT of 16 × 16 patches of 14 × 14 pixels; patches and head are whole under tensor
    parallelism.
    """
    tokens = Weight("class_token", (1, 1, width)), Weight("position_embeddings", (1, 257, width))
    patches = Weight("patches.weight", (width, 3, 14, 14)), Weight("patches.bias", (width,))
    head = Weight("head.weight", (1000, width)), Weight("head.bias", (1000,))
    return Model(
        (*tokens, *patches),
        _layer(width, heads, mlp),
        layers,
        (*_vectors("final_layernorm", width), *head),
    )


MODELS = {
    "gpt2-124m": gpt(12, 768, 12),
    "gpt-774m": gpt(36, 1280, 20),
    "gpt-1.3b": gpt(24, 2048, 16),
    "vit-g-1011m": vit(40, 1408, 16, 6144),
}


class Spread(NamedTuple):
    tp: int = 1
    pp: int = 1
    dp: int = 1
    # 1 (and 2), 3; ddp: replicated; fsdp: FSDP2; hsdp8: HSDP, in shards on 8 ranks
    zero: str = "1"


#: The table that the command prints if no model is asked for.
DEFAULTS = [
    ("gpt2-124m", Spread()),
    ("gpt2-124m", Spread(dp=2)),
    ("gpt2-124m", Spread(dp=8)),
    ("gpt2-124m", Spread(dp=64)),
    ("gpt-774m", Spread(dp=64)),
    ("gpt-774m", Spread(dp=64, zero="3")),
    ("gpt-1.3b", Spread(dp=256)),
    ("gpt-1.3b", Spread(dp=4096)),
    ("gpt-1.3b", Spread(dp=256, zero="3")),
    ("gpt-1.3b", Spread(dp=4096, zero="3")),
    ("gpt-1.3b", Spread(dp=256, zero="fsdp")),
    ("gpt-1.3b", Spread(dp=256, zero="hsdp8")),
    ("gpt-1.3b", Spread(tp=2, dp=8, zero="ddp")),
    ("gpt-1.3b", Spread(tp=2, dp=64)),
    ("gpt-1.3b", Spread(tp=8, pp=2, dp=64)),
    ("gpt-1.3b", Spread(tp=8, pp=2, dp=256)),
    ("vit-g-1011m", Spread(tp=1, dp=256)),
    ("vit-g-1011m", Spread(tp=4, dp=256)),
]
