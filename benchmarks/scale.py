"""What one optimizer step sends, and what the power vectors take, on up to thousands of ranks.

    python benchmarks/scale.py                                                          about 1 minute on one core
    python benchmarks/scale.py --model gpt-1.3b --tp 8 --pp 2 --dp 64 --zero 1 [--json FILE]       a few seconds

Nothing here is a formula. One rank of the job is made on torch's fake process group, its buffers are read by the
layouts' own code, AdamW2 steps twice, and the collectives of the second step are counted on their way to torch. Three
things are stood in for, because the other ranks and the weights do not exist:

* the arithmetic: a kernel that computes nothing, and says of every ‖U‖ that it is 0 (then the certificate settles all
  matrices) or huge (then all are measured). Collectives depend on nothing else that a kernel does;
* the rows that are cut between ranks, which ranks tell each other: the union of the tiles of all ranks;
* the check that partitions hold the model's weights.

States: "certified" and "measured" are all matrices in that state, on CPUs. On a GPU the host does not see which are
settled, so one and the same traffic serves both: "either (GPU)", run on meta tensors, which nobody can look into.

Bytes are what a rank hands to all-reduce; a ring then sends, and receives, nearly twice as much. Vectors are the kept
blocks and x, z and left. Both are those of any rank of a pipeline stage, of the stage that has most.

Muon's gather, beside it: hidden 2-D matrices (no embeddings, no head) of which a rank holds a piece, but not all, are
gathered whole by it, 4·m·n bytes each, its own piece and a fused weight's parts included; of the rank that gathers most.
So DeepSpeed's Muon does it with its momentum. What it sends after that (DeepSpeed's ZeRO-3: updates) is not counted.
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

from weyl_megatron import AdamW2, walk
from weyl_megatron.layouts import zero
from weyl_megatron.layouts.buffers import Buffer, Layout, Parameter, Shard
from weyl_megatron.layouts.grid import Grid, Sharding, interleaved
from weyl_megatron.settings import check_settings
from weyl_megatron.spectral import blocks
from weyl_megatron.spectral.tiles import tiles_of_range
from weyl_megatron.thresholds import Thresholds

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_OPTIONS: dict[str, Any] = {"tau": 0.01, "power_iters": 2, "floor_std": 1e-3, "clip_vectors": False}


class Weight(NamedTuple):
    """A parameter of the whole model, and the dimension that tensor parallelism cuts."""

    name: str
    shape: tuple[int, ...]
    dim: int | None = None
    head: int = 0  # of a QKV: rows of a head's q, k and v, which follow each other (Megatron's order)
    is_hidden: bool = False
    is_tied: bool = False  # the last pipeline stage has a copy


class Model(NamedTuple):
    first: tuple[Weight, ...]
    layer: tuple[Weight, ...]
    layers: int
    last: tuple[Weight, ...]

    def stage(self, number: int, stages: int) -> list[Weight]:
        """Return the parameters of a pipeline stage, in order."""
        each, is_last = self.layers // stages, number == stages - 1
        numbers = range(number * each, (number + 1) * each)
        middle = [weight._replace(name=f"layers.{n}.{weight.name}") for n in numbers for weight in self.layer]
        copies = [weight for weight in self.first if weight.is_tied and is_last and number > 0]
        return [*(self.first if number == 0 else ()), *middle, *(self.last if is_last else ()), *copies]


class Spread(NamedTuple):
    tp: int = 1
    pp: int = 1
    dp: int = 1
    zero: str = "1"  # 1 (or 2), 3, ddp

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.dp


class Groups(NamedTuple):
    tensor: ProcessGroup | None
    data: ProcessGroup | None
    embedding: ProcessGroup | None = None  # the stages that keep a copy of a tied embedding


class Counted(NamedTuple):
    collectives: int
    bytes: int
    vectors: int  # bytes


def _layer(width: int, heads: int, mlp: int) -> tuple[Weight, ...]:
    return (
        *(Weight(f"input_layernorm.{leaf}", (width,)) for leaf in ("weight", "bias")),
        Weight("self_attention.linear_proj.weight", (width, width), 1, is_hidden=True),
        Weight("self_attention.linear_proj.bias", (width,)),
        Weight("self_attention.linear_qkv.weight", (3 * width, width), 0, width // heads, is_hidden=True),
        Weight("self_attention.linear_qkv.bias", (3 * width,), 0),
        *(Weight(f"pre_mlp_layernorm.{leaf}", (width,)) for leaf in ("weight", "bias")),
        Weight("mlp.linear_fc1.weight", (mlp, width), 0, is_hidden=True),
        Weight("mlp.linear_fc1.bias", (mlp,), 0),
        Weight("mlp.linear_fc2.weight", (width, mlp), 1, is_hidden=True),
        Weight("mlp.linear_fc2.bias", (width,)),
    )


def _norm(width: int) -> tuple[Weight, ...]:
    return tuple(Weight(f"final_layernorm.{leaf}", (width,)) for leaf in ("weight", "bias"))


def gpt(layers: int, width: int, heads: int, *, tokens: int = 50304, context: int = 1024) -> Model:
    """GPT-2, whose head is the embedding."""
    words = Weight("embedding.word_embeddings.weight", (tokens, width), 0, is_tied=True)
    positions = Weight("embedding.position_embeddings.weight", (context, width))
    return Model((words, positions), _layer(width, heads, 4 * width), layers, _norm(width))


def vit(layers: int, width: int, heads: int, mlp: int, *, patches: int = 256, classes: int = 1000) -> Model:
    """A ViT of 14 × 14 patches, whose patches and head tensor parallelism leaves whole."""
    first = (
        *(Weight("class_token", (1, 1, width)), Weight("position_embeddings", (1, patches + 1, width))),
        *(Weight("patches.weight", (width, 3, 14, 14)), Weight("patches.bias", (width,))),
    )
    head = Weight("head.weight", (classes, width)), Weight("head.bias", (classes,))
    return Model(first, _layer(width, heads, mlp), layers, (*_norm(width), *head))


MODELS = {
    "gpt2-124m": gpt(12, 768, 12),
    "gpt-774m": gpt(36, 1280, 20),
    "gpt-1.3b": gpt(24, 2048, 16),
    "vit-g-1011m": vit(40, 1408, 16, 6144),
}

DEFAULTS = [
    *[("gpt2-124m", Spread(dp=dp)) for dp in (2, 8, 64)],
    *[("gpt-774m", Spread(dp=64)), ("gpt-774m", Spread(dp=64, zero="3"))],
    *[("gpt-1.3b", Spread(tp=2, dp=8, zero="ddp")), ("gpt-1.3b", Spread(tp=2, dp=64))],
    *[("gpt-1.3b", Spread(tp=8, pp=2, dp=64)), ("gpt-1.3b", Spread(tp=8, pp=2, dp=256))],
    *[("gpt-1.3b", Spread(dp=dp, zero=stage)) for stage in "13" for dp in (256, 4096)],
    *[("vit-g-1011m", Spread(dp=256)), ("vit-g-1011m", Spread(tp=4, dp=256))],
]


def parameter_of(weight: Weight, tp: int, rank: int, groups: Groups) -> Parameter:
    """Return a parameter as tensor-parallel rank ``rank`` has it."""
    shape, dim = list(weight.shape), weight.dim
    sharding = None
    if tp > 1:
        sizes = () if dim is None else (shape[dim] // tp,) * tp
        assert groups.tensor is not None and (dim is None or sum(sizes) == shape[dim])
        sharding = Sharding(groups.tensor, dim, sizes, rank)
        if dim is not None:
            shape[dim] //= tp
    tied, fused = None, None
    if weight.is_tied and groups.embedding is not None:
        tied = Sharding(groups.embedding, None, (), dist.get_rank(groups.embedding))
    if weight.head:
        start = rank * shape[0] if tp > 1 else 0
        fused = interleaved([weight.head] * 3, "qkv", weight.shape[0], start, start + shape[0])
    return Parameter(weight.name, tuple(shape), sharding, tied, fused)


def buffers_of(
    parameters: Sequence[Parameter], stage: str, group: ProcessGroup | None, tensor_of: Callable[[int], Tensor]
) -> list[Buffer]:
    """Return what a rank steps, as the layouts' own code reads it; ``tensor_of`` makes a tensor of that length."""
    lengths = [prod(parameter.shape) for parameter in parameters]
    if stage == "ddp":
        found = zip(parameters, lengths, strict=True)
        return [Buffer(tensor_of(length), (Shard(parameter, 0, length, 0),)) for parameter, length in found]
    dp = dist.get_world_size(group)
    with patch.object(zero, "_check_content", lambda *_: None):
        if stage == "1":
            views = torch.empty(sum(lengths), device="meta").split(lengths)
            described = dict(zip(map(id, views), parameters, strict=True))
            partition = tensor_of(-(-sum(lengths) // dp))
            return list(zero.flat_partition_buffers([list(views)], [partition], [group], lambda p: described[id(p)]))
        pieces = [-(-length // dp) for length in lengths]
        stand_ins = [_zero3_parameter(*each, group) for each in zip(lengths, pieces, strict=True)]
        described = dict(zip(map(id, stand_ins), parameters, strict=True))
        partition = tensor_of(sum(pieces))
        return list(zero.zero3_buffers([stand_ins], [partition], lambda p: described[id(p)]))


def _zero3_parameter(length: int, piece: int, group: ProcessGroup | None) -> Any:
    content = torch.empty(piece, device="meta")
    return SimpleNamespace(
        partition_numel=lambda: piece, ds_numel=length, ds_process_group=group, ds_tensor=content
    )


def pieces_of(lengths: Sequence[int], stage: str, dp: int) -> list[list[tuple[int, int, int]]]:
    """Return, per parameter, (rank, start, stop) of the pieces that all data-parallel ranks hold."""
    found, at = [], 0
    for length in lengths:
        if stage == "ddp":
            found.append([(rank, 0, length) for rank in range(dp)])
            continue
        size, begin = (-(-sum(lengths) // dp), at) if stage == "1" else (-(-length // dp), 0)
        ranks = range(begin // size, (begin + length - 1) // size + 1)
        found.append([(r, max(r * size - begin, 0), min((r + 1) * size - begin, length)) for r in ranks])
        at += length
    return found


def cut_rows(
    weights: Sequence[Weight], spread: Spread, groups: Groups, grid_of: Callable[[Parameter], Grid | None]
) -> list[Tensor]:
    """Return, per matrix, the rows of which no rank of the stage holds all columns: a union over all ranks' tiles."""
    ranks = [[parameter_of(weight, spread.tp, rank, groups) for weight in weights] for rank in range(spread.tp)]
    pieces = pieces_of([prod(parameter.shape) for parameter in ranks[0]], spread.zero, spread.dp)
    seen: dict[Any, list[Tensor]] = {}  # layers that are cut alike
    found: list[Tensor] = []
    for number, weight in enumerate(weights):
        ranges = dict.fromkeys((start, stop) for _, start, stop in pieces[number])
        key = weight._replace(name=""), tuple(ranges)
        if key not in seen:
            grids = [grid for grid in (grid_of(parameters[number]) for parameters in ranks) if grid is not None]
            masks = [torch.zeros(matrix.rows, dtype=torch.bool) for matrix in grids[0].matrices] if grids else []
            for grid in grids:
                for start, stop in ranges:
                    for tile in tiles_of_range(grid.blocks, grid.width, start, stop, 0):
                        if tile.cols < grid.matrices[tile.matrix].cols:
                            masks[tile.matrix][tile.row : tile.row + tile.rows] = True
            seen[key] = [mask.nonzero().flatten() for mask in masks]
        found += seen[key]
    return found


def muon_gather(weights: Sequence[Weight], spread: Spread) -> int:
    """Return the bytes of the hidden matrices of which a rank holds a piece, of the rank where they are most."""
    cut_by_tp = [spread.tp > 1 and weight.dim is not None for weight in weights]
    lengths = [prod(w.shape) // (spread.tp if cut else 1) for w, cut in zip(weights, cut_by_tp, strict=True)]
    gathered = [0] * spread.dp
    for weight, cut, pieces in zip(weights, cut_by_tp, pieces_of(lengths, spread.zero, spread.dp), strict=True):
        for rank, _, _ in pieces if weight.is_hidden and (cut or len({piece[1:] for piece in pieces}) > 1) else ():
            gathered[rank] += 4 * prod(weight.shape)
    return max(gathered)


class NoArithmetic:
    """A kernel that computes nothing and says that every Σ u² is ``square``."""

    name = "none"

    def __init__(self, square: float) -> None:
        self._square = square

    def moments(self, _table: object, _move: Tensor, _multiply: Tensor, sums: Tensor) -> None:
        sums[:, 0] = self._square

    def _nothing(self, *_: object) -> None: ...

    bind = undo = move = multiply = multiply_back = orthonormalize = _nothing


def count_step(buffers: list[Buffer], cut: list[Tensor], square: float) -> Counted:
    """Step twice, and count what the second step hands to ``all_reduce``."""
    tensors = [buffer.tensor for buffer in buffers]
    optimizer = AdamW2(tensors, **_OPTIONS)
    optimizer._engine_layout = lambda: Layout(buffers)
    for tensor in tensors:
        tensor.grad = tensor.detach()
        optimizer.state[tensor] = {"step": torch.tensor(0.0), "exp_avg": tensor, "exp_avg_sq": tensor}
    sent: list[int] = []
    with (
        patch.object(dist, "all_reduce", lambda tensor, **_: sent.append(tensor.nbytes)),
        patch.object(blocks, "_cut_rows", lambda *_: cut),
        patch.object(walk, "pick", lambda *_, **__: NoArithmetic(square)),
    ):
        optimizer.step()
        sent.clear()
        optimizer.step()
    (stepped,) = optimizer._walks.values()
    return Counted(len(sent), sum(sent), vector_bytes(stepped._power.blocks))


def vector_bytes(of: blocks.Blocks) -> int:
    kept = [one for operand in of.operands for one in operand.kept]
    return sum(vectors.nbytes for vectors in (of.x, of.z, of.left, *kept))


@contextmanager
def fake_rank(spread: Spread, stage: int) -> Iterator[Groups]:
    """Be the last tensor-parallel rank of the middle data-parallel one in a pipeline stage, in Megatron's order."""
    tp, pp, dp, _ = spread
    first = stage * tp * dp + dp // 2 * tp
    rank = first + tp - 1
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=spread.ranks)
    try:
        tensor = dist.new_group(list(range(first, first + tp)))
        data = dist.new_group(list(range(stage * tp * dp + tp - 1, (stage + 1) * tp * dp, tp)))
        ends = [rank + (end - stage) * tp * dp for end in (0, pp - 1)]
        yield Groups(tensor, data, dist.new_group(ends) if pp > 1 and rank in ends else None)
    finally:
        dist.destroy_process_group()


def on_cpu(length: int) -> Tensor:
    return nn.Parameter(torch.empty(1).expand(length))  # of that length, without the memory


def on_device(length: int) -> Tensor:
    return nn.Parameter(torch.empty(length, device="meta"))


STATES = {"certified": (on_cpu, 0.0), "measured": (on_cpu, 1e30), "either (GPU)": (on_device, 1e30)}


def rows_of(name: str, model: Model, spread: Spread) -> list[dict[str, Any]]:
    """Return the rows of the table for one model on so many ranks, one per state."""
    settings = check_settings(**_OPTIONS, io=None, overrides=(), others={})
    most = dict.fromkeys(STATES, Counted(0, 0, 0))
    gathered = 0
    for stage in sorted({0, min(1, spread.pp - 1), spread.pp - 1}):  # those between are alike
        weights = model.stage(stage, spread.pp)
        gathered = max(gathered, muon_gather(weights, spread))
        with fake_rank(spread, stage) as groups:
            parameters = [parameter_of(weight, spread.tp, spread.tp - 1, groups) for weight in weights]
            cut = None
            for state, (tensor_of, square) in STATES.items():
                buffers = buffers_of(parameters, spread.zero, groups.data, tensor_of)
                if cut is None:
                    grid_of = Thresholds(settings, Layout(buffers), auto=False).grid
                    cut = cut_rows(weights, spread, groups, grid_of)
                counted = count_step(buffers, cut, square)
                most[state] = Counted(*map(max, most[state], counted))
    place = {"model": name, **spread._asdict(), "ranks": spread.ranks}
    return [{**place, "state": state, **one._asdict(), "muon_gather": gathered} for state, one in most.items()]


def size(count: int) -> str:
    return f"{count / 1e6:,.2f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB" if count else "0"
