"""Find a model's Transformer blocks, and in each of them W_q, W_k, W_v, W_o, W_1, W_2 and the two
norms.

A module is recognised by the names of its layers: fused QKV as in GPT-2 and nanoGPT (``c_attn``),
timm (``qkv``), torch (``in_proj_weight``) and Megatron (``linear_qkv``), or separate layers as
Hugging Face has them. What is not recognised stops with a sentence; ``names`` tells it then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_Cut = Callable[[Tensor], Tensor]

_SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("q", "k", "v"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("w_q", "w_k", "w_v"),
)
_STACKED = ("c_attn", "qkv", "in_proj", "Wqkv", "qkv_proj")
_OUTPUT = (
    "o_proj",
    "out_proj",
    "c_proj",
    "proj",
    "o",
    "to_out.0",
    "wo",
    "w_o",
    "dense",
    "linear_proj",
)
_MLPS = (
    ("up_proj", "down_proj"),
    ("fc1", "fc2"),
    ("c_fc", "c_proj"),
    ("fc", "proj"),
    ("linear_fc1", "linear_fc2"),
    ("linear1", "linear2"),
    ("w3", "w2"),  # Llama's own names: w1 is the gate
    ("intermediate.dense", "output.dense"),
)
_HEADS = ("num_heads", "n_head", "n_heads", "num_attention_heads", "heads")
_KEY_HEADS = ("num_key_value_heads", "n_kv_heads", "num_kv_heads")
_ROLES = ("q", "k", "v", "o", "1", "2")


class Weight(NamedTuple):
    """A matrix (out, in) inside a parameter of ``owner``, which may exist only while ``owner``
    computes (ZeRO-3).
    """

    owner: nn.Module
    attribute: str
    cut: _Cut  # the parameter to this matrix

    def read(self) -> Tensor:
        with _only_looking(self.owner):
            parameter: Tensor = getattr(self.owner, self.attribute)
        return self.cut(parameter.detach())

    @property
    def is_lent(self) -> bool:
        """Whether ZeRO-3 gives the parameter for as long as ``owner`` computes."""
        return any(hasattr(parameter, "ds_id") for parameter in self.owner.parameters())


@dataclass(frozen=True)
class Block:
    """One Transformer block as this rank holds it; heads are its own under tensor parallelism."""

    name: str
    number: int  # of the block in the whole model
    module: nn.Module
    attention: nn.Module
    weights: Mapping[
        str, Weight
    ]  # of "q", "k", "v", "o", "1" (of a gated MLP: up) and "2"; experts have no 1 and 2
    norms: tuple[nn.Module | None, nn.Module | None]
    norm_prefix: tuple[
        str, str
    ]  # of their parameters' names: Transformer Engine has them inside the next layer
    heads: int
    key_heads: int
    has_bias: (
        bool  # of q or k, or a norm or rotation of either: the scores are not xᵀ W_qᵀ W_k x then
    )
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
    with _only_looking(model):
        return _recognised(model) if names is None else _named(model, names)


@contextmanager
def _only_looking(module: nn.Module) -> Iterator[None]:
    """A look at a weight is no training pass: σReparam would take a power step."""
    lists = [inner for inner in module.modules() if isinstance(inner, ParametrizationList)]
    training = [inner.training for inner in lists]
    for inner in lists:
        inner.eval()
    try:
        yield
    finally:
        for inner, was in zip(lists, training, strict=True):
            inner.train(was)


def _recognised(model: nn.Module) -> list[Block]:
    blocks: list[Block] = []
    looked_at: list[str] = []
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if not _looks_like_attention(module):
            continue
        looked_at.append(f"{path or 'the model'} ({type(module).__name__})")
        parts = _attention(module)
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


def _looks_like_attention(module: nn.Module) -> bool:
    kind = type(module).__name__.lower()
    return "attention" in kind or "attn" in kind or hasattr(module, "linear_qkv")


class _Attention(NamedTuple):
    weights: dict[str, Weight]
    heads: int
    key_heads: int
    has_bias: bool


def _attention(module: nn.Module) -> _Attention | None:
    """Return q, k, v and o of an attention module; None where it has none of the known names."""
    if hasattr(module, "linear_qkv"):
        return _megatron(module)
    heads = _number(module, _HEADS)
    if heads is None:
        return None
    key_heads = _number(module, _KEY_HEADS) or heads
    output = next((layer for name in _OUTPUT if (layer := _layer(module, name)) is not None), None)
    if type(output).__name__ == "LinearAllreduce":
        raise ValueError(
            f"transformer: {type(module).__name__} is split by DeepSpeed's AutoTP; it takes "
            "Megatron's layers."
        )
    if isinstance(
        getattr(module, "in_proj_weight", None), nn.Parameter
    ):  # torch's MultiheadAttention
        weights = _stacked(module, "in_proj_weight", transposed=False, sizes=None)
        biased = getattr(module, "in_proj_bias", None) is not None
        return _Attention({**weights, **_output(output)}, heads, heads, biased)
    for trio in _SEPARATE:
        layers = [_layer(module, name) for name in trio]
        if all(layer is not None for layer in layers):
            found = {
                role: _whole(layer)
                for role, layer in zip("qkv", layers, strict=True)
                if layer is not None
            }
            biased = any(getattr(layer, "bias", None) is not None for layer in layers[:2])
            return _Attention(
                {**found, **_output(output)}, heads, key_heads, biased or _is_changed(module)
            )
    for name in _STACKED:
        layer = _layer(module, name)
        if layer is not None:
            sizes = None if key_heads == heads else (heads, key_heads, key_heads)
            weights = _stacked(layer, "weight", transposed=_is_transposed(layer), sizes=sizes)
            biased = (
                getattr(layer, "bias", None) is not None
                or getattr(module, "q_bias", None) is not None
            )
            return _Attention(
                {**weights, **_output(output)}, heads, key_heads, biased or _is_changed(module)
            )
    return None


def _megatron(module: nn.Module) -> _Attention:
    """Megatron's linear_qkv repeats [the queries of a group, its key, its value]."""
    own: Any = module
    heads, groups = own.num_attention_heads_per_partition, own.num_query_groups_per_partition
    size = own.hidden_size_per_attention_head
    repeated, layer = heads // groups, own.linear_qkv

    def cut(first: int, count: int) -> _Cut:
        return lambda w: w.view(groups, repeated + 2, size, -1)[:, first : first + count].reshape(
            -1, w.shape[-1]
        )

    rows = {"q": (0, repeated), "k": (repeated, 1), "v": (repeated + 1, 1)}
    weights = {role: Weight(layer, "weight", cut(*where)) for role, where in rows.items()}
    weights["o"] = Weight(own.linear_proj, "weight", lambda w: w)
    has_norm = any(getattr(own, name, None) is not None for name in ("q_layernorm", "k_layernorm"))
    is_rotated = (
        getattr(own.config, "position_embedding_type", "learned_absolute") != "learned_absolute"
    )
    biased = getattr(layer, "bias", None) is not None and layer.bias.numel() > 0
    return _Attention(weights, heads, groups, biased or has_norm or is_rotated)


