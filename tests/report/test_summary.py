"""Runs in few numbers, by the command: of real small runs, and of what is hard to write down."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.collapse.model import GPT, GPTConfig
from tests.demo.synthetic import synthetic_results
from tests.report.logs import spike, start, step, warning, write_log
from weyl_megatron import AdamW2, __version__
from weyl_megatron.cli import main
from weyl_megatron.watch import Watch

CONFIG = GPTConfig("pre", vocabulary=50, context=16, layers=3, heads=2, width=24)
STEPS = 6


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Any]]]:
    """Two runs that were trained and watched, by AdamW² and by AdamW; what they measured."""
    folder = tmp_path_factory.mktemp("trained")
    measured: dict[str, list[Any]] = {}
    for name in ("adamw2", "adamw"):
        torch.manual_seed(0)
        model = GPT(CONFIG)
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        if name == "adamw2":
            optimizer = AdamW2(model.named_parameters(), lr=0.05, tau=0.01)
        watch = Watch(model, optimizer, every=2, out=folder / name, run=name)
        for _ in range(STEPS):
            tokens = torch.randint(50, (4, 17))
            loss = model(tokens[:, :-1], tokens[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values = watch.step(loss)
            if values:
                measured.setdefault(name, []).append(dict(values))
        watch.close()
    return folder, measured


def said_by(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[str, str]:
    assert main(["report", *map(str, arguments)]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def strict(text: str) -> Any:
    """JSON without what other languages' parsers refuse."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert text.isascii() and text.endswith("}\n")
    return json.loads(text, parse_constant=refuse)


def rounded(value: float) -> Any:
    """A log has six digits of a number: the last is right by a half."""
    return pytest.approx(value, rel=5.1e-6)


