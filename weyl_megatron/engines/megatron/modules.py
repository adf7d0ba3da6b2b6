"""What Megatron-core's modules say of their parameters: the names in the whole model, and which
weights are fused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...layouts.buffers import model_names
from ...layouts.fused import Fused, interleaved
from ...layouts.tensor_parallel import Sharding


def global_names(model: Sequence[nn.Module], expert_rank: int) -> dict[int, str]:
    """Return, by ``id``, the names that parameters have in the whole model: the same at any number
    of ranks.

    Layers are numbered over all pipeline stages and chunks, experts over all ranks of experts.

    Args:
        model: the chunks of the model on this rank, in Megatron's wrappers.
        expert_rank: this rank among those that share out the experts.
    """
    names: dict[int, str] = {}
    for number, chunk in enumerate(model):
        renamed = dict(_renamed(chunk, expert_rank))
        numbered: dict[str, Tensor] = {}
        for local, param in chunk.named_parameters():
            parts = local.split(".")
            whole = [
                renamed.get(".".join(parts[: end + 1]), part) for end, part in enumerate(parts)
            ]
            numbered[".".join(whole)] = param
        taken = set(names.values())
        for whole_name, name in model_names(numbered).items():
            names[id(numbered[whole_name])] = f"chunk{number}.{name}" if name in taken else name
    return names


def shape_of(param: Tensor) -> torch.Size:
    """Return the shape of what this tensor-parallel rank has of a parameter: Megatron-FSDP's are
    DTensors of the whole, which know the parameter that they stand for.
    """
    shape: torch.Size = getattr(param, "orig_param", param).shape
    return shape


def _renamed(chunk: nn.Module, expert_rank: int) -> Iterator[tuple[str, str]]:
    """Yield (path of a module or parameter, what its last part is in the whole model)."""
    for path, module in chunk.named_modules():
        if isinstance(module, nn.ModuleList):
            for local, child in enumerate(module):
                layer = getattr(child, "layer_number", None)  # from 1 on, over all stages
                if path.endswith("local_experts"):
                    yield f"{path}.{local}", str(expert_rank * len(module) + local)
                elif isinstance(layer, int):
                    yield f"{path}.{local}", str(layer - 1)
        elif hasattr(
            module, "num_gemms"
        ):  # Transformer Engine's grouped linear layer: weight0, weight1, …
            for local in range(int(module.num_gemms)):
                for kind in ("weight", "bias"):
                    yield (
                        f"{path}.{kind}{local}".lstrip("."),
                        f"{kind}{expert_rank * int(module.num_gemms) + local}",
                    )


def fused_weights(
    model: Sequence[nn.Module], shardings: Mapping[int, Sharding]
) -> dict[int, Fused]:
    """Return, by ``id`` of the weight, which weights are several matrices.

    linear_qkv repeats [q of a query group, its k, its v], and tensor parallelism may cut it inside
    a group. linear_kv repeats [k, v] of a head, MLA's projections as its attention splits them. A
    gated linear_fc1 is [gate, up] on every rank, or chunks of both in turn; in_proj of Mamba and of
    Gated DeltaNet is a stack on every rank.

    Raises:
        ValueError: a module packs its weights in a way that is not understood.
    """
    fused: dict[int, Fused] = {}
    for chunk in model:
        for path, module in chunk.named_modules():
            if type(module).__name__ == "GroupedMLP":
                raise ValueError(
                    f"AdamW2: module '{path}' is a GroupedMLP, whose packed experts AdamW2 does "
                    f"not understand; it takes TEGroupedMLP and SequentialMLP."
                )
            for weight, pattern, labels in _patterns(module):
                sharding = shardings.get(id(weight))
                is_cut = sharding is not None and sharding.dim == 0
                rows = sum(sharding.sizes) if sharding and is_cut else shape_of(weight)[0]
                if min(pattern) > 0 and rows % sum(pattern) == 0:
                    fused[id(weight)] = interleaved(pattern, labels, rows)
    return fused


def _patterns(module: nn.Module) -> Iterator[tuple[Tensor, list[int], tuple[str, ...]]]:
    """Yield (weight, the rows of each part in one period, the parts' labels)."""
    config = getattr(module, "config", None)
    for weight in _weights(module, "linear_qkv"):
        width = int(module.hidden_size_per_attention_head)  # type: ignore[arg-type]
        q = width * (config.num_attention_heads // config.num_query_groups)  # type: ignore[union-attr]
        if getattr(config, "attention_output_gate", False):
            yield weight, [q, q, width, width], ("q", "gate", "k", "v")
        else:
            yield weight, [q, width, width], ("q", "k", "v")
    for weight in _weights(module, "linear_kv"):
        width = int(module.hidden_size_per_attention_head)  # type: ignore[arg-type]
        yield weight, [width, width], ("k", "v")
    if hasattr(module, "linear_kv_up_proj"):
        yield from _mla_patterns(module, config)
    for weight in _weights(module, "in_proj"):
        if known := _in_proj(module):
            yield weight, *known
    if getattr(config, "gated_linear_unit", False):
        for weight in _weights(module, "linear_fc1"):
            yield weight, [_chunk(module, config) or shape_of(weight)[0] // 2] * 2, ("gate", "up")


def _mla_patterns(
    module: nn.Module, config: Any
) -> Iterator[tuple[Tensor, list[int], tuple[str, ...]]]:
    """Yield the same of multi-latent attention: k and v of a head, and the parts of q and k that
    are rotated and that are not.
    """
    rope = config.qk_pos_emb_head_dim
    for name in ("linear_q_up_proj", "linear_q_proj"):
        for weight in _weights(module, name):
            yield weight, [config.qk_head_dim, rope], ("nope", "rope")
    for weight in _weights(module, "linear_kv_up_proj"):
        yield weight, [config.qk_head_dim, config.v_head_dim], ("k", "v")
    for weight in _weights(module, "linear_kv_down_proj"):
        yield weight, [config.kv_lora_rank, rope], ("latent", "rope")


def _in_proj(module: Any) -> tuple[list[int], tuple[str, ...]] | None:
    """Return the rows of this rank's share of each part of a module's ``in_proj``, and labels."""
    weight = getattr(module.in_proj, "weight", None)
    sizes: Sequence[int] | None = getattr(module, "in_proj_split_sections", None)
    labels: Sequence[str] = getattr(module, "in_proj_split_names", ())
    if sizes is None:  # of Mamba, in releases that say it
        sizes, labels = getattr(weight, "partition_sizes", None), ("z", "x", "B", "C", "dt")
    kind = type(module).__name__
    if sizes is None and kind == "MambaMixer":
        states = module.ngroups_local_tp * module.d_state
        sizes = [module.d_inner_local_tp] * 2 + [states] * 2 + [module.nheads_local_tp]
    elif sizes is None and kind == "GatedDeltaNet":
        whole = [module.qk_dim] * 2 + [module.v_dim] * 2 + [module.num_value_heads] * 2
        sizes = [size // module.tp_size for size in whole]
        labels = ("query", "key", "value", "z", "beta", "alpha")
    if sizes is None:
        return None
    numbers = tuple(str(number) for number in range(len(sizes)))
    return list(sizes), tuple(labels) if len(labels) == len(sizes) else numbers


def _weights(module: nn.Module, name: str) -> list[Tensor]:
    """Return the 2-D weights of a linear layer: one, or one per local expert."""
    layer = getattr(module, name, None)
    if not isinstance(layer, nn.Module):
        return []
    return [
        p
        for leaf, p in layer.named_parameters(recurse=False)
        if leaf.startswith("weight") and p.dim() == 2
    ]


def _chunk(module: nn.Module, config: Any) -> int | None:
    """Return after how many rows of the gate as many of up follow, where an expert interleaves
    them.
    """
    kind = type(module).__name__
    if "Shared" in kind:
        size = getattr(config, "moe_shared_expert_glu_interleave_size", None)
    else:
        size = getattr(config, "moe_mlp_glu_interleave_size", None) if "Grouped" in kind else None
    return None if size is None else int(size)
