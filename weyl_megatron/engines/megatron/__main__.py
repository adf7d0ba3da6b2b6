"""Run a training script of Megatron-LM, unedited, with ``--optimizer adamw2`` among its flags.

``torchrun … -m weyl_megatron.engines.megatron path/to/Megatron-LM/pretrain_gpt.py … --optimizer
adamw2``
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ...environment import IN_MEGATRON
from . import arguments

USAGE = "%(prog)s SCRIPT [the script's flags] [--optimizer adamw2 [--adamw2-tau TAU] ...]"


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``argv[0]`` with the arguments ``argv[1:]`` as ``python`` would, adamw2 being one of its
    optimizers.
    """
    script, *flags = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if script in ("-h", "--help"):
        _show_help()
        return
    if os.environ.get(IN_MEGATRON):
        _stop(
            f"got {IN_MEGATRON}='{os.environ[IN_MEGATRON]}', which is for scripts that it does not "
            "start; it takes --optimizer adamw2 and the --adamw2- flags instead."
        )
    path = Path(script)
    if not path.is_file():
        _stop(
            f"got '{script}' for the script, which is no file; it takes Megatron-LM's "
            "pretrain_gpt.py or the like."
        )
    sys.path.insert(0, str(path.resolve().parent))
    if not _is_importable("megatron.training"):
        _stop(f"found no megatron.training, neither beside '{script}' nor installed.")
    sys.argv[:] = [script, *flags]
    arguments.install()
    runpy.run_path(script, run_name="__main__")


def _show_help() -> None:
    parser = argparse.ArgumentParser(
        "python -m weyl_megatron.engines.megatron",
        USAGE,
        "Run a training script of Megatron-LM, such as pretrain_gpt.py, as it is.",
    )
    arguments.add_flags(parser)
    parser.print_help()


def _is_importable(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _stop(sentence: str) -> None:
    print(f"weyl_megatron.engines.megatron {sentence}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
