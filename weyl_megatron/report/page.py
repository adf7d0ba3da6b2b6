"""The skeleton of all pages and what stands in them: sections, cards, figures, tables, legends.

A page is one file with its styles, scripts and data in it, readable without a network. Arguments
are plain text, which is escaped here; ``body``, ``lead``, ``figures``, ``heads``, ``rows``,
``cells`` and ``foot`` are HTML.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

_PAGE = Template(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
$style</style>
</head>
<body>
<main>
<h1>$heading</h1>
$body
</main>
<div id="values"></div>
$data<script>
"use strict";
$script</script>
</body>
</html>
"""
)


def asset(name: str) -> str:
    """The text of a style or a script that lies beside this module."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def page(
    title: str,
    body: str,
    heading: str = "",
    data: Mapping[str, Any] | None = None,
    parts: Sequence[str] = (),
) -> str:
    """A whole page.

    Args:
        title: of the window, and above the page where there is no ``heading``.
        body: HTML.
        heading: what stands above the page.
        data: what the scripts read, by the id of its element: ``steps``, the logged steps in
            ascending order, and ``maps``. Anything that JSON takes.
        parts: scripts and styles beside those that all pages have: ``"maps"``.
    """
    scripts = "".join(
        f'<script type="application/json" id="{name}">{_json(value)}</script>\n'
        for name, value in (data or {}).items()
    )
    return _PAGE.substitute(
        title=escape(title),
        heading=escape(heading or title),
        style="".join(asset(f"{name}.css") for name in ("chart", "page", *parts)),
        body=body,
        data=scripts,
        script="".join(asset(f"{name}.js") for name in ("fit", "hover", *parts)),
    )


def _json(value: Any) -> str:
    """JSON that no text in it can end the element of."""
    return json.dumps(value, separators=(",", ":")).replace("</", "<\\/")


def section(title: str, lead: str, body: str, panel: str = "") -> str:
    """A part of the page, under its heading; ``panel`` is its name for who looks it up."""
    named = f' data-panel="{panel}"' if panel else ""
    return f"<section{named}><h2>{escape(title)}</h2><p>{lead}</p>{body}</section>"


def card(body: str) -> str:
    """A card."""
    return f'<div class="card">{body}</div>'


def legend(entries: Iterable[tuple[str, str]], more: str = "", marked: str = "") -> str:
    """Names and their colours, then ``more``, which is drawn dashed, and ``marked``, as marks."""
    spans = "".join(f'<span style="--run:{color}">{escape(name)}</span>' for name, color in entries)
    dashed = f'<span class="dashed">{escape(more)}</span>' if more else ""
    marks = f'<span class="marked">{escape(marked)}</span>' if marked else ""
    return f'<div class="legend">{spans}{dashed}{marks}</div>'


def grid(columns: int, figures: Iterable[str]) -> str:
    """A card with figures side by side."""
    return f'<div class="card grid of-{columns}">{"".join(figures)}</div>'


def figure(body: str) -> str:
    """One chart."""
    return f"<figure>{body}</figure>"


def figure_of_run(color: str, title: str, body: str, attributes: str = "") -> str:
    """One chart of a run, under its colour; with a title under its name, too."""
    name = f'<div class="name">{escape(title)}</div>' if title else ""
    return f'<figure class="of-run" style="--run:{color}"{attributes}>{name}{body}</figure>'


def tile(color: str, title: str, number: str, note: str) -> str:
    """A run's one number, large."""
    return (
        f'<div class="card tile" style="--run:{color}"><b>{escape(title)}</b>'
        f"<strong>{escape(number)}</strong><span>{escape(note)}</span></div>"
    )


def table(heads: Sequence[str], rows: Iterable[str], foot: str = "") -> str:
    """A card with a table of the runs; ``foot`` is a row."""
    cells = "".join(f'<th scope="col">{head}</th>' for head in heads)
    footer = f"<tfoot>{foot}</tfoot>" if foot else ""
    return (
        f'<div class="card table"><table class="runs"><thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody>{footer}</table></div>"
    )


def row(color: str, title: str, cells: Iterable[str]) -> str:
    """A run's row."""
    return f'<tr style="--run:{color}"><th scope="row">{escape(title)}</th>{"".join(cells)}</tr>'


def cell(text: str, small: str = "", kind: str = "") -> str:
    """A plain cell with a second, smaller line."""
    second = f"<small>{escape(small)}</small>" if small else ""
    return f"<td{f' class={kind!r}' if kind else ''}>{escape(text)}{second}</td>"
