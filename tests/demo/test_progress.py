from __future__ import annotations

import io
import json
from pathlib import Path

from weyl_megatron.demo.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def step(number: int, **more: int) -> str:
    return (
        json.dumps({"event": "step", "step": number, "loss": 2.5, "elapsed": number / 10, **more})
        + "\n"
    )


def log(out: Path, run: str, text: str) -> None:
    (out / run).mkdir(exist_ok=True)
    with (out / run / "log.jsonl").open("a") as file:
        file.write(text)


def test_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    stream = io.StringIO()
    progress = Progress(tmp_path, 100, stream)
    log(tmp_path, "adamw2", step(49, clipped=3, matrices=39) + step(50, clipped=2, matrices=39))
    progress.update()
    log(
        tmp_path,
        "adamw2",
        json.dumps({"event": "end", "validation_loss": 2.25, "elapsed": 10.0}) + "\n",
    )
    progress.update()
    first, last = stream.getvalue().splitlines()
    assert (
        first == "AdamW², τ = 0.01      step  50/100  loss 2.500  clipped  2/39 matrices  0:45 left"
    )
    assert last == "AdamW², τ = 0.01      validation loss 2.250  in 10 s"


def test_one_live_line_in_a_terminal(tmp_path: Path) -> None:
    stream = Terminal()
    progress = Progress(tmp_path, 100, stream)
    progress.update()
    assert "starting" in stream.getvalue()
    log(tmp_path, "adamw", step(1))
    progress.update()
    log(tmp_path, "adamw", step(2))
    progress.update()
    assert "\n" not in stream.getvalue() and "step   2/100" in stream.getvalue().rsplit("\r", 1)[-1]


def test_half_a_line_is_left_for_later(tmp_path: Path) -> None:
    stream = io.StringIO()
    progress = Progress(tmp_path, 100, stream)
    line = step(50)
    log(tmp_path, "adamw", line[:10])
    progress.update()
    log(tmp_path, "adamw", line[10:])
    progress.update()
    assert stream.getvalue().count("step  50/100") == 1
