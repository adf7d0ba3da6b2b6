"""Run a training script of Megatron-LM, unedited, with ``--optimizer adamw2`` among its flags.

``torchrun … -m weyl_megatron.integrations.megatron path/to/Megatron-LM/pretrain_gpt.py … --optimizer adamw2``
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from weyl_megatron.integrations.megatron import arguments

USAGE = (
    "usage: python -m weyl_megatron.integrations.megatron SCRIPT [the script's flags] "
    "[--optimizer adamw2 [--adamw2-tau TAU] …]\n"
    "SCRIPT is a training script of Megatron-LM, such as Megatron-LM/pretrain_gpt.py; SCRIPT --help shows all flags."
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``argv[0]`` with the arguments ``argv[1:]`` as ``python`` would, adamw2 being one of its optimizers."""
    script, *flags = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if script in ("-h", "--help"):
        print(USAGE)
        return
    path = Path(script)
    if not path.is_file():
        _stop(f"got '{script}' for the script, which is no file; it takes Megatron-LM's pretrain_gpt.py or the like.")
    sys.path.insert(0, str(path.resolve().parent))
    if not _is_importable("megatron.training"):
        _stop(f"found no megatron.training, neither beside '{script}' nor installed.")
    sys.argv[:] = [script, *flags]
    arguments.install()
    runpy.run_path(script, run_name="__main__")


def _is_importable(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _stop(sentence: str) -> None:
    print(f"weyl_megatron.integrations.megatron {sentence}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