def test_json_has_the_numbers_that_were_measured(
    trained: tuple[Path, dict[str, list[Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, measured = trained
    said = strict(said_by(capsys, folder, "--json")[0])
    assert (said["version"], said["weyl_megatron"], said["notes"]) == (1, __version__, [])
    assert [run["run"] for run in said["runs"]] == ["adamw", "adamw2"]
    for run in said["runs"]:
        values = measured[run["run"]]
        assert run["folder"] == str(folder / run["run"]) and run["interval"] == 2
        assert run["steps"] == {"first": 1, "last": STEPS, "measurements": 4}
        losses = [each["loss"] for each in values]
        assert run["loss"]["last"] == {"value": rounded(losses[-1]), "step": STEPS}
        assert run["loss"]["least"]["value"] == rounded(min(losses))
        heads = [(block, head) for block in range(CONFIG.layers) for head in range(CONFIG.heads)]
        assert run["heads"]["count"] == len(heads)
        modes = [values[-1][f"block/{block}/head/{head}/mode"] for block, head in heads]
        names = ("normal", "benign", "malignant", "uniform")
        assert run["heads"]["modes"] == {name: modes.count(at) for at, name in enumerate(names)}
        for name in ("max_logit", "entropy", "sec"):
            tags = [f"block/{block}/head/{head}/{name}" for block, head in heads]
            known = run["heads"]["numbers"][name]
            every = [each[tag] for each in values for tag in tags]
            assert known["largest"]["value"] == rounded(max(every))
            assert known["least"]["value"] == rounded(min(every))
            assert known["mean"] == rounded(sum(every) / len(every))
            last = [values[-1][tag] for tag in tags]
            assert known["last"]["mean"] == rounded(sum(last) / len(last))
            peak = known["largest"]
            at = [1, 2, 4, 6].index(peak["step"])
            place = f"block/{peak['block']}/head/{peak['head']}/{name}"
            assert values[at][place] == rounded(peak["value"])
        known = run["blocks"]["numbers"]["sigma_qk"]
        every = [each[f"block/{block}/sigma_qk"] for each in values for block in range(3)]
        assert known["largest"]["value"] == rounded(max(every)) and run["blocks"]["count"] == 3
        assert run["warnings"] == {"count": 0, "listed": []}
        assert run["spikes"] == {"count": 0, "skipped": 0, "listed": []}
    adamw, adamw2 = said["runs"]
    assert adamw["clipped"] is None
    every = measured["adamw2"]
    of_all = [each[tag] for each in every for tag in each if re.fullmatch("clip/.*/clipped", tag)]
    assert adamw2["clipped"]["mean"] == rounded(sum(of_all) / len(of_all)) and sum(of_all) > 0
    of_q = [
        each[f"clip/blocks.{block}.attn.q.weight/clipped"] for each in every for block in (0, 1, 2)
    ]
    assert adamw2["clipped"]["kinds"]["attn.q"]["mean"] == rounded(sum(of_q) / len(of_q))


def cells_of(text: str) -> list[list[list[str]]]:
    """The tables of Markdown, in them the text of each cell; there is nothing but text in it."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark")
    tables: list[list[list[str]]] = []
    for token in parser.enable("table").parse(text):
        assert token.type != "html_block"
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            tables[-1].append([])
        elif token.type == "inline":
            assert {part.type for part in token.children or ()} <= {"text"}, token
            if token.level > 3:  # of a table
                tables[-1][-1].append("".join(part.content for part in token.children or ()))
    return tables


def test_markdown_is_a_row_a_run(
    trained: tuple[Path, dict[str, list[Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, measured = trained
    text, _ = said_by(capsys, folder / "adamw2", folder / "adamw", "--markdown")
    (table,) = cells_of(text)
    heads, adamw2, adamw = table
    assert heads[:4] == ["run", "steps", "last loss", "least loss"]
    assert heads[-2:] == ["largest σ₁(W_qᵀW_k)", "matrices clipped"]  # no warnings, no spikes
    assert adamw2[:3] == ["adamw2", "6", f"{measured['adamw2'][-1]['loss']:.4g}"]
    assert adamw[:3] == ["adamw", "6", f"{measured['adamw'][-1]['loss']:.4g}"]
    assert adamw2[-1].endswith(" %") and adamw[-1] == "–"
    assert len(text.splitlines()) == 4 and "<" not in text


def test_markdown_has_warnings_spikes_and_what_could_not_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    title = "a|b\n<b>*c*</b> `d` [e](f) &amp; $g$"
    name = "h.0_x_|y|`z`"
    log = [start(title), step(10, loss=2.0), step(20, loss=None), warning(10, 0, 0, "x"), "?\n"]
    log += [spike(15, 30.0, "skip", name=name), spike(20, None, norm=None)]
    text, _ = said_by(capsys, write_log(tmp_path / "a", log), "--markdown", "-")
    table, spikes = cells_of(text)
    flat = " ".join(title.split())
    assert table[0] == ["run", "steps", "last loss", "least loss", "warnings", "spikes (skipped)"]
    assert table[1] == [flat, "20", "not finite", "2 (step 10)", "1", "2 (1)"]
    assert spikes[0] == ["run", "step", "action", "worst", "norm", "usual", "z"]
    assert spikes[1] == [flat, "15", "skip", f"{name} and 1 more", "9", "1.1", "30"]
    assert spikes[2][-3:] == ["not finite", "1.1", "not finite"]
    assert text.splitlines()[-1].startswith("- ") and "line 5 is not JSON" in text


def test_json_of_what_is_not_finite_or_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = [start("τ", interval="often"), *(warning(at, 1, 2, f"w{at}") for at in range(30))]
    log += [step(30, **{"loss": float("nan"), "block/0/head/0/sec": float("inf")})]
    log += [spike(31, None, norm=None)]
    (run,) = strict(said_by(capsys, write_log(tmp_path / "a", log), "--json")[0])["runs"]
    assert run["run"] == "τ" and run["interval"] is None and run["validation_loss"] is None
    assert run["loss"] == {"last": {"value": None, "step": 30}, "least": None}
    nothing = {"least": None, "largest": None, "mean": None, "last": None}
    assert run["heads"]["numbers"] == {"sec": nothing} and run["heads"]["modes"] is None
    assert run["blocks"] is None and run["clipped"] is None
    assert run["warnings"]["count"] == 30 and len(run["warnings"]["listed"]) == 20
    assert run["warnings"]["listed"][3] == {"step": 3, "block": 1, "head": 2, "text": "w3"}
    (listed,) = run["spikes"]["listed"]
    assert (listed["step"], listed["action"], listed["matrices"]) == (31, "log", 2)
    assert listed["worst"][0] == {
        "name": "h.3.attn.q.weight",
        "norm": None,
        "usual": 1.1,
        "z": None,
    }


def test_the_demos_runs_have_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synthetic_results(tmp_path)
    said = strict(said_by(capsys, tmp_path, "--json")[0])
    assert all(run["validation_loss"] and run["loss"] and run["steps"] for run in said["runs"])
    (table,) = cells_of(said_by(capsys, tmp_path, "--markdown")[0])
    assert "validation loss" in table[0] and len(table) == 1 + len(said["runs"])


def test_what_goes_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A summary on standard output is alone there; without --out there is no page."""
    folder = write_log(tmp_path / "a", [start("a"), "?\n", step(1, loss=1.0)])
    page, file, table = tmp_path / "p.html", tmp_path / "deep" / "s.json", tmp_path / "t.md"
    out, errors = said_by(capsys, folder, "--json")
    assert strict(out)["runs"] and errors.endswith("line 2 is not JSON.\n")
    assert sorted(tmp_path.iterdir()) == [folder]
    out, errors = said_by(capsys, folder, "--json", "--out", page)
    assert strict(out)["runs"] and errors.startswith(f"The report: {page}\n") and page.is_file()
    out, errors = said_by(capsys, folder, "--json", file, "--markdown", table)
    assert out.endswith("line 2 is not JSON.\n") and errors == ""
    assert strict(file.read_text())["notes"] and table.read_text().startswith("| run |")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--json", "."],
            "--json got ., a folder, it takes a file or -, and runs stand before it.",
        ),
        (
            ["--markdown", "b/stability.jsonl"],
            "--markdown got b/stability.jsonl, a run's log, it takes a file or -, and runs stand "
            "before it.",
        ),
        (
            ["--json", "--markdown"],
            "--json and --markdown got standard output, it takes one of them.",
        ),
        (["--json", "x", "--markdown", "x"], "--json and --markdown got x, it takes one of them."),
    ],
)
def test_what_is_not_meant_is_refused_in_a_sentence(
    options: list[str],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_log(tmp_path / "a", [start("a"), step(1, loss=1.0)])
    assert main(["report", str(folder), *options]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"weyl-megatron: error: report: {sentence}\n" and captured.out == ""
    assert sorted(tmp_path.iterdir()) == [folder]
