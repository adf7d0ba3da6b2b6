"""A step that a GPU steers: the host launches, and waits for nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .kernels import Stepped
from .limits import Limits
from .spectral.blocks import Blocks
from .spectral.certificate import Certificate
from .spectral.collectives import Span, all_reduce_spans
from .spectral.horizon import Horizon, Steps
from .spectral.power import COLD_ITERS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .kernels.triton_kernel import TritonKernel

#: Iterations beyond the usual that a matrix may ask for after settled steps: the host does not see
#: which do.
_STALE_ITERS = 2

#: Steps after which the host reads what a device told: it has long arrived, and is so read on all
#: ranks alike.
_LATE = 2

#: Rounded away, U may be anything.
_LEAST_EPS = 1e-30

_Groups = tuple["ProcessGroup", ...]


class _Told(NamedTuple):
    """What a device tells after a step."""

    bounds: Tensor  # (3, matrices): b, ‖U‖_F and the age, in memory of the host
    arrival: torch.Event | None  # None: it is there
    step: Steps


class DeviceStep:
    """The middle of a step, decided by kernels from numbers that stay on the device.

    Matrices that the certificate is sure to settle (:class:`.Horizon`) are told so; where all are,
    no iteration is launched.

    Args:
        blocks: the vectors, resident.
        kernel: the launches.
        certificate: of the matrices; its vectors become rows of the kernel's numbers.
        buffer_of: of each matrix, the buffer that holds it.
        norm_spans: where the two numbers of each spread matrix lie in a vector of them.
        iters: block power iterations of a matrix that is measured.
    """

    def __init__(
        self,
        blocks: Blocks,
        kernel: TritonKernel,
        certificate: Certificate,
        can_undo: Tensor,
        buffer_of: Sequence[int],
        norm_spans: Mapping[int, Span],
        iters: int,
    ) -> None:
        from .kernels.triton_step import numbers  # imports Triton

        self._rows = numbers
        self._blocks, self._kernel, self._iters = blocks, kernel, iters
        self._buffer_of = torch.tensor(buffer_of, dtype=torch.int64)
        self._norm_spans = list(norm_spans.values())
        rows = kernel.numbers
        certificate.move_to(rows[int(numbers.LOWER) : int(numbers.SQUARES) + 1])
        sigma = int(numbers.SIGMA)
        self._sigma = rows[sigma], rows[sigma + 1]
        self._waits, self._rates = kernel.masks[int(numbers.WAITS)], rows[int(numbers.RATE)]
        self._norms = kernel.norms.view(-1)
        self._bounds = rows[int(numbers.LOWER) : int(numbers.AGE) + 1]
        rows[int(numbers.CAN_UNDO)] = can_undo
        rows[int(numbers.KEPT)] = certificate.kept
        sizes = [float(matrix.rows * matrix.cols) for matrix in blocks.matrices]
        self._horizon = Horizon(torch.tensor(sizes, dtype=torch.float64), certificate.kept_on_host)
        spreads = dict.fromkeys(matrix.groups for matrix in blocks.matrices)
        #: The matrices of each set of groups: ranks that share one share all of them.
        self._spread = {
            groups: [k for k, matrix in enumerate(blocks.matrices) if matrix.groups == groups]
            for groups in spreads
        }
        self._told: deque[_Told] = deque()
        self._never = torch.zeros(len(sizes), dtype=torch.bool)
        self._spans: dict[tuple[int, tuple[_Groups, ...]], tuple[list[Span], list[Span]]] = {}
        self._of_buffers: list[tuple[float, float]] = []  # the betas, and as vectors
        self._betas = torch.empty(0), torch.empty(0)
        self._places: list[tuple[int, ...]] | None = None
        self._same_for = 0  # steps in which torch saw no other writer

    @property
    def arithmetic(self) -> str:
        """What differs where the device may round in other ways: ranks that share a matrix decide
        alike what they launch.
        """
        device = self._blocks.x.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else ""

    def begin(
        self,
        weights: Sequence[Tensor],
        stepped: Sequence[Stepped | None],
        groups: Sequence[Mapping[str, Any]],
        limits: Limits,
        *,
        cold: bool,
        has_fast: bool,
    ) -> None:
        """Take the tensors of a step, their parameter groups, and what holds in it.

        Args:
            weights, stepped, groups: by buffer.
            limits: on the CPU.
            cold: whether nothing is known of the vectors.
            has_fast: whether any τ, also of matrices elsewhere, is beyond SLOW_TAU.
        """
        step = self._steps(groups, limits)
        self._look_ahead(step, limits, weights, stepped)
        self._kernel.bind(weights, stepped, (*limits, self._sure))
        # That counts the weights as written.
        self._places = self._places_of(weights, stepped) if self._may_be_sure else None
        self._step, self._cold = step, cold
        most = max(COLD_ITERS, self._iters)
        stale = most if cold else min(most, self._iters + _STALE_ITERS)
        self._rounds = (stale if cold or has_fast else (stale + 1) // 2), stale

    def move_early(self) -> Tensor:
        """Step in one pass what is no matrix, and the matrices that are expected to be settled.

        Return, on the device, which of them are. The others are put back.
        """
        kernel = self._kernel
        kernel.expect()
        kernel.step()
        all_reduce_spans(self._norms, self._norm_spans)
        kernel.settle(self._iters, cold=self._cold)
        if not self._is_all_sure:  # or else nothing fails
            kernel.undo()
        return self._waits

    def waiting(self, _: Tensor) -> Iterator[int]:
        """Yield the only batch, unless the certificate is sure to settle all of it."""
        if not self._is_all_sure:
            yield 0

    def sigmas(self, _: int) -> tuple[Tensor, Tensor]:
        """Update M and V of the matrices that waited; return σ₁(W) and σ₁(U) of all matrices."""
        kernel, blocks = self._kernel, self._blocks
        for number in range(max(self._rounds)):
            of_left, of_z = self._spans_of(number)
            kernel.multiply(number, self._rounds)
            all_reduce_spans(blocks.left, of_left)
            kernel.collect(number)
            all_reduce_spans(blocks.z, of_z)
            kernel.orthonormalize(number, self._rounds)
        return self._sigma

    def rates(self, _: Tensor, __: Tensor) -> Tensor:
        """Return α_W of every matrix."""
        self._kernel.decide_rates()
        return self._rates

    def move(self, _: int, __: Tensor) -> None:
        """Move the weights that waited for their rates."""
        self._kernel.move()

    def end(self, _: Tensor) -> None:
        """Let the certificate follow the step, and have the device tell of it."""
        kernel = self._kernel
        kernel.follow()
        kernel.release()
        bounds = self._bounds
        if bounds.device.type != "cuda":
            self._told.append(_Told(bounds.clone(), None, self._step))
            return
        copy = torch.empty(bounds.shape, dtype=bounds.dtype, pin_memory=True)
        copy.copy_(bounds, non_blocking=True)
        arrival = torch.Event("cuda")
        arrival.record()
        self._told.append(_Told(copy, arrival, self._step))

    def measured(self) -> tuple[Tensor, ...]:
        """Return the columns of ``MatrixStats`` after a step."""
        rows, numbers = self._kernel.numbers, self._rows
        rate, lr = rows[int(numbers.RATE)], rows[int(numbers.LR)]
        stood = rows[int(numbers.STOOD_W)], rows[int(numbers.STOOD_U)]
        settled = self._kernel.masks[int(numbers.WAITS)] == 0
        clips = (self._kernel.masks[int(numbers.CLIPS)] != 0) & ~settled
        share, unseen = (
            torch.where(clips, rows[int(number)], 1) for number in (numbers.SHARE, numbers.UNSEEN)
        )
        clipped = torch.where(clips, rows[int(numbers.CLIPPED)], 0).long()
        is_over = (rate < lr) | clips
        return *stood, rate, is_over, rows[int(numbers.TAU)], settled, clipped, share, unseen

    def forget(self) -> None:
        """Rely on nothing: the vectors or the weights are others now."""
        self._told.clear()
        self._horizon.forget()
        self._same_for = 0

    def _steps(self, groups: Sequence[Mapping[str, Any]], limits: Limits) -> Steps:
        """Return what a step is made with, of every matrix."""
        betas: dict[int, tuple[float, float]] = {}
        for group in groups:
            if id(group) not in betas:
                is_bounded = group["eps"] > _LEAST_EPS
                beta1, beta2 = map(float, group["betas"])
                betas[id(group)] = (beta1, beta2) if is_bounded else (float("nan"), float("nan"))
        of_buffers = [betas[id(group)] for group in groups]
        if of_buffers != self._of_buffers:
            self._of_buffers = of_buffers
            columns = torch.tensor(of_buffers, dtype=torch.float64).view(-1, 2)[self._buffer_of]
            self._betas = columns[:, 0], columns[:, 1]
        return Steps(limits.lr, limits.weight_decay, *self._betas)

    def _look_ahead(
        self,
        step: Steps,
        limits: Limits,
        weights: Sequence[Tensor],
        stepped: Sequence[Stepped | None],
    ) -> None:
        """Decide which matrices the certificate is sure to settle, by what was told late.

        Args:
            step, limits: of the step to come.
            weights, stepped: whose memory torch may tell that others wrote, for matrices that no
                other rank has pieces of, where it might tell something else. Of all matrices the
                device compares the weights.
        """
        horizon, sets = self._horizon, self._spread
        self._sure, self._active = self._never, tuple(sets)
        settled: list[_Groups] = []  # the sets that were, when the device told
        if len(self._told) >= _LATE:
            told = self._told.popleft()
            if told.arrival is not None:
                told.arrival.synchronize()
            lower, norm, age = told.bounds
            ages = age.tolist()
            settled = [groups for groups in sets if all(ages[k] > 0 for k in sets[groups])]
            if settled:
                horizon.read(lower, norm, told.step)
            else:  # most often nothing is sure then
                horizon.count(norm)
        self._may_be_sure = bool(settled)
        if settled:
            for later in self._told:
                horizon.follow(later.step)
            sure = horizon.sure(step, limits.tau, limits.floor)
            alone = sets.get((), [])
            are_same = self._places == self._places_of(weights, stepped)
            self._same_for = self._same_for + 1 if are_same else 0
            if self._same_for < _LATE:
                sure[alone] = False
            else:
                sure[alone] |= ~limits.is_present[alone]
            chosen = sure.tolist()
            # All matrices of a set, or none: collectives are of the set. What this rank knows of
            # other sets than one it shares decides nothing of that one.
            of_sure = {groups for groups in settled if all(chosen[k] for k in sets[groups])}
            self._active = tuple(groups for groups in sets if groups not in of_sure)
            for groups in self._active:
                sure[sets[groups]] = False
            self._sure = sure
        self._is_all_sure = not self._active

    def _places_of(
        self, weights: Sequence[Tensor], stepped: Sequence[Stepped | None]
    ) -> list[tuple[int, ...]]:
        """Return where weights and moments lie, and how often torch has seen them written."""
        return [
            (weight.data_ptr(), weight._version)
            if state is None
            else (
                weight.data_ptr(),
                weight._version,
                state.exp_avg.data_ptr(),
                state.exp_avg._version,
                state.exp_avg_sq.data_ptr(),
                state.exp_avg_sq._version,
            )
            for weight, state in zip(weights, stepped, strict=True)
        ]

    def _spans_of(self, number: int) -> tuple[list[Span], list[Span]]:
        """Return what of ``left`` and of ``z`` is summed over ranks in an iteration."""
        operands = (0, 1) if number < self._rounds[0] else (1,)
        key = len(operands), self._active
        if key not in self._spans:
            blocks = self._blocks
            chosen = {k for groups in self._active if groups for k in self._spread[groups]}
            lists = blocks.left_spans[0], blocks.z_spans[0]
            of_left, of_z = (
                sorted(
                    (span for o in operands for k, span in spans[o].items() if k in chosen),
                    key=lambda span: span.start,
                )
                for spans in lists
            )
            self._spans[key] = of_left, of_z
        return self._spans[key]
