"""Compile every kernel that a step launches on a GPU, on a machine that has none.

    python -m benchmarks.compile_kernels --arch 80 90 100 [--json out/kernels.json]
    python -m benchmarks.compile_kernels --front-end            Triton to its own IR only, a second

80 is an A100, 90 an H100 or H200, 100 a B200. The status is 1 where a kernel does not compile,
spills registers or fits on no multiprocessor, and where one is never launched.

What is compiled is what is launched: small optimizers make steps on the CPU, in the code of a GPU's
step, and Triton's own binder specializes each launch for the architecture, with its constants,
dtypes, alignments and options. The results are in Triton's cache (TRITON_CACHE_DIR), under the keys
that a GPU's first step looks for, if it has the same Triton.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import nn
from triton import knobs
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import JITFunction, driver

from weyl_megatron import AdamW2, matrices
from weyl_megatron.engines.given import GivenLayout
from weyl_megatron.kernels import triton_step
from weyl_megatron.layouts.buffers import Buffer, Layout, Parameter, Shard
from weyl_megatron.spectral.blocks import Blocks


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


HEADINGS = "kernel", "sm", "registers", "bytes spilled", "bytes shared", "programs an SM", "time"


class Launch(NamedTuple):
    """A kernel as it is launched: what Triton compiles for it."""

    kernel: Any
    arch: int
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name, its constants, and the pointers that this variant takes unaligned."""
        names = self.kernel.arg_names
        constants = [f"{names[at[0]]}={value}" for at, value in self.constants.items()]
        unaligned = [
            f"{param.name} not aligned"
            for param in self.kernel.params
            if self.signature[param.name].startswith("*")
            and not (param.do_not_specialize_on_alignment or self.attributes.get((param.num,)))
        ]
        return " ".join([self.kernel.__name__, *constants, *unaligned])

    @property
    def target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    @property
    def source(self) -> ASTSource:
        return ASTSource(self.kernel, self.signature, self.constants, self.attributes)


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

    @property
    def passes(self) -> bool:
        return self.error is None and self.spilled == 0 and bool(self.programs)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    architectures = list(MULTIPROCESSORS)
    parser.add_argument("--arch", nargs="+", type=int, choices=architectures, default=[80, 90])
    parser.add_argument("--front-end", action="store_true", help="stop at Triton's own IR")
    parser.add_argument("--json", type=Path, help="write the table there, too")
    options = parser.parse_args()
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, under which nothing is compiled; unset it")
    failed = False
    rows: list[Row] = []
    versions = {"triton": triton.__version__, "torch": torch.__version__}
    print(f"Triton {versions['triton']}, torch {versions['torch']}\n")
    print(f"| {' | '.join(HEADINGS)} |\n| --- {'| ---: ' * (len(HEADINGS) - 1)}|")
    for arch in options.arch:
        launched = launches(arch)
        for kernel in never_launched(launched):
            failed = True
            print(f"| {kernel} | {arch} | never launched |")
        for launch in launched:
            rows.append(front_end(launch) if options.front_end else compiled(launch))
            print(line(rows[-1]), flush=True)
    if options.front_end:
        failed |= any(row.error is not None for row in rows)
    else:
        failed |= not all(row.passes for row in rows)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = {**versions, "kernels": [row._asdict() for row in rows]}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(int(failed))


