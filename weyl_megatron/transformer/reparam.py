"""σReparam: Ŵ = γ / σ₁(W) · W with a learned γ: training chooses a layer's spectral norm.

Zhai et al. 2023, "Stabilizing Transformer Training by Preventing Attention Entropy Collapse" (arXiv
2303.06296). σ₁ is tracked by one power step per training forward pass, in float32; gradients flow
through σ₁ = uᵀWv with u and v held fixed. A weight that tensor parallelism spreads is one matrix:
vectors and scalars travel, never the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..layouts.local import is_fully_sharded, is_on_mesh, laid_like, local
from ..spectral.blocks import start_block
from ..spectral.step import SharedByGroup, SumOverGroup, power_step
from .blocks import find_blocks
from .megatron import gated_state_dict, is_gated, sharded_state_dict, tensor_parallel_group
from .mesh import band_of, cut_like, first_of_band, is_band, register_parameter

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
        held = local(weight.detach())
        matrix = held.flatten(1).float()
        cols, first = matrix.shape[1], 0
        if group is not None and dim == 1:
            first, cols = cols * dist.get_rank(group), cols * dist.get_world_size(group)
            if is_on_mesh(weight):
                first, cols = first_of_band(weight, group, dim)
        start = start_block(name, cols, 1)[first : first + matrix.shape[1], 0]
        u = torch.zeros(matrix.shape[0], device=matrix.device)
        v = start.to(matrix.device, torch.float32)
        for _ in range(_FIRST_STEPS):
            u, v = power_step(matrix, v, group, dim)
        if is_on_mesh(weight) and dim is not None:
            u, v = (cut_like(weight, u, 0), v) if dim == 0 else (u, cut_like(weight, v, 1))
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
            start = held.new_tensor([1.0 if gamma == "one" else sigma])
            self.gamma = nn.Parameter(start, requires_grad=weight.requires_grad)

    def forward(self, weight: Tensor) -> Tensor:
        """Return Ŵ; in training, take a power step before."""
        # Activation checkpointing computes a forward pass again inside backward: with the same u
        # and v.
        is_backward = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        if self.training and not is_backward:
            with torch.no_grad():
                self._turn(local(weight.detach()).flatten(1).float())
        if self._statistics_only:
            return weight
        sigma = self.sigma(weight)
        is_there = sigma > _LEAST_SIGMA
        scale = torch.where(is_there, self.gamma.float() / torch.where(is_there, sigma, 1), 0)
        if self._group is not None:
            scale = SharedByGroup.apply(scale, self._group)
        held = local(weight)
        scaled: Tensor = (held.float() * scale).to(held.dtype)
        return laid_like(weight, scaled) if is_on_mesh(weight) else scaled

    def sigma(self, weight: Tensor) -> Tensor:
        """Return uᵀ W v, the estimate of σ₁(W), a scalar in float32 with a gradient."""
        u, v = local(self.u), local(self.v)
        with torch.autocast(weight.device.type, enabled=False):  # see power_step
            sigma: Tensor = u @ (local(weight).flatten(1).float() @ v)
        return sigma if self._group is None else SumOverGroup.apply(sigma, self._group)

    def sigma_of_whole(self, weight: Tensor) -> Tensor:
        """Return the same of all of a weight whose bands ranks have. Collective."""
        vectors: tuple[Any, Any] = (self.u, self.v)
        u, v = (x.full_tensor() if is_on_mesh(x) else x for x in vectors)
        with torch.autocast(weight.device.type, enabled=False):
            sigma: Tensor = u @ (weight.flatten(1).float() @ v)
        return sigma

    def _turn(self, matrix: Tensor) -> None:
        """Take a power step with what this rank has of W."""
        u, v = power_step(matrix, local(self.v), self._group, self._dim)
        for name, new in (("u", u), ("v", v)):
            old = getattr(self, name)
            setattr(self, name, laid_like(old, new) if is_on_mesh(old) else new)

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
            meta device, partitioned by ZeRO-3 or spread by torch otherwise than in bands (call it
            after ``parallelize_module`` and before ``fully_shard``); a Megatron layer fuses the
            accumulation of gradients, which needs a parameter; a layer computes with weights of its
            own (torch's MultiheadAttention, Transformer Engine).
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
    gated = {id(inner.linear_fc1) for inner in model.modules() if is_gated(inner)}
    for name, layer in chosen.items():
        attributes = vars(layer.weight).copy()  # Megatron's marks of what is split
        training = layer.training
        layer.eval()  # registering looks at Ŵ: without a power step
        parametrize.register_parametrization(layer, "weight", made[name])
        layer.train(training)
        vars(layer.parametrizations.weight.original).update(attributes)
        # The class is this layer's alone since then.
        if isinstance(layer, nn.Linear):
            type(layer).register_parameter = register_parameter  # type: ignore[assignment]
        if hasattr(layer, "sharded_state_dict"):
            sharded = gated_state_dict if id(layer) in gated else sharded_state_dict
            type(layer).sharded_state_dict = sharded
    return list(chosen)


def fold(model: nn.Module) -> list[str]:
    """Bake every Ŵ into its layer's weight, in place; return the layers' names.

    For inference, or to go on without. The state dict is that of the plain model then.

    Raises:
        ValueError: nothing is converted, or the model belongs to a ZeRO-3 engine or to FSDP2, which
            give W back its own numbers.
    """
    folded = list(_converted(model))
    if not folded:
        raise ValueError(f"fold: {type(model).__name__} has no layer that sigma_reparam converted.")
    is_sharded = is_fully_sharded(model)
    for name, layer, parametrization in folded:
        if is_sharded or is_on_mesh(layer.parametrizations.weight.original):
            raise ValueError(
                f"fold: '{name}' is spread over ranks, it takes a whole model: load what "
                "get_model_state_dict with full_state_dict=True returns into another one, and fold "
                "that."
            )
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
    tracked = {}
    for name, layer, parametrization in _converted(model):
        original = layer.parametrizations.weight.original
        if is_on_mesh(original) and original.device_mesh.size() > 1:
            tracked[name] = float(parametrization.sigma_of_whole(original.full_tensor()))
            continue
        if _is_partitioned(original):
            raise ValueError(
                f"sigmas: '{name}' is partitioned by ZeRO-3, it takes "
                "deepspeed.zero.GatheredParameters."
            )
        tracked[name] = float(parametrization.sigma(original))
    return tracked


def drop_norms(model: nn.Module, names: Any = None) -> int:
    """Replace both norms of every block by nothing, as the paper does for its ViT; return how many.

    Args:
        names: for a model that is not recognised, see
            :func:`weyl_megatron.transformer.blocks.find_blocks`.

    Raises:
        ValueError: the model is not recognised, or a block computes with its norms' parameters by
            itself.
    """
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
    """Raise ValueError where matrices are no layer's ``weight``: they would be left out."""
    kinds = {kind.__name__ for kind in type(layer).__mro__}
    is_engine = type(layer).__module__.startswith("transformer_engine")
    is_engine = is_engine or any(kind.startswith("TE") for kind in kinds)
    is_foreign = is_engine and not isinstance(layer, (nn.Linear, nn.Conv2d))
    weight = getattr(layer, "weight", None) if is_foreign else None
    if isinstance(weight, Tensor) and weight.dim() == 2:
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
    is_sharded = is_fully_sharded(model)
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
        if is_sharded or (is_on_mesh(weight) and not is_band(weight)):
            raise ValueError(
                f"sigma_reparam: '{name}' is spread over ranks already, it takes a whole layer, or "
                "one that tensor parallelism cut along one dimension: convert after "
                "parallelize_module and before fully_shard."
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
        own = f"{name}.weight".lstrip(".")
        others = [path for path in owners.get(id(weight), []) if path != own]
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
    whole = int(getattr(weight, "ds_numel", weight.numel()))
    return hasattr(weight, "ds_id") and weight.numel() != whole


def _parametrization(
    name: str, layer: nn.Module, gamma: str, statistics_only: bool
) -> SigmaReparam:
    weight: Any = layer.weight
    group, dim = None, None
    if is_on_mesh(weight):
        group, dim = band_of(weight)
    elif getattr(weight, "tensor_model_parallel", False):
        group, dim = tensor_parallel_group(layer), int(weight.partition_dim)
        if dist.get_world_size(group) == 1:
            group, dim = None, None
    return SigmaReparam(weight, name, gamma, statistics_only=statistics_only, group=group, dim=dim)
