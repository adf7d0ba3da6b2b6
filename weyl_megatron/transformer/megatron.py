"""What σReparam and the blocks have to know of Megatron's layers: their ranks, their checkpoints.

Megatron is imported where one of its layers is there, and not before.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def tensor_parallel_group(layer: Any) -> ProcessGroup:
    """Return the group over which a layer's weight is spread: its own, or the process's."""
    group: ProcessGroup | None = getattr(layer, "tp_group", None)
    if group is None:
        from megatron.core import parallel_state

        group = parallel_state.get_tensor_model_parallel_group()
    return group


def is_gated(module: nn.Module) -> bool:
    """Whether it is a Megatron MLP whose linear_fc1 stacks gate and up."""
    config = getattr(module, "config", None)
    return hasattr(module, "linear_fc1") and bool(getattr(config, "gated_linear_unit", False))


def sharded_state_dict(
    layer: Any, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
) -> Any:
    """Return what Column- and RowParallelLinear do, for a layer that σReparam has converted.

    Megatron's own looks for the key ``weight``. W is cut along its dimension, and so is the one of
    u and v that has an element for each of its rows or columns.
    """
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    dim = int(layer.parametrizations.weight.original.partition_dim)
    axes = {"parametrizations.weight.original": dim, f"parametrizations.weight.0.{'uv'[dim]}": 0}
    if dim == 0:
        axes["bias"] = 0
    state = layer.state_dict(prefix="", keep_vars=True)
    groups = {}
    if "dp_cp_group" in inspect.signature(make_sharded_tensors_for_checkpoint).parameters:
        # since 0.16
        groups = {"tp_group": layer.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
    return make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets, **groups)


def gated_state_dict(
    layer: Any, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
) -> Any:
    """Return the same where every rank has a band of the gate and one of up.

    Megatron's MLP does so for ``weight``.
    """
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

    sharded = sharded_state_dict(layer, prefix, sharded_offsets, metadata)
    has_own_shards = (metadata or {}).get("singleton_local_shards", False)
    options = (has_own_shards,) if has_own_shards else ()  # since 0.16
    for key in ("parametrizations.weight.original", "parametrizations.weight.0.u"):
        sharded[prefix + key] = apply_swiglu_sharded_factory(
            sharded[prefix + key], sharded_offsets, *options
        )
    return sharded
