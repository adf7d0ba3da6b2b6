"""What all tests share: property tests draw the same cases on every run, untimed; the table of
`make faults`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings


def _modules() -> list[str]:
    """Return the names of the package's modules, without importing one."""
    root = Path(__file__).parents[1]
    paths = (
        path.relative_to(root).with_suffix("") for path in (root / "weyl_megatron").rglob("*.py")
    )
    return [".".join(path.parts).removesuffix(".__init__") for path in paths]


# A warning that is of our doing is an error, here (pyproject.toml) and in the processes that tests
# start.
os.environ["PYTHONWARNINGS"] = ",".join(
    [
        *filter(None, [os.environ.get("PYTHONWARNINGS")]),
        *(f"error:::{module}" for module in _modules()),
    ]
)

# What DeepSpeed compiles names the include folders of its environment: two environments that share
# a folder would compile it anew, in turn, each while the other waits.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name bytes by their argument: an archive's hold the time, and xdist's workers must collect
    the same names.
    """
    return argname if isinstance(val, bytes) else None


#: The files that take longest, the longest first (`pytest --durations=0` tells). Two workers that
#: share the files are done at about the same time then.
LONGEST = (
    "launch/test_hosts.py",
    "demo/test_demo.py",
    "kernels/test_choice.py",
    "faults/test_save_faults.py",
    "examples/test_collapse.py",
    "examples/test_deepspeed_runs.py",
    "engines/megatron/test_newest.py",
    "engines/deepspeed/test_deepspeed.py",
    "day/test_day.py",
    "faults/test_resize.py",
    "faults/test_properties.py",
    "transformer/test_residual.py",
    "watch/test_watch.py",
    "examples/test_pretrain.py",
    "transformer/test_reparam.py",
    "engines/huggingface/test_huggingface.py",
    "faults/test_security.py",
    "patches/test_deepspeed.py",
    "patches/test_megatron.py",
    "engines/megatron/test_checkpoints.py",
    "engines/megatron/test_megatron.py",
    "engines/megatron/test_nonfinite.py",
    "engines/megatron/test_variable.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    root = Path(__file__).parent
    place = {str(root / name): number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(str(item.path), len(place)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--faults",
        type=Path,
        metavar="FILE",
        help="write what tests tried, and what survived, to FILE",
    )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print, and write, a row for every test that recorded what it tried and what survived."""
    path = config.getoption("--faults")
    if path is None:
        return
    rows = []
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            told = dict(getattr(report, "user_properties", []))
            if "tried" in told and (report.when == "call" or outcome == "skipped"):
                survived = told.get("survived", "") if outcome == "passed" else outcome
                rows.append((report.location[0], told["tried"], survived))
    lines = [
        "| tried | survived |",
        "| --- | --- |",
        *(f"| {tried} | {survived} |" for _, tried, survived in sorted(rows)),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    terminalreporter.write_line("")
    for line in lines:
        terminalreporter.write_line(line)
