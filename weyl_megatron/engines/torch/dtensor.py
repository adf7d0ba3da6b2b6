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

from ...layouts.buffers import Spread
from ...layouts.grid import Box
from ...layouts.local import is_on_mesh, local

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Placed(NamedTuple):
    """Where this rank's piece of a parameter lies, and the groups that have the others."""

    box: Box
    spreads: tuple[Spread, ...]


class _Cut(NamedTuple):
    """A dimension of a parameter, and the mesh dimensions that cut it, the innermost first."""

    parameter: int  # its number
    dim: int
    mesh_dims: tuple[int, ...]


class _Groups:
    """The process groups of meshes: of several over the same ranks one stands for all."""

    def __init__(self) -> None:
        self._by_ranks: dict[tuple[int, ...], ProcessGroup] = {}

    def of(self, mesh: Any, mesh_dim: int) -> ProcessGroup:
        group = mesh.get_group(mesh_dim)
        return self._by_ranks.setdefault(tuple(dist.get_process_group_ranks(group)), group)


def placed(named: Sequence[tuple[str, Tensor]]) -> dict[int, Placed]:
    """Return where the pieces of DTensors lie, by ``id``. Collective over their meshes.

    Args:
        named: (name, parameter), in the same order on every rank; plain ones are passed over.

    Raises:
        ValueError: a parameter is spread in a way that is no box on every rank.
    """
    named = [(name, tensor) for name, tensor in named if is_on_mesh(tensor)]
    cuts = [_cuts(name, tensor, number) for number, (name, tensor) in enumerate(named)]
    groups = _Groups()
    extents = [list(local(tensor).shape) for _, tensor in named]
    starts = [[0] * tensor.dim() for _, tensor in named]
    totals = [list(each) for each in extents]
    levels = max((len(cut.mesh_dims) for each in cuts for cut in each), default=0)
    for level in range(levels):
        _add_level(named, [cut for each in cuts for cut in each], level, groups, starts, totals)
    for (name, tensor), total in zip(named, totals, strict=True):
        if tuple(total) != tuple(tensor.shape):
            raise ValueError(
                f"AdamW2: parameter '{name}' got pieces that add up to {tuple(total)} on its ranks,"
                f" it takes its shape, {tuple(tensor.shape)}."
            )
    return {
        id(tensor): Placed(
            Box(tuple(starts[number]), tuple(extents[number])),
            tuple(_spreads(tensor, groups)) if cuts[number] else (),
        )
        for number, (_, tensor) in enumerate(named)
    }


def _cuts(name: str, tensor: Any, number: int) -> list[_Cut]:
    """Return the dimensions of a parameter that its mesh cuts.

    Raises:
        ValueError: it is partial, or this rank is not in the mesh, or the order is not understood.
    """
    mesh, placements = tensor.device_mesh, tensor.placements
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"AdamW2: parameter '{name}' is a DTensor on a mesh without this rank, it takes one "
            "that this rank is in."
        )
    orders: dict[int, list[int]] = {}  # by dimension of the tensor, the outermost first
    for mesh_dim in reversed(range(mesh.ndim)):
        placement = placements[mesh_dim]
        if placement.is_replicate() or mesh.size(mesh_dim) == 1:
            continue
        dim = getattr(placement, "dim", None)
        if dim is None:
            raise ValueError(
                f"AdamW2: parameter '{name}' is a DTensor with the placement {placement}, it takes "
                "Shard and Replicate."
            )
        order = orders.setdefault(dim, [])
        # FSDP2 cuts what tensor parallelism, to its right, has cut into so many bands.
        bands, at = getattr(placement, "split_factor", 1), 0
        while bands > 1 and at < len(order):
            bands, at = bands // mesh.size(order[at]), at + 1
        if bands != 1:
            raise ValueError(
                f"AdamW2: parameter '{name}' is a DTensor with the placements {placements} on a "
                f"mesh of shape {tuple(mesh.shape)}, whose order AdamW2 does not understand."
            )
        order.insert(at, mesh_dim)
    return [_Cut(number, dim, tuple(reversed(order))) for dim, order in orders.items()]


def _add_level(
    named: Sequence[tuple[str, Any]],
    cuts: Sequence[_Cut],
    level: int,
    groups: _Groups,
    starts: list[list[int]],
    totals: list[list[int]],
) -> None:
    """Add up what the ranks of a mesh dimension have, of every dimension that it cuts.

    Args:
        named: the parameters.
        cuts: all of them.
        level: 0 for the innermost mesh dimension of each.
        groups: of their meshes.
        starts: of this rank's pieces, per dimension, within what was added up so far.
        totals: the extents of that.
    """
    by_group: dict[ProcessGroup, list[tuple[_Cut, int]]] = {}
    for cut in cuts:
        if level < len(cut.mesh_dims):
            mesh, mesh_dim = named[cut.parameter][1].device_mesh, cut.mesh_dims[level]
            place = mesh.get_coordinate()[mesh_dim]
            by_group.setdefault(groups.of(mesh, mesh_dim), []).append((cut, place))
    for group, members in by_group.items():
        own = [(place, totals[cut.parameter][cut.dim]) for cut, place in members]
        by_rank: list[list[tuple[int, int]]] = [[] for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(by_rank, own, group=group)
        for (cut, place), pieces in zip(members, zip(*by_rank, strict=True), strict=True):
            starts[cut.parameter][cut.dim] += sum(size for at, size in pieces if at < place)
            totals[cut.parameter][cut.dim] = sum(size for _, size in pieces)


def _spreads(tensor: Any, groups: _Groups) -> Iterator[Spread]:
    """Yield the groups of a parameter that some mesh dimension cuts; the others have copies."""
    mesh = tensor.device_mesh
    for mesh_dim, (placement, place) in enumerate(
        zip(tensor.placements, mesh.get_coordinate(), strict=True)
    ):
        if mesh.size(mesh_dim) > 1:
            yield Spread(groups.of(mesh, mesh_dim), place, placement.is_replicate())
