"""What a program of a kernel executes: the instructions of its loops times their trips."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import triton

from benchmarks import sass
from benchmarks.compile_kernels import NOTHING, disassembled, programs_of, usage
from benchmarks.launches import Launch, launches

from . import gpus

_FMA = {"FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2", "IMAD", "HFMA2", "HADD2", "HMUL2"}
_MUFU = {"MUFU", "I2F", "F2I", "F2F", "FRND", "I2FP", "F2FP"}
_ISSUE_ONLY = {"BRA", "BSSY", "BSYNC", "EXIT", "NOP", "BAR", "RET", "CALL", "WARPSYNC", "DEPBAR"}
_MOVES = {"LDG", "STG", "LDS", "STS", "LD", "ST", "LDL", "STL"}

_LOADS = {"LDG", "LD", "ATOM", "ATOMG"}

_REGISTER = re.compile(r"\bR(\d+)(\.64)?")


class Usage(NamedTuple):
    """What one warp takes, in instructions; ``l1`` in bytes, ``wait`` in clocks."""

    issue: float = 0.0
    fma: float = 0.0
    alu: float = 0.0
    mufu: float = 0.0
    fp64: float = 0.0
    l1: float = 0.0
    dependent: float = 0.0  #: clocks, if each instruction waited for the one before
    apart: float = 0.0  #: clocks, if they only wait for their turn and at barriers
    l2_waits: float = 0.0  #: how often it waits for loads
    dram_waits: float = 0.0

    def plus(self, other: Usage, times: float = 1.0) -> Usage:
        return Usage(*(a + times * b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True, eq=False)
class Kernel:
    """A compiled variant."""

    name: str
    constants: Mapping[str, Any]
    code: sass.Code
    warps: int  #: of a program
    at_once: int  #: programs on a multiprocessor


def kernels(arch: int, width: int) -> dict[str, Kernel]:
    """Return the kernels of a float32 step, by name and what tells their variants apart.

    Args:
        arch: as 90.
        width: vectors of U; W has 4.
    """
    compiled = [_kernel(launch) for launch in launches(arch, width)]
    return {_key(each.name, each.constants): each for each in compiled}


def _key(name: str, constants: Mapping[str, Any]) -> str:
    parts = [name, *(f"{k}={constants[k]}" for k in ("MODE", "FIRST", "COLD") if k in constants)]
    return " ".join(parts)


def _kernel(launch: Launch) -> Kernel:
    made = triton.compile(launch.source, target=launch.target, options=launch.options)
    registers, _ = usage(made.asm["cubin"])
    warps, shared = int(made.metadata.num_warps), int(made.metadata.shared)
    constants = {name: getattr(value, "value", value) for name, value in launch.named().items()}
    return Kernel(
        launch.kernel.__name__,
        constants,
        disassembled(made.asm["cubin"]),
        warps,
        programs_of(launch.arch, registers, shared, warps),
    )


def constant(function: triton.JITFunction[Any], name: str, **values: Any) -> int:
    """Return what a function of the kernels assigns to a constant of its own.

    Args:
        function: the one in whose source it is.
        name: the constant's.
        values: what the names on the right of it stand for.

    Raises:
        ValueError: the function has no such constant.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(function.fn)))
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name and node.value:
            # The expression is a line of the kernels' own source.
            return int(eval(ast.unparse(node.value), {}, values))
    raise ValueError(
        f"cost_model: {function.fn.__name__} got '{name}' for a constant, which it does not have."
    )


def executed(
    kernel: Kernel,
    values: Mapping[str, Any],
    *,
    without: str,
    from_dram: str = NOTHING,
) -> Usage:
    """Return what a warp executes.

    Args:
        kernel: compiled.
        values: what the names in ``for`` statements stand for; ``row`` is what ``tl.load`` reads of
            a table's row.
        without: what is not executed, a pattern of :func:`sass.path_of`.
        from_dram: of which loops the loads wait for DRAM.

    Raises:
        ValueError: a loop's trips are not known, or what is not executed is nowhere.
    """
    outside, bodies = _taken(kernel, without, from_dram)
    total = outside
    trips: list[float] = []
    for loop, body in zip(kernel.code.loops, bodies, strict=True):
        around = 1.0 if loop.parent is None else trips[loop.parent]
        if around == 0 or body is None:
            trips.append(0.0)
            continue
        trips.append(around * _trips(kernel, loop, values))
        total = total.plus(body, trips[-1])
    return total


