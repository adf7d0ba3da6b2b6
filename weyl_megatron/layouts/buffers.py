"""What every engine's layout is reduced to: local buffers, and which range of which parameter lies
where in them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ..spectral.blocks import MatrixSpec
from ..spectral.tiles import Tile, range_rectangles, tiles_of_range
from .fused import Fused
from .grid import Box, Grid
from .kinds import Kind

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


#: Elements to a row of what is no matrix.
_LINE = 4096

#: Modules that torch puts around a model's own: torch.compile, activation checkpointing, FSDP1.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def model_name(name: str) -> str:
    """Return the name that the model itself has for a parameter or module, without what wrappers
    add to it.

    Start vectors, overrides and statistics go by it, so a model that is compiled, or that DDP
    holds, keeps its own names.
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":  # DDP and the engines
        parts = parts[1:]
    return ".".join(parts)


def model_names(names: Iterable[str]) -> dict[str, str]:
    """Return what :func:`model_name` makes of every name of one model.

    Where it would make one name of several, as of a model that calls a layer of its own ``module``,
    these stay as they are.
    """
    shorter = {name: model_name(name) for name in names}
    counts = Counter(shorter.values())
    return {name: short if counts[short] == 1 else name for name, short in shorter.items()}


class Spread(NamedTuple):
    """A group of ranks over which a parameter is spread: in pieces, or as copies."""

    group: ProcessGroup
    rank: int  # in it
    is_copied: bool = False

    @property
    def is_repeated(self) -> bool:
        """True of all copies but the first: what they hold counts once."""
        return self.is_copied and self.rank > 0


class Bands(NamedTuple):
    """The extents of all ranks along a dimension of a parameter, where each rank stacks its own
    shares of a fused weight's parts, as layers that are made tensor-parallel do.
    """

    dim: int
    extents: tuple[int, ...]


class Parameter(NamedTuple):
    """A parameter of the model, and what this rank has of it."""

    name: str
    shape: tuple[int, ...]  # of the whole
    box: Box | None = None  # None: all of it
    # the groups that it is spread over, apart from those of buffers
    spreads: tuple[Spread, ...] = ()
    bands: Bands | None = None
    fused: Fused | None = None  # what the engine knows of its parts
    kind: Kind | None = None  # what it is to its module, where that is seen
    # its dimensions as they lie in memory, the slowest first; None: in order
    order: tuple[int, ...] | None = None
    is_frozen: bool = False  # in a parameter group, and not stepped

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of what this rank has of it."""
        return self.shape if self.box is None else self.box.extents

    @property
    def is_vector(self) -> bool:
        """True of gains, biases and class tokens: one dimension, or three and more of which only
        one counts.
        """
        if self.kind is not None and self.kind.form == "vector":
            return True
        return len(self.shape) < 2 or (
            len(self.shape) > 2 and sum(extent > 1 for extent in self.shape) < 2
        )


class Shard(NamedTuple):
    """Elements ``[start, stop)`` of what a rank has of a parameter, flattened, which lie from
    ``offset`` on in a buffer; may be empty.
    """

    parameter: Parameter
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Buffer:
    """One tensor that the engine gives the optimizer to step, and what lies in it.

    ``shards`` lists every parameter that any rank of ``groups`` holds a piece of, in the same order
    on all of them. ``param_group`` is given where other ranks step pieces of a parameter of which
    this one has none, in an empty ``tensor`` that no parameter group lists. ``swapped`` is given
    where the engine keeps the elements elsewhere, and puts that many into ``tensor`` for a step.
    """

    tensor: Tensor
    shards: tuple[Shard, ...]
    groups: tuple[ProcessGroup, ...] = ()
    param_group: int | None = None
    swapped: int | None = None

    @property
    def name(self) -> str:
        """What sentences call it: its first parameter."""
        return self.shards[0].parameter.name if self.shards else ""


class Layout(NamedTuple):
    """What an engine tells, once, at the first step: every buffer that it will ever step, in an
    order all ranks share.

    ``gather`` returns an object of every rank that has other matrices (pipeline stages, experts);
    it is None where every rank has a piece of all of them, or where the engine's ranks cannot be
    asked: then ``is_part`` is true.
    """

    buffers: list[Buffer]
    # of the model's parameters, frozen ones too, where modules are seen
    kinds: Mapping[str, Kind] | None = None
    # all of the model's, where other optimizers step some of them
    parameters: list[Parameter] | None = None
    gather: Callable[[Any], list[Any]] | None = None
    is_part: bool = False


@dataclass(frozen=True)
class Plan:
    """Buffers that are stepped together, as matrices and tiles. Each element of a parameter is in
    one tile.
    """

    matrices: tuple[MatrixSpec, ...]
    parameters: tuple[Parameter, ...]  # of each matrix
    buffer_of: tuple[int, ...]  # of each: the buffer that holds, or on other ranks would hold, it
    tiles: tuple[Tile, ...]  # what is measured here
    replicas: tuple[Tile, ...]  # pieces of matrices that another rank measures
    rest: tuple[Tile, ...]  # what takes the scheduled rate, of matrix -1


def plan_of(buffers: Sequence[Buffer], grid_of: Callable[[Parameter], Grid | None]) -> Plan:
    """Return the plan of ``buffers``; ``grid_of`` says which matrices a parameter holds, or None
    where it is exempt.
    """
    matrices: list[MatrixSpec] = []
    parameters: list[Parameter] = []
    buffer_of: list[int] = []
    tiles: list[Tile] = []
    replicas: list[Tile] = []
    rest: list[Tile] = []
    for number, buffer in enumerate(buffers):
        for shard in buffer.shards:
            parameter = shard.parameter
            grid = grid_of(parameter)
            if grid is None:
                rest += _tiles_of_line(shard, number)
                continue
            first = len(matrices)
            groups = (*buffer.groups, *(spread.group for spread in parameter.spreads))
            for shape in grid.matrices:
                matrices.append(
                    MatrixSpec(parameter.name + shape.suffix, shape.rows, shape.cols, groups)
                )
                parameters.append(parameter)
                buffer_of.append(number)
            of_shard = [
                tile._replace(matrix=first + tile.matrix)
                for tile in tiles_of_range(
                    grid.blocks, grid.width, shard.start, shard.stop, shard.offset, number
                )
            ]
            is_repeated = any(spread.is_repeated for spread in parameter.spreads)
            (replicas if is_repeated else tiles).extend(of_shard)
    return Plan(
        tuple(matrices),
        tuple(parameters),
        tuple(buffer_of),
        tuple(tiles),
        tuple(replicas),
        tuple(rest),
    )


def _tiles_of_line(shard: Shard, buffer: int) -> Iterator[Tile]:
    """Yield elements that are no matrix as rows of a length that threads can share out."""
    for row, col, rows, cols in range_rectangles(0, shard.stop - shard.start, _LINE):
        yield Tile(-1, 0, 0, rows, cols, shard.offset + row * _LINE + col, _LINE, buffer)
