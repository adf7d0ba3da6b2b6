"""Which layers of a module are W_q, W_k, W_v, W_o, W_1 and W_2, by the names that libraries use.

Known are fused QKV as in GPT-2 and nanoGPT (``c_attn``), timm (``qkv``), torch
(``in_proj_weight``) and Megatron (``linear_qkv``), and separate layers as Hugging Face has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

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

#: What a block's weights are called.
ROLES = ("q", "k", "v", "o", "1", "2")


class Weight(NamedTuple):
    """A matrix (out, in) inside a parameter of ``owner``.

    Under ZeRO-3 the parameter may exist only while ``owner`` computes.
    """

    owner: nn.Module
    attribute: str
    cut: _Cut  # the parameter to this matrix

    def read(self) -> Tensor:
        """Return the matrix."""
        return self.cut(self.held())

    def held(self) -> Tensor:
        """Return the parameter; a DTensor is one still."""
        with only_looking(self.owner):
            parameter: Tensor = getattr(self.owner, self.attribute)
        return parameter.detach()

    @property
    def parameter(self) -> nn.Parameter | None:
        """The parameter; None where ``owner`` computes it of another one."""
        return dict(self.owner.named_parameters(recurse=False)).get(self.attribute)

    @property
    def is_transposed(self) -> bool:
        """Whether outputs are the parameter's second dimension."""
        return _is_transposed(self.owner)

    @property
    def is_part(self) -> bool:
        """Whether the parameter has other matrices, too."""
        parameter: Any = self.parameter
        if parameter is None:
            return False
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 takes the elements away
        outputs = int(shape[1 if self.is_transposed else 0])
        return self.rows(outputs).numel() < outputs

    def rows(self, outputs: int) -> Tensor:
        """Return which of the parameter's ``outputs`` this matrix has, in order."""
        numbers = torch.arange(outputs).unsqueeze(1)
        return self.cut(numbers.T if self.is_transposed else numbers).flatten()

    @property
    def is_lent(self) -> bool:
        """Whether ZeRO-3 gives the parameter for as long as ``owner`` computes."""
        return any(hasattr(parameter, "ds_id") for parameter in self.owner.parameters())


class AttentionLayers(NamedTuple):
    """The matrices of an attention module, and how many heads share them."""

    weights: dict[str, Weight]  # of "q", "k", "v", and "o" where it is known
    heads: int
    key_heads: int
    has_bias: bool  # see :class:`weyl_megatron.transformer.blocks.Block`


@contextmanager
def only_looking(module: nn.Module) -> Iterator[None]:
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


def looks_like_attention(module: nn.Module) -> bool:
    kind = type(module).__name__.lower()
    return "attention" in kind or "attn" in kind or hasattr(module, "linear_qkv")


def attention_layers(module: nn.Module) -> AttentionLayers | None:
    """Return q, k, v and o of an attention module; None where it has none of the known names.

    Raises:
        ValueError: DeepSpeed's AutoTP has split the module.
    """
    if hasattr(module, "linear_qkv"):
        return _of_megatron(module)
    heads = _number(module, _HEADS)
    if heads is None:
        return None
    key_heads = _number(module, _KEY_HEADS) or heads
    outputs = (layer_at(module, name) for name in _OUTPUT)
    output = next((layer for layer in outputs if layer is not None), None)
    if type(output).__name__ == "LinearAllreduce":
        raise ValueError(
            f"transformer: {type(module).__name__} is split by DeepSpeed's AutoTP; it takes "
            "Megatron's layers."
        )
    last = {} if output is None else {"o": whole_weight(output)}
    if isinstance(getattr(module, "in_proj_weight", None), nn.Parameter):
        # torch's MultiheadAttention
        is_biased = getattr(module, "in_proj_bias", None) is not None
        stack = stacked_weights(module, "in_proj_weight")
        return AttentionLayers({**stack, **last}, heads, heads, is_biased)
    for trio in _SEPARATE:
        layers = [layer_at(module, name) for name in trio]
        separate = {
            role: whole_weight(layer)
            for role, layer in zip("qkv", layers, strict=True)
            if layer is not None
        }
        if len(separate) == len(trio):
            is_biased = any(getattr(layer, "bias", None) is not None for layer in layers[:2])
            is_biased = is_biased or _is_changed(module)
            return AttentionLayers({**separate, **last}, heads, key_heads, is_biased)
    for name in _STACKED:
        layer = layer_at(module, name)
        if layer is not None:
            sizes = (1, 1, 1) if key_heads == heads else (heads, key_heads, key_heads)
            biases = (getattr(layer, "bias", None), getattr(module, "q_bias", None))
            is_biased = any(bias is not None for bias in biases) or _is_changed(module)
            stack = stacked_weights(layer, "weight", sizes)
            return AttentionLayers({**stack, **last}, heads, key_heads, is_biased)
    return None


