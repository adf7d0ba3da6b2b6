"""Which kernel steps which tensors."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..environment import KERNEL, say_once
from ..spectral.blocks import Blocks, Table
from ..spectral.power import Products
from ..spectral.seen import Seen
from ..spectral.tiles import Tile
from .plain import PlainKernel
from .stepped import Stepped

if TYPE_CHECKING:
    from .triton_kernel import TritonKernel

#: Set this to a kernel's name to have no other.
VARIABLE = KERNEL

NAMES = ("torch", "cpu", "triton")

#: The oldest Triton that compiles the kernels, and the oldest under whose interpreter they give
#: what plain torch gives; 3.1 to 3.3 do not.
_OLDEST_TRITON, _OLDEST_INTERPRETER = (3, 1), (3, 5)

#: The dtypes of weights that a kernel takes.
_DTYPES = {
    "cpu": (torch.float32,),
    "triton": (torch.float32, torch.bfloat16),
}


class Kernel(Products, Protocol):
    """One optimizer step's arithmetic on the tiles of tables, as far as masks, uint8
    ``(matrices,)``, let it.

    Operand 0 of the products are the weights, operand 1 the updates U, which are formed from M and
    V where they are needed. ``sums`` is ``(matrices, 3)``, float64: Σ u², Σ w² before and Σ w²
    after the step, over this rank's tiles.

    A kernel that may round in other ways on other machines has a number ``arithmetic``, which is
    another one there. One that takes matrices through a whole step by itself has ``step_alone``;
    one that forms M of those that are projected has ``clip``.
    """

    name: str

    def bind(self, weights: Sequence[Tensor], stepped: Sequence[Stepped | None]) -> None:
        """Take the tensors of this step; None where there is no gradient, whose U is 0."""

    def release(self) -> None:
        """Let go of the tensors of this step: a gradient must not outlive it."""

    def step(self, table: Table, mask: Tensor, sums: Tensor) -> None:
        """Update M and V and move W at the scheduled rate, in one pass; also of what is no
        matrix.
        """

    def moments(self, table: Table, mask: Tensor, sums: Tensor) -> None:
        """Update M and V, add Σ u² to the sums and the first products with U to where the table
        says.
        """

    def undo(self, table: Table, mask: Tensor) -> None:
        """Take the move at the scheduled rate back."""

    def move(self, table: Table, mask: Tensor, rates: Tensor, sums: Tensor) -> None:
        """W ← W − α_W λ W − α_W U at ``rates``, float64 ``(matrices,)``; add to Σ w² after the
        step.
        """

    def project(
        self, table: Table, mask: Tensor, rates: Sequence[Tensor], sums: Tensor, seen: Seen
    ) -> None:
        """W ← W − α_d λ W − (rate · U + Y C), of what ``seen`` holds; add to Σ w² after the step.

        Args:
            table: of ``seen``'s places, whose last column is whether a tile is measured here.
            mask: the matrices.
            rates: what multiplies U and what multiplies λ, float64 ``(matrices,)`` each.
            sums: see above.
            seen: X, C and the Y of cut rows.
        """


def pick(tensors: Sequence[Tensor], *, plain: bool = False) -> str:
    """Return the name of the kernel for ``tensors``, which lie on one device: the fused one where
    it can run and takes their dtype.

    Where it cannot, the plain one steps them, as right and slower, and the log says why, once.

    Args:
        tensors: what is stepped.
        plain: whether AdamW is wanted bit for bit, which plain torch alone promises on every
            machine.

    Raises:
        ValueError: the environment asks for a kernel that cannot step them.
    """
    if plain:
        return "torch"
    return pick_name(tensors[0].device.type, {tensor.dtype for tensor in tensors})


def make(name: str, blocks: Blocks) -> Kernel:
    """Return the kernel of a name that a host steers, "torch" or "cpu", on ``blocks``."""
    if name == "torch":
        return PlainKernel(blocks)
    from .cpu import CpuKernel

    return CpuKernel(blocks)


#: Vectors that Triton's kernels have registers for.
VECTORS_ON_GPU = 16


def make_triton(
    blocks: Blocks,
    tiles: Sequence[Tile],
    measured: int,
    buffers: int,
    projected: Sequence[int],
) -> TritonKernel:
    """Return the kernel on ``blocks``, which are resident, that steers itself; its arguments."""
    from .triton_kernel import TritonKernel

    return TritonKernel(blocks, tiles, measured, buffers, projected)


def pick_name(device: str, dtypes: Collection[torch.dtype]) -> str:
    """Return the name of the kernel for tensors of a device type and dtypes.

    Raises:
        ValueError: the environment asks for a kernel that cannot step them.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", *NAMES):
        raise ValueError(f"AdamW2: {VARIABLE} got {wanted!r}, it takes one of {', '.join(NAMES)}.")
    name = wanted or {"cpu": "cpu", "cuda": "triton"}.get(device, "torch")
    reason = why_not(name, device, dtypes)
    if reason is None:
        return name
    if wanted:
        raise ValueError(f"AdamW2: {VARIABLE} got {wanted!r}, but {reason}.")
    say_once(f"AdamW2: the step runs in plain torch, not in the fused kernel '{name}': {reason}.")
    return "torch"


