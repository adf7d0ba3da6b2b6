"""What this rank has of a block's matrices while their layers compute, and σ₁ of all of them.

Whole matrices; bands of heads under Megatron's tensor parallelism; under torch's the piece of a
DTensor. Of a weight that stacks q, k and v and is cut along the stack, no rank's piece is a band of
each: that one is gathered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..layouts.local import is_on_mesh, local
from ..transformer.blocks import Block
from ..transformer.layers import Weight
from . import spectra

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: The dimension along which Megatron's ranks share a matrix (out, in), by its role.
_SHARED_DIM = {"q": 0, "k": 0, "v": 0, "1": 0, "o": 1, "2": 1}

#: What libraries call the width of a head.
_HEAD_SIZES = ("head_dim", "attention_head_size", "head_size", "d_head", "dim_head")


class Band(NamedTuple):
    """Rows or columns of a matrix (out, in); all of it where it is whole on every rank."""

    matrix: Tensor
    dim: int | None = None  # 0: these are rows, 1: columns, None: it is whole
    start: int = 0  # the first of them
    group: ProcessGroup | None = None  # whose ranks have the others
    total: int = 0  # of all ranks, where torch shares them out
    is_gathered: bool = False  # of a stack that ranks share out

    def sigma(self, role: str, name: str) -> float:
        """Return σ₁ of the whole matrix. Collective over the group."""
        dim = _SHARED_DIM[role] if self.dim is None else self.dim
        measure = spectra.sigma_of_columns if dim else spectra.sigma_of_rows
        return measure(_computed(self.matrix), name, self.group)

    def repeated(self, heads: int, times: int) -> Band:
        """Return keys or values, once for every head that shares them.

        Args:
            heads: whose rows this rank has.
            times: heads that share one.
        """
        if times == 1:
            return self
        rows = self.matrix.view(heads, -1, self.matrix.shape[-1]).repeat_interleave(times, 0)
        return self._replace(matrix=rows.flatten(0, 1), start=self.start * times)


class Heads(NamedTuple):
    """The heads of an attention whose weights this rank has."""

    heads: int
    key_heads: int
    first: int  # among those of the model
    times: int  # heads that share a key
    ranks: int = 1  # that share the heads out


def heads_of_model(block: Block, *, is_spread: bool) -> int | None:
    """Return the heads of a block on all ranks; None: only its attention will say.

    Args:
        block: whose heads.
        is_spread: whether torch's tensor parallelism shares out the model.
    """
    if block.group is not None:
        return block.heads * dist.get_world_size(block.group)
    query = block.weights.get("q")
    parameter: Any = None if query is None else query.parameter
    if not is_spread or query is None or parameter is None or not is_on_mesh(parameter):
        return block.heads
    size = _head_size(block)
    outputs = int(parameter.shape[1 if query.is_transposed else 0])
    return None if size is None else query.rows(outputs).numel() // size


def heads_of_rank(block: Block, bands: Mapping[str, Band], queries: Tensor | None) -> Heads:
    """Return which heads this rank has the weights of.

    Args:
        block: whose heads; where torch shares out their rows, its numbers may be those of the model
            or of this rank.
        bands: its matrices.
        queries: ``(batch, heads, tokens, d)``, as its attention gets them; None: they were not
            seen.

    Raises:
        ValueError: ranks have parts of heads, or queries without their keys; or nothing says how
            many rows a head has.
    """
    query, key = bands.get("q"), bands.get("k")
    if query is None or key is None or block.group is not None:
        return _heads(block.heads, block.key_heads, block.first_head)
    if query.dim is None and key.dim is None and not query.is_gathered:
        return _heads(block.heads, block.key_heads, 0)
    value = bands.get("v", key)
    is_whole = key.dim is None and value.dim is None
    if not query.is_gathered and (query.dim != 0 or (key.dim != 0 and not is_whole)):
        raise ValueError(
            f"watch: W_q, W_k and W_v of {block.name} got {_words(query)}, {_words(key)} and "
            f"{_words(value)} on each rank, they take rows of W_q (ColwiseParallel), a head's on "
            "one rank, with rows of the others or all of both; or all of W_q and W_k."
        )
    size = _head_size(block) if queries is None else queries.shape[-1]
    if size is None:
        raise ValueError(
            f"watch: {block.name} got weights that ranks share out and an attention that was not "
            f"seen and has no head_dim, it takes one of both: {block.heads} may be this rank's "
            "heads or the model's."
        )
    rows = (len(query.matrix), query.start, len(key.matrix), key.start)
    if query.is_gathered:
        if queries is not None and queries.shape[1] * size != rows[0]:
            raise ValueError(
                f"watch: {block.name} got q, k and v in one weight that ranks cut along the stack, "
                f"and an attention of {queries.shape[1]} heads on each rank, it takes one of all "
                f"{rows[0] // size}: ColwiseParallel(output_layouts=Replicate())."
            )
        return _heads(rows[0] // size, rows[2] // size, 0)
    ranks = dist.get_world_size(query.group)
    whole_keys = rows[2] if is_whole else key.total
    if any(count % size for count in (*rows, whole_keys)) or query.total % whole_keys:
        is_shared = False
    else:  # where this rank's queries begin, its keys do
        is_shared = is_whole or rows[1] * rows[2] == rows[0] * rows[3]
    if not is_shared:
        raise ValueError(
            f"watch: {block.name} got {len(query.matrix)} rows of W_q and {len(key.matrix)} of W_k "
            f"on this rank, it takes whole heads of {size} rows with the keys that they share: as "
            "many ranks as divide the keys' heads, or all keys on each."
        )
    times = query.total // whole_keys
    return Heads(rows[0] // size, rows[2] // size, rows[1] // size, times, ranks)


def read_bands(block: Block, owner: nn.Module, *, is_lent: bool) -> dict[str, Band]:
    """Return what this rank has of the matrices that a layer is about to compute with, by role.

    Collective where torch cuts a weight that stacks several.

    Args:
        block: whose layer it is.
        owner: the layer.
        is_lent: whether the engine takes its weights away again, so that they are copied.

    Raises:
        ValueError: torch spreads a weight in a way that is no band.
    """
    bands: dict[str, Band] = {}
    gathered: dict[str, Tensor] = {}  # by the layer's attribute
    for role, weight in block.weights.items():
        if weight.owner is not owner:
            continue
        tensor: Any = weight.held()
        copies = is_lent or weight.is_lent
        if not is_on_mesh(tensor):
            matrix = weight.cut(tensor)
            dim = None if block.group is None else _SHARED_DIM[role]
            bands[role] = Band(matrix.clone() if copies else matrix, dim, 0, block.group)
            continue
        mesh, placement = tensor.device_mesh, tensor.placements[-1]
        is_cut = placement.is_shard() and mesh.size() > 1
        is_plain = getattr(placement, "split_factor", 1) == 1
        if mesh.ndim > 1 or not (is_plain and (is_cut or placement.is_replicate())):
            raise ValueError(
                f"watch: {block.name}, {role} got the placements {tensor.placements} on a mesh of "
                f"shape {tuple(mesh.shape)} as it computes, it takes Shard and Replicate on a mesh "
                "of one dimension."
            )
        if not is_cut:
            bands[role] = Band(weight.cut(local(tensor).clone() if copies else local(tensor)))
            continue
        dim = placement.dim % tensor.dim()
        dim = 1 - dim if weight.is_transposed else dim
        if dim == 0 and _is_stacked(weight, tensor):
            if weight.attribute not in gathered:
                gathered[weight.attribute] = tensor.full_tensor()
            bands[role] = Band(weight.cut(gathered[weight.attribute]), is_gathered=True)
            continue
        held = local(tensor).clone() if copies else local(tensor)
        # As torch cuts: so many for each rank, and what is left for the last.
        share = -(-tensor.shape[placement.dim] // mesh.size())
        start = min(share * mesh.get_local_rank(), tensor.shape[placement.dim])
        bands[role] = Band(
            weight.cut(held), dim, start, mesh.get_group(), tensor.shape[placement.dim]
        )
    return bands


def sigma_of_product(left: Band, right: Band, name: str, along: int) -> float | None:
    """Return σ₁ of left @ right, or of leftᵀ @ right where ``along`` is 0. Collective.

    None where the ranks share them in ways that do not fit: left and right have to be cut along
    the dimension that the product sums over, or one of them whole.

    Args:
        left, right: they have as many columns (rows), and rows, when they are whole.
        name: seeds the start vector.
        along: left's dimension that the product sums over.
    """
    first, second = _computed(left.matrix), _computed(right.matrix)
    if left.dim not in (None, along) or right.dim not in (None, 0):
        return None
    if left.dim is None and right.dim == 0:
        first = first.narrow(along, right.start, second.shape[0])
    if right.dim is None and left.dim == along:
        second = second.narrow(0, left.start, first.shape[along])
    if first.shape[along] != second.shape[0]:
        return None
    group = right.group if left.dim is None else left.group
    return spectra.sigma_of_product(first.T if along == 0 else first, second, name, group)


def spectra_of_heads(query: Band, key: Band, heads: Heads) -> Tensor:
    """Return the singular values of W_qᵀW_k of this rank's heads, as spectra.head_spectra does."""
    if query.dim is None or key.dim is not None:
        return spectra.head_spectra(query.matrix, key.matrix, heads.heads, heads.key_heads)
    keys = key.repeated(heads.key_heads, heads.times).matrix
    own = keys.narrow(0, query.start, len(query.matrix))
    return spectra.head_spectra(query.matrix, own, heads.heads, heads.heads)


def _heads(heads: int, key_heads: int, first: int) -> Heads:
    return Heads(heads, key_heads, first, heads // key_heads)


def _head_size(block: Block) -> int | None:
    sizes = (getattr(block.attention, name, None) for name in _HEAD_SIZES)
    return next((size for size in sizes if isinstance(size, int) and size > 0), None)


def _words(band: Band) -> str:
    return "all" if band.dim is None else ("rows", "columns")[band.dim]


def _is_stacked(weight: Weight, tensor: Tensor) -> bool:
    outputs = int(tensor.shape[1 if weight.is_transposed else 0])
    return weight.rows(outputs).numel() < outputs


def _computed(matrix: Tensor) -> Tensor:
    return matrix if matrix.dtype == torch.float64 else matrix.float()
