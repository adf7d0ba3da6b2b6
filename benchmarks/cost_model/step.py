"""What a step launches, and what each launch has to do: from the kernels' own tables of units."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from benchmarks.compile_kernels import NOTHING
from benchmarks.models import MODELS, Named, Shape, is_of_a_block
from weyl_megatron.device_step import _STALE_ITERS
from weyl_megatron.kernels import triton_kernel, units
from weyl_megatron.kernels.passes import Passes, passes_of
from weyl_megatron.kernels.triton_step import orthonormalize, project
from weyl_megatron.layouts.buffers import Buffer, Layout, Parameter, Plan, Shard, plan_of
from weyl_megatron.settings import check_settings
from weyl_megatron.spectral import blocks
from weyl_megatron.thresholds import Thresholds

from .bounds import Launch, Work
from .code import Kernel, Usage, constant, executed, exits, kernels
from .gpus import Gpu

#: As in AdamW2's defaults, and in docs/step_time.md.
ITERS = 2
_OPTIONS: dict[str, Any] = {
    "tau": 0.01,
    "power_iters": ITERS,
    "floor_std": 1e-3,
    "clip_vectors": False,
}

STEP, UNDO, MOVE = 0, 1, 2

#: Bytes of float32 that a pass reads and writes, an element.
PASSES = {STEP: 28, UNDO: 16, MOVE: 16}

#: And a product, by operand and whether the moments are updated on the way: A X, and Aᵀ Y.
PRODUCTS = {(0, True): (4, 4), (0, False): (4, 4), (1, True): (20, 8), (1, False): (8, 8)}

#: What the host sends in a step, and what it is told.
COPIES = 2


class Tables(NamedTuple):
    """The units of a model's step on a GPU."""

    shape: Shape
    plan: Plan
    passes: Passes
    products: units.Products
    is_hidden: Sequence[bool]  #: of each matrix


class Active(NamedTuple):
    """What a step does."""

    early: bool  #: whether the certificate settles all
    launched: bool  #: whether the host launches iterations
    of_weight: int = 0  #: iterations of every W
    of_update: int = 0
    projected: bool = False  #: whether the hidden matrices' moves clip singular values


@cache
def tables(model: str, gpu: Gpu, width: int) -> Tables:
    """Return the tables of one of the benchmarks' models; no weight is allocated.

    Args:
        model: of benchmarks.models.
        gpu: of which the multiprocessors are counted.
        width: vectors of U of hidden matrices; others, and W, have 4.
    """
    named = MODELS[model].parameters()
    plan = _plan(named)
    is_hidden = [is_of_a_block(matrix.name) for matrix in plan.matrices]
    with patch.object(blocks, "start_block", lambda _, cols, b: torch.zeros(cols, b)):
        resident = blocks.Blocks(
            plan.matrices,
            plan.tiles,
            (4, [width if hidden else 4 for hidden in is_hidden]),
            [list(range(len(plan.matrices)))],
            piggybacks=False,
            device=torch.device("cpu"),
            dtype=torch.float32,
            resident=True,
        )
    kinds = [(torch.float32, torch.float32)] * len(named)
    programs = triton_kernel._PROGRAMS * gpu.sms
    everything = [*plan.tiles, *plan.replicas, *plan.rest]
    device = torch.device("cpu")
    sizes = len(plan.tiles), len(plan.matrices)
    of_passes = passes_of(everything, *sizes, kinds, programs, device)
    bands = [triton_kernel._ROWS[b][operand] for operand, b in enumerate((4, width))]
    of_products = units.products(resident, bands, (4, width), kinds, programs, triton_kernel._COLS)
    return Tables(MODELS[model], plan, of_passes, of_products, is_hidden)


def _plan(named: Sequence[Named]) -> Plan:
    buffers = []
    for name, shape in named:
        tensor = torch.empty(shape, device="meta")
        shard = Shard(Parameter(name, shape), 0, tensor.numel(), 0)
        buffers.append(Buffer(tensor, (shard,)))
    settings = check_settings(**_OPTIONS, io=None, overrides=(), others={})
    return plan_of(buffers, Thresholds(settings, Layout([]), auto=False).grid)


