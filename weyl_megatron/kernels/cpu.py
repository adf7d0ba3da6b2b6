"""The step on a CPU in compiled code (cpu_step.cpp): float32, any number of threads.

The file is compiled on first use, for the machine's own instruction set, with nothing but a C++
compiler: it includes no header of torch, so that takes four seconds. There is no lock that a killed
build could leave behind, because a finished library is moved into its place at once.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..environment import CACHE, CXXFLAGS
from ..spectral.blocks import Blocks, Table
from ..spectral.iterations import Iterations
from ..spectral.power import BLOCK
from ..spectral.ritz import INDEPENDENT
from ..spectral.seen import Seen
from .clipping import Clipping
from .cpu_structs import HYPER_BYTES, Structs, columns_of, hyper_bytes
from .stepped import Stepped

#: What the compiler is given; it includes the headers in the folder of the same name.
_SOURCE = Path(__file__).with_name("cpu_step.cpp")

#: Without contraction, a row's elements are computed alike wherever vector registers begin and end.
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-shared",
    "-fPIC",
    "-fopenmp",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
)

#: The compiler takes the flags in this, too, for a library of its own; `make asan` sets it.
FLAGS = CXXFLAGS

#: ``ritz.INDEPENDENT`` of the Gram matrices that the kernel makes.
_INDEPENDENT = INDEPENDENT * torch.finfo(torch.float32).eps


class CpuKernel:
    """See :class:`.Kernel`.

    Raises:
        OSError: there is no compiler, or it cannot compile the kernel.
    """

    name = "cpu"

    def __init__(self, blocks: Blocks) -> None:
        self._blocks, self._library = blocks, library()
        self.arithmetic = arithmetic()
        self._batches = [torch.tensor(batch, dtype=torch.int64) for batch in blocks.batches]
        self._structs = Structs(blocks)
        self._count = len(blocks.matrices)
        self._buffers = self._hypers = torch.empty(0)
        self._alive: object = None

    def bind(self, weights: Sequence[Tensor], stepped: Sequence[Stepped | None]) -> None:
        pairs = list(zip(weights, stepped, strict=True))
        read = [state and state.in_dtype(weight.dtype) for weight, state in pairs]
        addresses, hypers = [], bytearray()
        rows: dict[int, bytes] = {}  # by the identity of what tensors share
        for weight, state in zip(weights, read, strict=True):
            if state is None:
                addresses += [weight.data_ptr(), 0, 0, 0, 0]
                hypers += bytes(HYPER_BYTES)
                continue
            tensors = weight, state.grad, state.exp_avg, state.exp_avg_sq
            addresses += [*(tensor.data_ptr() for tensor in tensors), _narrow(state)]
            row = rows.get(id(state.hyper))
            if row is None:
                row = rows[id(state.hyper)] = hyper_bytes(state.hyper)
            hypers += row
            torch.autograd.graph.increment_version(weight)  # it is changed behind autograd's back
        self._buffers = torch.tensor(addresses, dtype=torch.int64)
        self._hypers = torch.frombuffer(hypers, dtype=torch.uint8)
        self._alive = weights, read  # the tensors at these addresses

    def release(self) -> None:
        self._alive = None

    def step(self, table: Table, mask: Tensor, sums: Tensor) -> None:
        state = self._buffers, self._hypers
        self._call("step", *columns_of(table), mask, self._count, *state, sums)

    def moments(self, table: Table, mask: Tensor, sums: Tensor) -> None:
        state, blocks = (self._buffers, self._hypers), self._blocks
        arena = blocks.x, blocks.z, blocks.left
        self._call("moments", *columns_of(table), mask, self._count, *state, *arena, sums)

    def undo(self, table: Table, mask: Tensor) -> None:
        self._call("undo", *columns_of(table), mask, self._buffers, self._hypers)

    def move(self, table: Table, mask: Tensor, rates: Tensor, sums: Tensor) -> None:
        state = self._buffers, self._hypers
        self._call("move", *columns_of(table), mask, self._count, *state, rates, sums)

    def project(
        self, table: Table, mask: Tensor, rates: Sequence[Tensor], sums: Tensor, seen: Seen
    ) -> None:
        state, arena = (self._buffers, self._hypers), (seen.x, seen.z, seen.left)
        known = 0, 0  # of no row is Y known
        self._call(
            "project", *columns_of(table), mask, self._count, *state, *arena, *rates, sums, *known
        )

    def clip(
        self,
        batch: int,
        mask: Tensor,
        lr: Tensor,
        bound: Tensor,
        sums: Tensor,
        clipping: Clipping,
    ) -> None:
        """Make C of a batch's matrices in ``mask``, and what ``clipping`` says of them.

        Args:
            batch: its number.
            mask: the matrices.
            lr, bound: α and the bound of σ₁(α U) of every matrix.
            sums: see :class:`.Kernel`.
            clipping: what the vectors saw of them, and the results.
        """
        numbers, struct = self._batches[batch], self._structs.of_clipping(clipping)
        self._call("clip", numbers, len(numbers), mask, lr, bound, sums, struct)

    def multiply(self, operand: int, table: Table, mask: Tensor) -> None:
        self._multiply(operand, table, mask, is_back=0)

    def multiply_back(self, operand: int, table: Table, mask: Tensor) -> None:
        self._multiply(operand, table, mask, is_back=1)

    def orthonormalize(
        self, operand: int, batch: int, mask: Tensor, more: Tensor, sigma: Tensor, gain: Tensor
    ) -> None:
        blocks, numbers = self._blocks, self._batches[batch]
        shape = blocks.operands[operand].shape
        results = blocks.x, blocks.z, sigma, gain
        self._call(
            "orthonormalize", shape, numbers, len(numbers), mask, more, *results, _INDEPENDENT
        )

    def step_alone(
        self,
        batches: Sequence[int],
        tables: Sequence[Table],
        sigma: Tensor,
        gain: Tensor,
        iterations: Iterations,
        begun: Tensor,
        moved: Tensor,
        limits: Sequence[Tensor],
        sums: Tensor,
        clipping: Clipping | None = None,
    ) -> None:
        """Do lines 3 to 14 of the algorithm for batches of matrices that no other rank has pieces
        of.

        Args:
            batches: their numbers.
            tables: of every batch, all tiles.
            sigma, gain: what becomes σ₁ and what its last iteration gained, ``(2, matrices)``.
            iterations: which matrices make which.
            begun: the matrices whose moments are not updated yet; their first products with U are
                made with them.
            moved: the matrices whose weights wait for their rates.
            limits: the scheduled rate, τ and the floor under σ₁(W) of every matrix.
            sums: see :class:`.Kernel`.
            clipping: of the matrices that are projected.
        """
        structs = [
            self._structs.of_batch(batch, tables[batch], (sigma, gain), clipping)
            for batch in batches
        ]
        addresses = torch.tensor([struct.data_ptr() for struct in structs])
        self._call(
            "step_alone",
            addresses,
            len(batches),
            iterations.most,
            iterations.least,
            begun,
            moved,
            self._count,
            self._buffers,
            self._hypers,
            *limits,
            torch.empty_like(limits[0]),
            sums,
            _INDEPENDENT,
            iterations.settled,
            0 if clipping is None else self._structs.of_clipping(clipping),
        )

    def _multiply(self, operand: int, table: Table, mask: Tensor, is_back: int) -> None:
        if table.tiles:
            state, blocks = (self._buffers, self._hypers), self._blocks
            arena = blocks.x, blocks.z, blocks.left
            self._call(
                "multiply", operand, is_back, *columns_of(table), mask, self._count, *state, *arena
            )

    def _call(self, name: str, *arguments: Tensor | float) -> None:
        call(self._library, name, *arguments)


def _narrow(stepped: Stepped) -> int:
    """Return which of M (1) and V (2) are in bfloat16."""
    are_narrow = (moment.dtype == torch.bfloat16 for moment in stepped[1:3])
    return sum(bit << place for place, bit in enumerate(are_narrow))


def call(library: ctypes.CDLL, name: str, *arguments: Tensor | float) -> None:
    """Call a function of the library, with as many threads as torch has.

    Tensors are passed by address, other numbers as int64 or double.
    """
    assert all(each.is_contiguous() for each in arguments if isinstance(each, Tensor))
    given = [
        ctypes.c_void_p(each.data_ptr())
        if isinstance(each, Tensor)
        else (ctypes.c_double(each) if isinstance(each, float) else ctypes.c_int64(each))
        for each in arguments
    ]
    getattr(library, f"weyl_{name}")(*given, ctypes.c_int64(torch.get_num_threads()))


@functools.cache
def library() -> ctypes.CDLL:
    """Return the compiled kernel; compile it if this machine has not yet.

    Raises:
        OSError: there is no compiler, or it cannot compile the kernel.
    """
    return ctypes.CDLL(str(build()))


@functools.cache
def arithmetic() -> int:
    """Return a number that tells apart compiled kernels whose σ₁ round in other ways.

    After the collectives every rank makes σ₁, and what decides on one more iteration, by itself.
    A compiler for registers of another width adds in another order.
    """
    width, cols = BLOCK, 1500
    # Numbers that are exact on every machine, in [-1, 1).
    z = (torch.arange(width * (cols + width)) * 7919 % 4093 - 2046).float() / 2048
    z[width * cols :] = torch.eye(width).flatten()  # Yᵀ Y
    x = torch.eye(width, cols)
    shape = torch.tensor([0, 0, cols, width, width * cols])
    numbers, mask = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.uint8)
    results = torch.zeros(2, dtype=torch.float64)  # σ₁ and its gain
    call(
        library(),
        "orthonormalize",
        shape,
        numbers,
        1,
        mask,
        mask,
        x,
        z,
        results[:1],
        results[1:],
        _INDEPENDENT,
    )
    return zlib.crc32(results.numpy().tobytes() + x.numpy().tobytes())


def build() -> Path:
    """Return the file of the compiled kernel; compile it if this machine has not yet.

    Raises:
        OSError: there is no compiler, or it cannot compile the kernel.
    """
    compiler = find_compiler()
    if compiler is None:
        raise OSError("there is no C++ compiler (c++, g++, clang++, or the one that CXX names)")
    flags = [
        *_FLAGS,
        *_machine_flags(),
        *_library_flags(compiler),
        *shlex.split(os.environ.get(FLAGS, "")),
    ]
    key = hashlib.sha256(_sources() + " ".join([compiler, *flags, _cpu()]).encode()).hexdigest()[
        :16
    ]
    folder = cache_folder()
    path = folder / f"cpu_step-{key}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            built = Path(temporary) / path.name
            run = subprocess.run(
                [compiler, str(_SOURCE), *flags, "-o", str(built)],
                capture_output=True,
                text=True,
                check=False,
            )
            if run.returncode != 0:
                raise OSError(f"{compiler} failed: {run.stderr.strip()[-500:]}")
            built.replace(path)
    return path


def _sources() -> bytes:
    """Return the text of everything that is compiled, with the files' names."""
    headers = sorted(_SOURCE.with_suffix("").glob("*.h"))
    return b"".join(path.name.encode() + path.read_bytes() for path in [_SOURCE, *headers])