@functools.cache
def _taken(kernel: Kernel, without: str, from_dram: str) -> tuple[Usage, list[Usage | None]]:
    """Return what is taken outside of loops, and in each, once; None: it is not executed."""
    skipped = re.compile(without)
    loops = kernel.code.loops
    instructions = [*kernel.code.outside, *(each for loop in loops for each in loop.own)]
    paths = {sass.path_of(each.source) for each in (*instructions, *loops)}
    for pattern in without.split("|"):
        if pattern != NOTHING and not any(re.search(pattern, path) for path in paths):
            raise ValueError(
                f"cost_model: {kernel.name} got '{pattern}' for what is not executed, it takes a "
                "pattern of the kernel's source."
            )
    bodies: list[Usage | None] = []
    for loop in kernel.code.loops:
        path = sass.path_of(loop.source)
        body = _usage(_kept(loop.own, skipped), bool(re.search(from_dram, path)))
        bodies.append(None if skipped.search(path) else body)
    return _usage(_kept(kernel.code.outside, skipped), False), bodies


@functools.cache
def exits(kernel: Kernel) -> Usage:
    """Return what a warp executes of a program that its mask tells to do nothing."""
    own = [each for each in kernel.code.outside if len(each.source) <= 1]
    return _usage(own, False)


def _kept(
    instructions: Iterable[sass.Instruction], skipped: re.Pattern[str]
) -> list[sass.Instruction]:
    return [each for each in instructions if not skipped.search(sass.path_of(each.source))]


def _trips(kernel: Kernel, loop: sass.Loop, values: Mapping[str, Any]) -> int:
    """Return how often a loop's body is executed each time that it is come to."""
    head = loop.source[-1].text if loop.source else "?"
    said = re.fullmatch(r"for \w+ in (range\(.*\)):", head)
    table = SimpleNamespace(load=lambda at: values["row"][at])
    names = {"tl": table, "unit": 0, "piece": 0, "block": 0, **kernel.constants, **values}
    try:
        if said is None:
            raise NameError(head)
        # The statement is a line of the kernels' own source.
        return len(eval(said[1], {"range": range}, names))
    except (NameError, KeyError) as error:
        raise ValueError(
            f"cost_model: {kernel.name} got a loop '{head}' of which it knows no trips: {error}."
        ) from None


def _usage(instructions: Sequence[sass.Instruction], is_from_dram: bool) -> Usage:
    total = dict.fromkeys(Usage._fields, 0.0)
    total["dram_waits" if is_from_dram else "l2_waits"] = waits_for_loads(instructions)
    for each in instructions:
        kind = each.kind
        total["issue"] += 1
        pipe = pipe_of(kind)
        if pipe is not None:
            total[pipe] += 1
        if kind in _MOVES:
            total["l1"] += 32 * each.bits / 8
        elif kind in ("SHFL", "RED", "ATOM", "ATOMG"):
            total["l1"] += 128
        waited = gpus.DEPENDENT.get("fp64" if pipe == "fp64" else kind, gpus.DEPENDENT_ELSE)
        total["dependent"] += waited
        total["apart"] += gpus.DEPENDENT["BAR"] if kind == "BAR" else gpus.APART
    return Usage(**total)


def waits_for_loads(instructions: Sequence[sass.Instruction]) -> int:
    """Return how often a warp waits for what it loads: where a register is used that a load has
    not written yet. Loads that are on their way then arrive together.
    """
    waits = 0
    coming: set[int] = set()
    for each in instructions:
        used = _registers(each.operands)
        if coming & used:
            waits += 1
            coming.clear()
        if each.kind in _LOADS:
            first = re.match(r"(?:P\d+, )?R(\d+)", each.operands)
            if first is not None:
                begin = int(first[1])
                coming.update(range(begin, begin + max(1, each.bits // 32)))
    return waits + bool(coming)


def _registers(operands: str) -> set[int]:
    """Return the registers in operands, those that are written, too."""
    numbers: set[int] = set()
    for number, pair in _REGISTER.findall(operands):
        numbers.add(int(number))
        if pair:
            numbers.add(int(number) + 1)
    return numbers


def pipe_of(kind: str) -> str | None:
    """Return the pipe that an instruction takes, or None: it only has to be begun."""
    if kind in _FMA:
        return "fma"
    if kind in _MUFU:
        return "mufu"
    if kind.startswith("D") and kind[1:] in ("FMA", "ADD", "MUL", "SETP", "MNMX"):
        return "fp64"
    if kind in _ISSUE_ONLY or kind in _MOVES or kind.startswith(("U", "SHFL", "RED", "ATOM")):
        return None
    return "alu"