def _of_megatron(module: nn.Module) -> AttentionLayers:
    """Megatron's linear_qkv repeats [the queries of a group, its key, its value]."""
    own: Any = module
    heads, groups = own.num_attention_heads_per_partition, own.num_query_groups_per_partition
    size = own.hidden_size_per_attention_head
    repeated, layer = heads // groups, own.linear_qkv

    def cut(first: int, count: int) -> _Cut:
        def rows(w: Tensor) -> Tensor:
            parts = w.view(groups, repeated + 2, size, -1)  # (group, head, row of it, in)
            return parts[:, first : first + count].reshape(-1, w.shape[-1])

        return rows

    places = {"q": (0, repeated), "k": (repeated, 1), "v": (repeated + 1, 1)}
    weights = {role: Weight(layer, "weight", cut(*place)) for role, place in places.items()}
    weights["o"] = Weight(own.linear_proj, "weight", lambda w: w)
    has_norm = any(getattr(own, name, None) is not None for name in ("q_layernorm", "k_layernorm"))
    positions = getattr(own.config, "position_embedding_type", "learned_absolute")
    is_biased = getattr(layer, "bias", None) is not None and layer.bias.numel() > 0
    has_bias = is_biased or has_norm or positions != "learned_absolute"
    return AttentionLayers(weights, heads, groups, has_bias)


def _is_changed(module: nn.Module) -> bool:
    """Whether queries and keys are normed or rotated between their layers and the scores."""
    norms = (getattr(module, name, None) for name in ("q_norm", "k_norm"))
    if any(isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity) for norm in norms):
        return True
    config = getattr(module, "config", None)
    rotations = ("rope_theta", "rope_parameters")
    return any(getattr(config, name, None) is not None for name in rotations)


def mlp_weights(block: nn.Module) -> dict[str, Weight]:
    """Return W_1 and W_2 of a block; nothing where there are several (experts) or none."""
    names = [name for name in ("mlp", "feed_forward", "ffn", "ff") if hasattr(block, name)]
    for holder in [block, *(getattr(block, name) for name in names)]:
        for pair in _MLPS:
            layers = [layer_at(holder, name) for name in pair]
            if layers[0] is not None and layers[1] is not None:
                first, second = whole_weight(layers[0]), whole_weight(layers[1])
                config = getattr(holder, "config", None)
                if pair[0] == "linear_fc1" and getattr(config, "gated_linear_unit", False):
                    # Its rows are [gate, up].
                    first = Weight(layers[0], "weight", lambda w: w[w.shape[0] // 2 :])
                return {"1": first, "2": second}
    return {}


def layer_at(module: nn.Module, path: str) -> nn.Module | None:
    """Return the submodule at a path; None where there is none that has a matrix."""
    layer: Any = module
    for part in path.split("."):
        layer = getattr(layer, part, None)
    return layer if isinstance(layer, nn.Module) and _has_weight(layer) else None


def _has_weight(layer: nn.Module) -> bool:
    """Whether there is a weight; one that is computed of another is not computed for that.

    FSDP2 has the other one whole only while the layer computes.
    """
    return is_parametrized(layer, "weight") or hasattr(layer, "weight")


def whole_weight(layer: nn.Module) -> Weight:
    return Weight(layer, "weight", (lambda w: w.T) if _is_transposed(layer) else (lambda w: w))


def stacked_weights(
    owner: nn.Module, attribute: str = "weight", sizes: tuple[int, int, int] = (1, 1, 1)
) -> dict[str, Weight]:
    """Return q, k and v of a weight (q + k + v, in) that stacks them, in parts like ``sizes``."""

    def cut(number: int) -> _Cut:
        def piece(w: Tensor) -> Tensor:
            rows = w.T if _is_transposed(owner) else w
            unit = rows.shape[0] // sum(sizes)
            return torch.split(rows, [unit * size for size in sizes])[number]

        return piece

    return {role: Weight(owner, attribute, cut(number)) for number, role in enumerate("qkv")}


def _is_transposed(layer: nn.Module) -> bool:
    return type(layer).__name__ == "Conv1D"  # Hugging Face's: y = x W


def _number(module: nn.Module, names: Sequence[str]) -> int | None:
    for holder in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None