def find_compiler() -> str | None:
    """Return the C++ compiler that ``CXX`` names, or the first of the usual ones that is there."""
    named = os.environ.get("CXX")
    return next(
        filter(None, map(shutil.which, [named] if named else ["c++", "g++", "clang++"])), None
    )


def cache_folder() -> Path:
    """Return a folder of this user's alone for compiled kernels, made where it is missing.

    Raises:
        OSError: others may write to it: code is not loaded from there.
    """
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    )
    folder = Path(root) / CACHE
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise OSError(f"{folder} can be written by others than this user")
    return folder


def _library_flags(compiler: str) -> list[str]:
    """Return what links C++'s library where ``CXX`` names a C compiler, as PEFT's BOFT leaves it
    behind.
    """
    is_for_c = re.fullmatch(r"(.*-)?(gcc|cc|clang)(-[\d.]+)?", Path(compiler).name) is not None
    return ["-lstdc++"] if is_for_c and platform.system() == "Linux" else []


def _machine_flags() -> list[str]:
    if platform.machine() in ("x86_64", "AMD64"):
        return ["-march=native", "-mprefer-vector-width=512"]
    return ["-mcpu=native"]


def _cpu() -> str:
    """Return what tells machines of different instruction sets apart that share a home
    directory.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line for line in lines if line.lower().startswith(("flags", "features"))),
        platform.processor(),
    )
