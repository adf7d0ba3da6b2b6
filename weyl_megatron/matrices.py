"""Tensors that are stepped together, as the matrices that they hold pieces of."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .batches import Tables, batches_of, spans_of
from .device_step import DeviceStep
from .environment import DOCTOR, KERNEL
from .host_step import HostStep
from .kernels import VECTORS_ON_GPU, Stepped, make, make_triton, pick
from .layouts.buffers import Buffer, plan_of
from .layouts.local import local
from .layouts.plain import dense
from .limits import Schedule
from .projection import Projector
from .spectral import PowerIteration
from .spectral.blocks import can_fit, fitted
from .spectral.certificate import Certificate, are_same
from .spectral.collectives import all_reduce_spans
from .spectral.power import BLOCK, COLD_ITERS, rows_of
from .spectral.seen import check_cut
from .stats import MatrixStats, entries
from .thresholds import Thresholds

#: The number of U among the operands of the products; W is operand 0.
_UPDATE = 1


class SavedMatrix(NamedTuple):
    """What a checkpoint holds of one matrix."""

    step: float  #: how many had been made
    blocks: list[Tensor]  #: the vectors, of W and of U
    bounds: list[Tensor]  #: the certificate's numbers
    #: whether these are of the whole matrix, and not of what the rank has that saved it
    is_global: bool = False


class MatrixGroup:
    """The matrices of tensors that are stepped together.

    Every rank of the tensors' process groups goes through the same matrices in the same order, with
    or without a piece of them, so that collectives never diverge. Collective over these groups.

    A step is ``begin``, ``move_early``, then ``sigmas``, ``rates`` and ``move`` for every batch
    that ``waiting`` yields, then ``end``.

    Args:
        buffers: what lies in the tensors, which are on one device.
        thresholds: τ and the floor of every matrix.
        power_iters: block power iterations of a matrix that is measured.
        is_adamw: whether every τ is infinite.
        is_amsgrad: whether any of them divides by the largest V so far.
        param_groups: of each buffer.
        clips: what those say of it, each once, see :func:`.settings.clip_of`.

    Raises:
        ValueError: ranks that share a matrix step it in different kernels; or a kernel does not
            have what a parameter group asks for.
    """

    def __init__(
        self,
        buffers: Sequence[Buffer],
        thresholds: Thresholds,
        power_iters: int,
        *,
        is_adamw: bool = False,
        is_amsgrad: bool = False,
        param_groups: Sequence[Mapping[str, Any]] = (),
        clips: Sequence[tuple[str, int]] = (),
    ) -> None:
        tensors = [buffer.tensor for buffer in buffers]
        self.tensors, self._thresholds, self._iters = tensors, thresholds, power_iters
        self.is_amsgrad, self.is_adamw, self.clips = is_amsgrad, is_adamw, clips
        self._plan = plan_of(buffers, thresholds.grid)
        self.names = [matrix.name for matrix in self._plan.matrices]
        self._device = tensors[0].device
        name = pick(tensors, plain=is_adamw or is_amsgrad)
        self._steers_itself = name == "triton"
        vectors = self._read_vectors([] if is_adamw else param_groups)
        #: the matrices whose singular values are clipped
        self._projected = [k for k, width in enumerate(vectors) if width]
        is_double = all(tensor.dtype == torch.float64 for tensor in tensors)
        everything = [list(range(len(self.names)))]
        on_host = self._device.type == "cpu"
        batches = everything if self._steers_itself else batches_of(self._plan, on_host)
        self._power = PowerIteration(
            self._plan.matrices,
            self._plan.tiles,
            widths=(BLOCK, [width or BLOCK for width in vectors]),
            batches=batches,
            piggybacks=not self._steers_itself,
            device=self._device,
            dtype=torch.float64 if is_double else torch.float32,
            resident=self._steers_itself,
        )
        eps = max((torch.finfo(tensor.dtype).eps for tensor in tensors), default=0.0)
        self.certificate = Certificate(self._plan.matrices, eps, self._device)
        self._norm_spans = spans_of(self._plan.matrices, 2)
        refusal: ValueError | None = None
        try:
            self._check_projected(vectors)
            self._step = self._make_step(name, power_iters)
        except ValueError as error:  # the other ranks must not wait for this one
            refusal = error
        self._check_ranks(name, vectors, refusal)
        limits_on = torch.device("cpu") if self._steers_itself else self._device
        self._schedule = Schedule(self._plan, thresholds, limits_on)
        self._cold = True  # nothing is known of the vectors
        self._has_stepped = False
        self._squares_of_all: Tensor | None = None  # Σ w², of what other ranks have, too

    def _make_step(self, name: str, iters: int) -> HostStep | DeviceStep:
        """Return what goes through the middle of a step: Triton's kernels steer themselves."""
        plan, blocks, certificate = self._plan, self._power.blocks, self.certificate
        # A step that was made too early can be taken back where rounding it twice is still
        # rounding.
        exact = torch.float32, torch.float64
        is_exact = [self.tensors[number].dtype in exact for number in plan.buffer_of]
        can_undo = torch.tensor(is_exact, dtype=torch.bool, device=self._device)
        if name == "triton":
            everything = [*plan.tiles, *plan.replicas, *plan.rest]
            kernel = make_triton(
                blocks, everything, len(plan.tiles), len(self.tensors), self._projected
            )
            return DeviceStep(
                blocks, kernel, certificate, can_undo, plan.buffer_of, self._norm_spans, iters
            )
        tables = Tables(plan, blocks.batches, blocks.operands[_UPDATE], self._device)
        host_kernel = make(name, blocks)
        projector = None
        if self._projected:
            projector = Projector(
                self._power, host_kernel, plan, _UPDATE, self._projected, self._device
            )
        return HostStep(
            self._power,
            host_kernel,
            tables,
            certificate,
            can_undo,
            self._norm_spans,
            iters,
            projector,
        )

    def _read_vectors(self, param_groups: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return how many vectors see the update of every matrix that is projected, else 0."""
        plan = self._plan
        if not param_groups:
            return [0] * len(plan.matrices)
        pairs = zip(plan.parameters, plan.buffer_of, strict=True)
        return [self._thresholds.vectors(each, param_groups[number]) for each, number in pairs]

    def _check_projected(self, vectors: Sequence[int]) -> None:
        """Raise ValueError on what cannot be projected here."""
        most = max(vectors, default=0)
        if self._steers_itself and most > VECTORS_ON_GPU:
            raise ValueError(
                f"AdamW2: vectors got {most}, the kernels for a GPU take at most {VECTORS_ON_GPU}, "
                f"or {KERNEL}=torch."
            )
        for tile in self._plan.replicas:
            if vectors[tile.matrix]:
                check_cut(self._power.blocks, tile)

    def _check_ranks(self, name: str, vectors: Sequence[int], refusal: ValueError | None) -> None:
        """Raise ValueError where a rank has refused a matrix, or steps it in another way than the
        others. Collective.

        Two kernels round differently, as does one that is compiled for two kinds of processors.
        Where a rounding decides whether one more iteration is made, ranks would wait for each other
        for ever.

        Args:
            name: of the kernel here.
            vectors: of every matrix that is projected, else 0.
            refusal: what this rank has refused.
        """
        arithmetic = "" if refusal else self._step.arithmetic
        number = float(zlib.crc32(f"{name} {arithmetic}".encode()))
        own = [[1.0, 0.0 if refusal else number, float(bool(refusal)), width] for width in vectors]
        sums = torch.tensor(own, dtype=torch.float64, device=self._device)
        # Of a matrix that is not spread: 1 rank.
        all_reduce_spans(sums.view(-1), list(spans_of(self._plan.matrices, 4).values()))
        if refusal is not None:
            raise refusal
        rows = zip(self.names, vectors, sums.tolist(), strict=True)
        for matrix, width, (ranks, total, refusals, widths) in rows:
            if refusals:
                raise ValueError(
                    f"AdamW2: matrix '{matrix}' got a rank that refuses it, and says why; it takes "
                    "ranks that all step it."
                )
            if widths != width * ranks:
                raise ValueError(
                    f"AdamW2: matrix '{matrix}' got other 'clip' or 'vectors' on another rank, it "
                    "takes the same on all."
                )
            if total != number * ranks:
                raise ValueError(
                    f"AdamW2: matrix '{matrix}' got a rank that steps in another kernel than "
                    f"'{name}', or in one for another processor, it takes one: "
                    f"`{DOCTOR}` tells why, {KERNEL} sets it."
                )

    def begin(
        self,
        weights: Sequence[Tensor],
        stepped: Sequence[Stepped | None],
        groups: Sequence[dict[str, Any]],
    ) -> None:
        """Take the weights, gradients and moments of a step, and the parameter group, of every
        tensor.
        """
        limits = self._schedule.read(groups, [state is not None for state in stepped])
        if self._schedule.was_infinite:
            # where τ is infinite, nothing is checked of what the certificate says
            self.forget()
        self._step.begin(
            weights, stepped, groups, limits, cold=self._cold, has_fast=self._schedule.has_fast
        )

    def _squares(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return Σ of squares of every matrix, of what this rank has of it, ``(matrices,)``."""
        squares = torch.zeros(len(self._plan.matrices), dtype=torch.float64, device=self._device)
        for tile in self._plan.tiles:
            tensor = tensors[tile.buffer]
            if tensor is not None and tile.rows:
                rows = rows_of(tensor, tile, 0, tile.rows)
                dtype = torch.promote_types(rows.dtype, torch.float32)
                norm = torch.linalg.vector_norm(rows, dtype=dtype)
                squares[tile.matrix] += norm.double().square()
        return squares

    def gradient_norms(self, stepped: Sequence[Stepped | None]) -> dict[str, float]:
        """Return ‖G‖_F of every matrix, by its name. Collective."""
        squares = self._squares([None if state is None else state.grad for state in stepped])
        all_reduce_spans(squares, list(spans_of(self._plan.matrices, 1).values()))
        return dict(zip(self.names, squares.sqrt().tolist(), strict=True))

    def move_early(self) -> Tensor:
        """Step in one pass what is no matrix, and the matrices that are expected to be settled
        (lines 3 to 14 at α).

        Return the matrices that the certificate then settles; the others are put back.
        """
        return self._step.move_early()

    def waiting(self, settled: Tensor) -> Iterator[int]:
        """Yield the number of each batch that has matrices which are not settled."""
        return self._step.waiting(settled)

    def sigmas(self, batch: int) -> tuple[Tensor, Tensor]:
        """Update M and V of a batch's matrices that waited (lines 3 to 5); return σ₁(W) and σ₁(U)
        (line 6), of all matrices.
        """
        return self._step.sigmas(batch)

    def rates(self, sigma_weight: Tensor, sigma_update: Tensor) -> Tensor:
        """Return α_W of every matrix (lines 7 to 9)."""
        return self._step.rates(sigma_weight, sigma_update)

    def move(self, batch: int, rates: Tensor) -> None:
        """Move the weights of a batch that waited for their rates (lines 10 to 14)."""
        self._step.move(batch, rates)

    def end(self, settled: Tensor) -> None:
        """Let the certificate follow the step, and remember what it did."""
        self._step.end(settled)
        self._cold, self._has_stepped, self._squares_of_all = False, True, None

    def stats(self) -> dict[str, MatrixStats]:
        """Return what the last step did, by the matrix's name."""
        if not self._has_stepped:
            return {}
        columns, norm = self._step.measured(), self.certificate.norm
        return entries(self.names, columns, self._projected, norm, self._squares_of_all)

    @cached_property
    def first_here(self) -> set[str]:
        """The matrices of which this is the first of the ranks that share them."""
        matrices = self._plan.matrices
        return {m.name for m in matrices if all(dist.get_rank(g) == 0 for g in m.groups)}

    def moved(self) -> Tensor:
        """Return ‖U‖_F, α_W, Σ w² after it, and whether Rule 1 bounded α, of the last step,
        ``(4, matrices)``, float64, on the device. Collective.
        """
        squares = self.certificate.squares.clone()
        all_reduce_spans(squares, list(spans_of(self._plan.matrices, 1).values()))
        self._squares_of_all = squares
        _, _, rates, is_clipped, *_ = self._step.measured()
        return torch.stack([self.certificate.norm, rates, squares, is_clipped.double()])

    def forget(self) -> None:
        """Take vectors and bounds for unknown at the next step, as at the first."""
        self._cold = True
        self._power.blocks.restart()
        self.certificate.forget()
        self._step.forget()

    def saved(self) -> dict[str, Any] | None:
        """Return what the next step takes from the last ones, as a checkpoint holds it; None:
        nothing.
        """
        if self._cold or self.is_adamw:
            return None
        return {
            "matrices": self.names,
            "blocks": self._power.blocks.kept(),
            "bounds": self.certificate.saved(),
        }

    def saved_by_tensor(self, step: float) -> dict[int, list[SavedMatrix]]:
        """Return what the next step takes from the last ones, whole matrices, by the ``id`` of the
        tensor that has them. Collective.

        Args:
            step: how many were made; of vectors that no step has made it is -1.
        """
        bounds = [column.clone() for column in self.certificate.saved()]
        all_reduce_spans(bounds[-1], list(spans_of(self._plan.matrices, 1).values()))
        step = -1.0 if self._cold else step
        by_tensor: dict[int, list[SavedMatrix]] = {}
        for k, blocks in enumerate(self._power.blocks.kept()):
            matrix = SavedMatrix(step, blocks, [column[k] for column in bounds], is_global=True)
            by_tensor.setdefault(id(self.tensors[self._plan.buffer_of[k]]), []).append(matrix)
        return by_tensor

    def matrix_tensors(self) -> list[Tensor]:
        """Return the tensors that have matrices."""
        return [self.tensors[number] for number in dict.fromkeys(self._plan.buffer_of)]

    def names_by_parameter(self) -> dict[str, list[str]]:
        """Return the names of the matrices of every parameter."""
        names: dict[str, list[str]] = {}
        for parameter, name in zip(self._plan.parameters, self.names, strict=True):
            names.setdefault(parameter.name, []).append(name)
        return names

    def restore(self, saved: Mapping[str, SavedMatrix]) -> None:
        """Take back what was saved of these matrices, by name; in groups that may have been others,
        cut otherwise.
        """
        records = [saved[name] for name in self.names if name in saved]
        kept = self._power.blocks.kept()
        if len(records) != len(kept) or not all(
            can_fit(record.blocks, blocks, matrix.cols)
            for record, blocks, matrix in zip(records, kept, self._plan.matrices, strict=True)
        ):
            return
        is_filled = torch.zeros(len(kept), dtype=torch.bool)
        for k, (blocks, record) in enumerate(zip(kept, records, strict=True)):
            for block, saved_block in zip(blocks, record.blocks, strict=True):
                is_filled[k] |= saved_block.numel() < block.numel()
                block.copy_(fitted(saved_block, block.numel(), self._plan.matrices[k]))
        columns = zip(*(record.bounds for record in records), strict=True)
        bounds = [torch.stack(column) for column in columns]
        if all(record.is_global for record in records):
            bounds = self._of_this_rank(bounds)
        self.certificate.restore(bounds)
        # Directions that are new have to be found, as after so many steps without an iteration.
        self.certificate.age[is_filled.to(self._device)] = COLD_ITERS
        self._cold = False

    def _of_this_rank(self, bounds: list[Tensor]) -> list[Tensor]:
        """Return the certificate's numbers of what this rank has, of those of whole matrices;
        nothing is trusted of matrices that are others now. Collective.
        """
        lower, norm, age, squares = (column.to(self._device) for column in bounds)
        own = self._squares([dense(local(tensor)).detach() for tensor in self.tensors])
        total = own.clone()
        all_reduce_spans(total, list(spans_of(self._plan.matrices, 1).values()))
        return [torch.where(are_same(total, squares), lower, 0), norm, age, own]
