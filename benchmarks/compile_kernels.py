"""Compile every kernel that a step launches on a GPU, on a machine that has none, and look at what
becomes of it.

    python -m benchmarks.compile_kernels --arch 80 90 100 --widths 4 8 16 [--json out/kernels.json]
    python -m benchmarks.compile_kernels --front-end            Triton to its own IR only, seconds

80 is an A100, 90 an H100 or H200, 100 a B200. What is compiled is what is launched (launches.py):
in all dtypes with 4 vectors of U, in float32 with other numbers of them. The status is 1 where a
kernel

- does not compile, spills registers, or is never launched;
- is one that moves bytes (the products and the elementwise passes) and fits on a multiprocessor
  fewer than four times, or at all, if it is another;
- is one that moves bytes and loads or stores anything but 128 bits a thread in a loop over aligned
  columns. Allowed are 64 for gradients of two bytes beside float32, and in the products, which
  have four columns a thread, for whatever has two bytes; and fewer for Y, which is in a cache and
  the same for all threads;
- is one that moves bytes and exchanges between threads (SHFL, BAR, LDS, STS) in a loop over
  columns.

Which loop is which is read off the source lines in the code (sass.py): the loops over columns of
A X are those of ``_bands``, over rows of Aᵀ Y those of ``_rows``, the aligned ones where these are
called with WIDE; the small loops of YᵀY are ``_gram``'s. Triton's lines before 3.5 tell no
calls: there the loops are not looked at, and the table says so.

The results are in Triton's cache (TRITON_CACHE_DIR), under the keys that a GPU's first step looks
for, if it has the same Triton (3.5 or newer).
"""

from __future__ import annotations

import argparse
import inspect
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton._C.libtriton import ir
from triton.compiler import make_backend

from . import sass
from .launches import ALL_DTYPES, FLOAT, Launch, launches, never_launched


class Multiprocessor(NamedTuple):
    """What programs that run at once share: CUDA C++ Programming Guide, compute capabilities."""

    shared: int  #: bytes of memory
    shared_of_one: int  #: that a program may have
    warps: int
    programs: int


MULTIPROCESSORS = {
    80: Multiprocessor(164 << 10, 163 << 10, 64, 32),
    86: Multiprocessor(100 << 10, 99 << 10, 48, 16),
    89: Multiprocessor(100 << 10, 99 << 10, 48, 24),
    90: Multiprocessor(228 << 10, 227 << 10, 64, 32),
    100: Multiprocessor(228 << 10, 227 << 10, 64, 32),
    120: Multiprocessor(100 << 10, 99 << 10, 48, 24),
}

#: All have so many registers, given to warps by the 256; CUDA takes so many bytes of a program.
_REGISTERS, _REGISTERS_AT_ONCE, _TAKEN = 1 << 16, 256, 1 << 10


HEADINGS = (
    "kernel",
    "sm",
    "registers",
    "bytes spilled",
    "bytes shared",
    "programs an SM",
    "bits of loads and stores in aligned loops",
    "time",
)


#: A pattern of nothing.
NOTHING = r"(?!)"


class Mover(NamedTuple):
    """A kernel that moves bytes: which of its loops do, as :func:`sass.path_of` has them."""

    columns: str  #: loops over columns
    aligned: str  #: those of them that are over aligned ones
    loops: int  #: how many of these there are at least
    elements: int | None  #: side by side that a thread loads at once; None: as many as 128 bits are
    cached: str = NOTHING  #: loads of what is in a cache, and the same for all threads
    programs: int = 4  #: that a multiprocessor has to run at once


MOVERS = {
    "products": Mover(
        columns=r"> _bands: for start in ",
        aligned=r"> _unit: _bands\([^>]*\bTrue\b[^>]*> _bands: for start in ",
        loops=2,  # of W and of U
        elements=4,
    ),
    "collect": Mover(
        columns=r"> _rows: for begin in ",
        aligned=r"> _strip: _rows\([^>]*\bTrue\b[^>]*> _rows: for begin in ",
        loops=2,  # of W and of U
        elements=4,
        cached=r"> line: ",  # Y
    ),
    "project": Mover(  # what is not aligned is put in order for its stores
        columns=r"project: _rows\([^>]*\bTrue\b[^>]*> _rows: for begin in ",
        aligned=r"project: _rows\([^>]*\bTrue\b[^>]*> _rows: for begin in ",
        loops=1,
        elements=4,
        cached=r"> line: ",
    ),
    "elementwise": Mover(
        columns=r"> _unit: for start in ",
        aligned=r"> _unit: for start in range\(0, body, WIDE\)",
        loops=1,
        elements=None,
    ),
}

#: Since then the lines of compiled code tell the calls that led there.
TELLS_CALLS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 5)

_EXCHANGES = "SHFL", "BAR", "LDS", "STS"


