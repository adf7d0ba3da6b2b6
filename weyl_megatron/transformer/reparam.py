"""σReparam: Ŵ = γ / σ₁(W) · W, with a learned γ, so that a layer's spectral norm is a number that
training chooses.

Zhai et al. 2023, "Stabilizing Transformer Training by Preventing Attention Entropy Collapse" (arXiv
2303.06296). σ₁ is tracked by one power step per training forward pass, in float32; gradients flow
through σ₁ = uᵀWv with u and v held fixed. A weight that tensor parallelism spreads is one matrix:
vectors and scalars travel, never the weight.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..spectral.blocks import start_block
from ..spectral.step import SharedByGroup, SumOverGroup, power_step

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: Power steps at conversion. A random matrix's σ₁ is within about a percent then, and training goes
#: on from there.
_FIRST_STEPS = 50

#: Below this σ₁ is no divisor: a matrix that training shrank to nothing stays nothing, and gets no
#: gradient.
_LEAST_SIGMA = 1e-12


class SigmaReparam(nn.Module):
    """The parametrization of one weight; see :func:`sigma_reparam`."""

    u: Tensor
    v: Tensor

    def __init__(
        self,
        weight: Tensor,
        name: str,
        gamma: str,
        *,
        statistics_only: bool = False,
        group: ProcessGroup | None = None,
        dim: int | None = None,
    ) -> None:
        super().__init__()
        self._group, self._dim, self._statistics_only = group, dim, statistics_only
        matrix = weight.detach().flatten(1).float()
        cols, first = matrix.shape[1], 0
        if group is not None and dim == 1:
            first, cols = cols * dist.get_rank(group), cols * dist.get_world_size(group)
        start = start_block(name, cols, 1)[first : first + matrix.shape[1], 0]
        u, v = (
            torch.zeros(matrix.shape[0], device=matrix.device),
            start.to(matrix.device, torch.float32),
        )
        for _ in range(_FIRST_STEPS):
            u, v = power_step(matrix, v, group, dim)
        self.register_buffer("u", u)
        self.register_buffer("v", v)
        sigma = float(self.sigma(weight.detach()))
        if not 0 < sigma < float("inf"):
            raise ValueError(
                f"sigma_reparam: '{name}' has σ₁ = {sigma}, it takes a matrix that is neither zero "
                "nor infinite."
            )
        if not statistics_only:
            # (1,): DeepSpeed takes no parameter without a dimension.
            start = weight.new_tensor([1.0 if gamma == "one" else sigma])
            self.gamma = nn.Parameter(start, requires_grad=weight.requires_grad)

    def forward(self, weight: Tensor) -> Tensor:
        """Return Ŵ; in training, take a power step before."""
        # Activation checkpointing computes a forward pass again inside backward: with the same u
        # and v.
        if self.training and (
            torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1
        ):
            with torch.no_grad():
                self.u, self.v = power_step(
                    weight.detach().flatten(1).float(), self.v, self._group, self._dim
                )
        if self._statistics_only:
            return weight
        sigma = self.sigma(weight)
        is_there = sigma > _LEAST_SIGMA
        scale = torch.where(is_there, self.gamma.float() / torch.where(is_there, sigma, 1), 0)
        if self._group is not None:
            scale = SharedByGroup.apply(scale, self._group)
        return (weight.float() * scale).to(weight.dtype)

    def sigma(self, weight: Tensor) -> Tensor:
        """Return uᵀ W v, the estimate of σ₁(W), a scalar in float32 with a gradient."""
        with torch.autocast(weight.device.type, enabled=False):  # see power_step
            sigma: Tensor = self.u @ (weight.flatten(1).float() @ self.v)
        return sigma if self._group is None else SumOverGroup.apply(sigma, self._group)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SigmaReparam:
        """Move with the model, but stay in float32: half a vector's digits are half of σ₁'s."""
        u, v = self.u, self.v
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.u, self.v = u.to(self.u.device), v.to(self.v.device)
        return self


def sigma_reparam(
    model: nn.Module,
    match: Sequence[str] = ("*",),
    *,
    exclude: Sequence[str] = (),
    gamma: str = "one",
    statistics_only: bool = False,
) -> list[str]:
    """Convert a model's linear layers in place; return their names.

    Converted are ``nn.Linear``, ``nn.Conv2d`` (as a matrix (out, in·kernel)), Hugging Face's
    ``Conv1D`` and Megatron's Column- and RowParallelLinear. Call it before the optimizer or the
    engine is made: γ is a parameter. The layers' state has ``parametrizations.weight.original`` and
    ``.0.gamma``, ``.0.u``, ``.0.v`` then; :func:`fold` undoes that.

    Every training pass takes a power step. Where several of them come before their backward passes
    (pipelines), and activations are computed again there, they are computed with the last pass's u
    and v.

    Args:
        match, exclude: patterns (``fnmatch``) of the layers' names.
        gamma: γ's start, ``"one"`` (the paper's) or ``"sigma"``, σ₁(W), which keeps the function
            that the model is (to the rounding of the weight's dtype, which is γ's).
        statistics_only: only track σ₁ (see :func:`sigmas`); the layers stay what they are.

    Raises:
        ValueError: nothing matches; a layer is converted already, tied to another, zero, on the
            meta device or partitioned by ZeRO-3; a Megatron layer fuses the accumulation of
            gradients, which needs a parameter; a layer computes with weights of its own (torch's
            MultiheadAttention, Transformer Engine).
    """
    if gamma not in ("one", "sigma"):
        raise ValueError(f"sigma_reparam: gamma got {gamma!r}, it takes 'one' or 'sigma'.")
    matched = {
        name: layer
        for name, layer in model.named_modules()
        if any(fnmatch(name, p) for p in match) and not any(fnmatch(name, p) for p in exclude)
    }
    for name, layer in matched.items():
        _refuse_own_weights(name, layer)
    chosen = {name: layer for name, layer in matched.items() if _is_linear(layer)}
    if not chosen:
        raise ValueError(
            f"sigma_reparam: match got {tuple(match)}, which no linear layer of "
            f"{type(model).__name__} has."
        )
    _check(model, chosen)
    made = {
        name: _parametrization(name, layer, gamma, statistics_only)
        for name, layer in chosen.items()
    }
    gated = {id(inner.linear_fc1) for inner in model.modules() if _is_gated(inner)}
    for name, layer in chosen.items():
        attributes = vars(layer.weight).copy()  # Megatron's marks of what is split
        training = layer.training
        parametrize.register_parametrization(
            layer.eval(), "weight", made[name]
        )  # it looks at Ŵ: without a power step
        layer.train(training)
        vars(layer.parametrizations.weight.original).update(attributes)
        if hasattr(layer, "sharded_state_dict"):
            # The class is this layer's alone since then.
            type(layer).sharded_state_dict = (
                _gated_state_dict if id(layer) in gated else _sharded_state_dict
            )
    return list(chosen)


def fold(model: nn.Module) -> list[str]:
    """Bake every Ŵ into its layer's weight, for inference or to go on without; return the layers'
    names.

    The state dict is that of the plain model then.

    Raises:
        ValueError: nothing is converted, or the model belongs to a ZeRO-3 engine, which gives W
            back its own numbers.
    """
    folded = list(_converted(model))
    if not folded:
        raise ValueError(f"fold: {type(model).__name__} has no layer that sigma_reparam converted.")
    for name, layer, parametrization in folded:
        if hasattr(layer.parametrizations.weight.original, "ds_id"):
            raise ValueError(
                f"fold: '{name}' belongs to a ZeRO-3 engine, it takes a model without one: convert "
                "another model, load the state dict of the engine's zero_to_fp32.py into it, and "
                "fold that."
            )
        parametrization.eval()  # no power step for the last look
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return [name for name, _, _ in folded]


@torch.no_grad()
def sigmas(model: nn.Module) -> dict[str, float]:
    """Return the tracked σ₁(W) of every converted layer. Collective where a layer is spread.

    Raises:
        ValueError: a weight is partitioned by ZeRO-3.
    """
    found = {}
    for name, layer, parametrization in _converted(model):
        original = layer.parametrizations.weight.original
        if _is_partitioned(original):
            raise ValueError(
                f"sigmas: '{name}' is partitioned by ZeRO-3, it takes "
                "deepspeed.zero.GatheredParameters."
            )
        found[name] = float(parametrization.sigma(original))
    return found


def drop_norms(model: nn.Module, names: Any = None) -> int:
    """Replace both norms of every block by nothing, as the paper does for its ViT; return how many.

    Args:
        names: for a model that is not recognised, see
            :func:`weyl_megatron.transformer.blocks.find_blocks`.

    Raises:
        ValueError: the model is not recognised, or a block computes with its norms' parameters by
            itself.
    """
    from .blocks import find_blocks

    blocks = find_blocks(model, names)
    for block in blocks:
        if any(block.norm_prefix) or isinstance(block.module, nn.TransformerEncoderLayer):
            kind = type(block.module).__name__
            raise ValueError(
                f"drop_norms: {block.name} ({kind}) has its norms inside other layers, it takes "
                "modules."
            )
    norms = {id(norm) for block in blocks for norm in block.norms if norm is not None}
    dropped = 0
    for module in list(model.modules()):
        for name, child in module.named_children():
            if id(child) in norms:
                setattr(module, name, nn.Identity())
                dropped += 1
    return dropped


def _converted(model: nn.Module) -> Iterator[tuple[str, Any, SigmaReparam]]:
    layer: Any  # torch does not type what a parametrized module has
    for name, layer in model.named_modules():
        if parametrize.is_parametrized(layer, "weight"):
            for parametrization in layer.parametrizations.weight:
                if isinstance(parametrization, SigmaReparam):
                    yield name, layer, parametrization


def _is_linear(layer: nn.Module) -> bool:
    kinds = {kind.__name__ for kind in type(layer).__mro__}
    megatron = {"ColumnParallelLinear", "RowParallelLinear"}
    return isinstance(layer, (nn.Linear, nn.Conv2d)) or "Conv1D" in kinds or bool(kinds & megatron)


def _refuse_own_weights(name: str, layer: Any) -> None:
    """Raise ValueError where a layer has matrices that are no layer's ``weight``, so that they
    would be left out.
    """
    kinds = {kind.__name__ for kind in type(layer).__mro__}
    is_engine = type(layer).__module__.startswith("transformer_engine") or any(
        k.startswith("TE") for k in kinds
    )
    is_foreign = is_engine and not isinstance(layer, (nn.Linear, nn.Conv2d))
    if (
        is_foreign
        and isinstance(getattr(layer, "weight", None), Tensor)
        and layer.weight.dim() == 2
    ):
        where = (
            "Transformer Engine's, which computes with its own weight; Megatron's local "
            "layers can be converted"
        )
    elif isinstance(layer, nn.MultiheadAttention):
        where = "torch's MultiheadAttention, whose in_proj_weight is no layer's"
    else:
        return
    raise ValueError(f"sigma_reparam: '{name}' is {where}; leave it out with exclude=('{name}*',).")


def _check(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    owners: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(path)
    for name, layer in chosen.items():
        if parametrize.is_parametrized(layer, "weight"):
            raise ValueError(
                f"sigma_reparam: '{name}' has a parametrized weight already, it takes each layer "
                "once."
            )
        weight: Any = layer.weight
        if weight is None:  # Megatron's output layer, tied to the embedding
            raise ValueError(
                f"sigma_reparam: '{name}' has no weight of its own; leave it out with "
                f"exclude=('{name}',)."
            )
        if weight.is_meta:
            raise ValueError(
                f"sigma_reparam: '{name}' is on the meta device, it takes weights that are there."
            )
        if _is_partitioned(weight):
            raise ValueError(
                f"sigma_reparam: '{name}' is partitioned by ZeRO-3; convert before, without "
                "zero.Init."
            )
        others = [
            path for path in owners.get(id(weight), []) if path != f"{name}.weight".lstrip(".")
        ]
        if others:
            raise ValueError(
                f"sigma_reparam: '{name}.weight' is tied to '{others[0]}'; leave it out with "
                f"exclude=('{name}',)."
            )
        if getattr(layer, "gradient_accumulation_fusion", False):
            raise ValueError(
                f"sigma_reparam: '{name}' got gradient_accumulation_fusion=True, it takes False: Ŵ "
                "is no parameter."
            )


def _is_partitioned(weight: Tensor) -> bool:
    return hasattr(weight, "ds_id") and weight.numel() != int(
        getattr(weight, "ds_numel", weight.numel())
    )


def _parametrization(
    name: str, layer: nn.Module, gamma: str, statistics_only: bool
) -> SigmaReparam:
    weight: Any = layer.weight
    group, dim = None, None
    if getattr(weight, "tensor_model_parallel", False):
        group, dim = getattr(layer, "tp_group", None), int(weight.partition_dim)
        if group is None:
            from megatron.core import parallel_state

            group = parallel_state.get_tensor_model_parallel_group()
        if dist.get_world_size(group) == 1:
            group, dim = None, None
    return SigmaReparam(weight, name, gamma, statistics_only=statistics_only, group=group, dim=dim)


def _is_gated(module: nn.Module) -> bool:
    """Whether it is a Megatron MLP whose linear_fc1 stacks gate and up."""
    return hasattr(module, "linear_fc1") and bool(
        getattr(getattr(module, "config", None), "gated_linear_unit", False)
    )


def _sharded_state_dict(
    layer: Any, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
) -> Any:
    """Return what Megatron's Column- and RowParallelLinear do, who look for the key ``weight``.

    W is cut along its dimension, and so is the one of u and v that has an element for each of its
    rows or columns.
    """
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    dim = int(layer.parametrizations.weight.original.partition_dim)
    axes = {"parametrizations.weight.original": dim, f"parametrizations.weight.0.{'uv'[dim]}": 0}
    if dim == 0:
        axes["bias"] = 0
    state = layer.state_dict(prefix="", keep_vars=True)
    groups = {}
    if (
        "dp_cp_group" in inspect.signature(make_sharded_tensors_for_checkpoint).parameters
    ):  # since 0.16
        groups = {"tp_group": layer.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
    return make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets, **groups)


def _gated_state_dict(
    layer: Any, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
) -> Any:
    """Return the same where every rank has a band of the gate and one of up, as Megatron's MLP does
    for ``weight``.
    """
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

    sharded = _sharded_state_dict(layer, prefix, sharded_offsets, metadata)
    has_own_shards = (metadata or {}).get("singleton_local_shards", False)
    options = (has_own_shards,) if has_own_shards else ()  # since 0.16
    for key in ("parametrizations.weight.original", "parametrizations.weight.0.u"):
        sharded[prefix + key] = apply_swiglu_sharded_factory(
            sharded[prefix + key], sharded_offsets, *options
        )
    return sharded
