"""Three modes of attention, simulated: what the spectrum of W = W_qᵀW_k makes of one and the same
tokens.

After Qi et al., "Taming Transformer Without Using Learning Rate Warmup" (arXiv 2505.21910),
Appendix G. One head, A = softmax(P / √d_q) with P = Xᵀ W X. The sizes are a ViT-B's; how W is made,
and its numbers, are ours:

* normal: W_q and W_k independent, of variance 1/d as at initialisation;
* benign collapse: W_q the same and W_k nearly equal to it, so that W is not quite symmetric,
positive, and of full
  rank d_q; both are made so large that ‖W‖_F is that of the third;
* malignant collapse: W_q and W_k as in the first, and two directions of W that have grown to σ =
400.
"""

from __future__ import annotations

import argparse
import base64
import math
import struct
import zlib
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..watch.attention import (
    Mode,
    attention_map,
    classify,
    effective_rank,
    entropy,
    map_rank,
    relative_entropy,
    visible,
)
from ..watch.spectra import energy_concentration, head_spectra
from .charts import Axis, Chart, Line
from .modes_page import PAGE

TOKENS, WIDTH, HEAD = 197, 768, 64  # T, d and d_q of a ViT-B on 224 × 224 pixels

#: s of the SEC(d_q, s) that the table shows.
_LARGEST = 4

#: The directions that have grown in the malignant mode, and σ of each. Two extreme tokens' scores
#: along a direction differ by about 0.3 σ / √d_q, which must be several nats for one key to take
#: all.
_GROWN, _SIGMA = 2, 400.0

#: How much of W_k in the benign mode is its own, relative to what it shares with W_q.
_OWN = 0.3

