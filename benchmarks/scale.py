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
the kept blocks and x, z and left. Every rank of a pipeline stage has the same of both; shown is the
stage that has most.

Muon's gather, beside it: hidden 2-D matrices (no embeddings, no head) that no rank holds whole,
4·m·n bytes each, own piece included, a fused weight as one. "holders": every rank gathers those
that it has a piece of, as DeepSpeed's Muon does with its momentum (BF16_Optimizer, ZeRO-3); of the
rank that gathers most. "owners": each is gathered by one rank alone, and they are shared out as
evenly as can be. Sending updates back, which owners have to, is not counted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from triton.runtime.jit import JITFunction

from benchmarks.scale_mesh import MESHES, mesh_buffers, mesh_pieces
from benchmarks.scale_models import DEFAULTS, MODELS, Model, Spread, Weight
from weyl_megatron import AdamW2, matrices, state
from weyl_megatron import tensors as stepped_tensors
from weyl_megatron.engines.deepspeed import layout as zero
from weyl_megatron.engines.given import GivenLayout
from weyl_megatron.layouts.buffers import Buffer, Layout, Parameter, Shard
from weyl_megatron.layouts.buffers import Spread as OverGroup
from weyl_megatron.layouts.fused import interleaved
from weyl_megatron.layouts.tensor_parallel import Sharding, band_of
from weyl_megatron.settings import check_settings
from weyl_megatron.spectral import blocks
from weyl_megatron.spectral.tiles import tiles_of_range
from weyl_megatron.thresholds import Thresholds

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OPTIONS: dict[str, Any] = {"tau": 0.01, "power_iters": 2, "floor_std": 1e-3, "clip_vectors": False}

#: Per parameter (rank, start, stop) of what data-parallel ranks hold of it.
Pieces = list[list[tuple[int, int, int]]]


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
    """Return what a rank steps, as the layouts' own code reads it; ``tensor_of(length)`` makes it."""
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
                    [params], [tensor_of(sum(pieces))], lambda p: described[id(p)], masters
                )
            )
        partition = tensor_of(-(-sum(lengths) // dist.get_world_size(group)))
        return list(
            zero.flat_partition_buffers(
                [params], [partition], [group], lambda p: described[id(p)], masters
            )
        )


def pieces_of(weights: Sequence[Weight], spread: Spread) -> Pieces:
    """Return what data-parallel ranks hold of every parameter, which the tests compare."""
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


class NoArithmetic:
    """A kernel that computes nothing and says that each Σ u² is ``square`` and each iteration
    gains: the most.
    """

    name = "none"

    def __init__(self, square: float) -> None:
        self._square = square

    def _say(self, *arguments: Any) -> None:
        arguments[-1][:, 0] = self._square

    def orthonormalize(self, *arguments: Any) -> None:
        arguments[-1].fill_(float("inf"))

    def _nothing(self, *_: Any) -> None: ...

    step = moments = _say
    bind = release = undo = move = multiply = multiply_back = _nothing


class Counted(NamedTuple):
    collectives: int
    bytes: int
    vectors: int  # bytes


def count_step(buffers: list[Buffer], cut: list[Tensor], square: float) -> Counted:
    """Step twice; count what the second step hands to ``all_reduce``."""
    optimizer = AdamW2([buffer.tensor for buffer in buffers], **OPTIONS)
    optimizer.engine = GivenLayout(lambda: Layout(buffers))
    for buffer in buffers:
        tensor = buffer.tensor
        tensor.grad = tensor.detach()
        optimizer.state[tensor] = {
            "step": torch.tensor(0.0),
            "exp_avg": tensor,
            "exp_avg_sq": tensor,
        }
    sent: list[int] = []
    with (
        patch.object(dist, "all_reduce", lambda tensor, **_: sent.append(tensor.nbytes)),
        patch.object(blocks, "_cut_rows", lambda *_: cut),
        patch.object(matrices.MatrixGroup, "_check_ranks", lambda *_: None),
        patch.object(matrices, "pick", lambda tensors, **_: KERNELS[tensors[0].device.type]),
        patch.object(matrices, "make", lambda *_: NoArithmetic(square)),
        patch.object(JITFunction, "run", lambda *_, **__: None),
        # The tensors have one element each in memory.
        patch.object(state, "check_form", lambda *_: None),
        patch.object(stepped_tensors, "check_memory", lambda *_: None),
    ):
        optimizer.step()
        sent.clear()
        optimizer.step()
    (stepped,) = optimizer._matrix_groups
    parts = stepped._power.blocks
    kept = [block for operand in parts.operands for block in operand.kept]  # none where resident
    vectors = [parts.x, parts.z, parts.left, *kept]
    return Counted(len(sent), sum(sent), sum(each.nbytes for each in vectors))


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


def on_cpu(length: int) -> Tensor:
    return nn.Parameter(torch.empty(1).expand(length))  # of that length, without the memory


def on_device(length: int) -> Tensor:
    return nn.Parameter(torch.empty(length, device="meta"))


#: Who steps what: a GPU steers its own step, by kernels that are not launched here.
KERNELS = {"cpu": "torch", "meta": "triton"}

STATES = {"certified": (on_cpu, 0.0), "measured": (on_cpu, 1e30), "either (GPU)": (on_device, 1e30)}


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
    most = dict.fromkeys(STATES, Counted(0, 0, 0))
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
            for state, (tensor_of, square) in STATES.items():
                buffers = buffers_of(parameters, spread.zero, groups.data, tensor_of)
                counted = count_step(
                    buffers, [rows for weight in weights for rows in cut[weight.name]], square
                )
                most[state] = Counted(*map(max, most[state], counted))
    place = {"model": name, **spread._asdict(), "ranks": prod(spread[:3])}
    muon = {"muon_holders": gathered[0], "muon_owners": gathered[1]}
    return [
        {**place, "state": state, **counted._asdict(), **muon} for state, counted in most.items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as aligned lines."""
    cells = [["model", "tp × pp × dp", "ZeRO", "ranks", "state", "collectives", "bytes", "vectors"]]
    cells[0] += ["Muon: holders", "owners"]
    for row in rows:
        place = f"{row['tp']} × {row['pp']} × {row['dp']}"
        sizes = [_size(row[key]) for key in ("bytes", "vectors", "muon_holders", "muon_owners")]
        counts = [str(row[key]) for key in ("zero", "ranks", "state", "collectives")]
        cells.append([row["model"], place, *counts, *sizes])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = "<><><>>>>>"
    lines = [
        "  ".join(f"{c:{s}{w}}" for c, s, w in zip(line, sides, widths, strict=True))
        for line in cells
    ]
    return "\n".join([lines[0], "─" * len(lines[0]), *lines[1:]])


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
    spread = Spread(args.tp, args.pp, args.dp, args.zero)
    if args.model is None and spread != Spread():
        parser.error("--tp, --pp, --dp and --zero take a --model beside them")
    try:
        asked = DEFAULTS if args.model is None else [(args.model, spread)]
        rows = [row for name, over in asked for row in rows_of(name, MODELS[name], over)]
    except ValueError as error:
        parser.error(str(error))
    print(
        "Per rank and step: collectives, the bytes that they are handed, and the memory of the\n"
        "power vectors; then what Muon would gather of the hidden matrices that are cut, at 4\n"
        "bytes an element (--help tells how).\n"
    )
    print(table(rows))
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
