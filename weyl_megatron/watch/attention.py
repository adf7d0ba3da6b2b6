"""What an attention map shows: entropy and its lower bound, rank, and the mode that it is in.

Pure functions on tensors, batched over leading dimensions. A map (rows, keys) has a row per sampled
query, which is a distribution over the keys. The modes are those of Qi et al., "Taming Transformer
Without Using Learning Rate Warmup" (arXiv 2505.21910), who tell two collapses of entropy apart by
the map's rank; the average of all tokens is a fourth.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

#: Attention is sparse where its entropy is at most this share of a uniform row's: exp(0.1 log 64) =
#: 1.5, a query that sees 64 keys looks at one or two. In the first layer of the demo's GPT, made
#: pre-LN, heads are at 0.56 and more while it learns (AdamW, lr 0.003), at 0.08 to 0.25 where it
#: stops learning (0.03), at 0.002 to 0.04 where it dies (0.1).
SPARSE = 0.1

#: Attention is uniform where its entropy is at least this share of a uniform row's. What is missing
#: is about half the variance of the scores: 3 % of log 64 nats are scores of deviation 0.5. Scores
#: of deviation 1 leave 0.88 of log 64.
UNIFORM = 0.97

#: A sparse map is of low rank where its effective rank is at most this share of the largest
#: possible. The identity and every permutation have 1, queries that each pick one key at random
#: 0.56; the heads of the run that dies have 0.05 to 0.12, and all queries on one key have 1 / rows.
LOW_RANK = 0.25


class Mode(IntEnum):
    """What an attention map does."""

    NORMAL = 0
    #: sparse but not of low rank: every token keeps to itself or one other, nothing is mixed
    BENIGN = 1
    #: sparse and of low rank: all tokens get the same few; a first-token sink looks like that, too
    MALIGNANT = 2
    UNIFORM = 3  #: every token gets the average of all it sees: rank collapse


def attention_logits(
    q: Tensor, k: Tensor, *, scale: float, rows: Tensor, causal: bool, bias: Tensor | None = None
) -> Tensor:
    """Return what the softmax over keys is taken of, for sampled queries, ``(…, len(rows), S)``.

    It is what scaled_dot_product_attention forms; −∞ where a query does not see a key.

    Args:
        q, k: queries ``(…, T, d)`` and keys ``(…, S, d)``; half precision is computed in float32.
        scale: of the scores, usually d^-½.
        rows: the sampled queries' positions, of T.
        causal: whether query t sees just the keys 0 … t, which counts from the first key where S
            and T differ.
        bias: added to the scores, or booleans that say which keys are seen; broadcast to
            ``(…, T, S)``.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = (q.index_select(-2, rows).to(dtype) * scale) @ k.to(dtype).mT
    if bias is not None:
        if bias.shape[-2] != 1:
            bias = bias.index_select(-2, rows)
        if bias.dtype == torch.bool:
            scores = scores.masked_fill(~bias, -math.inf)
        else:
            scores = scores + bias.to(dtype)
    if causal:
        keys = torch.arange(k.shape[-2], device=rows.device)
        scores = scores.masked_fill(keys > rows.unsqueeze(-1), -math.inf)
    return scores


def attention_of(logits: Tensor) -> Tensor:
    """Return the softmax over keys of logits, ``(…, rows, S)``; a query that sees no key gets
    zeros.
    """
    sees_none = (logits == -math.inf).all(-1, keepdim=True)
    return logits.masked_fill(sees_none, 0.0).softmax(-1).masked_fill(sees_none, 0.0)


def attention_map(
    q: Tensor, k: Tensor, *, scale: float, rows: Tensor, causal: bool, bias: Tensor | None = None
) -> Tensor:
    """Return the attention of sampled queries, ``(…, len(rows), S)``; see
    :func:`attention_logits` for the arguments.
    """
    return attention_of(attention_logits(q, k, scale=scale, rows=rows, causal=causal, bias=bias))


def logit_bound(q: Tensor, k: Tensor, *, scale: float, bias: Tensor | None = None) -> Tensor:
    """Return what no logit of any query exceeds, ``(…)``: |scale| · max ‖q‖ · max ‖k‖, and the
    largest bias (Cauchy and Schwarz).

    Args:
        q, k: queries ``(…, T, d)`` and keys ``(…, S, d)``.
        scale: of the scores.
        bias: added to the scores, or booleans; broadcast to ``(…, T, S)``.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    longest = [torch.linalg.vector_norm(x, dim=-1, dtype=dtype).amax(-1) for x in (q, k)]
    bound: Tensor = abs(scale) * longest[0] * longest[1]
    if bias is not None and bias.dtype != torch.bool:
        bound = bound + bias.to(dtype).amax((-2, -1))
    return bound


def sample_rows(length: int, count: int) -> Tensor:
    """Return ``count`` of the positions 0 … length − 1, evenly spread, the last among them.

    All, if there are fewer.

    Raises:
        ValueError: one of them is not positive.
    """
    if length < 1 or count < 1:
        raise ValueError(
            f"sample_rows: got {count} of {length} positions, it takes one or more of one or more."
        )
    count = min(count, length)
    return torch.arange(1, count + 1) * length // count - 1


def visible(rows: Tensor, keys: int, causal: bool) -> Tensor:
    """Return how many of ``keys`` keys the queries at positions ``rows`` see, ``(len(rows),)``."""
    return (rows + 1).clamp(max=keys) if causal else torch.full_like(rows, keys)


def entropy(attention: Tensor) -> Tensor:
    """Return every row's entropy in nats, ``(…, rows)``."""
    nats: Tensor = torch.special.entr(attention).sum(-1)
    return nats


