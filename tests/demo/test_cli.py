from __future__ import annotations

from pathlib import Path

import pytest

from weyl_megatron.cli import main


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--steps", "1"], "argument --steps: takes an integer of 2 or more, got '1'"),
        (["--steps", "many"], "argument --steps: takes an integer of 2 or more, got 'many'"),
        (["--procs", "0"], "argument --procs: takes an integer of 1 or more, got '0'"),
        (["--seed", "-1"], "argument --seed: takes an integer of 0 or more, got '-1'"),
    ],
)
def test_an_impossible_option_is_named(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["demo", *arguments])
    assert sentence in capsys.readouterr().err


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    text = capsys.readouterr().out
    assert all(option in text for option in ("--out", "--steps", "--seed", "--procs"))


def test_a_folder_that_cannot_be_made_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file" / "demo")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("weyl-megatron: error: ") and error.count("\n") == 1
