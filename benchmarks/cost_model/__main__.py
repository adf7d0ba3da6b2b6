"""The cost model's table, and its check; ``benchmarks/cost_model/__init__.py`` says what it is."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import triton

import benchmarks.cost_model as package
from benchmarks.models import MODELS

from .gpus import GPUS
from .model import bounds
from .table import binding, check, document, measured, states

#: What benchmarks.gpu leaves.
_RESULTS = Path("out/gpu/results.json")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cost_model", description=package.__doc__, formatter_class=raw
    )
    parser.add_argument("--gpu", nargs="+", choices=sorted(GPUS), default=["h200"])
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--widths", nargs="+", type=int, choices=[4, 8, 16], default=[4])
    parser.add_argument("--json", type=Path, help="write the bounds there")
    parser.add_argument("--markdown", type=Path, help="write the table there, or between its marks")
    parser.add_argument(
        "--check", type=Path, help="fail if a bound is 5 %% above what is kept there"
    )
    options = parser.parse_args()
    computed = {
        f"{gpu} {model} {width}": bounds(model, gpu, width)
        for gpu in options.gpu
        for width in options.widths
        for model in options.models
    }
    said = states(computed)
    print(
        f"Triton {triton.__version__}; milliseconds, not measured\n\n{said}\n\n{binding(computed)}"
    )
    if _RESULTS.is_file():
        print(f"\n{measured(json.loads(_RESULTS.read_text()), computed)}")
    kept: dict[str, Any] = {
        "triton": triton.__version__,
        "bounds": {
            key: {state: [round(each.lower, 4), round(each.upper, 4)] for state, each in of.items()}
            for key, of in computed.items()
        },
    }
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(kept, indent=1) + "\n")
    if options.markdown is not None:
        options.markdown.write_text(document(options.markdown, said, binding(computed)))
    if options.check is not None:
        faults = check(json.loads(options.check.read_text()), kept)
        print("\n" + "\n".join(faults or [f"no bound has grown beyond {options.check}"]))
        sys.exit(int(any(not fault.startswith("skipped") for fault in faults)))


if __name__ == "__main__":
    main()
