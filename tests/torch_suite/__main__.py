"""``python -m tests.torch_suite``: run all cells, and print how many each contender passes."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from tests.torch_suite import calls, checkpoints, learning  # noqa: F401  (they register checks)
from tests.torch_suite.cells import CHECKS, CONTENDERS, Cell, run_check


def table(cells: list[Cell]) -> str:
    """Return a line for each check: its cells, and how many of them each contender passes."""
    rows = {name: [cell for cell in cells if cell.check == name] for name in CHECKS}
    lines = [["check", "cells", *CONTENDERS]]
    for title, row in {**rows, "all": cells}.items():
        passed = [sum(cell.failures[name] is None for cell in row) for name in CONTENDERS]
        lines.append([title, *map(str, (len(row), *passed))])
    padded = [f"{title:<52}" + "".join(f"{each:>18}" for each in rest) for title, *rest in lines]
    return "\n".join(padded)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.torch_suite", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every cell to FILE")
    parser.add_argument("--failures", action="store_true", help="print what failed, and how")
    args = parser.parse_args()
    cells = [cell for name in CHECKS for cell in run_check(name)]
    print(table(cells))
    if args.failures:
        for cell in cells:
            for contender, failure in cell.failures.items():
                if failure is not None:
                    print(f"{cell.name} | {contender} | {failure}")
    if args.json:
        args.json.write_text(json.dumps(list(map(asdict, cells)), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
