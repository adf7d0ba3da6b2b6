"""FSDP2, tensor parallelism and both together: which box of a parameter each rank has.

torch's own sharding says it, but for uneven shards of a mesh of two dimensions it says another one
than the ranks have (pytorch #168134). So the ranks are asked for the extents of what they have, and
these have to add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from ...layouts.buffers import Bands, Spread
from ...layouts.grid import Box
from ...layouts.local import local, specification

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Placed(NamedTuple):
    """Where this rank's piece of a parameter lies, and the groups that have the others."""

    shape: tuple[int, ...]  # of the whole
    box: Box
    spreads: tuple[Spread, ...]
    bands: Bands | None


class _Piece(NamedTuple):
    """What this rank has of a parameter, and what torch says of the whole."""

    name: str
    held: Tensor
    device_mesh: Any
    placements: tuple[Any, ...]
    shape: tuple[int, ...]

    def dim(self) -> int:
        """How many dimensions it has."""
        return len(self.shape)


class _Cut(NamedTuple):
    """A dimension of a parameter, and the mesh dimensions that cut it, the innermost first."""

    parameter: int  # its number
    dim: int
    mesh_dims: tuple[int, ...]
    is_packed: bool  # every rank has its share of each of several parts


class _Groups:
    """The process groups of meshes: of several over the same ranks one stands for all."""

    def __init__(self) -> None:
        self._by_ranks: dict[tuple[int, ...], ProcessGroup] = {}

    def of(self, mesh: Any, mesh_dim: int) -> ProcessGroup:
        group = mesh.get_group(mesh_dim)
        return self._by_ranks.setdefault(tuple(dist.get_process_group_ranks(group)), group)


def placed(
    named: Sequence[tuple[str, Tensor]], *, is_last_outermost: bool = False
) -> dict[int, Placed]:
    """Return where the pieces of DTensors lie, by ``id``. Collective over their meshes.

    Args:
        named: (name, parameter), in the same order on every rank; whole ones are passed over.
        is_last_outermost: whether of several mesh dimensions that cut one of a parameter the last
            cuts first, and the placements do not say so.

    Raises:
        ValueError: a parameter is spread in a way that is no box on every rank.
    """
    spread = [(tensor, specification(tensor), name) for name, tensor in named]
    tensors = [tensor for tensor, whole, _ in spread if whole is not None]
    pieces_here = [
        _Piece(name, local(tensor), whole.device_mesh, whole.placements, tuple(whole.shape))
        for tensor, whole, name in spread
        if whole is not None
    ]
    cuts = [_cuts(piece, number, is_last_outermost) for number, piece in enumerate(pieces_here)]
    groups = _Groups()
    extents = [list(piece.held.shape) for piece in pieces_here]
    starts = [[0] * piece.dim() for piece in pieces_here]
    totals = [list(each) for each in extents]
    bands: dict[int, Bands] = {}
    levels = max((len(cut.mesh_dims) for each in cuts for cut in each), default=0)
    for level in range(levels):
        of_level = [cut for each in cuts for cut in each if level < len(cut.mesh_dims)]
        for cut, place, pieces in _pieces(pieces_here, of_level, level, groups, totals):
            starts[cut.parameter][cut.dim] += sum(pieces[:place])
            totals[cut.parameter][cut.dim] = sum(pieces)
            if cut.is_packed:
                bands[cut.parameter] = Bands(cut.dim, tuple(pieces))
    for piece, total in zip(pieces_here, totals, strict=True):
        if tuple(total) != piece.shape:
            raise ValueError(
                f"AdamW2: parameter '{piece.name}' got pieces that add up to {tuple(total)} on its "
                f"ranks, it takes its shape, {piece.shape}."
            )
    return {
        id(tensor): Placed(
            piece.shape,
            Box(tuple(starts[number]), tuple(extents[number])),
            tuple(_spreads(piece, groups)) if cuts[number] else (),
            bands.get(number),
        )
        for number, (tensor, piece) in enumerate(zip(tensors, pieces_here, strict=True))
    }