class Row(NamedTuple):
    """What became of a launch: a line of the table and of the JSON."""

    kernel: str
    arch: int
    registers: int | None = None  #: of a thread
    spilled: int | None = None  #: bytes of a thread
    shared: int | None = None  #: bytes of a program
    warps: int | None = None  #: of a program
    programs: int | None = None  #: on a multiprocessor at once
    seconds: float | None = None  #: to compile
    error: str | None = None
    moves: dict[str, int] | None = None  #: loads and stores by bits, in the aligned loops
    faults: Sequence[str] = ()

    @property
    def passes(self) -> bool:
        return self.error is None and not self.faults


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    architectures = list(MULTIPROCESSORS)
    parser.add_argument("--arch", nargs="+", type=int, choices=architectures, default=[80, 90])
    parser.add_argument("--widths", nargs="+", type=int, choices=[4, 8, 16], default=[4])
    parser.add_argument("--front-end", action="store_true", help="stop at Triton's own IR")
    parser.add_argument("--json", type=Path, help="write the table there, too")
    parser.add_argument("--jobs", type=int, default=2, help="kernels that are compiled at once")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set, under which nothing is compiled; unset it")
    versions = {"triton": triton.__version__, "torch": torch.__version__}
    print(f"Triton {versions['triton']}, torch {versions['torch']}\n")
    print(f"| {' | '.join(HEADINGS)} |\n| --- {'| ---: ' * (len(HEADINGS) - 1)}|")
    failed = False
    launched: list[Launch] = []
    for arch in options.arch:
        of_arch = variants(arch, options.widths)
        for kernel in never_launched(of_arch):
            failed = True
            print(f"| {kernel} | {arch} | never launched |")
        launched += of_arch
    rows: list[Row] = []
    for row in each(front_end if options.front_end else compiled, launched, options.jobs):
        rows.append(row)
        print(line(row), flush=True)
        failed |= not row.passes
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = {**versions, "kernels": [row._asdict() for row in rows]}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(int(failed))


def variants(arch: int, widths: Sequence[int]) -> list[Launch]:
    """Return what steps launch: in all dtypes with 4 vectors of U (moments in others than the
    weights' for sm_90 alone), in float32 with others.
    """
    noted: dict[str, Launch] = {}
    of_4 = [dtypes for dtypes in ALL_DTYPES if dtypes.state is None or arch == 90]
    for width in widths:
        for launch in launches(arch, width, of_4 if width == 4 else (FLOAT,)):
            noted.setdefault(f"{launch.name} {launch.options}", launch)
    return list(noted.values())


def each(make: Callable[[Launch], Row], launched: Sequence[Launch], jobs: int) -> Iterator[Row]:
    """Yield a row of every launch, in their order, from so many processes."""
    if jobs < 2:
        yield from map(make, launched)
        return
    global _TASK
    _TASK = make, launched  # a launch holds functions, which only a fork carries along
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        yield from pool.map(_numbered, range(len(launched)))


_TASK: tuple[Callable[[Launch], Row], Sequence[Launch]]


def _numbered(number: int) -> Row:
    make, launched = _TASK
    return make(launched[number])


def front_end(launch: Launch) -> Row:
    """Return whether Triton's front end, which types every expression, takes a launch."""
    begin = time.perf_counter()
    backend = make_backend(launch.target)
    options = backend.parse_options(launch.options)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    by_name = {
        "target": launch.target,
        "options": options,
        "codegen_fns": _generators(backend, options),
        "module_map": getattr(backend, "get_module_map", dict)(),
        "context": context,
    }
    try:
        source = launch.source
        taken = inspect.signature(source.make_ir).parameters
        source.make_ir(*(by_name[name] for name in taken))
    except Exception as error:
        return Row(launch.name, launch.arch, error=_last_line(error))
    return Row(launch.name, launch.arch, seconds=time.perf_counter() - begin)


def _generators(backend: Any, options: Any) -> Any:
    make = backend.get_codegen_implementation
    return make(options) if inspect.signature(make).parameters else make()


def compiled(launch: Launch) -> Row:
    """Return what a launch takes of a multiprocessor, once compiled, and what is wrong with it."""
    begin = time.perf_counter()
    try:
        kernel = triton.compile(launch.source, target=launch.target, options=launch.options)
        seconds = time.perf_counter() - begin
        registers, spilled = usage(kernel.asm["cubin"])
        code = disassembled(kernel.asm["cubin"])
    except Exception as error:
        return Row(launch.name, launch.arch, error=_last_line(error))
    warps, shared = int(kernel.metadata.num_warps), int(kernel.metadata.shared)
    programs = programs_of(launch.arch, registers, shared, warps)
    mover = MOVERS.get(launch.kernel.__name__)
    faults = [f"{spilled} bytes spilled"] if spilled else []
    least = mover.programs if mover else 1
    if programs < least:
        faults.append(f"{programs} programs an SM, not {least}")
    moves = None
    if mover:
        constants = launch.named()
        of_state, of_grad, *of_moments = (
            _bits(constants.get(name)) for name in ("STATE", "GRAD", "OF_M", "OF_V")
        )
        if code.has_calls or TELLS_CALLS:
            faults += loop_faults(mover, code, of_state, of_grad, of_moments)
            moves = dict(sorted(_moves(sass.matching(code.loops, mover.aligned)).items()))
    taken = registers, spilled, shared, warps, programs, seconds
    return Row(launch.name, launch.arch, *taken, None, moves, faults)