def _is_changed(module: nn.Module) -> bool:
    """Whether queries and keys are normed or rotated between their layers and the scores."""
    normed = (getattr(module, name, None) for name in ("q_norm", "k_norm"))
    if any(isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity) for norm in normed):
        return True
    config = getattr(module, "config", None)
    return (
        getattr(config, "rope_theta", None) is not None
        or getattr(config, "rope_parameters", None) is not None
    )


def _stacked(
    owner: nn.Module, attribute: str, *, transposed: bool, sizes: tuple[int, ...] | None
) -> dict[str, Weight]:
    def cut(number: int) -> _Cut:
        def piece(w: Tensor) -> Tensor:
            rows = w.T if transposed else w
            unit = rows.shape[0] // sum(sizes or (1, 1, 1))
            return torch.split(rows, [unit * size for size in sizes or (1, 1, 1)])[number]

        return piece

    return {role: Weight(owner, attribute, cut(number)) for number, role in enumerate("qkv")}


def _whole(layer: nn.Module) -> Weight:
    return Weight(layer, "weight", (lambda w: w.T) if _is_transposed(layer) else (lambda w: w))


def _output(layer: nn.Module | None) -> dict[str, Weight]:
    return {} if layer is None else {"o": _whole(layer)}


def _is_transposed(layer: nn.Module) -> bool:
    return type(layer).__name__ == "Conv1D"  # Hugging Face's: y = x W


def _layer(module: nn.Module, path: str) -> nn.Module | None:
    """A submodule that has a matrix, by its path."""
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, nn.Module) and hasattr(found, "weight") else None


def _number(module: nn.Module, names: Sequence[str]) -> int | None:
    for holder in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


