"""Three modes of attention, simulated: what the spectrum of W = W_qᵀW_k makes of the same tokens.

After Qi et al., "Taming Transformer Without Using Learning Rate Warmup" (arXiv 2505.21910),
Appendix G. One head, A = softmax(P / √d_q) with P = Xᵀ W X. The sizes are a ViT-B's; how W is made,
and its numbers, are ours:

* normal: W_q and W_k independent, of variance 1/d as at initialisation;
* benign collapse: W_q the same and W_k nearly equal to it, so that W is not quite symmetric,
  positive, and of full rank d_q; both are made so large that ‖W‖_F is that of the third;
* malignant collapse: W_q and W_k as in the first, and two directions of W that have grown to
  σ = 400.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..watch.attention import (
    Mode,
    attention_map,
    classify,
    entropy,
    map_rank,
    relative_entropy,
    visible,
)
from ..watch.spectra import energy_concentration, head_spectra

TOKENS, WIDTH, HEAD = 197, 768, 64  # T, d and d_q of a ViT-B on 224 × 224 pixels

#: The directions that have grown in the malignant mode, and σ of each. Two extreme tokens' scores
#: along a direction differ by about 0.3 σ / √d_q, which must be several nats for one key to take
#: all.
GROWN, SIGMA = 2, 400.0

#: How much of W_k in the benign mode is its own, relative to what it shares with W_q.
OWN = 0.3


class Simulation(NamedTuple):
    """One head: its spectrum and its attention."""

    name: str
    built: Mode  # what its construction says
    singular_values: Tensor  # of W, (d_q,) in float64, the largest first
    concentration: Tensor  # SEC(d_q, s) for s = 1 … d_q
    entropy: float  # nats, mean over the queries
    relative_entropy: float  # over log T
    map_rank: float  # effective rank of the map, of T
    mode: Mode  # what the map is classified as
    attention: Tensor  # (T, T), a row per query


def simulate(seed: int = 0) -> list[Simulation]:
    """Return the normal, the benign and the malignant mode.

    Their tokens are the same: normal noise behind a LayerNorm, drawn from ``seed``.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(rows: int, cols: int) -> Tensor:
        return torch.randn(rows, cols, generator=generator)

    x = torch.nn.functional.layer_norm(noise(TOKENS, WIDTH), (WIDTH,))
    query, key = noise(HEAD, WIDTH) / math.sqrt(WIDTH), noise(HEAD, WIDTH) / math.sqrt(WIDTH)
    # W gains SIGMA · u vᵀ for each of the directions, through a dimension of the head for each.
    through, u, v = (torch.linalg.qr(noise(size, GROWN)).Q for size in (HEAD, WIDTH, WIDTH))
    grown_query = query + math.sqrt(SIGMA) * through @ u.T
    grown_key = key + math.sqrt(SIGMA) * through @ v.T
    similar_key = query + OWN * key
    grown, similar = _spectrum(grown_query, grown_key), _spectrum(query, similar_key)
    factor = float((grown.norm() / similar.norm()).sqrt())
    return [
        _simulation("normal", Mode.NORMAL, x, query, key),
        _simulation("benign collapse", Mode.BENIGN, x, factor * query, factor * similar_key),
        _simulation("malignant collapse", Mode.MALIGNANT, x, grown_query, grown_key),
    ]


def _simulation(name: str, built: Mode, x: Tensor, query: Tensor, key: Tensor) -> Simulation:
    """Attention of tokens ``(T, d)`` through W_q and W_k ``(d_q, d)``."""
    rows = torch.arange(TOKENS)
    keys = visible(rows, TOKENS, causal=False)
    attention = attention_map(x @ query.T, x @ key.T, scale=HEAD**-0.5, rows=rows, causal=False)
    values = _spectrum(query, key)
    concentration = [energy_concentration(values, largest) for largest in range(1, HEAD + 1)]
    return Simulation(
        name=name,
        built=built,
        singular_values=values,
        concentration=torch.stack(concentration),
        entropy=float(entropy(attention).mean()),
        relative_entropy=float(relative_entropy(attention, keys)),
        map_rank=float(map_rank(attention)),
        mode=Mode(int(classify(attention, keys))),
        attention=attention,
    )


def _spectrum(query: Tensor, key: Tensor) -> Tensor:
    return head_spectra(query, key, 1, 1)[0]
