"""Rule 1 by clipping singular values, in a step that the host steers (``clip="project"``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .batches import tables_of_seen
from .kernels import Kernel
from .layouts.buffers import Plan
from .rule import decay_rates, project
from .spectral import PowerIteration, ritz
from .spectral.seen import Seen


class Projector:
    """What becomes of the updates that are too large, of the matrices that are projected.

    Args:
        power: the blocks, and what iterates on them; it keeps for this what they see of U.
        kernel: the arithmetic on tiles.
        plan: what lies where.
        operand: the number of U among the operands.
        numbers: the matrices that are projected.
        device: of the vectors.
    """

    def __init__(
        self,
        power: PowerIteration,
        kernel: Kernel,
        plan: Plan,
        operand: int,
        numbers: Sequence[int],
        device: torch.device,
    ) -> None:
        blocks, count = power.blocks, len(plan.matrices)
        self._seen = power.seen = Seen(blocks, operand, numbers)
        self._kernel, self._tables = (
            kernel,
            tables_of_seen(plan, blocks.batches, self._seen, device),
        )
        is_projected = torch.zeros(count, dtype=torch.bool)
        is_projected[list(numbers)] = True
        self.is_projected = is_projected.to(device)
        widths = blocks.operands[operand].widths
        is_whole = [w == min(m.rows, m.cols) for w, m in zip(widths, plan.matrices, strict=True)]
        self._is_whole = torch.tensor(is_whole, dtype=torch.bool, device=device)
        self._stacks = [self._alike(batch) for batch in blocks.batches]
        self._none = torch.zeros(count, dtype=torch.float64, device=device)
        self.begin()

    def begin(self) -> None:
        """Forget what the last step did."""
        #: the matrices whose update was projected in this step
        self.is_active = torch.zeros_like(self.is_projected)
        self._rate, self._decay = self._none.clone(), self._none.clone()
        self.unseen, self.share = self._none + 1, self._none + 1
        self.clipped = torch.zeros_like(self._none, dtype=torch.int64)

    def has(self, batch: int) -> bool:
        """Whether any matrix of a batch is projected."""
        return bool(self._stacks[batch])

    def move(
        self,
        batch: int,
        is_over: Tensor,
        lr: Tensor,
        bound: Tensor,
        sums: Tensor,
    ) -> Tensor:
        """Move the weights of a batch's projected matrices whose update breaks the rule; return
        which these are, bool ``(matrices,)``.

        Args:
            batch: its number.
            is_over: the matrices that wait for their move and whose update is too large, bool.
            lr, bound: α and the bound of σ₁(α U) of every matrix.
            sums: see :class:`.Kernel`.
        """
        is_active = is_over & self.is_projected
        chosen = is_active.tolist()
        for alike in self._stacks[batch]:
            some = [[k for k in numbers if chosen[k]] for numbers in alike]
            if any(some):
                self._form([numbers for numbers in some if numbers], lr, bound, sums[:, 0].sqrt())
        self._kernel.project(
            self._tables[batch], is_active.byte(), (self._rate, self._decay), sums, self._seen
        )
        self.is_active = self.is_active | is_active
        return is_active

    def _form(self, alike: list[list[int]], lr: Tensor, bound: Tensor, norm: Tensor) -> None:
        """Make C of matrices of the same ranks and width, listed by their number of columns."""
        images = [[self._seen.operand.image(k) for k in numbers] for numbers in alike]
        of_z = [torch.stack([z for z, _ in members]).double() for members in images]
        gram_y = torch.stack([gram for members in images for _, gram in members]).double()
        gram_z = torch.cat([ritz.gram(z) for z in of_z])
        at = torch.tensor([k for numbers in alike for k in numbers]).to(lr.device)
        eps = torch.finfo(self._seen.z.dtype).eps
        grams = gram_y, gram_z
        clip = project(grams, lr[at], bound[at], norm[at], self._is_whole[at], eps)
        self._rate[at], self._decay[at] = clip.rate, decay_rates(lr[at], clip)
        self.unseen[at], self.share[at] = clip.rate / lr[at], clip.share
        self.clipped[at] = clip.clipped
        first = 0
        for members, z in zip(images, of_z, strict=True):
            factors = clip.factor[first : first + len(z)]
            first += len(z)
            changed = ritz.products(factors, z)
            torch._foreach_copy_([image for image, _ in members], list(changed.to(self._seen.z)))

    def rates(self, rates: Tensor, lr: Tensor) -> tuple[Tensor, Tensor]:
        """Return ‖update‖_F / ‖U‖_F of every matrix, and what multiplied λ W.

        Args:
            rates: α_W of those that were scaled.
            lr: α.
        """
        of_update = torch.where(self.is_active, self.share * lr, rates)
        return of_update, torch.where(self.is_active, self._decay, rates)

    def _alike(self, batch: Sequence[int]) -> list[list[list[int]]]:
        """Return the projected matrices of a batch: those of the same ranks and width in one list,
        and in that by their number of columns; see ``spectral/power.py``.
        """
        operand = self._seen.operand
        numbers: dict[Any, dict[int, list[int]]] = {}
        for k in batch:
            if k in self._seen.matrices:
                matrix = operand.matrices[k]
                alike = numbers.setdefault((matrix.groups, operand.widths[k]), {})
                alike.setdefault(matrix.cols, []).append(k)
        return [list(alike.values()) for alike in numbers.values()]
