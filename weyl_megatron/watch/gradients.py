"""‖G‖ of W_q, W_k and W_v as an optimizer steps them, any; AdamW² also notes its matrices' own.

An engine gives its optimizer pieces: slices of flat partitions, rows of a DTensor. Each rank sums
the squares of what its pieces have of a matrix's rows just before they are stepped, when they are
reduced, unscaled and clipped; the sums of all ranks are added up. No gradient is gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..engines import engine as engines
from ..engines.torch.plain import PlainTorch
from ..layouts.buffers import Buffer, Layout, Shard, model_names
from ..layouts.local import is_on_mesh, local_gradient
from ..spectral.collectives import Span, all_reduce_spans
from ..transformer.blocks import Block
from ..transformer.layers import Weight

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: Of an optimizer of a run: what an engine put around it, and the optimizer itself.
Wrapped = tuple[Any, torch.optim.Optimizer]


class _Held(NamedTuple):
    """What an optimizer is given of a parameter."""

    parameter: nn.Parameter
    buffer: Buffer
    shard: Shard


class _Matrix(NamedTuple):
    """One of a parameter's matrices."""

    tag: str
    rows: Tensor  # its numbers among the outputs of what ``Weight.cut`` takes
    elements: int  # on all ranks
    groups: tuple[ProcessGroup, ...]


@dataclass(frozen=True)
class _Piece:
    """Elements of a parameter in a tensor that the optimizer steps."""

    tensor: Tensor
    shard: Shard
    shape: tuple[int, int]  # of what ``Weight.cut`` takes
    first: tuple[int, int]  # where in it the tensor begins, where that has its two dimensions
    is_transposed: bool
    is_repeated: bool  # another rank counts what this one has
    matrices: tuple[_Matrix, ...]

    def sums(self, gradient: Tensor) -> Tensor:
        """Return Σ of squares and the number of elements here of every output, ``(2, outputs)``."""
        outputs = self.shape[1 if self.is_transposed else 0]
        sums = torch.zeros(2, outputs, dtype=torch.float64, device=gradient.device)
        if self.is_repeated:
            return sums
        if gradient.dim() == 2:
            self._add(sums, gradient, *self.first)
            return sums
        _, start, stop, offset = self.shard
        flat, width = gradient.detach()[offset : offset + stop - start], self.shape[1]
        row, col = divmod(start, width)
        if col and flat.numel():  # the end of a row
            head = flat[: width - col]
            self._add(sums, head.unsqueeze(0), row, col)
            flat, row = flat[head.numel() :], row + 1
        lines = flat.numel() // width
        self._add(sums, flat[: lines * width].view(lines, width), row, 0)
        self._add(sums, flat[lines * width :].unsqueeze(0), row + lines, 0)
        return sums

    def _add(self, sums: Tensor, block: Tensor, row: int, col: int) -> None:
        """Add a block of the parameter that begins at (row, col)."""
        if not block.numel():
            return
        along, first = (0, col) if self.is_transposed else (1, row)
        dtype = torch.promote_types(block.dtype, torch.float32)
        norms = torch.linalg.vector_norm(block.detach(), dim=along, dtype=dtype)
        sums[0, first : first + norms.numel()] += norms.double().square()
        sums[1, first : first + norms.numel()] += block.shape[along]