def relative_entropy(attention: Tensor, keys: Tensor) -> Tensor:
    """Return each map's mean entropy over that of uniform rows, the mean of log ``keys``.

    NaN where that is 0.

    Args:
        attention: ``(…, rows, S)``.
        keys: how many keys each query sees, ``(…, rows)``.
    """
    keys = keys.to(attention.device)
    has_choice = keys > 1
    nats = torch.where(has_choice, entropy(attention).double(), 0.0).sum(-1)
    most = torch.where(has_choice, keys, 1).double().log().sum(-1)
    return nats / torch.where(most > 0, most, math.nan)


def entropy_bound(sigma: Tensor, keys: Tensor) -> Tensor:
    """Return the least entropy of a softmax over ``keys`` scores of norm ``sigma`` at most.

    In nats, float64; the arguments are broadcast. Zhai et al., "Stabilizing Transformer Training by
    Preventing Attention Entropy Collapse" (arXiv 2303.06296), Theorem 3.1. There σ is
    σ₁(W_K W_Qᵀ) σ₁(XXᵀ), which bounds the norm of a row of scores; where they are scaled, so is σ.
    """
    others = keys.to(sigma.device).double() - 1
    # The largest score's distance from all others.
    apart = sigma.double() * (1 + 1 / others.clamp(min=1)).sqrt()
    weight = others * (-apart).exp()  # of the others, beside 1 for the largest
    # An infinite σ leaves ∞ · 0 otherwise.
    share = torch.where(weight > 0, apart * weight / (1 + weight), weight)
    return torch.where(others > 0, weight.log1p() + share, 0.0)


def entropy_minimiser(sigma: float, keys: int) -> Tensor:
    """Return the scores of norm ``sigma`` that reach :func:`entropy_bound`: one is above all.

    ``(keys,)`` in float64.
    """
    if keys == 1:
        return torch.zeros(1, dtype=torch.float64)
    scores = torch.full((keys,), -sigma / math.sqrt(keys * (keys - 1)), dtype=torch.float64)
    scores[0] = sigma * math.sqrt((keys - 1) / keys)
    return scores


def effective_rank(singular_values: Tensor) -> Tensor:
    """Return exp H(σ²/Σσ²) of singular values ``(…, n)``; 0 where all are 0.

    So many equal ones have the same entropy.
    """
    return _spread(_relative(singular_values.double()).square())


def stable_rank(singular_values: Tensor) -> Tensor:
    """Return Σσ²/σ₁² of singular values ``(…, n)`` in any order; 0 where all are 0."""
    return _relative(singular_values.double()).square().sum(-1)


def map_rank(attention: Tensor) -> Tensor:
    """Return the effective rank of maps ``(…, rows, keys)`` in float64; NaN where not finite."""
    wide = attention if attention.shape[-2] <= attention.shape[-1] else attention.mT
    finite = wide.isfinite().all(-1).all(-1)
    wide = torch.where(finite[..., None, None], wide, 0.0).double()
    # σ² are the eigenvalues of AAᵀ, which is smaller than A. What float64 rounds has no weight in
    # an entropy.
    energy = torch.linalg.eigvalsh(wide @ wide.mT).clamp(min=0)
    return torch.where(finite, _spread(energy), math.nan)


def classify(attention: Tensor, keys: Tensor) -> Tensor:
    """Return the :class:`Mode` of each map as an integer, ``(…)``.

    Means over a batch of maps are for the caller.

    Args:
        attention: ``(…, rows, S)``.
        keys: how many keys each query sees, ``(rows,)``, as :func:`visible` counts them.
    """
    share = relative_entropy(attention, keys)
    low_rank = map_rank(attention) <= LOW_RANK * min(attention.shape[-2:])
    sparse = torch.where(low_rank, int(Mode.MALIGNANT), int(Mode.BENIGN))
    dense = torch.where(share >= UNIFORM, int(Mode.UNIFORM), int(Mode.NORMAL))
    return torch.where(share <= SPARSE, sparse, dense)


def classify_numbers(relative: float, rank: float, rows: int) -> Mode:
    """Return the mode of a map of which numbers are known, or their means over a batch.

    NORMAL where they are NaN.

    Args:
        relative: entropy over a uniform row's, as :func:`relative_entropy`.
        rank: effective rank, as :func:`map_rank`.
        rows: its largest possible, the fewer of rows and keys.
    """
    if relative <= SPARSE:
        return Mode.MALIGNANT if rank <= LOW_RANK * rows else Mode.BENIGN
    return Mode.UNIFORM if relative >= UNIFORM else Mode.NORMAL


def _relative(values: Tensor) -> Tensor:
    """Return values over the largest of the last dimension; zeros stay.

    That keeps their squares in range.
    """
    largest = values.amax(-1, keepdim=True)
    return values / torch.where(largest == 0, 1.0, largest)


def _spread(energy: Tensor) -> Tensor:
    """Return the exponential of the entropy of energies' shares; 0 where there is none."""
    total = energy.sum(-1, keepdim=True)
    shares = energy / torch.where(total == 0, 1.0, total)
    return torch.where(total[..., 0] == 0, 0.0, torch.special.entr(shares).sum(-1).exp())
