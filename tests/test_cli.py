"""`weyl-megatron` itself; its sub-commands have tests of their own."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch

from weyl_megatron import __version__, cli

COMMANDS = ("demo", "doctor", "report", "modes", "plan")


def test_the_version_names_this_package_and_torch(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"weyl-megatron {__version__}, torch {torch.__version__}\n"


def test_help_lists_the_commands_and_imports_no_torch() -> None:
    code = (
        "import sys; from weyl_megatron.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *lines, has_torch = done.stdout.splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("    ") and line.strip()]
    assert [word for word in listed if word in COMMANDS] == list(COMMANDS)
    assert any("--version" in line for line in lines)
    assert has_torch == "False"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: weyl-megatron {command}")


@pytest.mark.parametrize("arguments", [[], ["demon"], ["demo", "--steps", "1"]])
def test_what_it_does_not_take_ends_with_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_the_command_is_installed_under_its_name() -> None:
    scripts = entry_points(group="console_scripts", name="weyl-megatron")
    assert {script.value for script in scripts} == {"weyl_megatron.cli:main"}