class Step:
    """The launches of a model's step on a GPU.

    Args:
        model, gpu, width: as for :func:`tables`.
    """

    def __init__(self, model: str, gpu: Gpu, width: int) -> None:
        self._tables, self._width = tables(model, gpu, width), width
        self._kernels = compiled(gpu.arch, width)
        self._matrices = len(self._tables.plan.matrices)

    def launches(self, active: Active) -> list[Launch]:
        """Return what is launched, in order."""
        made = [self._small("expect"), self._pass(STEP, active.early, not active.early)]
        made += [self._of_matrices("add_norms", active.early), self._small("settle COLD=False")]
        if active.launched:
            made.append(self._pass(UNDO, False, False))
            stale = ITERS + _STALE_ITERS
            rounds = (stale + 1) // 2, stale
            for number in range(stale):
                making = number < active.of_weight, number < active.of_update
                made.append(self._products(number, making, number < rounds[0]))
                made.append(self._collect(number, making))
                made.append(self._orthonormalize(making))
            made.append(self._small("decide_rates"))
            if self._width > 4:
                made.append(self._clip(active.projected))
            made.append(self._pass(MOVE, not active.early, False, active.projected))
            if self._width > 4:
                made.append(self._project(active.projected))
        return [*made, self._of_matrices("follow", True)]

    def adamw(self) -> Launch:
        """Return a pass that steps everything at the scheduled rate."""
        return self._pass(STEP, True, True)

    def _pass(self, mode: int, of_matrices: bool, of_rest: bool, projected: bool = False) -> Launch:
        """Return an elementwise pass; what is no matrix is stepped with the matrices, or alone."""
        is_hidden = self._tables.is_hidden
        kernel = self._kernels[f"elementwise MODE={mode}"]

        def work(row: tuple[int, ...]) -> Work:
            rows, cols, matrix = row[2], row[3], row[5]
            is_rest = of_rest or (of_matrices and mode == STEP)
            if matrix < -1 or not (of_matrices if matrix >= 0 else is_rest):
                return Work(exits(kernel))
            values = {"row": row, "body": cols // 8 * 8, "edges": cols % 8}
            warp = _executed(
                kernel,
                tuple(sorted(values.items())),
                r"sums, STEP, WIDE" if mode == MOVE else NOTHING,
                r"range\(0, body, WIDE\)",
            )
            return Work(warp, stream=PASSES[mode] * rows * cols)

        # Where a run begins changes nothing here.
        table = [
            (
                0,
                0,
                *row[2:5],
                -2 if row[5] >= 0 and projected and is_hidden[row[5]] else min(row[5], 0),
                row[6],
            )
            for row in _rows(self._tables.passes.units)
        ]
        return _launch(kernel, table, work)

    def _products(self, number: int, making: tuple[bool, bool], are_both: bool) -> Launch:
        is_first = number == 0
        kernel = self._kernels[f"products FIRST={is_first}"]
        lanes = kernel.constants["LANES"]

        def work(row: tuple[int, ...]) -> Work:
            rows, cols, operand, n, width = row[2], row[3], row[7], row[9], row[13]
            if not making[operand]:
                return Work(exits(kernel))
            is_wide = cols % 8 == 0 and (row[1] | row[4] | n) % 4 == 0
            at_once = kernel.constants["ROWS_U" if operand else "ROWS_W"]
            values = {
                "row": row,
                "count": rows,
                "cols": cols,
                "n": n,
                "width": width,
                "ROWS": at_once,
                "COLS": 4 * lanes if is_wide else lanes,
            }
            other = "hyper, False" if operand else "MOMENTS if FIRST else UPDATES"
            warp = _executed(
                kernel,
                tuple(sorted(values.items())),
                rf"{other}|tl.zeros\(\(WIDEST|atomic_add|LANES, {not is_wide}, STATE",
                r"for start in range\(0, cols, COLS\)",
            )
            return Work(
                warp,
                stream=PRODUCTS[operand, is_first][0] * rows * cols,
                x=-(-rows // at_once) * 4 * width * cols,
                x_held=4 * width * n,
                handed=4 * width * (rows + width),
            )

        table = [
            (0, row[1] % 4, *row[2:5], 0, 0, row[7], 0, row[9], row[10], 0, -1, row[13])
            for row in _rows(self._tables.products.units)
            if are_both or row[7] == 1
        ]
        return _launch(kernel, table, work)

    def _collect(self, number: int, making: tuple[bool, bool]) -> Launch:
        kernel = self._kernels[f"collect FIRST={number == 0}"]

        cols, strips = triton_kernel._COLS, _rows(self._tables.products.strips)

        def work(row: tuple[int, ...]) -> Work:
            operand, n, width, start, count, rows = row
            if not making[operand]:
                return Work(exits(kernel))
            at_once = kernel.constants["ROWS_U" if operand else "ROWS_W"]
            values = {
                "width": width,
                "count": rows,
                "whole": rows // at_once * at_once,
                "ROWS": at_once,
                "strips": 0,
                "first": 0,
                "cut": count,
                "last": count,
                "rows": 0,
            }
            other = "False, 0, BLOCK_W" if operand else "FIRST, 1, BLOCK_U"
            is_gram, is_wide = start < 0, n % 8 == 0
            branch = r"_strip\(|_columns\(" if is_gram else r"_gram\("
            without = rf"{other}|{branch}|COLS, {not is_wide}, STATE"
            warp = _executed(kernel, tuple(sorted(values.items())), without, r"_rows: for ")
            if is_gram:
                return Work(warp, handed=4 * count * width * width)
            held = 4 * width * min(n - start, cols)
            moved = PRODUCTS[operand, number == 0][1] * rows * min(n - start, cols)
            # What several strips sum is written, read by the last, and written.
            handed = 4 * width * rows + held * (3 if count > 1 else 1)
            return Work(warp, stream=moved, handed=handed)

        # Columns are as any others of so many.
        table = [
            (row[0], row[3], row[4], -1, row[12] - row[11], 0)
            if row[5] < 0
            else (row[0], min(row[3] - row[5], cols), row[4], 0, row[7], strips[row[6]][2])
            for row in _rows(self._tables.products.pieces)
        ]
        return _launch(kernel, table, work)

    def _clip(self, is_active: bool) -> Launch:
        """Return the launch that decides how matrices are projected, a program for each block."""
        kernel = self._kernels["clip"]
        values = (("turns", project._SWEEPS.value * (kernel.constants["BLOCK"] - 1)),)

        def work(row: tuple[int, ...]) -> Work:
            is_projected = is_active and row[0] == 1 and self._tables.is_hidden[row[1]]
            if not is_projected:
                return Work(exits(kernel))
            return Work(_executed(kernel, values, NOTHING, NOTHING))

        table = [(*row[:2],) for row in _rows(self._tables.products.blocks)]
        return _launch(kernel, table, work, are_dependent=True)

    def _project(self, is_active: bool) -> Launch:
        """Return the move of what is projected, a program for each piece of U's Z."""
        kernel = self._kernels["project"]
        cols, strips = triton_kernel._COLS, _rows(self._tables.products.strips)

        def work(row: tuple[int, ...]) -> Work:
            n, wide, width, rows, is_hidden = row
            if not (is_active and is_hidden):
                return Work(exits(kernel))
            values = {"width": width, "count": rows, "ROWS": kernel.constants["ROWS"]}
            without = rf"COLS, {wide % 8 != 0}, STATE"
            warp = _executed(kernel, tuple(sorted(values.items())), without, r"_rows: for begin")
            handed = 4 * width * (rows + n)
            return Work(warp, stream=PASSES[MOVE] * rows * n, handed=handed)

        table = [
            (min(row[3] - row[5], cols), row[3], row[4], strips[row[6]][2], is_hidden)
            for row in _rows(self._tables.products.pieces)
            if row[0] == 1 and row[5] >= 0
            for is_hidden in (self._tables.is_hidden[row[1]],)
        ]
        return _launch(kernel, table, work)

    def _orthonormalize(self, making: tuple[bool, bool]) -> Launch:
        kernel = self._kernels["orthonormalize"]

        def work(row: tuple[int, ...]) -> Work:
            operand, n, width = row[0], row[4], row[5]
            if not making[operand]:
                return Work(exits(kernel))
            constants = kernel.constants
            block = constants[_BLOCKS[operand]]
            values = {
                "row": row,
                "n": n,
                "width": width,
                "AT_ONCE": constant(orthonormalize._gram_of_rows, "AT_ONCE", BLOCK=block),
                # What is kept for projection.
                "size": width * (n + width) if operand and self._width > 4 else 0,
            }
            is_shared = constants["BLOCK_W"] == constants["BLOCK_U"]  # one code serves both
            other = rf"_block\([^>]*{_BLOCKS[1 - operand]}, LANES\)"
            without = NOTHING if is_shared else other
            warp = _executed(kernel, tuple(sorted(values.items())), without, NOTHING)
            return Work(warp, x=3 * 4 * width * n)

        table = [(row[0], 0, 0, 0, *row[4:]) for row in _rows(self._tables.products.blocks)]
        return _launch(kernel, table, work, are_dependent=True)

    def _of_matrices(self, name: str, is_active: bool) -> Launch:
        """Return a launch of one program for each matrix, which adds up what its units summed."""
        kernel = self._kernels[name]

        def work(row: tuple[int, ...]) -> Work:
            start, stop = row if is_active else (0, 0)
            values = (("start", start), ("stop", stop))
            return Work(_executed(kernel, values, NOTHING, NOTHING))

        table = [(0, row[1] - row[0]) for row in _rows(self._tables.passes.spans)]
        return _launch(kernel, table, work, are_dependent=True)

    def _small(self, name: str) -> Launch:
        """Return a launch of one program for every 128 matrices."""
        kernel = self._kernels[name]
        work = Work(_executed(kernel, (), NOTHING, NOTHING))
        programs = -(-self._matrices // 128)
        return Launch(name.split()[0], kernel.warps, kernel.at_once, [(programs, work)], True)


_BLOCKS = "BLOCK_W", "BLOCK_U"


@cache
def compiled(arch: int, width: int) -> dict[str, Kernel]:
    """Return the kernels of a step."""
    return kernels(arch, width)


_KNOWN: dict[tuple[Any, ...], Usage] = {}


def _executed(
    kernel: Kernel, values: tuple[tuple[str, Any], ...], without: str, from_dram: str
) -> Usage:
    """Return what :func:`executed` does; many units are alike."""
    key = id(kernel), values, without, from_dram
    if key not in _KNOWN:
        _KNOWN[key] = executed(kernel, dict(values), without=without, from_dram=from_dram)
    return _KNOWN[key]


def _rows(table: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in table.tolist()]


def _launch(
    kernel: Kernel,
    table: Iterable[tuple[int, ...]],
    work: Callable[[tuple[int, ...]], Work],
    *,
    are_dependent: bool = False,
) -> Launch:
    """Return a launch of a program for each row of a table."""
    of_rows: dict[tuple[int, ...], Work] = {}
    programs: list[tuple[int, Work]] = []
    for row, same in groupby(table):
        if row not in of_rows:
            of_rows[row] = work(row)
        programs.append((sum(1 for _ in same), of_rows[row]))
    name = kernel.name
    if "MODE" in kernel.constants:
        name = {STEP: "step", UNDO: "undo", MOVE: "move"}[kernel.constants["MODE"]]
    return Launch(name, kernel.warps, kernel.at_once, programs, are_dependent)