def _cuts(tensor: _Piece, number: int, is_last_outermost: bool) -> list[_Cut]:
    """Return the dimensions of a parameter that its mesh cuts.

    Raises:
        ValueError: it is partial, or this rank is not in the mesh, or the order is not understood.
    """
    name, mesh, placements = tensor.name, tensor.device_mesh, tensor.placements
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"AdamW2: parameter '{name}' is a DTensor on a mesh without this rank, it takes one "
            "that this rank is in."
        )
    orders: dict[int, list[int]] = {}  # by dimension of the tensor, the outermost first
    packed: list[int] = []
    for mesh_dim in reversed(range(mesh.ndim)):
        placement = placements[mesh_dim]
        if placement.is_replicate() or mesh.size(mesh_dim) == 1:
            continue
        dim = getattr(placement, "dim", None)
        if placement.is_partial() or dim is None:
            raise ValueError(
                f"AdamW2: parameter '{name}' is a DTensor with the placement {placement}, it takes "
                "Shard and Replicate."
            )
        order = orders.setdefault(dim % tensor.dim(), [])
        # FSDP2 cuts what tensor parallelism, to its right, has cut into so many bands.
        bands, at = getattr(placement, "split_factor", 1), 0
        while bands > 1 and at < len(order):
            bands, at = bands // mesh.size(order[at]), at + 1
        packed += [dim % tensor.dim()] if bands != 1 else []
        order.insert(len(order) if is_last_outermost else at, mesh_dim)
    if any(len(orders[dim]) > 1 for dim in packed):
        raise ValueError(
            f"AdamW2: parameter '{name}' is a DTensor with the placements {placements} on a mesh "
            f"of shape {tuple(mesh.shape)}, whose order AdamW2 does not understand."
        )
    return [
        _Cut(number, dim, tuple(reversed(order)), dim in packed) for dim, order in orders.items()
    ]


def _pieces(
    pieces_here: Sequence[_Piece],
    cuts: Sequence[_Cut],
    level: int,
    groups: _Groups,
    totals: Sequence[Sequence[int]],
) -> Iterator[tuple[_Cut, int, list[int]]]:
    """Yield, of every dimension that is cut, this rank's place in a mesh dimension, and the extents
    of what the ranks there have, in order.

    Args:
        pieces_here: of the parameters.
        cuts: those that have a mesh dimension at this level.
        level: 0 for the innermost mesh dimension of each.
        groups: of their meshes.
        totals: what this rank and those at the levels before have together, per dimension.
    """
    by_group: dict[ProcessGroup, list[tuple[_Cut, int]]] = {}
    for cut in cuts:
        mesh, mesh_dim = pieces_here[cut.parameter].device_mesh, cut.mesh_dims[level]
        place = mesh.get_coordinate()[mesh_dim]
        by_group.setdefault(groups.of(mesh, mesh_dim), []).append((cut, place))
    for group, members in by_group.items():
        own = [(place, totals[cut.parameter][cut.dim]) for cut, place in members]
        by_rank: list[list[tuple[int, int]]] = [[] for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(by_rank, own, group=group)
        for (cut, place), pieces in zip(members, zip(*by_rank, strict=True), strict=True):
            yield cut, place, [extent for _, extent in sorted(pieces)]


def _spreads(tensor: _Piece, groups: _Groups) -> Iterator[Spread]:
    """Yield the groups of a parameter that some mesh dimension cuts; the others have copies."""
    mesh = tensor.device_mesh
    for mesh_dim, (placement, place) in enumerate(
        zip(tensor.placements, mesh.get_coordinate(), strict=True)
    ):
        if mesh.size(mesh_dim) > 1:
            yield Spread(groups.of(mesh, mesh_dim), place, placement.is_replicate())
