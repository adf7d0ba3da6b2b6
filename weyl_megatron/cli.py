"""`weyl-megatron`: the command line. Each sub-command imports what it needs when it runs."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import __version__

Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one sub-command and returns its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without τ is no reason to stop
            stream.reconfigure(errors="replace")
    parsed = _parser().parse_args(arguments)
    command: Command = parsed.command
    try:
        return command(parsed)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"weyl-megatron: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="weyl-megatron", description="AdamW²: train Transformers without learning-rate warmup."
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="print this package's version and torch's"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    doctor = commands.add_parser(
        "doctor",
        help="say what is installed, what is missing, and which kernel steps here",
        description=(
            "Says which versions are installed, whether DeepSpeed and Megatron find AdamW², which "
            "kernel steps here and why, and the command that mends what does not fit. Exits with "
            "1 where something that is installed cannot work as it is; what is not installed does "
            "not count."
        ),
    )
    doctor.add_argument(
        "--json",
        action="store_true",
        help='print {"version": …, "lines": [{"label": …, "text": …, "fits": …}, …]}',
    )
    doctor.set_defaults(command=_doctor)
    _add_instruments(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="pretrain a small GPT five times and compare",
        description=(
            "Pretrains a small GPT on the Python standard library's sources under DeepSpeed "
            "ZeRO-2: AdamW without and with warmup, AdamW² without warmup at τ = 0.01, at "
            "τ = balanced and, there, projected. Uses all GPUs, or the CPU and gloo "
            "(DS_ACCELERATOR=cpu forces that). Writes OUT/report.html, OUT/results.json and each "
            "run's log.jsonl; exits with 1 if a claim about the final losses is not met."
        ),
    )
    demo.add_argument(
        "--out", type=Path, default=Path("out/demo"), help="folder to write to (%(default)s)"
    )
    demo.add_argument(
        "--steps", type=_at_least(2), default=400, help="training steps of each run (%(default)s)"
    )
    demo.add_argument(
        "--seed", type=_at_least(0), default=0, help="seed of the weights and batches (%(default)s)"
    )
    demo.add_argument("--procs", type=_at_least(1), help="processes (one per GPU, 2 on CPU)")
    demo.set_defaults(command=_demo)


def _add_instruments(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    report = commands.add_parser(
        "report",
        help="make one HTML page of watched runs, or a summary",
        description=(
            "Makes one self-contained HTML page of one or several runs: folders with the "
            "stability.jsonl of weyl_megatron.watch.Watch, or the demo's. With --json or "
            "--markdown it makes a summary in its place; with --out, the page too."
        ),
    )
    report.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="a run's folder, or one of several runs'"
    )
    report.add_argument("--out", type=Path, help="the page (report.html)")
    for key, what in (("json", "the summary as JSON"), ("markdown", "as a table of Markdown")):
        report.add_argument(
            f"--{key}", nargs="?", const="-", metavar="FILE", help=f"{what}; behind the runs"
        )
    report.set_defaults(command=_run_of("report.report"))

    modes = commands.add_parser("modes", help="simulate the three modes of attention")
    modes.add_argument(
        "--out", type=Path, default=Path("modes.html"), help="the page (%(default)s)"
    )
    modes.add_argument(
        "--seed", type=_at_least(0), default=0, help="of the tokens and weights (%(default)s)"
    )
    modes.set_defaults(command=_run_of("report.modes"))

    plan = commands.add_parser(
        "plan",
        help="say how long each τ would warm a model up, or what a run's first steps speak for",
        description=(
            "Says, per kind of matrix and for several τ, for how many steps the clip of AdamW² "
            "takes the place of a warmup, and suggests a τ. MODEL: a Hugging Face or timm name, "
            "the folder of a config.json, a recipe, a checkpoint. With --run in its place it says "
            "which τ and which rate the first hundred steps of a watched run speak for, and why."
        ),
    )
    plan.add_argument("model", metavar="MODEL", nargs="?")
    plan.add_argument(
        "--run", type=Path, help="a folder with the stability.jsonl of weyl_megatron.watch.Watch"
    )
    plan.add_argument("--lr", type=float, help="peak of the schedule (the recipe's, or 6e-4)")
    plan.add_argument("--steps", type=_at_least(1), help="of the run")
    plan.add_argument("--warmup", type=_at_least(0), help="steps of warmup (the recipe's, or 0)")
    plan.add_argument("--tau", nargs="+", help="thresholds to look at")
    plan.add_argument("--json", type=Path, help="a file for the numbers")
    plan.set_defaults(command=_run_of("plan.plan"))


def _run_of(module: str) -> Command:
    """Return what imports a module of the package and calls its ``run``."""

    def command(arguments: argparse.Namespace) -> int:
        run: Command = importlib.import_module(f"weyl_megatron.{module}").run
        return run(arguments)

    return command


def _demo(arguments: argparse.Namespace) -> int:
    from .demo.launch import run_demo

    # A CI job that is called off takes the training processes along.
    signal.signal(signal.SIGTERM, _interrupt)
    return run_demo(arguments.out, arguments.steps, arguments.seed, arguments.procs)


def _doctor(arguments: argparse.Namespace) -> int:
    from .doctor import examine

    lines = examine()
    if arguments.json:
        report = {"version": __version__, "lines": [line._asdict() for line in lines]}
        print(json.dumps(report, indent=1, ensure_ascii=False))
    else:
        for line in lines:
            print(f"{line.label:<19}{line.text}")
    return 0 if all(line.fits for line in lines) else 1


class _Version(argparse.Action):
    """Print the version and torch's, as torch says it: its metadata may lack the "+cu130"."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        import torch

        print(f"weyl-megatron {__version__}, torch {torch.__version__}")
        parser.exit()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _at_least(smallest: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = smallest - 1
        if value < smallest:
            raise argparse.ArgumentTypeError(
                f"takes an integer of {smallest} or more, got {text!r}"
            )
        return value

    return integer


if __name__ == "__main__":
    sys.exit(main())
