"""Find a model's Transformer blocks: in each of them its weight matrices and its two norms.

A module is recognised by the names of its layers, see ``layers.py``. What is not recognised stops
with a sentence; ``names`` says where the layers are then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .layers import (
    ROLES,
    AttentionLayers,
    Weight,
    attention_layers,
    layer_at,
    looks_like_attention,
    mlp_weights,
    only_looking,
    stacked_weights,
    whole_weight,
)
from .megatron import tensor_parallel_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Block:
    """One Transformer block as this rank holds it; heads are its own under tensor parallelism."""

    name: str
    number: int  # of the block in the whole model
    module: nn.Module
    attention: nn.Module
    # Of "q", "k", "v", "o", "1" (of a gated MLP: up) and "2"; experts have no 1 and 2.
    weights: Mapping[str, Weight]
    norms: tuple[nn.Module | None, nn.Module | None]
    # Of their parameters' names: Transformer Engine has them inside the next layer.
    norm_prefix: tuple[str, str]
    heads: int
    key_heads: int
    # Of q or k, or a norm or rotation of either: the scores are not xᵀ W_qᵀ W_k x then.
    has_bias: bool
    group: ProcessGroup | None = None  # over which heads and the MLP are spread
    first_head: int = 0

    def norm(self, which: int, kind: str) -> Tensor | None:
        """γ (``weight``) or β (``bias``) of the first or second norm; None where it has none."""
        value = getattr(self.norms[which], self.norm_prefix[which] + kind, None)
        return value.detach() if isinstance(value, Tensor) else None


def find_blocks(model: nn.Module, names: Mapping[str, Any] | None = None) -> list[Block]:
    """Return the model's blocks in the order of its modules.

    Args:
        model: any of the engines' wrappers around it, too.
        names: for a model that is not recognised, paths inside a block: ``{"block": "layers.*",
            "q": "attn.a", "k": "attn.b", "v": …, "o": …, "1": …, "2": …, "heads": 8}``, or
            ``"qkv"`` for one layer that stacks the three.

    Raises:
        ValueError: no block was recognised, or a name is not there.
    """
    with only_looking(model):
        return _recognised(model) if names is None else _named(model, names)


def _recognised(model: nn.Module) -> list[Block]:
    blocks: list[Block] = []
    looked_at: list[str] = []
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if not looks_like_attention(module):
            continue
        looked_at.append(f"{path or 'the model'} ({type(module).__name__})")
        parts = attention_layers(module)
        if parts is None:
            continue
        parent = _block_around(path, modules)
        if parent is None:
            continue
        blocks.append(_block(parent, modules[parent], module, parts, len(blocks)))
    if not blocks:
        seen = ", ".join(looked_at[:6]) or "no module whose class name has 'Attention'"
        raise ValueError(
            f"transformer: no Transformer block was recognised in {type(model).__name__}; looked "
            f"at {seen}; name the layers with names={{'block': 'layers.*', 'q': …, 'k': …, 'v': …, "
            f"'o': …, '1': …, '2': …, 'heads': …}}."
        )
    return blocks


def _block_around(path: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Return the path of the block around an attention.

    That is the nearest module that is an element of a list or has an MLP beside the attention.
    """
    while path:
        path = path.rpartition(".")[0]
        if path not in modules:
            return None
        inside = modules[path]
        if mlp_weights(inside) or path.rpartition(".")[2].isdigit():
            return path
        if isinstance(inside, nn.ModuleList):
            return None
    return None


