"""The step on a GPU in Triton (triton_ops.py): float32, in a number of launches that does not grow
with depth.

Nothing here waits for the device: which matrices are iterated is read by the kernels, from masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..spectral.blocks import Blocks, Table
from ..spectral.power import BLOCK
from ..spectral.ritz import INDEPENDENT
from . import triton_ops as ops
from .stepped import Hyper, Stepped

#: Rows of a tile that one program multiplies: each costs a partial Z, BLOCK / rows of the tile's
#: bytes.
_PRODUCT_ROWS = 512

#: Elements that one program of an elementwise pass works on.
_ELEMENTS = 1 << 14

#: Vectors per matrix, up to a power of two.
_BLOCK = 1 << (BLOCK - 1).bit_length()

#: Rows and columns that a program holds at once.
_ROWS, _COLS = 16, 128


class _Units(NamedTuple):
    """The bands of rows of a table's tiles, one program each."""

    units: Tensor  # (units, 4): tile, first row, rows, where the partial Z lies
    spans: Tensor  # (matrices here, 3): matrix, its first unit, the one behind its last
    room: int  # of all partial Z
    longest: int  # of one


class TritonKernel:
    """See :class:`.Kernel`."""

    name = "triton"

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self._cuts: dict[tuple[int, bool], _Units] = {}
        self._batches = [
            torch.tensor(batch, dtype=torch.int64, device=blocks.x.device)
            for batch in blocks.batches
        ]
        self._pointers = self._hypers = torch.empty(0)
        self._alive: object = None

    def bind(self, weights: Sequence[Tensor], stepped: Sequence[Stepped | None]) -> None:
        device = self._blocks.x.device
        pointers, hypers = [], []
        for weight, state in zip(weights, stepped, strict=True):
            if state is None:
                pointers.append([weight.data_ptr(), 0, 0, 0])
                hypers.append([0.0] * 12)
            else:
                tensors = weight, state.grad, state.exp_avg, state.exp_avg_sq
                pointers.append([tensor.data_ptr() for tensor in tensors])
                hypers.append(_hyper(state.hyper))
        self._pointers = _upload(torch.tensor(pointers, dtype=torch.int64), device)
        self._hypers = _upload(torch.tensor(hypers, dtype=torch.float32), device)
        self._alive = weights, stepped  # the tensors at these addresses
        for weight in weights:  # they are changed behind autograd's back
            torch.autograd.graph.increment_version(weight)

    def release(self) -> None:
        self._alive = None

    def step(self, table: Table, mask: Tensor, sums: Tensor) -> None:
        self._elementwise(table, mask, self._hypers, sums, mode=0, columns=(0, 3))

    def moments(self, table: Table, mask: Tensor, sums: Tensor) -> None:
        self._products(table, mask, source=2, operand=1, sums=sums)

    def undo(self, table: Table, mask: Tensor) -> None:
        self._elementwise(table, mask, self._hypers, None, mode=1, columns=(0, 0))

    def move(self, table: Table, mask: Tensor, rates: Tensor, sums: Tensor) -> None:
        self._elementwise(table, mask, rates, sums, mode=2, columns=(2, 3))

    def multiply(self, operand: int, table: Table, mask: Tensor) -> None:
        self._products(table, mask, source=operand, operand=operand)

    def multiply_back(self, operand: int, table: Table, mask: Tensor) -> None:
        self._products(table, mask, source=operand, operand=operand, back=True)

    def orthonormalize(
        self, operand: int, batch: int, mask: Tensor, more: Tensor, sigma: Tensor, gain: Tensor
    ) -> None:
        blocks, numbers = self._blocks, self._batches[batch]
        independent = INDEPENDENT * torch.finfo(torch.float32).eps
        ops.orthonormalize[(len(numbers),)](
            blocks.operands[operand].shape,
            numbers,
            mask,
            more,
            blocks.x,
            blocks.z,
            sigma,
            gain,
            independent,
            BLOCK=_BLOCK,
            COLS=_COLS,
        )

    def _products(
        self,
        table: Table,
        mask: Tensor,
        *,
        source: int,
        operand: int,
        back: bool = False,
        sums: Tensor | None = None,
    ) -> None:
        if not table.tiles:
            return
        blocks, units = self._blocks, self._units_of(table, elementwise=False)
        device = blocks.x.device
        partial = torch.zeros(units.room, device=device)
        partial_sums = torch.zeros(len(units.units), 3, device=device)
        ops.products[(len(units.units),)](
            table.columns,
            units.units,
            self._pointers,
            self._hypers,
            mask,
            blocks.x,
            blocks.left,
            partial,
            partial_sums,
            BACK=back,
            SOURCE=source,
            BLOCK=_BLOCK,
            ROWS=_ROWS,
            COLS=_COLS,
        )
        shape = blocks.operands[operand].shape
        grid = (len(units.spans), -(-units.longest // 1024))
        ops.add_partials[grid](
            shape, units.spans, units.units, mask, partial, blocks.z, LENGTH=1024
        )
        if sums is not None:
            ops.add_sums[(len(units.spans),)](
                units.spans, mask, partial_sums, sums, FIRST=0, LAST=1
            )

    def _elementwise(
        self,
        table: Table,
        mask: Tensor,
        rates: Tensor,
        sums: Tensor | None,
        *,
        mode: int,
        columns: tuple[int, int],
    ) -> None:
        if not table.tiles:
            return
        units = self._units_of(table, elementwise=True)
        partial = torch.zeros(len(units.units), 3, device=self._blocks.x.device)
        ops.elementwise[(len(units.units),)](
            table.columns,
            units.units,
            self._pointers,
            self._hypers,
            mask,
            rates,
            partial,
            MODE=mode,
            ROWS=_ROWS,
            COLS=_COLS,
        )
        if sums is not None and len(units.spans):
            first, last = columns
            ops.add_sums[(len(units.spans),)](
                units.spans, mask, partial, sums, FIRST=first, LAST=last
            )

    def _units_of(self, table: Table, *, elementwise: bool) -> _Units:
        key = table.columns.data_ptr(), elementwise
        if key not in self._cuts:
            self._cuts[key] = _cut(table, self._blocks, elementwise)
        return self._cuts[key]


def _cut(table: Table, blocks: Blocks, elementwise: bool) -> _Units:
    """Cut a table's tiles into bands of rows."""
    units: list[list[int]] = []
    room = longest = 0
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    widths = table.columns[:, 9].tolist()
    for number, (tile, width) in enumerate(zip(table.tiles, widths, strict=True)):
        rows = max(1, _ELEMENTS // tile.cols) if elementwise else _PRODUCT_ROWS
        cols = 0 if elementwise else blocks.matrices[tile.matrix].cols
        length = 0 if elementwise else width * (cols + width)  # of Z and Yᵀ Y
        for row in range(0, tile.rows, rows):
            if width:
                first.setdefault(tile.matrix, len(units))
                last[tile.matrix] = len(units) + 1
            units.append([number, row, min(rows, tile.rows - row), room])
            room += length
        longest = max(longest, length)
    spans = [[matrix, start, last[matrix]] for matrix, start in first.items()]
    device = table.columns.device
    return _Units(
        torch.tensor(units, dtype=torch.int64).view(-1, 4).to(device),
        torch.tensor(spans, dtype=torch.int64).view(-1, 3).to(device),
        room,
        longest,
    )


def _hyper(hyper: Hyper) -> list[float]:
    """Return a row of the hyperparameters as triton_ops.py reads it."""
    lr, beta1, beta2, eps, weight_decay, correction1, correction2 = hyper.numbers()
    root = correction2**0.5
    moments = [1 - beta1, beta2, 1 - beta2]
    direction = [correction1 / root, eps * correction1]
    move = [lr, weight_decay, correction1, root, eps]
    return [*moments, *direction, *move, 0.0, 0.0]


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host's on the device, without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