class Gradients:
    """Reads gradients while a step is made.

    Args:
        engine: DeepSpeed's, or None.
        chunks: the model.
        blocks: those to look at.
    """

    def __init__(self, engine: Any, chunks: Sequence[nn.Module], blocks: Sequence[Block]) -> None:
        self._engine, self._chunks, self._blocks = engine, chunks, blocks
        self._pieces: list[tuple[torch.optim.Optimizer, list[_Piece]]] | None = None
        self._hooks: list[Any] = []
        self._sums: dict[int, Tensor] = {}  # by id of the piece
        self._refused: dict[str, str] = {}
        self.missing: dict[str, str] = {}  #: why, by tag, of what the last norms() left out

    def arm(self, optimizers: Sequence[Wrapped]) -> None:
        """Look at the next step of the optimizers. Collective."""
        self.disarm()
        self._sums = {}
        is_plain = self._engine is None and not any(_is_megatron(w) for w, _ in optimizers)
        # Engines step tensors of their own, which stay; the model's may be replaced.
        if self._pieces is None or is_plain:
            self._refused = {}
            self._pieces = [(inner, self._read(outer, inner)) for outer, inner in optimizers]
        for optimizer, pieces in self._pieces:
            if pieces:
                hook = self._reader(pieces)
                self._hooks.append(optimizer.register_step_pre_hook(hook))

    def disarm(self) -> None:
        """Take every hook away again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def norms(self) -> dict[str, float]:
        """Return ‖G‖ by tag, since :meth:`arm`; what no rank saw is left out. Collective."""
        self.disarm()
        matrices: dict[str, _Matrix] = {}
        sums: dict[str, Tensor] = {}
        for _, pieces in self._pieces or ():
            for piece in pieces:
                seen = self._sums.get(id(piece))
                for matrix in piece.matrices:
                    matrices[matrix.tag] = matrix
                    total = sums.setdefault(matrix.tag, torch.zeros(2, dtype=torch.float64))
                    if seen is not None:
                        total += seen[:, matrix.rows.to(seen.device)].sum(1).cpu()
        self.missing = dict(self._refused)
        if not matrices:
            return {}
        spans = [
            Span(matrix.groups, 2 * number, 2 * number + 2)
            for number, matrix in enumerate(matrices.values())
            if matrix.groups
        ]
        together = torch.cat(list(sums.values()))
        all_reduce_spans(together, spans)
        norms = {
            tag: squares**0.5
            for (tag, matrix), (squares, elements) in zip(
                matrices.items(), together.view(-1, 2).tolist(), strict=True
            )
            if elements == matrix.elements
        }
        unseen = "no step was made of all elements."
        self.missing = self._refused | {tag: unseen for tag in matrices if tag not in norms}
        return norms

    def _reader(self, pieces: Sequence[_Piece]) -> Callable[..., None]:
        def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            # Engines list what they step now: some call the optimizer once for each group.
            listed = {id(t) for group in optimizer.param_groups for t in group["params"]}
            scale = getattr(optimizer, "grad_scale", None)  # GradScaler's, for a fused optimizer
            for piece in pieces:
                gradient = local_gradient(piece.tensor) if id(piece.tensor) in listed else None
                if gradient is not None:
                    sums = piece.sums(gradient)
                    if scale is not None:
                        sums[0] /= scale.to(sums.device).double().square()
                    self._sums[id(piece)] = sums

        return hook

    def _read(self, wrapper: Any, optimizer: torch.optim.Optimizer) -> list[_Piece]:
        """Return what the optimizer steps of the blocks; nothing where an engine's layout is not
        understood. Collective.
        """
        wanted: dict[int, list[tuple[str, Block, Weight]]] = {}
        for block in self._blocks:
            for role in ("q", "k", "v"):
                weight = block.weights.get(role)
                parameter = None if weight is None else weight.parameter
                if weight is not None and parameter is not None:
                    tag = f"block/{block.number}/grad_{role}"
                    wanted.setdefault(id(parameter), []).append((tag, block, weight))
        refusal = ""
        held: list[_Held] = []
        try:
            held = list(self._held(wrapper, optimizer, wanted))
        except ValueError as error:
            refusal = str(error)
        if self._engine is not None and dist.is_initialized():
            # A rank's partition may be another than its layout says, and the others' not.
            refusals: list[str] = [""] * dist.get_world_size()
            dist.all_gather_object(refusals, refusal)
            refusal = next(filter(None, refusals), "")
        if refusal:
            tags = (tag for weights in wanted.values() for tag, *_ in weights)
            self._refused |= dict.fromkeys(tags, refusal)
            return []
        return [_piece(each, wanted[id(each.parameter)]) for each in held]

    def _held(
        self, wrapper: Any, optimizer: torch.optim.Optimizer, wanted: Mapping[int, Any]
    ) -> Iterator[_Held]:
        """Yield what the optimizer is given of the parameters that are wanted, by ``id``."""
        if self._engine is not None:
            from ..engines.deepspeed.adapter import read_layout

            named = dict(self._engine.module.named_parameters())
            by_name = {name: named[whole] for whole, name in model_names(named).items()}
            for buffer in read_layout(self._engine).buffers:
                for shard in buffer.shards:
                    parameter = by_name.get(shard.parameter.name)
                    if parameter is not None and id(parameter) in wanted:
                        yield _Held(parameter, buffer, shard)
            return
        stepped: Sequence[Any]
        if _is_megatron(wrapper):
            from ..engines.megatron.layout import stepped_layout

            stepped, layout = stepped_layout(wrapper, self._chunks, wanted)
        else:
            listed = [t for group in optimizer.param_groups for t in group["params"]]
            stepped = [t for t in listed if id(t) in wanted]
            layout = self._plain_layout(stepped)
        for parameter, buffer in zip(stepped, layout.buffers, strict=True):
            yield _Held(parameter, buffer, buffer.shards[0])

    def _plain_layout(self, stepped: Sequence[Tensor]) -> Layout:
        names = {id(p): n for chunk in self._chunks for n, p in chunk.named_parameters()}
        known = engines.Known([{"params": stepped}], lambda: names, {}, None)
        return PlainTorch().read_layout(known)


def _piece(held: _Held, wanted: Sequence[tuple[str, Block, Weight]]) -> _Piece:
    described = held.shard.parameter
    is_cut_of_whole = is_on_mesh(held.parameter)  # as it is whole while its layer computes
    shape = described.shape if is_cut_of_whole else described.local_shape
    starts = described.box.starts if is_cut_of_whole and described.box else (0, 0)
    spreads = described.spreads
    groups = (*held.buffer.groups, *(spread.group for spread in spreads))
    share = prod(described.shape) // prod(shape)
    is_transposed = wanted[0][2].is_transposed
    outputs, inputs = (shape[1], shape[0]) if is_transposed else (shape[0], shape[1])
    matrices = []
    for tag, _, weight in wanted:
        rows = weight.rows(outputs)
        matrices.append(_Matrix(tag, rows, rows.numel() * inputs * share, groups))
    return _Piece(
        held.buffer.tensor,
        held.shard,
        (shape[0], shape[1]),
        (starts[0], starts[1]),
        is_transposed,
        any(spread.is_repeated for spread in spreads),
        tuple(matrices),
    )


def _is_megatron(wrapper: Any) -> bool:
    return type(wrapper).__module__.startswith("megatron.core.optimizer")