def _norms(block: nn.Module, attention: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield a block's norms over the hidden size, each with its parameters' prefix."""
    inside = {id(module) for module in attention.modules()}
    fused = getattr(attention, "linear_qkv", None)
    if fused is not None and hasattr(fused, "layer_norm_weight"):
        yield fused, "layer_norm_"
    for path, module in block.named_modules():
        # BERT's second norm is inside its attention.
        if id(module) in inside and not path.endswith("LayerNorm"):
            continue
        is_norm = "Norm" in type(module).__name__
        if is_norm and isinstance(getattr(module, "weight", None), Tensor):
            yield module, ""
        elif hasattr(module, "layer_norm_weight"):
            yield module, "layer_norm_"


def _block(
    name: str, module: nn.Module, attention: nn.Module, parts: AttentionLayers, number: int
) -> Block:
    norms = list(_norms(module, attention))[:2]
    norms += [(nn.Module(), "")] * (2 - len(norms))
    layer = getattr(module, "layer_number", None)  # Megatron's, from 1 on over all stages
    group, rank = _tensor_parallel(attention)
    weights = {**parts.weights, **mlp_weights(module)}
    beside = layer_at(module, "attention.output.dense")  # BERT's
    if "o" not in weights and beside is not None:
        weights["o"] = whole_weight(beside)
    (first, first_prefix), (second, second_prefix) = norms
    return Block(
        name=name,
        number=layer - 1 if isinstance(layer, int) and hasattr(attention, "linear_qkv") else number,
        module=module,
        attention=attention,
        weights={role: weights[role] for role in ROLES if role in weights},
        norms=(first, second),
        norm_prefix=(first_prefix, second_prefix),
        heads=parts.heads,
        key_heads=parts.key_heads,
        has_bias=parts.has_bias,
        group=group,
        first_head=rank * parts.heads,
    )


def _tensor_parallel(attention: nn.Module) -> tuple[ProcessGroup | None, int]:
    """Return the group over which Megatron spreads the heads, and this rank's number in it."""
    if not hasattr(attention, "linear_qkv"):
        return None, 0
    collection = getattr(attention, "pg_collection", None)
    group = getattr(collection, "tp", None) or tensor_parallel_group(attention.linear_qkv)
    size, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    return (group, rank) if size > 1 else (None, 0)


def _named(model: nn.Module, names: Mapping[str, Any]) -> list[Block]:
    """Blocks by the names that were given."""
    unknown = set(names) - {"block", "qkv", "heads", "key_heads", "attention", *ROLES}
    if unknown or "block" not in names or not isinstance(names.get("heads"), int):
        raise ValueError(
            f"transformer: names got {sorted(names)}, it takes 'block' (a pattern like "
            "'layers.*'), 'heads' (a number), 'q', 'k', 'v' or 'qkv', and 'o', '1', '2', "
            "'attention', 'key_heads'."
        )
    heads = names["heads"]
    pattern = str(names["block"]).split(".")
    blocks: list[Block] = []
    for path, module in model.named_modules():
        if not _matches(path, pattern):
            continue
        weights = _named_weights(path, module, names)
        attention = module.get_submodule(names["attention"]) if "attention" in names else module
        parts = AttentionLayers(weights, heads, names.get("key_heads", heads), has_bias=True)
        blocks.append(_block(path, module, attention, parts, len(blocks)))
    if not blocks:
        raise ValueError(
            f"transformer: names['block'] got {names['block']!r}, which no module of the model is "
            "called."
        )
    return blocks


def _matches(path: str, pattern: Sequence[str]) -> bool:
    """Whether the last parts of a path are those of a pattern, in which ``*`` is any part."""
    tail = path.split(".")[-len(pattern) :]
    return len(tail) == len(pattern) and all(
        wanted in ("*", part) for wanted, part in zip(pattern, tail, strict=True)
    )


def _named_weights(path: str, block: nn.Module, names: Mapping[str, Any]) -> dict[str, Weight]:
    """Return the weights of a block by the paths of their layers in it."""
    layers: dict[str, nn.Module] = {}
    for role in ("q", "k", "v", "qkv", "o", "1", "2"):
        if role in names:
            layer = layer_at(block, names[role])
            if layer is None:
                raise ValueError(
                    f"transformer: names[{role!r}] got {names[role]!r}, which {path} has no layer "
                    "at."
                )
            layers[role] = layer
    weights = {role: whole_weight(layer) for role, layer in layers.items() if role != "qkv"}
    if "qkv" in layers:
        weights |= stacked_weights(layers["qkv"])
    if not {"q", "k"} <= weights.keys():
        raise ValueError(f"transformer: names got {sorted(names)}, it takes 'q' and 'k', or 'qkv'.")
    return weights
