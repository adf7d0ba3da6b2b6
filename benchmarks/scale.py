"""What an optimizer step sends, and what the power vectors take, on up to thousands of ranks.

    python -m benchmarks.scale [--json FILE]                           25 seconds on one core, 1 GB
    python -m benchmarks.scale --model gpt-1.3b --tp 8 --pp 2 --dp 64 --zero 1      a few seconds

Nothing here is a formula. One rank of the job is made on torch's fake process group, the layouts'
own code reads its buffers, AdamW2 steps twice, and what the second step hands to all-reduce is
counted on the way. The other ranks and the weights do not exist, so three things are stood in for:

* the arithmetic: a kernel that computes nothing, and says of every ‖U‖ that it is 0 (the
  certificate settles all matrices) or huge (all are measured). Collectives depend on nothing else
  that a kernel does;
* which rows are cut between ranks, which ranks tell each other: the union of the tiles of all
  ranks;
* the check that a partition holds the model's weights.

"certified" and "measured" are all matrices in that state, on CPUs. On other devices the host does
not see which are settled, so both states send the same, "either (GPU)": a step on meta tensors,
which nobody can look into.

Bytes are what one rank hands over; a ring sends, and receives, nearly twice as much. Vectors are
the kept blocks and x, z and left, and what of them is kept for projection; a share is of the
parameters of the stage, at 4 bytes each, the tensor-parallel part of them and all data-parallel
ones. Every rank of a pipeline stage has the same of all; shown is the stage that has most.

All this with clip="scale", the paper's, and with "project" at the default number of vectors, hidden
matrices projected.

Muon's gather, beside it: hidden 2-D matrices (no embeddings, no head) that no rank holds whole,
4·m·n bytes each, own piece included, a fused weight as one. "holders": every rank gathers those
that it has a piece of, as DeepSpeed's Muon does with its momentum (BF16_Optimizer, ZeRO-3); of the
rank that gathers most. "owners": each is gathered by one rank alone, and they are shared out as
evenly as can be. Sending updates back, which owners have to, is not counted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.scale_count import CLIPS, OPTIONS, STATES, count_step
from benchmarks.scale_mesh import MESHES, is_refused, mesh_buffers, mesh_pieces
from benchmarks.scale_models import DEFAULTS, MODELS, Model, Spread, Weight
from weyl_megatron.engines.deepspeed import layout as zero
from weyl_megatron.layouts.buffers import Buffer, Layout, Parameter, Shard
from weyl_megatron.layouts.buffers import Spread as OverGroup
from weyl_megatron.layouts.fused import interleaved
from weyl_megatron.layouts.tensor_parallel import Sharding, band_of
from weyl_megatron.settings import PROJECT, SCALE, check_settings
from weyl_megatron.spectral.tiles import tiles_of_range
from weyl_megatron.thresholds import Thresholds

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: Per parameter (rank, start, stop) of what data-parallel ranks hold of it.
Pieces = list[list[tuple[int, int, int]]]


class Cell(NamedTuple):
    """What is shown of a state and a clip."""

    collectives: int
    bytes: int
    vectors: int
    share: float  # of the vectors, of the parameters


class Groups(NamedTuple):
    tensor: ProcessGroup | None
    data: ProcessGroup | None
    embedding: ProcessGroup | None = None  # the stages that have a copy of the tied embedding


def parameter_of(weight: Weight, spread: Spread, rank: int, groups: Groups) -> Parameter:
    """Return a parameter as tensor-parallel rank ``rank`` has it."""
    shape, sharding, tied, fused = list(weight.shape), None, (), None
    if spread.tp > 1:
        assert groups.tensor is not None
        sharding = Sharding(groups.tensor, None, (), rank)
        if weight.dim is not None:
            shape[weight.dim] //= spread.tp
            sharding = Sharding(groups.tensor, weight.dim, (shape[weight.dim],) * spread.tp, rank)
    if weight.is_tied and groups.embedding is not None:
        tied = (OverGroup(groups.embedding, dist.get_rank(groups.embedding), is_copied=True),)
    if weight.head:
        fused = interleaved([weight.head] * 3, "qkv", weight.shape[0])
    return band_of(weight.name, shape, sharding, spreads=tied, fused=fused)


def buffers_of(
    parameters: Sequence[Parameter],
    stage: str,
    group: ProcessGroup | None,
    tensor_of: Callable[[int], Tensor],
) -> list[Buffer]:
    """Return what a rank steps, as the layouts' own code reads it; ``tensor_of`` makes a tensor of
    that length.
    """
    if stage in MESHES:
        return mesh_buffers(parameters, stage, tensor_of)
    lengths = [prod(parameter.local_shape) for parameter in parameters]
    if stage == "ddp":
        return [
            Buffer(tensor_of(n), (Shard(p, 0, n, 0),))
            for p, n in zip(parameters, lengths, strict=True)
        ]
    pieces = [-(-length // dist.get_world_size(group)) for length in lengths]
    flat = torch.empty(sum(lengths), device="meta")
    params = list(flat.split(lengths))
    if stage == "3":
        params = [
            SimpleNamespace(
                ds_numel=n,
                partition_numel=lambda k=k: k,
                ds_process_group=group,
                ds_tensor=flat[:k],
            )
            for n, k in zip(lengths, pieces, strict=True)
        ]
    described = dict(zip(map(id, params), parameters, strict=True))
    masters = zero.Masters()
    with patch.object(masters, "check", lambda *_: None):  # nothing is in these tensors
        if stage == "3":
            return list(
                zero.zero3_buffers(
                    [params], [tensor_of(sum(pieces))], [None], lambda p: described[id(p)], masters
                )
            )
        partition = tensor_of(-(-sum(lengths) // dist.get_world_size(group)))
        return list(
            zero.flat_partition_buffers(
                [params], [partition], [group], lambda p: described[id(p)], masters
            )
        )


def pieces_of(weights: Sequence[Weight], spread: Spread) -> Pieces:
    """Return what all data-parallel ranks hold of every parameter; the tests compare it with what
    the layouts read.
    """
    if spread.zero in MESHES:
        return mesh_pieces([weight.shape for weight in weights], spread)
    lengths = [prod(w.shape) // (1 if w.dim is None else spread.tp) for w in weights]
    pieces: Pieces = []
    at = 0
    for length in lengths:
        if spread.zero == "ddp":
            pieces.append([(rank, 0, length) for rank in range(spread.dp)])
            continue
        begin, total = (at, sum(lengths)) if spread.zero == "1" else (0, length)
        size = -(-total // spread.dp)
        ranks = range(begin // size, (begin + length - 1) // size + 1)
        pieces.append(
            [(r, max(r * size - begin, 0), min((r + 1) * size - begin, length)) for r in ranks]
        )
        at += length
    return pieces


def cut_rows(
    weights: Sequence[Weight], spread: Spread, pieces: Pieces, groups: Groups
) -> dict[str, list[Tensor]]:
    """Return, per weight and matrix, the rows of which no rank has all columns: a union over the
    tiles of all ranks.
    """
    settings = check_settings(**OPTIONS, io=None, overrides=(), others={})
    grid_of = Thresholds(settings, Layout([]), auto=False).grid
    seen: dict[Any, list[Tensor]] = {}  # layers that are cut alike
    cut: dict[str, list[Tensor]] = {}
    for weight, held in zip(weights, pieces, strict=True):
        ranges = tuple(dict.fromkeys((start, stop) for _, start, stop in held))
        key = weight._replace(name=""), ranges
        if key not in seen:
            grids = [
                grid_of(parameter_of(weight, spread, rank, groups)) for rank in range(spread.tp)
            ]
            masks = [
                torch.zeros(matrix.rows, dtype=torch.bool)
                for matrix in (grids[0].matrices if grids[0] else ())
            ]
            for grid in filter(None, grids):
                for start, stop in ranges:
                    for tile in tiles_of_range(grid.blocks, grid.width, start, stop, 0):
                        if tile.cols < grid.matrices[tile.matrix].cols:
                            masks[tile.matrix][tile.row : tile.row + tile.rows] = True
            seen[key] = [mask.nonzero().flatten() for mask in masks]
        cut[weight.name] = seen[key]
    return cut


def muon_gather(weights: Sequence[Weight], spread: Spread, pieces: Pieces) -> tuple[int, int]:
    """Return the bytes of hidden matrices that one rank gathers, by holders and by owners; see
    above.
    """
    holders, sizes = [0] * spread.dp, [0, 0]
    for weight, held in zip(weights, pieces, strict=True):
        is_band = spread.tp > 1 and weight.dim is not None
        if weight.is_hidden and (is_band or len({piece[1:] for piece in held}) > 1):
            sizes.append(4 * prod(weight.shape))
            for rank, _, _ in held:
                holders[rank] += sizes[-1]
    return max(holders), max(*sizes, sum(sizes) // (spread.tp * spread.dp))


@contextmanager
def fake_rank(spread: Spread, stage: int) -> Iterator[Groups]:
    """Be the last tensor-parallel rank of the middle data-parallel one in a pipeline stage, in
    Megatron's order.
    """
    tp, pp, dp, _ = spread
    begin, end = stage * tp * dp, (stage + 1) * tp * dp
    rank = begin + dp // 2 * tp + tp - 1
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=tp * pp * dp)
    try:
        tensor = dist.new_group(list(range(rank - tp + 1, rank + 1)))
        data = dist.new_group(list(range(begin + tp - 1, end, tp)))
        copies = [rank - begin, rank - begin + (pp - 1) * tp * dp]
        yield Groups(tensor, data, dist.new_group(copies) if pp > 1 and rank in copies else None)
    finally:
        dist.destroy_process_group()


def rows_of(name: str, model: Model, spread: Spread) -> list[dict[str, Any]]:
    """Return the rows of the table for one model on so many ranks, one per state.

    Raises:
        ValueError: the model cannot be spread so.
    """
    bands = [
        w.shape[w.dim] // (3 * w.head or 1)
        for w in (*model.first, *model.layer)
        if w.dim is not None
    ]
    if (
        min(spread[:3]) < 1
        or model.layers % spread.pp
        or any(extent % spread.tp for extent in bands)
    ):
        raise ValueError(
            f"{name} takes --tp that divides heads and tokens, --pp that divides its "
            f"{model.layers} layers"
        )
    cells = [(state, clip) for state in STATES for clip in CLIPS]
    taken = [cell for cell in cells if not is_refused(spread.zero, *cell)]
    most = dict.fromkeys(taken, Cell(0, 0, 0, 0.0))
    gathered: tuple[int, int] = (0, 0)
    tied: dict[str, list[Tensor]] = {}
    for stage in sorted({0, min(1, spread.pp - 1), spread.pp - 1}):  # those between are alike
        weights = model.stage(stage, spread.pp)
        pieces = pieces_of(weights, spread)
        gathered = max(gathered, muon_gather(weights, spread, pieces))
        with fake_rank(spread, stage) as groups:
            cut = {**cut_rows(weights, spread, pieces, groups), **tied}
            # Tied weights are measured in the first stage.
            tied = tied or {w.name: cut[w.name] for w in weights if w.is_tied}
            parameters = [parameter_of(weight, spread, spread.tp - 1, groups) for weight in weights]
            size = 4 * sum(prod(parameter.local_shape) for parameter in parameters)
            rows, io = [each for w in weights for each in cut[w.name]], io_of(weights)
            for state, clip in most:
                tensor_of, square = STATES[state]
                buffers = buffers_of(parameters, spread.zero, groups.data, tensor_of)
                counted = count_step(buffers, rows, square, clip, io)
                cell = Cell(*counted, counted.vectors / size)
                most[state, clip] = Cell(*map(max, most[state, clip], cell))
    place = {"model": name, **spread._asdict(), "ranks": prod(spread[:3])}
    muon = {"muon_holders": gathered[0], "muon_owners": gathered[1]}
    return [
        {
            **place,
            "state": state,
            **most[state, SCALE]._asdict(),
            PROJECT: most[state, PROJECT]._asdict() if (state, PROJECT) in most else None,
            **muon,
        }
        for state in STATES
    ]


def io_of(weights: Sequence[Weight]) -> list[str]:
    """Return the names of embeddings, positions and the head, which are scaled."""
    return [w.name for w in weights if not w.is_hidden and len(w.shape) > 1]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as aligned lines."""
    what = ["collectives", "bytes", "vectors", "share"]
    cells = [["model", "tp × pp × dp", "ZeRO", "ranks", "state", *what]]
    cells[0] += ["project: collectives", *what[1:], "Muon: holders", "owners"]
    for row in rows:
        place = f"{row['tp']} × {row['pp']} × {row['dp']}"
        muon = [_size(row[key]) for key in ("muon_holders", "muon_owners")]
        counts = [str(row[key]) for key in ("zero", "ranks", "state")]
        cells.append([row["model"], place, *counts, *_cells(row), *_cells(row[PROJECT]), *muon])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = "<><><>>>>>>>>>>"
    lines = [
        "  ".join(f"{c:{s}{w}}" for c, s, w in zip(line, sides, widths, strict=True))
        for line in cells
    ]
    return "\n".join([lines[0], "─" * len(lines[0]), *lines[1:]])


