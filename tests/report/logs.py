"""Logs of runs that were never trained, and the page of some."""

from __future__ import annotations

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from weyl_megatron.report.report import write_report

BLOCKS, HEADS, STEPS, LAST = 2, 2, range(10, 130, 10), 120
UNIFORM = math.log(16)
WEIGHTS = ["q", "k", "v", "o", "1", "2", "qk", "ov", "21"]
TERMS = [f"sigma_{name}" for name in WEIGHTS]
TERMS += ["norm1_gain", "norm1_bias", "norm2_gain", "norm2_bias", "x", "grad_x"]
EMPTY = {"meta", "line", "polyline", "polygon", "circle", "path", "link", "img", "br", "input"}


class Page(HTMLParser):
    """Checks that what opens closes, and keeps the attributes and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(html: str) -> Page:
    """A page, everything on which is closed."""
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == []
    return page


def values(
    step: int, collapses: bool, blocks: int = BLOCKS, heads: int = HEADS
) -> dict[str, float | None]:
    """What a run logs at a step."""
    grown = min(1.0, step / LAST) if collapses else 0.0
    logged: dict[str, float | None] = {
        "loss": 3.0 if collapses else 5.0 - step / 60,
        "lr": 0.01,
        "sharpness": 10 + grown,
        "sharpness_adam": 90.0,
        "sharpness_threshold": 3800.0,
    }
    for block in range(blocks):
        logged |= {f"block/{block}/{term}": 1 + block + 9 * grown for term in TERMS}
        logged |= {f"block/{block}/grad_{role}": 0.1 * (1 - grown) + 1e-6 for role in "qkv"}
        logged[f"block/{block}/similarity"] = 0.1 + 0.8 * grown
        for head in range(heads):
            of_head = {
                "sigma_qk": 2 + 50 * grown + head,
                "sec": 0.5 + 0.4 * grown + 0.01 * block,
                "effective_rank": 9 - 8 * grown,
                "stable_rank": 2.0,
                "map_rank": 5.0,
                "max_logit": 4.0 + 60 * grown,
                "max_logit_mean": 3.0 + 40 * grown,
                "max_logit_bound": 9.0 + 90 * grown,
                "entropy": UNIFORM * (0.7 - 0.69 * grown),
                "mode": 2.0 if grown > 0.5 else float(head == 1) * 3,
            }
            logged |= {f"block/{block}/head/{head}/{name}": it for name, it in of_head.items()}
        for kind in ("attn.q", "mlp.fc"):
            name = f"h.{block}.{kind}.weight"
            logged |= {f"clip/{name}/lr": 0.002 * (1 + block), f"clip/{name}/clipped": 1.0}
            clipped = {"directions": 3.0 + 4 * block, "share": 0.2 + 0.4 * block, "unseen": 0.5}
            logged |= {f"clip/{name}/{key}": value for key, value in clipped.items()}
        logged[f"clip_share_block/{block}"] = 0.75
    return logged | {"clip/wte.weight/lr": 0.01, "clip_share/attn.q": 1.0, "clip_share/mlp.fc": 0.5}


def levels(step: int, block: int, head: int, rows: int = 16, cols: int = 16) -> bytes:
    """A map that no other step, block or head has."""
    return random.Random(f"{step} {block} {head}").randbytes(rows * cols - 1) + b"\xff"


def start(title: str, **more: Any) -> dict[str, Any]:
    names = [f"h.{block}" for block in range(BLOCKS)]
    return {
        "event": "start",
        "version": 1,
        "run": title,
        "blocks": names,
        "heads": HEADS,
        "sec": 4,
        **more,
    }


def attention_map(step: int, block: int, head: int, rows: int = 16, cols: int = 16) -> Any:
    """The line of a map."""
    place = {"event": "map", "step": step, "block": block, "head": head}
    return {
        **place,
        "rows": rows,
        "cols": cols,
        "queries": list(range(rows)),
        "levels": levels(step, block, head, rows, cols).hex(),
    }


def warning(step: int, block: int, head: int, text: str) -> dict[str, Any]:
    return {"event": "warning", "step": step, "block": block, "head": head, "text": text}


def spike(step: int, z: float | None = 14.0, action: str = "log", **more: Any) -> dict[str, Any]:
    """The line of a spike of two matrices, of which the second is the worse."""
    name = f"h.{step % 7}.attn.q.weight"
    worse = {"name": name, "norm": z and 0.3 * z, "usual": 1.1, "z": z, **more}
    matrices = [{"name": "wte.weight", "norm": 2.5, "usual": 1.5, "z": 6.5}, worse]
    return {"event": "spike", "step": step, "action": action, "matrices": matrices}


def records(title: str, collapses: bool) -> list[dict[str, Any]]:
    """A whole log."""
    log = [start(title, uniform_entropy=UNIFORM, interval=10, something=[1])]
    for at in STEPS:
        log.append(step(at, **values(at, collapses)))
        log += [attention_map(at, block, head) for block in (0, 1) for head in (0, 1)]
    if not collapses:
        return log
    return [*log, warning(70, 1, 0, "entropy <fell> & σ₁ climbed"), spike(80), spike(90)]


def write_log(folder: Path, lines: list[Any], name: str = "stability.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def step(number: int, **tags: Any) -> dict[str, Any]:
    return {"event": "step", "step": number, "values": tags}


def html_of(*folders: Path) -> str:
    out = folders[0] / "deep" / "report.html"
    write_report(folders, out)
    return out.read_text(encoding="utf-8")


def panels(html: str) -> list[str]:
    return re.findall(r'data-panel="(\w+)"', html)