def why_not(name: str, device: str, dtypes: Collection[torch.dtype]) -> str | None:
    """Return why a kernel cannot step tensors of a device type and dtypes, or None where it can."""
    if name == "torch":
        return None
    others = set(dtypes) - set(_DTYPES[name])
    if others:
        taken = " and ".join(map(str, _DTYPES[name]))
        return f"it takes {taken}, not {', '.join(sorted(map(str, others)))}"
    try:
        if name == "cpu":
            if device != "cpu":
                return f"it takes tensors on the CPU, not on {device}"
            from .cpu import library

            library()
        else:
            import triton

            if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
                return f"it takes tensors on a GPU, not on {device} (unless TRITON_INTERPRET=1)"
            is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
            oldest = _OLDEST_INTERPRETER if is_interpreted else _OLDEST_TRITON
            if tuple(map(int, triton.__version__.split(".")[:2])) < oldest:
                return (
                    f"it takes Triton {'.'.join(map(str, oldest))} or newer, not "
                    f"{triton.__version__}"
                )
            if not is_interpreted and not _builds_by_itself():
                return why_no_launcher()
    except (ImportError, OSError, RuntimeError) as error:
        return str(error)
    return None


def _builds_by_itself() -> bool:
    """Whether something else than a C compiler builds what launches Triton's kernels."""
    import triton

    knobs = getattr(triton, "knobs", None)  # since 3.4
    return knobs is not None and knobs.build.impl is not None


def why_no_launcher() -> str | None:
    """Return why Triton cannot build what launches its kernels, or None where it can.

    That is in C and includes Python's headers. Triton builds it at the first launch, in the middle
    of a step.
    """
    named = os.environ.get("CC")
    names = ["gcc", "clang"] if named is None else [named]
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        return "there is no C compiler for Triton's launcher (gcc, clang, or the one that CC names)"
    return _trouble_of(compiler)


@functools.cache
def _trouble_of(compiler: str) -> str | None:
    """Return why a C compiler cannot build an extension of this Python, or None where it can."""
    # As Triton does; Debian's own scheme has no headers.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    headers = sysconfig.get_paths(scheme)["include"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "launcher.c"
        source.write_text("#include <Python.h>\n")
        flags = ["-shared", "-fPIC", f"-I{headers}"]
        command = [compiler, str(source), *flags, "-o", f"{folder}/launcher.so"]
        try:
            run = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            return f"{compiler} cannot build Triton's launcher: {error}"
    if run.returncode == 0:
        return None
    lines = [line.strip() for line in run.stderr.splitlines() if line.strip()]
    said = next((line for line in lines if "error" in line), " ".join(lines[:1]))
    return f"{compiler} cannot build Triton's launcher: {said[:300]}"