def _cells(cell: Mapping[str, Any] | None) -> list[str]:
    if cell is None:
        return ["refused", "", "", ""]
    sizes = [_size(cell[key]) for key in ("bytes", "vectors")]
    return [str(cell["collectives"]), *sizes, f"{cell['share']:.2%}"]


def _size(count: int) -> str:
    return f"{count / 1e6:,.2f} MB" if count >= 1e5 else f"{count / 1e3:,.2f} kB" if count else "0"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", choices=MODELS, help="one model, on --tp, --pp, --dp; none: a table of several"
    )
    for flag in ("--tp", "--pp", "--dp"):
        parser.add_argument(flag, type=int, default=1)
    parser.add_argument("--zero", choices=("1", "3", "ddp", *MESHES), default="1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    args = parser.parse_args()
    torch.set_num_threads(1)  # others would wait for each other: tensors are small
    spread = Spread(args.tp, args.pp, args.dp, args.zero)
    if args.model is None and spread != Spread():
        parser.error("--tp, --pp, --dp and --zero take a --model beside them")
    try:
        asked = DEFAULTS if args.model is None else [(args.model, spread)]
        rows = [row for name, over in asked for row in rows_of(name, MODELS[name], over)]
    except ValueError as error:
        parser.error(str(error))
    print(
        "Per rank and step: collectives, the bytes that they are handed, the memory of the power\n"
        "vectors and its share of the parameters'; the same with clip='project'; then what Muon\n"
        "would gather of the hidden matrices that are cut, at 4 bytes an element (--help tells\n"
        "how).\n"
    )
    print(table(rows))
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