def _block_around(path: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Return the nearest module around an attention that is an element of a list or has an MLP
    beside it.
    """
    while path:
        path = path.rpartition(".")[0]
        if path not in modules:
            return None
        inside = modules[path]
        if _mlp(inside) or path.rpartition(".")[2].isdigit():
            return path
        if isinstance(inside, nn.ModuleList):
            return None
    return None


def _mlp(block: nn.Module) -> dict[str, Weight]:
    """Return W_1 and W_2 of a block; nothing where there are several (experts) or none."""
    holders = [
        block,
        *(
            getattr(block, name)
            for name in ("mlp", "feed_forward", "ffn", "ff")
            if hasattr(block, name)
        ),
    ]
    for holder in holders:
        for pair in _MLPS:
            layers = [_layer(holder, name) for name in pair]
            if layers[0] is not None and layers[1] is not None:
                first, second = _whole(layers[0]), _whole(layers[1])
                config = getattr(holder, "config", None)
                if pair[0] == "linear_fc1" and getattr(config, "gated_linear_unit", False):
                    first = Weight(
                        layers[0], "weight", lambda w: w[w.shape[0] // 2 :]
                    )  # [gate, up]
                return {"1": first, "2": second}
    return {}


def _norms(block: nn.Module, attention: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield a block's norms over the hidden size: modules, and the prefix of their parameters'
    names.
    """
    inside = {id(module) for module in attention.modules()}
    fused = getattr(attention, "linear_qkv", None)
    if fused is not None and hasattr(fused, "layer_norm_weight"):
        yield fused, "layer_norm_"
    for path, module in block.named_modules():
        is_inner = id(module) in inside and not path.endswith(
            "LayerNorm"
        )  # BERT's second is inside its attention
        if (
            "Norm" in type(module).__name__
            and not is_inner
            and isinstance(getattr(module, "weight", None), Tensor)
        ):
            yield module, ""
        elif not is_inner and hasattr(module, "layer_norm_weight"):
            yield module, "layer_norm_"


def _block(
    name: str, module: nn.Module, attention: nn.Module, parts: _Attention, number: int
) -> Block:
    norms = list(_norms(module, attention))[:2]
    norms += [(nn.Module(), "")] * (2 - len(norms))
    layer = getattr(module, "layer_number", None)  # Megatron's, from 1 on over all stages
    group, rank = _tensor_parallel(attention)
    weights = {**parts.weights, **_mlp(module)}
    beside = _layer(module, "attention.output.dense")  # BERT's
    if "o" not in weights and beside is not None:
        weights |= _output(beside)
    (first, first_prefix), (second, second_prefix) = norms
    return Block(
        name=name,
        number=layer - 1 if isinstance(layer, int) and hasattr(attention, "linear_qkv") else number,
        module=module,
        attention=attention,
        weights={role: weights[role] for role in _ROLES if role in weights},
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
    group = getattr(collection, "tp", None) or getattr(attention.linear_qkv, "tp_group", None)
    if group is None:
        from megatron.core import parallel_state

        group = parallel_state.get_tensor_model_parallel_group()
    size, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    return (group, rank) if size > 1 else (None, 0)


def _named(model: nn.Module, names: Mapping[str, Any]) -> list[Block]:
    """Blocks by the names that were given."""
    unknown = set(names) - {"block", "qkv", "heads", "key_heads", "attention", *_ROLES}
    if unknown or "block" not in names or not isinstance(names.get("heads"), int):
        raise ValueError(
            f"transformer: names got {sorted(names)}, it takes 'block' (a pattern like "
            "'layers.*'), 'heads' (a number), 'q', 'k', 'v' or 'qkv', and 'o', '1', '2', "
            "'attention', 'key_heads'."
        )
    pattern = str(names["block"]).split(".")
    blocks: list[Block] = []
    for path, module in model.named_modules():
        parts = path.split(".")
        tail = parts[-len(pattern) :]
        if len(tail) < len(pattern) or any(
            p not in ("*", t) for p, t in zip(pattern, tail, strict=True)
        ):
            continue
        layers: dict[str, nn.Module] = {}
        for role in ("q", "k", "v", "qkv", "o", "1", "2"):
            if role in names:
                layer = _layer(module, names[role])
                if layer is None:
                    raise ValueError(
                        f"transformer: names[{role!r}] got {names[role]!r}, which {path} has no "
                        "layer at."
                    )
                layers[role] = layer
        weights = {role: _whole(layer) for role, layer in layers.items() if role != "qkv"}
        if "qkv" in layers:
            weights |= _stacked(
                layers["qkv"], "weight", transposed=_is_transposed(layers["qkv"]), sizes=None
            )
        if not {"q", "k"} <= weights.keys():
            raise ValueError(
                f"transformer: names got {sorted(names)}, it takes 'q' and 'k', or 'qkv'."
            )
        attention = module.get_submodule(names["attention"]) if "attention" in names else module
        parted = _Attention(weights, names["heads"], names.get("key_heads", names["heads"]), True)
        blocks.append(_block(path, module, attention, parted, len(blocks)))
    if not blocks:
        raise ValueError(
            f"transformer: names['block'] got {names['block']!r}, which no module of the model is "
            "called."
        )
    return blocks
