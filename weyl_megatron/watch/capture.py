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
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..layouts.local import is_fully_sharded, is_on_mesh, local
from ..transformer.blocks import Block
from . import bands, spectra
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
from .attention_calls import AttentionCalls, heads_here
from .bands import Band, Heads
from .ranks import MAX, MEAN, NORM, ONCE, Reading
from .tokens import Tokens, first_tensor, norm, similarity, tokens_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_LOGGER = logging.getLogger("weyl_megatron")

#: The products: left, right, and the dimension of left that they sum over.
_PRODUCTS = {"qk": ("q", "k", 0), "ov": ("o", "v", 1), "21": ("2", "1", 1)}


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
        sequence_parallel: whether Megatron's ranks share out the tokens between blocks.
        group: torch's tensor-parallel group, where it has several ranks; None: there is none.
    """

    root: nn.Module
    blocks: Sequence[Block]
    rows: int
    sequences: int
    largest: int
    maps: Sequence[int]
    is_first: bool = True
    sequence_parallel: bool = False
    group: ProcessGroup | None = None

    def __post_init__(self) -> None:
        self.readings: dict[str, Reading] = {}
        self.attention_maps: list[Map] = []
        self._weights: dict[str, Band] = {}
        self._spectra: Tensor | None = None  # of the heads' W_qᵀW_k
        self._given: Tokens | None = None  # to the block
        self._input: Tokens | None = None  # of the attention
        self._queries: Tensor | None = None  # (batch, heads, tokens, d), as attention is seen
        self._shared: dict[int, bool] = {}  # whether ranks share out a block's tokens
        self._inside: Block | None = None
        self._done: set[int] = set()
        self._is_caught = False  # the attention of the block that computes
        self._missed: set[int] = set()
        self._handles: list[Any] = []
        self._mode = AttentionCalls(self._attended)
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
            self._spectra = self._given = self._queries = None
            x = first_tensor(args, kwargs)
            if x is None:
                return
            given = tokens_of(x, block.name)
            if self.group is None:
                self._shared[block.number] = self.sequence_parallel
                self._tell(block, given.x)
            else:  # as the block ends, when its attention has said how many tokens there are
                self._given = given._replace(x=given.x.clone())
            if x.requires_grad:
                x.register_hook(self._gradient(block, x))  # type: ignore[no-untyped-call]

        return hook

    def _tell(self, block: Block, x: Tensor) -> None:
        """‖x‖ of what the block is given, and how alike its tokens are."""
        tag, is_shared = f"block/{block.number}", self._shared[block.number]
        with torch.no_grad():
            if self.is_first or is_shared:
                self.readings[f"{tag}/x"] = Reading(norm(x), NORM)
            if not self.sequence_parallel and (self.is_first or is_shared):
                likeness = similarity(self._batch_first(x), self.group if is_shared else None)
                self.readings[f"{tag}/similarity"] = Reading(likeness, MEAN)

    def _gradient(self, block: Block, x: Any) -> Callable[[Tensor], None]:
        placements = x.placements if is_on_mesh(x) else None

        def hook(gradient: Any) -> None:
            if is_on_mesh(gradient):
                gradient = gradient.redistribute(placements=placements)
            if self.is_first or self._shared[block.number]:
                tag = f"block/{block.number}/grad_x"
                self.readings.setdefault(tag, Reading(norm(gradient), NORM))

        return hook

    def _attention_entered(self, block: Block) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._inside is block and not self.sequence_parallel:
                x = first_tensor(args, kwargs)
                self._input = None if x is None else tokens_of(x, f"{block.name}'s attention")

        return hook

    def _computes(self, block: Block, owner: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], *__: Any) -> None:
            if self._inside is not block:
                return
            self._weights |= bands.read_bands(block, owner, is_lent=self._is_lent)
            if owner is block.norms[0] and self._given is not None and self._given.is_cut is None:
                # SequenceParallel has put it on its mesh by now.
                x = first_tensor(args, {})
                is_cut = tokens_of(x, block.name).is_cut if x is not None else None
                self._given = self._given._replace(is_cut=is_cut)
            for which, layer in enumerate(block.norms):
                if layer is owner and self.is_first:
                    for kind, name in (("weight", "gain"), ("bias", "bias")):
                        value = block.norm(which, kind)
                        if value is not None:
                            tag = f"block/{block.number}/norm{which + 1}_{name}"
                            self.readings[tag] = Reading(norm(value), ONCE)

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
            if self._given is not None:
                self._shared[block.number] = self._are_shared(self._given)
                self._tell(block, self._given.x)
            with torch.no_grad():
                self._measure(block)
            self._done.add(block.number)
            self._inside, self._weights = None, {}
            self._input = self._given = self._queries = None

        return hook

    def _measure(self, block: Block) -> None:
        """σ₁ of the block's matrices and of their products, and the spectra of its heads."""
        tag, weights = f"block/{block.number}", self._weights
        sigmas: dict[str, float] = {}
        for role, band in weights.items():
            sigmas[f"sigma_{role}"] = band.sigma(role, f"{tag}/{role}")
        heads = self._heads(block)
        rows = dict(weights)
        for role in {"k", "v"} & weights.keys():
            # Values may be whole where ranks have some of the keys.
            is_all = weights[role].dim is None and weights["k"].dim == 0
            ranks = heads.ranks if is_all else 1
            rows[role] = weights[role].repeated(heads.key_heads * ranks, heads.times)
        for name, (left, right, along) in _PRODUCTS.items():
            if left in weights and right in weights:
                sigma = bands.sigma_of_product(weights[left], rows[right], f"{tag}/{name}", along)
                if sigma is None:
                    raise ValueError(
                        f"watch: W_{left} and W_{right} of {block.name} are cut in ways that do "
                        "not fit, they take a ColwiseParallel before a RowwiseParallel."
                    )
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

    def _heads(self, block: Block) -> Heads:
        return bands.heads_of_rank(block, self._weights, self._queries)

    def _are_shared(self, tokens: Tokens) -> bool:
        """Whether torch's tensor-parallel ranks have other tokens of the same sequences."""
        whole = None if self._queries is None else self._queries.shape[2]
        ranks, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        return tokens.is_shared(whole, ranks, rank)

    def _of_heads(self, block: Block, columns: dict[str, Tensor], kind: str) -> None:
        heads = self._heads(block)
        for name, values in columns.items():
            for head, value in enumerate(values.tolist()):
                tag = f"block/{block.number}/head/{heads.first + head}/{name}"
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
        if block is None or q.dim() != 4:
            return
        if is_on_mesh(q):
            q, k, mask = heads_here(q), heads_here(k), local(mask)
        queries, self._queries = self._queries, q.detach()
        heads = self._heads(block)
        if q.shape[1] == heads.heads * heads.ranks > heads.heads:  # behind a gather
            k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
            q, k = (x.narrow(1, heads.first, heads.heads) for x in (q, k))
        if q.shape[1] != heads.heads:
            self._queries = queries
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
            for head in self.maps if self.is_first or heads.ranks > 1 or block.group else ():
                if 0 <= head - heads.first < heads.heads:
                    kept = attention[0, head - heads.first].cpu()
                    self.attention_maps.append(Map(block.number, head, rows.tolist(), kept))

    def _bound(self, block: Block, scale: float, keys: Tensor) -> Tensor | None:
        """Return Zhai et al.'s lower bound of every head's entropy, ``(heads,)``.

        None where scores are not scale · xᵀ W_qᵀ W_k x, or where x was not seen.
        """
        if block.has_bias or self._input is None or not {"q", "k"} <= self._weights.keys():
            return None
        values = self._head_spectra(block)
        is_shared = self.group is not None and self._are_shared(self._input)
        group = self.group if is_shared else None
        x = self._batch_first(self._input.x)[: self.sequences].float()  # (batch, tokens, d)
        energies = [spectra.sigma_of_rows(sequence, "x", group) ** 2 for sequence in x]
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
            self._spectra = bands.spectra_of_heads(query, key, self._heads(block))
        return self._spectra

    def _batch_first(self, x: Tensor) -> Tensor:
        """(batch, tokens, d); Megatron has the tokens first."""
        is_megatron = any(hasattr(block.attention, "linear_qkv") for block in self.blocks)
        return x.transpose(0, 1) if is_megatron else x