def loop_faults(
    mover: Mover, code: sass.Code, of_state: int, of_grad: int, of_moments: Sequence[int] = ()
) -> list[str]:
    """Return what is wrong with the loops of a kernel that moves bytes.

    Args:
        mover: which loops they are.
        code: of the kernel.
        of_state, of_grad: bits of an element of W and of a gradient.
        of_moments: of M and of V; none: as of W.
    """
    faults: list[str] = []
    for loop in sass.matching(code.loops, mover.columns):
        exchanges = {each.opcode for each in loop.own if each.kind in _EXCHANGES}
        if exchanges:
            faults.append(f"{', '.join(sorted(exchanges))} in '{loop.source[-1].text}'")
    aligned = list(sass.matching(code.loops, mover.aligned))
    if len(aligned) < mover.loops:
        faults.append(f"{len(aligned)} loops over aligned columns, not {mover.loops}")
    elements = mover.elements or 128 // of_state
    wide, least = (min(128, elements * bits) for bits in (of_state, min([of_grad, *of_moments])))
    narrower = any(bits < of_state for bits in of_moments)
    for loop in aligned:
        moves = [
            each
            for each in loop.own
            if each.kind in ("LDG", "STG")
            and not re.search(mover.cached, sass.path_of(each.source))
        ]
        narrow = [one for one in moves if one.bits < wide]
        # W, M and V, or G, M and V: of what is loaded, gradients are a third at most.
        loads = sum(one.kind == "LDG" for one in moves)
        are_small = narrower or (
            3 * len(narrow) <= loads and all(one.kind == "LDG" for one in narrow)
        )
        are_small = are_small and all(one.bits >= least for one in narrow)
        if not are_small:
            opcodes = ", ".join(sorted({one.opcode for one in narrow}))
            faults.append(f"{opcodes} in '{loop.source[-1].text}'")
    return list(dict.fromkeys(faults))


def _moves(loops: Iterable[sass.Loop]) -> Counter[str]:
    total: Counter[str] = Counter()
    for loop in loops:
        total += Counter({k: n for k, n in loop.counts().items() if k[:3] in ("LDG", "STG")})
    return total


def _bits(dtype: Any) -> int:
    return int(getattr(dtype, "value", dtype).primitive_bitwidth) if dtype is not None else 32


def programs_of(arch: int, registers: int, shared: int, warps: int) -> int:
    """Return how many programs of so many registers a thread a multiprocessor runs at once."""
    most = MULTIPROCESSORS[arch]
    if shared > most.shared_of_one:
        return 0
    of_warp = -(-registers * 32 // _REGISTERS_AT_ONCE) * _REGISTERS_AT_ONCE
    by_registers = _REGISTERS // of_warp // warps
    return min(most.programs, most.warps // warps, by_registers, most.shared // (shared + _TAKEN))


def line(row: Row) -> str:
    """Return a row of the table."""
    if row.error is not None:
        return f"| {row.kernel} | {row.arch} | does not compile: {row.error} |"
    moves = ", ".join(f"{count} {kind}" for kind, count in (row.moves or {}).items())
    if row.moves is None and row.kernel.split()[0] in MOVERS and row.programs is not None:
        moves = "not looked at: this Triton's lines tell no calls"
    taken = [row.registers, row.spilled, row.shared, row.programs, moves]
    cells = ["" if cell is None else str(cell) for cell in taken]
    faults = f" **{'; '.join(row.faults)}** |" if row.faults else ""
    return f"| {row.kernel} | {row.arch} | {' | '.join(cells)} | {row.seconds:.1f} s |{faults}"


def disassembled(cubin: bytes) -> sass.Code:
    """Return the code of a kernel."""
    return sass.parse(_said(cubin, "nvdisasm", "-c", "-gi"))


def usage(cubin: bytes) -> tuple[int, int]:
    """Return the registers of a thread and the bytes of its stack, where they are spilled to."""
    said = _said(cubin, "cuobjdump", "-res-usage")
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", said)
    if numbers is None:
        raise RuntimeError(f"cuobjdump tells no registers: {said[-200:]!r}")
    return int(numbers[1]), int(numbers[2])


def _said(cubin: bytes, tool: str, *options: str) -> str:
    """Return what one of the tools says that come with Triton."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(path), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _last_line(error: BaseException) -> str:
    """Return the line of a compiler's message that says what is wrong, where it went wrong
    first.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [text.strip() for text in str(error).splitlines() if text.strip(" ^")]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}".replace("|", "/")


if __name__ == "__main__":
    main()
