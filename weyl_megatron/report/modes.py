"""`weyl-megatron modes`: the three simulated modes of attention, as a table and as a page."""

from __future__ import annotations

import argparse
import base64
import math
import struct
import zlib
from collections.abc import Sequence
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from ..watch.attention import Mode, effective_rank
from .charts import Axis, Chart, Line
from .page import cell, figure, figure_of_run, grid, legend, page, row, section, table
from .simulation import GROWN, HEAD, OWN, SIGMA, TOKENS, WIDTH, Simulation, simulate

#: s of the SEC(d_q, s) that the table shows.
_LARGEST = 4

# colour of the lines, and of the maps' pixels, which must do on light and on dark ground
_DRAWN = {
    Mode.NORMAL: ("var(--mode-0)", (20, 160, 140)),
    Mode.BENIGN: ("var(--mode-1)", (122, 108, 240)),
    Mode.MALIGNANT: ("var(--mode-2)", (224, 88, 63)),
}


def run(arguments: argparse.Namespace) -> int:
    """Simulate with ``arguments.seed``, print a table and write the page to ``arguments.out``.

    Returns:
        0; 1 where a mode is not classified as what it was built as.
    """
    simulations = simulate(arguments.seed)
    sec = f"SEC({HEAD}, {_LARGEST})"
    head = ("mode", "σ₁(W)", "‖W‖_F", sec, "entropy", "map's rank", "classified as")
    rows = [head, *(_row(each) for each in simulations)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *numbers, mode in rows:
        cells = (number.rjust(width) for number, width in zip(numbers, widths[1:-1], strict=True))
        print("  ".join([name.ljust(widths[0]), *cells, mode]))
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(_page(simulations, arguments.seed), encoding="utf-8")
    print(f"\nThe maps and their spectra: {out}")
    return 0 if all(each.mode == each.built for each in simulations) else 1


def _page(simulations: Sequence[Simulation], seed: int) -> str:
    """The page: the attention maps, the spectra of W, the numbers, how they are made."""
    w = "W<sub>q</sub>ᵀW<sub>k</sub>"
    takeaway = (
        "Both collapses have large weights of the same energy, and in both a query looks at hardly "
        "more than one key. Spread over all directions, and alike for queries and keys, the energy "
        f"makes every token look at itself; concentrated in {GROWN} of them, it makes all tokens "
        "look at the same few."
    )
    maps = grid(3, map(_map, simulations))
    read = (
        "A row is a query, a column a key, both from the first token on. Colour is as dense as the "
        "cube root of the attention, on one scale."
    )
    names = legend((each.name, _DRAWN[each.built][0]) for each in simulations)
    charts = grid(2, [figure(_spectra(simulations).svg()), figure(_energy(simulations).svg())])
    heads = ("mode", "σ₁(W)", "‖W‖<sub>F</sub>", f"SEC({HEAD}, {_LARGEST})", "entropy, nats")
    rows = (_table_row(each) for each in simulations)
    numbers = (
        f"Uniform attention has {math.log(TOKENS):.2f} nats. SEC(d<sub>q</sub>, s) is the share of "
        "Σσ² that the s largest singular values have. The rank of a map is the exponential of the "
        "entropy of its σ²/Σσ²."
    )
    body = [
        f'<p class="takeaway">{takeaway}</p>{maps}<p>{read}</p>',
        section(
            "What decides: the spectrum of W",
            f"W = {w}, and the share of its energy in its largest singular values.",
            names + charts,
        ),
        section("The numbers", numbers, table((*heads, "rank of the map", "classified as"), rows)),
        section("How they are made", _tokens(seed), _constructions()),
    ]
    return page("Three modes of attention", "".join(body))


def _tokens(seed: int) -> str:
    return (
        f"One head, A = softmax(P / √d<sub>q</sub>) with P = XᵀWX, on {TOKENS} tokens of width "
        f"{WIDTH} and d<sub>q</sub> = {HEAD}, normal noise behind a LayerNorm (seed {seed}). The "
        "tokens are the same in all three."
    )


def _constructions() -> str:
    return (
        "<ul><li>Normal: W<sub>q</sub> and W<sub>k</sub> are independent, of variance 1/d.</li>"
        f"<li>Benign collapse: W<sub>k</sub> is W<sub>q</sub> and {OWN:g} of noise of its size, so "
        "W is nearly symmetric, positive and of full rank. Both are scaled until ‖W‖<sub>F</sub> "
        "is that of the malignant collapse.</li>"
        f"<li>Malignant collapse: the normal W, in which {GROWN} directions have grown to "
        f"σ = {SIGMA:g}.</li></ul>"
        "<p>After Qi et al., “Taming Transformer Without Using Learning Rate Warmup”, arXiv "
        "2505.21910, Appendix G. The sizes and numbers are ours.</p>"
    )


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
    return row(_DRAWN[each.built][0], name, map(cell, cells))


def _map(each: Simulation) -> str:
    """A map under its colour and name, and what there is to say about it."""
    color, rgb = _DRAWN[each.built]
    rank = float(effective_rank(each.singular_values))
    image = (
        f'<img alt="attention map, {escape(each.name)}" width="{TOKENS}" height="{TOKENS}" '
        f'src="{_png(each, rgb)}">'
    )
    caption = (
        f"entropy {each.entropy:.2f} nats, effective rank {each.map_rank:.0f} of {TOKENS}; W has "
        f"{rank:.0f} effective directions of {HEAD}"
    )
    return figure_of_run(color, each.name, f"{image}<figcaption>{caption}</figcaption>")


def _png(each: Simulation, rgb: tuple[int, int, int]) -> str:
    """A map as a data URI: one colour, as opaque as the cube root of the attention.

    Opacity, so that the map does on light and on dark ground.
    """
    levels = (each.attention.clamp(0, 1).pow(1 / 3) * 255).round().to(torch.uint8)
    lines = b"".join(b"\0" + bytes(pixels) for pixels in levels.tolist())
    size = (levels.shape[1], levels.shape[0])
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", *size, 8, 3, 0, 0, 0)),  # 8 bits, of a palette
        (b"PLTE", bytes(rgb) * 256),
        (b"tRNS", bytes(range(256))),
        (b"IDAT", zlib.compress(lines, 9)),
        (b"IEND", b""),
    ]
    parts = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    image = b"\x89PNG\r\n\x1a\n" + b"".join(parts)
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def _spectra(simulations: Sequence[Simulation]) -> Chart:
    values = torch.cat([each.singular_values for each in simulations])
    low = 10 ** math.floor(math.log10(values.min()))
    high = 10 ** math.ceil(math.log10(values.max()))
    lines = [_line(each, each.singular_values) for each in reversed(simulations)]
    y = Axis("σᵢ, log scale", low, high, log=True)
    return _chart("Singular values of W", Axis("i", 1, HEAD), y, lines)


def _energy(simulations: Sequence[Simulation]) -> Chart:
    lines = [_line(each, each.concentration) for each in simulations]
    y = Axis(f"SEC({HEAD}, s)", 0, 1.02)
    return _chart("Energy in the s largest of them", Axis("s", 1, HEAD), y, lines)


def _chart(title: str, x: Axis, y: Axis, lines: Sequence[Line]) -> Chart:
    return Chart(title, x, y, lines, width=530, height=270)


def _line(each: Simulation, values: Tensor) -> Line:
    """A mode's curve; the normal one is dashed, so that what it lies upon shows through."""
    color, _ = _DRAWN[each.built]
    is_dashed = each.built == Mode.NORMAL
    return Line(each.name, range(1, HEAD + 1), values.tolist(), color, dashed=is_dashed, width=2)
