"""What a block is given: ‖x‖ and how alike its tokens are, where ranks may share out the tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layouts.local import is_on_mesh, local
from ..spectral.step import total

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Tokens(NamedTuple):
    """Activations (batch, tokens, d), or some of their tokens."""

    x: Tensor
    is_cut: bool | None  # whether other ranks have the others; None: nothing says it yet

    def is_shared(self, whole: int | None, ranks: int, rank: int) -> bool:
        """Whether other ranks have tokens of the same sequences.

        Args:
            whole: tokens of a sequence, as its queries were counted; None: they were not seen.
            ranks, rank: of the tensor-parallel group.
        """
        if self.is_cut is not None:
            return self.is_cut
        if whole is None or self.x.dim() < 3 or ranks == 1:
            return False
        share = -(-whole // ranks)  # as torch cuts
        return self.x.shape[1] == max(0, min(share, whole - share * rank)) != whole


def tokens_of(x: Any, name: str) -> Tokens:
    """Return what this rank has of activations.

    Raises:
        ValueError: a DTensor that is cut along another dimension than tokens.
    """
    if not is_on_mesh(x):
        return Tokens(x.detach(), None)
    placement = x.placements[-1]
    is_tokens = placement.is_shard() and placement.dim % x.dim() == 1
    if x.device_mesh.ndim > 1 or not (is_tokens or placement.is_replicate()):
        raise ValueError(
            f"watch: the input of {name} got the placements {x.placements}, it takes Replicate and "
            "Shard(1), over tokens."
        )
    return Tokens(local(x).detach(), is_tokens)


def norm(x: Tensor) -> float:
    """Return ‖x‖ of what this rank has."""
    held = local(x.detach())
    dtype = torch.promote_types(held.dtype, torch.float32)
    return float(torch.linalg.vector_norm(held, dtype=dtype))


def similarity(x: Tensor, group: ProcessGroup | None = None) -> float:
    """Return the mean cosine of the angle between two tokens of a sequence.

    Collective over the group.

    Args:
        x: ``(batch, tokens, d)``.
        group: ranks that have other tokens of the same sequences.
    """
    directions = F.normalize(x.detach().float(), dim=-1)
    sums, squares, tokens = directions.sum(1), directions.square().sum((1, 2)), x.shape[1]
    if group is not None:
        counts = torch.full_like(squares, tokens)
        together = total(torch.cat([sums.T, squares[None], counts[None]]), group)
        sums, squares, tokens = together[:-2].T, together[-2], int(together[-1, 0])
    pairs = sums.square().sum(-1) - squares
    return float(pairs.mean()) / max(1, tokens * (tokens - 1))


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return what a module is given, by its place or by the names that libraries have for it."""
    named = (kwargs.get(name) for name in ("hidden_states", "x", "src", "query"))
    return next((value for value in (*args, *named) if isinstance(value, Tensor)), None)
