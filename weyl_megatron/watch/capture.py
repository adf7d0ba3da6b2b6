"""What one forward and backward pass shows of a model's blocks, where the engine has it anyway.

Weights are read while their layer computes: under ZeRO-3 and FSDP2 that is when they are whole, and
nothing is gathered for it. Queries and keys are caught on their way into
``scaled_dot_product_attention`` (or Megatron's core attention), behind norms and rotations. Kernels
that never form the attention map are no obstacle: it is formed again for a few queries.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..layouts.local import is_fully_sharded, is_on_mesh
from ..transformer.blocks import Block
from . import spectra
from .attention import (
    attention_logits,
    attention_of,
    effective_rank,
    entropy,
    entropy_bound,
    logit_bound,
    map_rank,
    sample_rows,
    stable_rank,
    visible,
)
from .ranks import MAX, MEAN, NORM, ONCE, Reading, refuse_band

_LOGGER = logging.getLogger("weyl_megatron")

_ROLES_OF_ROWS, _ROLES_OF_COLUMNS = ("q", "k", "v", "1"), ("o", "2")


class Map(NamedTuple):
    """An attention map: of the first sequence, for sampled queries."""

    block: int
    head: int
    queries: list[int]
    attention: Tensor  # (queries, keys)


@dataclass
class Capture:
    """Collects one pass of one model (a pipeline stage's chunk has blocks of its own).

    Args:
        root: the module whose forward pass is one micro-batch.
        blocks: those to look at.
        rows: queries of each sequence for which the attention map is formed.
        sequences: of a micro-batch at most.
        largest: s of SEC(d_q, s).
        maps: heads (in the whole model) of each block whose map is kept.
        is_first: whether this rank reads what all ranks of its tensor-parallel group know.
        sequence_parallel: whether these ranks share out the tokens between blocks.
    """

    root: nn.Module
    blocks: Sequence[Block]
    rows: int
    sequences: int
    largest: int
    maps: Sequence[int]
    is_first: bool = True
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        self.readings: dict[str, Reading] = {}
        self.attention_maps: list[Map] = []
        self._weights: dict[str, Tensor] = {}
        self._spectra: Tensor | None = None  # of the heads' W_qᵀW_k
        self._input: Tensor | None = None  # of the attention
        self._inside: Block | None = None
        self._done: set[int] = set()
        self._is_caught = False  # the attention of the block that computes
        self._missed: set[int] = set()
        self._handles: list[Any] = []
        self._mode = _AttentionCalls(self._attended)
        self._is_on = False
        self._is_lent = False  # whether weights go back before a block's hooks are called

    def arm(self) -> None:
        """Look at the next training pass of ``root``, forward and backward."""
        self.readings, self.attention_maps, self._done = {}, [], set()
        self._handles.append(self.root.register_forward_pre_hook(self._begin))
        self._handles.append(self.root.register_forward_hook(self._end, always_call=True))

    def disarm(self) -> None:
        """Take every hook away again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._is_on:
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._is_on = False

    def _begin(self, *_: Any) -> None:
        if not self.root.training or not torch.is_grad_enabled():
            return  # an evaluation between two steps
        self._is_lent = is_fully_sharded(self.root)
        for block in self.blocks:
            hook = block.module.register_forward_pre_hook
            self._handles.append(hook(self._entered(block), with_kwargs=True))
            self._handles.append(block.module.register_forward_hook(self._left(block)))
            hook = block.attention.register_forward_pre_hook
            self._handles.append(hook(self._attention_entered(block), with_kwargs=True))
            core = getattr(block.attention, "core_attention", None)
            if isinstance(core, nn.Module):
                hook = core.register_forward_pre_hook
                self._handles.append(hook(self._core(block, core), with_kwargs=True))
            owners = {id(w.owner): w.owner for w in block.weights.values()}
            owners |= {id(norm): norm for norm in block.norms if norm is not None}
            for owner in owners.values():
                self._handles.append(owner.register_forward_pre_hook(self._computes(block, owner)))
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        self._is_on = True

    def _end(self, *_: Any) -> None:
        if self._is_on:
            self.disarm()

    def _entered(self, block: Block) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if block.number in self._done:
                return
            self._inside, self._weights, self._input, self._is_caught = block, {}, None, False
            self._spectra = None
            x = _first_tensor(args, kwargs)
            if x is None:
                return
            tag = f"block/{block.number}"
            with torch.no_grad():
                if self.is_first or self.sequence_parallel:
                    self.readings[f"{tag}/x"] = Reading(_norm(x), NORM)
                if self.is_first and not self.sequence_parallel:
                    likeness = _similarity(self._batch_first(x))
                    self.readings[f"{tag}/similarity"] = Reading(likeness, MEAN)
            if x.requires_grad and (self.is_first or self.sequence_parallel):
                x.register_hook(self._gradient(f"{tag}/grad_x"))  # type: ignore[no-untyped-call]

        return hook

    def _gradient(self, tag: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            self.readings.setdefault(tag, Reading(_norm(gradient), NORM))

        return hook

    def _attention_entered(self, block: Block) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._inside is block and not self.sequence_parallel:
                x = _first_tensor(args, kwargs)
                self._input = None if x is None else self._batch_first(x.detach())

        return hook

    def _computes(self, block: Block, owner: nn.Module) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if self._inside is not block:
                return
            for role, weight in block.weights.items():
                if weight.owner is owner:
                    matrix = weight.read()
                    if is_on_mesh(matrix):
                        refuse_band(f"{block.name}, {role}", matrix)
                    is_lent = self._is_lent or weight.is_lent
                    self._weights[role] = matrix.clone() if is_lent else matrix
            for which, norm in enumerate(block.norms):
                if norm is owner and self.is_first:
                    for kind, name in (("weight", "gain"), ("bias", "bias")):
                        value = block.norm(which, kind)
                        if value is not None:
                            tag = f"block/{block.number}/norm{which + 1}_{name}"
                            self.readings[tag] = Reading(_norm(value), ONCE)

        return hook

    def _left(self, block: Block) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if self._inside is not block:
                return
            if not self._is_caught and block.number not in self._missed:
                self._missed.add(block.number)
                _LOGGER.warning(
                    "watch: the attention of %s was not seen: it does not go through "
                    "scaled_dot_product_attention; its weights are measured, its entropy is not.",
                    block.name,
                )
            with torch.no_grad():
                self._measure(block)
            self._done.add(block.number)
            self._inside, self._weights, self._input = None, {}, None

        return hook

    def _measure(self, block: Block) -> None:
        """σ₁ of the block's matrices and of their products, and the spectra of its heads."""
        weights = {role: _computed(matrix) for role, matrix in self._weights.items()}
        tag, group = f"block/{block.number}", block.group
        sigmas: dict[str, float] = {}
        for role, matrix in weights.items():
            measure = spectra.sigma_of_rows if role in _ROLES_OF_ROWS else spectra.sigma_of_columns
            sigmas[f"sigma_{role}"] = measure(matrix, f"{tag}/{role}", group)
        shared = [role for role in ("k", "v") if role in weights]
        rows = weights | {role: self._per_head(block, weights[role]) for role in shared}
        pairs = {"qk": ("q", "k"), "ov": ("o", "v"), "21": ("2", "1")}
        for name, (left, right) in pairs.items():
            if left in weights and right in weights:
                first = weights[left].T if left == "q" else weights[left]
                sigma = spectra.sigma_of_product(first, rows[right], f"{tag}/{name}", group)
                sigmas[f"sigma_{name}"] = sigma
        if self.is_first:
            for name, value in sigmas.items():
                self.readings[f"{tag}/{name}"] = Reading(value, ONCE)
        if {"q", "k"} <= weights.keys():
            values = self._head_spectra(block)
            columns = {
                "sigma_qk": values[:, 0],
                "sec": spectra.energy_concentration(values, self.largest),
                "effective_rank": effective_rank(values),
                "stable_rank": stable_rank(values),
            }
            self._of_heads(block, columns, ONCE)

    def _per_head(self, block: Block, matrix: Tensor) -> Tensor:
        """Keys or values, once for every head that shares them."""
        if block.heads == block.key_heads:
            return matrix
        rows = matrix.view(block.key_heads, -1, matrix.shape[-1])
        return rows.repeat_interleave(block.heads // block.key_heads, 0).flatten(0, 1)

    def _of_heads(self, block: Block, columns: dict[str, Tensor], kind: str) -> None:
        for name, values in columns.items():
            for head, value in enumerate(values.tolist()):
                tag = f"block/{block.number}/head/{block.first_head + head}/{name}"
                self.readings[tag] = Reading(value, kind)

    def _core(self, block: Block, core: nn.Module) -> Callable[..., None]:
        """Megatron's core attention gets queries and keys as (tokens, batch, heads, d)."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            names = ("query", "key", "value", "attention_mask")
            given = dict(zip(names, args, strict=False)) | kwargs
            q, k = (given[name].detach().permute(1, 2, 0, 3) for name in ("query", "key"))
            kind = str(given.get("attn_mask_type") or getattr(core, "attn_mask_type", ""))
            scale = getattr(core, "softmax_scale", None) or 1 / math.sqrt(q.shape[-1])
            if self._inside is block:
                self._attended(q, k, None, "causal" in kind, scale)

        return hook

    def _attended(
        self, q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> None:
        """Form the attention map again for some queries of the block that computes.

        Args:
            q, k: ``(batch, heads, tokens, d)``; heads may share keys.
        """
        block = self._inside
        if block is None or q.dim() != 4 or q.shape[1] != block.heads:
            return
        self._is_caught = True
        with torch.no_grad(), self._mode.paused():
            q, k = q[: self.sequences].detach().float(), k[: self.sequences].detach().float()
            if k.shape[1] != q.shape[1]:
                k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
            rows = sample_rows(q.shape[2], self.rows).to(q.device)
            has_batch = mask is not None and mask.dim() == 4 and mask.shape[0] > 1
            bias = mask[: self.sequences] if mask is not None and has_batch else mask
            # (batch, heads, rows, keys)
            logits = attention_logits(q, k, scale=scale, rows=rows, causal=causal, bias=bias)
            attention = attention_of(logits)
            keys = visible(rows, k.shape[2], causal)
            uniform = float(keys.double().log().mean())
            columns = {
                "entropy": entropy(attention).double().mean((0, 2)),
                "map_rank": map_rank(attention).mean(0),
            }
            bound = self._bound(block, scale, keys)
            if bound is not None:
                columns["entropy_bound"] = bound
            largest = logits.amax(-1)  # (batch, heads, rows); of a query that sees no key −∞
            sees = largest != -math.inf
            counts = sees.sum((0, 2)).clamp(min=1)
            columns["max_logit_mean"] = largest.where(sees, 0.0).double().sum((0, 2)) / counts
            self._of_heads(block, columns, MEAN)
            bounds = logit_bound(q, k, scale=scale, bias=bias)
            self._of_heads(
                block,
                {
                    "max_logit": largest.amax((0, 2)),
                    "max_logit_bound": bounds.expand(q.shape[:2]).amax(0),
                },
                MAX,
            )
            self.readings |= {
                "uniform_entropy": Reading(uniform, ONCE),
                "map_rows": Reading(min(attention.shape[-2:]), ONCE),
            }
            for head in self.maps:
                if 0 <= head - block.first_head < block.heads:
                    kept = attention[0, head - block.first_head].cpu()
                    self.attention_maps.append(Map(block.number, head, rows.tolist(), kept))

    def _bound(self, block: Block, scale: float, keys: Tensor) -> Tensor | None:
        """Return Zhai et al.'s lower bound of every head's entropy, ``(heads,)``.

        None where scores are not scale · xᵀ W_qᵀ W_k x, or where x was not seen.
        """
        if block.has_bias or self._input is None or not {"q", "k"} <= self._weights.keys():
            return None
        values = self._head_spectra(block)
        x = self._input[: self.sequences].float()  # (batch, tokens, d)
        energies = [spectra.sigma_of_rows(sequence, "x") ** 2 for sequence in x]
        energy = torch.tensor(energies, device=values.device)
        sigma = scale * values[:, :1] * energy  # (heads, batch)
        bound: Tensor = entropy_bound(sigma.unsqueeze(-1), keys.to(values.device)).mean((1, 2))
        return bound

    def _head_spectra(self, block: Block) -> Tensor:
        """Return the spectra of the block that computes.

        The entropy's bound asks for them before all else is measured.
        """
        if self._spectra is None:
            query, key = self._weights["q"], self._weights["k"]
            self._spectra = spectra.head_spectra(query, key, block.heads, block.key_heads)
        return self._spectra

    def _batch_first(self, x: Tensor) -> Tensor:
        """(batch, tokens, d); Megatron has the tokens first."""
        is_megatron = any(hasattr(block.attention, "linear_qkv") for block in self.blocks)
        return x.transpose(0, 1) if is_megatron else x


class _AttentionCalls(TorchFunctionMode):
    """Sees every call of scaled_dot_product_attention, by whatever module."""

    def __init__(self, seen: Callable[[Tensor, Tensor, Tensor | None, bool, float], None]) -> None:
        super().__init__()
        self._seen, self._is_paused = seen, False

    def paused(self) -> _Pause:
        return _Pause(self)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and not self._is_paused:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            given = dict(zip(names, args, strict=False)) | kwargs
            q, k, mask = given["query"], given["key"], given.get("attn_mask")
            is_causal, scale = bool(given.get("is_causal", False)), given.get("scale")
            scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
            self._seen(q, k, mask, is_causal, scale)
        return func(*args, **kwargs)


class _Pause:
    def __init__(self, mode: _AttentionCalls) -> None:
        self._mode = mode

    def __enter__(self) -> None:
        self._mode._is_paused = True

    def __exit__(self, *_: Any) -> None:
        self._mode._is_paused = False


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    named = (kwargs.get(name) for name in ("hidden_states", "x", "src", "query"))
    return next((value for value in (*args, *named) if isinstance(value, Tensor)), None)


def _computed(matrix: Tensor) -> Tensor:
    return matrix if matrix.dtype == torch.float64 else matrix.float()


def _norm(x: Tensor) -> float:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return float(torch.linalg.vector_norm(x.detach(), dtype=dtype))


def _similarity(x: Tensor) -> float:
    """The mean cosine of the angle between two tokens of a sequence (batch, tokens, d)."""
    tokens = x.shape[1]
    directions = F.normalize(x.detach().float(), dim=-1)
    pairs = directions.sum(1).square().sum(-1) - directions.square().sum((1, 2))
    return float(pairs.mean()) / max(1, tokens * (tokens - 1))