# colour of the lines, and of the maps' pixels, which must do on light and on dark ground
_DRAWN = {
    Mode.NORMAL: ("var(--normal)", (20, 160, 140)),
    Mode.BENIGN: ("var(--benign)", (122, 108, 240)),
    Mode.MALIGNANT: ("var(--malignant)", (224, 88, 63)),
}


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
    """Return the normal, the benign and the malignant mode, on the same tokens: normal noise behind
    a LayerNorm.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(rows: int, cols: int) -> Tensor:
        return torch.randn(rows, cols, generator=generator)

    x = torch.nn.functional.layer_norm(noise(TOKENS, WIDTH), (WIDTH,))
    query, key = noise(HEAD, WIDTH) / math.sqrt(WIDTH), noise(HEAD, WIDTH) / math.sqrt(WIDTH)
    # W gains _SIGMA · u vᵀ for each of the directions, through a dimension of the head that is
    # theirs.
    through, u, v = (torch.linalg.qr(noise(size, _GROWN)).Q for size in (HEAD, WIDTH, WIDTH))
    grown_query = query + math.sqrt(_SIGMA) * through @ u.T
    grown_key = key + math.sqrt(_SIGMA) * through @ v.T
    similar_key = query + _OWN * key
    energy = _spectrum(grown_query, grown_key).norm() / _spectrum(query, similar_key).norm()
    factor = float(energy.sqrt())
    return [
        _simulation("normal", Mode.NORMAL, x, query, key),
        _simulation("benign collapse", Mode.BENIGN, x, factor * query, factor * similar_key),
        _simulation("malignant collapse", Mode.MALIGNANT, x, grown_query, grown_key),
    ]


def run(arguments: argparse.Namespace) -> int:
    """Simulate with ``arguments.seed``, print a table and write the page to ``arguments.out``.

    Returns:
        0; 1 where a mode is not classified as what it was built as.
    """
    simulations = simulate(arguments.seed)
    head = (
        "mode",
        "σ₁(W)",
        "‖W‖_F",
        f"SEC({HEAD}, {_LARGEST})",
        "entropy",
        "map's rank",
        "classified as",
    )
    rows = [head, *(_row(each) for each in simulations)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *numbers, mode in rows:
        cells = (number.rjust(width) for number, width in zip(numbers, widths[1:-1], strict=True))
        print("  ".join([name.ljust(widths[0]), *cells, mode]))
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(simulations, arguments.seed), encoding="utf-8")
    print(f"\nThe maps and their spectra: {out}")
    return 0 if all(each.mode == each.built for each in simulations) else 1


def page(simulations: Sequence[Simulation], seed: int) -> str:
    """The page: the attention maps, the spectra of W, the numbers."""
    return PAGE.substitute(
        maps="".join(_card(each) for each in simulations),
        spectra=_spectra(simulations).svg(),
        concentration=_concentration(simulations).svg(),
        rows="".join(_table_row(each) for each in simulations),
        **{
            "tokens": TOKENS,
            "width": WIDTH,
            "head": HEAD,
            "largest": _LARGEST,
            "grown": _GROWN,
            "seed": seed,
        },
        **{"sigma": f"{_SIGMA:g}", "own": f"{_OWN:g}", "uniform": f"{math.log(TOKENS):.2f}"},
    )


def _simulation(name: str, built: Mode, x: Tensor, query: Tensor, key: Tensor) -> Simulation:
    """Attention of tokens ``(T, d)`` through W_q and W_k ``(d_q, d)``."""
    rows = torch.arange(TOKENS)
    keys = visible(rows, TOKENS, causal=False)
    attention = attention_map(x @ query.T, x @ key.T, scale=HEAD**-0.5, rows=rows, causal=False)
    values = _spectrum(query, key)
    return Simulation(
        name=name,
        built=built,
        singular_values=values,
        concentration=torch.stack(
            [energy_concentration(values, largest) for largest in range(1, HEAD + 1)]
        ),
        entropy=float(entropy(attention).mean()),
        relative_entropy=float(relative_entropy(attention, keys)),
        map_rank=float(map_rank(attention)),
        mode=Mode(int(classify(attention, keys))),
        attention=attention,
    )


def _spectrum(query: Tensor, key: Tensor) -> Tensor:
    return head_spectra(query, key, 1, 1)[0]


def _row(each: Simulation) -> tuple[str, ...]:
    values = each.singular_values
    return (
        each.name,
        f"{float(values[0]):.4g}",
        f"{float(values.norm()):.4g}",
        f"{float(each.concentration[_LARGEST - 1]):.3f}",
        f"{each.entropy:.3f}",
        f"{each.map_rank:.1f}",
        each.mode.name.lower(),
    )


def _table_row(each: Simulation) -> str:
    name, *cells = _row(each)
    line, _ = _DRAWN[each.built]
    numbers = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f'<tr style="--run:{line}"><th scope="row">{escape(name)}</th>{numbers}</tr>'


def _card(each: Simulation) -> str:
    line, rgb = _DRAWN[each.built]
    rank = float(effective_rank(each.singular_values))
    return (
        f'<figure class="card" style="--run:{line}"><h3>{escape(each.name)}</h3>'
        f'<img alt="attention map, {escape(each.name)}" width="{TOKENS}" height="{TOKENS}" src="{_png(each, rgb)}">'
        f"<figcaption>entropy {each.entropy:.2f} nats, effective rank {each.map_rank:.0f} of "
        f"{TOKENS}; W has {rank:.0f} effective directions of {HEAD}</figcaption></figure>"
    )


def _png(each: Simulation, rgb: tuple[int, int, int]) -> str:
    """A map as a data URI: one colour, as opaque as the cube root of the attention, so that it does
    on any ground.
    """
    levels = (each.attention.clamp(0, 1).pow(1 / 3) * 255).round().to(torch.uint8)
    lines = b"".join(b"\0" + bytes(row) for row in levels.tolist())
    header = struct.pack(
        ">IIBBBBB", levels.shape[1], levels.shape[0], 8, 3, 0, 0, 0
    )  # 8 bits, of a palette
    chunks = [
        (b"IHDR", header),
        (b"PLTE", bytes(rgb) * 256),
        (b"tRNS", bytes(range(256))),
        (b"IDAT", zlib.compress(lines, 9)),
        (b"IEND", b""),
    ]
    parts = (
        struct.pack(">I", len(data)) + kind + data + _checksum(kind + data) for kind, data in chunks
    )
    return (
        "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()
    )


def _checksum(data: bytes) -> bytes:
    return struct.pack(">I", zlib.crc32(data))


def _spectra(simulations: Sequence[Simulation]) -> Chart:
    values = torch.cat([each.singular_values for each in simulations])
    low, high = (
        10 ** math.floor(math.log10(values.min())),
        10 ** math.ceil(math.log10(values.max())),
    )
    lines = [_line(each, each.singular_values) for each in reversed(simulations)]
    return _chart(
        "Singular values of W",
        Axis("i", 1, HEAD),
        Axis("σᵢ, log scale", low, high, log=True),
        lines,
    )


def _concentration(simulations: Sequence[Simulation]) -> Chart:
    lines = [_line(each, each.concentration, label=False) for each in simulations]
    return _chart(
        "Energy in the s largest of them",
        Axis("s", 1, HEAD),
        Axis(f"SEC({HEAD}, s)", 0, 1.02),
        lines,
    )


def _chart(title: str, x: Axis, y: Axis, lines: Sequence[Line]) -> Chart:
    labelled = any(line.label for line in lines)
    return Chart(
        title,
        x,
        y,
        lines,
        width=650 if labelled else 510,
        height=280,
        right=165 if labelled else 10,
    )


def _line(each: Simulation, values: Tensor, label: bool = True) -> Line:
    color, _ = _DRAWN[each.built]
    places, dashed = (
        list(range(1, HEAD + 1)),
        each.built == Mode.NORMAL,
    )  # what it lies upon shows through
    return Line(
        each.name,
        places,
        values.tolist(),
        color,
        label=each.name if label else "",
        dashed=dashed,
        width=2,
    )