def launches(arch: int) -> list[Launch]:
    """Return what a step launches, once per variant that Triton compiles for an architecture."""
    noted: dict[str, Launch] = {}

    def note(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        given = json.loads(compile["specialization_data"])["options"]
        options = {name: value for name, value in given.items() if isinstance(value, int | str)}
        bound = compile["signature"], compile["constants"], compile["configs"][0]
        noted.setdefault(f"{fn.name}{key}", Launch(fn.jit_function, arch, *bound, options))
        return True  # it is neither compiled nor launched

    with _as_on_a_gpu(arch, note):
        for matrices in (3, 16):  # a row of a mask is aligned after 16 of them
            _steps(*_whole(matrices))
        _steps(*_cut())
    return list(noted.values())


def never_launched(launches: list[Launch]) -> list[str]:
    """Return the names of the kernels that are in none of the launches."""
    launched = {launch.kernel.__name__ for launch in launches}
    return [name for name in _kernels() if not name.startswith("_") and name not in launched]


def _kernels() -> dict[str, Any]:
    """Return all functions of triton_ops.py that Triton compiles, by name."""
    return {n: each for n, each in vars(triton_step.ops).items() if isinstance(each, JITFunction)}


def front_end(launch: Launch) -> Row:
    """Return whether Triton's front end, which types every expression, takes a launch."""
    begin = time.perf_counter()
    backend = make_backend(launch.target)
    options = backend.parse_options(launch.options)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    generated = backend.get_codegen_implementation(options), backend.get_module_map()
    try:
        launch.source.make_ir(launch.target, options, *generated, context)
    except Exception as error:
        return Row(launch.name, launch.arch, error=_last_line(error))
    return Row(launch.name, launch.arch, seconds=time.perf_counter() - begin)


def compiled(launch: Launch) -> Row:
    """Return what a launch takes of a multiprocessor, once compiled."""
    begin = time.perf_counter()
    try:
        kernel = triton.compile(launch.source, target=launch.target, options=launch.options)
        seconds = time.perf_counter() - begin
        registers, spilled = _usage(kernel.asm["cubin"])
    except Exception as error:
        return Row(launch.name, launch.arch, error=_last_line(error))
    warps, shared = int(kernel.metadata.num_warps), int(kernel.metadata.shared)
    programs = programs_of(launch.arch, registers, shared, warps)
    return Row(launch.name, launch.arch, registers, spilled, shared, warps, programs, seconds)


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
    usage = [row.registers, row.spilled, row.shared, row.programs]
    cells = ["" if cell is None else str(cell) for cell in usage]
    return f"| {row.kernel} | {row.arch} | {' | '.join(cells)} | {row.seconds:.1f} s |"


def _usage(cubin: bytes) -> tuple[int, int]:
    """Return the registers of a thread and the bytes of its stack, where they are spilled to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", said)
    if numbers is None:
        raise RuntimeError(f"cuobjdump tells no registers: {said[-200:]!r}")
    return int(numbers[1]), int(numbers[2])


class _Driver:
    """Stands in for the driver of a GPU; one device per architecture, which Triton remembers."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        return self._arch

    def get_current_stream(self, device: int) -> int:
        return device


@contextmanager
def _as_on_a_gpu(arch: int, note: Callable[..., bool]) -> Iterator[None]:
    """Have optimizers take a GPU's path on the CPU, and Triton tell ``note`` what it compiles."""
    before = dict(vars(driver))
    never = property(lambda _: False, lambda *_: None)

    def pick(blocks: Blocks, *_: Any, **__: Any) -> triton_step.TritonKernel:
        return triton_step.TritonKernel(blocks)

    driver.set_active(_Driver(arch))
    try:
        with (
            patch.object(knobs.runtime, "jit_cache_hook", note),
            patch.object(matrices, "pick", pick),
            patch.object(matrices.MatrixGroup, "_on_host", never, create=True),
        ):
            yield
    finally:
        vars(driver).update(before)
        for kernel in _kernels().values():
            kernel.device_caches.pop(arch, None)


def _steps(optimizer: AdamW2, parameters: list[nn.Parameter]) -> None:
    """Make steps, the first from cold vectors; what is launched depends on no number of theirs."""
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


def _whole(matrices: int) -> tuple[AdamW2, list[nn.Parameter]]:
    """Return an optimizer of matrices that lie whole in their tensors, and of a vector."""
    named = [(f"w{number}", nn.Parameter(torch.randn(9 + number, 7))) for number in range(matrices)]
    named.append(("bias", nn.Parameter(torch.randn(5))))
    return AdamW2(named, tau=0.01), [parameter for _, parameter in named]


def _cut() -> tuple[AdamW2, list[nn.Parameter]]:
    """Return an optimizer of a matrix that is cut within a row, as ZeRO cuts it between ranks."""
    parameter, cut = Parameter("w", (9, 7)), 30
    pieces = [nn.Parameter(torch.randn(cut)), nn.Parameter(torch.randn(9 * 7 - cut))]
    shards = Shard(parameter, 0, cut, 0), Shard(parameter, cut, 9 * 7, 0)
    optimizer = AdamW2(zip(("first", "second"), pieces, strict=True), tau=0.01)
    buffers = [Buffer(piece, (shard,)) for piece, shard in zip(pieces, shards, strict=True)]
    optimizer.engine = GivenLayout(lambda: Layout(buffers))
    return optimizer, pieces


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
