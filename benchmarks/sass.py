"""Loops in SASS, the code of an NVIDIA GPU, as nvdisasm prints it with lines (``-c -gi``).

Every instruction is told the source it was made of, through all inlined calls: so a loop is known
by its ``for`` statement and by the calls that lead there, not by what happens to be in it. Triton
puts lines into what it compiles unless TRITON_DISABLE_LINE_INFO is set.

What Triton's cache holds may have been compiled in another checkout, from the same text at the same
lines, which are in its key; its lines name that one's files, which may have changed since. So a
file of a package is read where the package is imported from.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(.*?)\s*;?\s*(?:/\*.*\*/)?\s*$")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_PLACE = re.compile(r'\s*//## File "([^"]*)", line (\d+)(?: inlined at "([^"]*)", line (\d+))?')
_GUARD = re.compile(r"@!?U?P[T\d]+\s+")

#: The packages whose functions kernels are made of.
_PACKAGES = "weyl_megatron", "triton"


class Statement(NamedTuple):
    """Where an instruction comes from, in one of the functions that lead there."""

    function: str
    text: str  #: the call that leads on; where there is none, the statement


class Instruction(NamedTuple):
    """One instruction of every thread of a warp."""

    opcode: str  #: as "LDG.E.128"
    operands: str
    places: tuple[tuple[str, int], ...]  #: (file, line), the innermost first

    @property
    def kind(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]

    @property
    def bits(self) -> int:
        """How many bits a thread moves, where it moves any."""
        words = self.opcode.split(".")[1:]
        widths = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
        return next((widths[word] for word in words if word in widths), 32)

    @property
    def source(self) -> tuple[Statement, ...]:
        """The calls and the statement that it comes from, the outermost first."""
        return source_of(self.places)


class Loop(NamedTuple):
    """Instructions from a branch's target to the branch, without those of loops within."""

    start: int
    stop: int  #: behind its last instruction
    own: tuple[Instruction, ...]
    parent: int | None  #: the number of the loop around it
    source: tuple[Statement, ...]  #: the calls that lead to its ``for`` statement, and that

    def counts(self) -> Counter[str]:
        """How often every kind of instruction is in it; of loads and stores, with their bits."""
        return counts(self.own)


class Code(NamedTuple):
    """A kernel."""

    outside: tuple[Instruction, ...]  #: in no loop
    loops: tuple[Loop, ...]  #: in the order of their starts, the outer ones first

    @property
    def has_calls(self) -> bool:
        """Whether its lines tell the calls that lead to an instruction."""
        instructions = [*self.outside, *(each for loop in self.loops for each in loop.own)]
        return any(len(each.places) > 1 for each in instructions)


def counts(instructions: Sequence[Instruction]) -> Counter[str]:
    """How often every kind of instruction is there; of loads and stores, with their bits."""
    moves = {"LDG", "STG", "LD", "ST", "LDS", "STS", "LDL", "STL"}
    return Counter(
        f"{each.kind}.{each.bits}" if each.kind in moves else each.kind for each in instructions
    )


def parse(text: str) -> Code:
    """Return the loops of a kernel.

    Args:
        text: what ``nvdisasm -c -gi`` prints of a cubin with one kernel.

    Raises:
        ValueError: there is no instruction in it.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    places: list[tuple[str, int]] = []
    are_new = True
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif place := _PLACE.match(line):
            if are_new:
                places, are_new = [], False
            if not places:
                places.append((place[1], int(place[2])))
            if place[3] is not None:
                places.append((place[3], int(place[4])))
        elif said := _INSTRUCTION.match(line):
            are_new = True
            words = _GUARD.sub("", said[1], count=1).split(None, 1)
            if not words:
                continue
            operands = words[1] if len(words) > 1 else ""
            if target := _TARGET.search(operands):
                branches.append((len(instructions), target[1]))
            instructions.append(Instruction(words[0], operands, tuple(places)))
    if not instructions:
        raise ValueError(f"nvdisasm got a cubin that it takes no instruction from: {text[-200:]!r}")
    return _code(instructions, labels, branches)


def _code(
    instructions: Sequence[Instruction],
    labels: dict[str, int],
    branches: Sequence[tuple[int, str]],
) -> Code:
    """Return what lies in which loop: a branch back makes one, two to one target the same."""
    stops: dict[int, int] = {}
    for at, label in branches:
        start = labels.get(label, at + 1)
        # What waits behind the end of every kernel branches to itself.
        if start < at and instructions[at].kind == "BRA":
            stops[start] = max(stops.get(start, 0), at + 1)
    spans = sorted(stops.items(), key=lambda span: (span[0], -span[1]))
    parents: list[int | None] = []
    own: list[list[Instruction]] = [[] for _ in spans]
    outside: list[Instruction] = []
    for number, (start, stop) in enumerate(spans):
        around = [
            before
            for before in range(number)
            if spans[before][0] <= start < stop <= spans[before][1]
        ]
        parents.append(around[-1] if around else None)
    for at, instruction in enumerate(instructions):
        inside = [n for n, (start, stop) in enumerate(spans) if start <= at < stop]
        if inside:
            own[inside[-1]].append(instruction)
        else:
            outside.append(instruction)
    sources: dict[int, tuple[Statement, ...]] = {}
    within: dict[int, set[tuple[Statement, ...]]] = {}  # the statements of the loops in a loop
    for number in reversed(range(len(spans))):
        taken = within.get(number, set())
        sources[number] = _loop_source(own[number], taken)
        around_it = parents[number]
        if around_it is not None:
            within.setdefault(around_it, set()).update(taken, [sources[number]])
    loops = tuple(
        Loop(start, stop, tuple(body), parent, sources[number])
        for number, ((start, stop), body, parent) in enumerate(
            zip(spans, own, parents, strict=True)
        )
    )
    return Code(tuple(outside), loops)


def _loop_source(
    body: Sequence[Instruction], taken: Collection[tuple[Statement, ...]]
) -> tuple[Statement, ...]:
    """Return the ``for`` statement that most instructions of a loop stand in, the innermost one
    that is none of a loop within, and the calls that lead to it.
    """
    votes: Counter[tuple[Statement, ...]] = Counter()
    for instruction in body:
        free = [each for each in _fors_of(instruction.places) if each not in taken]
        votes.update(free[:1])
    return votes.most_common(1)[0][0] if votes else ()


@functools.cache
def _fors_of(places: tuple[tuple[str, int], ...]) -> list[tuple[Statement, ...]]:
    """Return the ``for`` statements around a place, with the calls that lead to each, the innermost
    first.
    """
    statements = source_of(places)
    loops: list[tuple[Statement, ...]] = []
    for depth, (file, line) in enumerate(places):
        function = _function(file, line)
        if function is None:
            continue
        around = [
            node
            for node in _nodes(function)
            if isinstance(node, ast.For | ast.While) and _holds(node, line)
        ]
        around.sort(key=lambda node: -node.lineno)
        calls = statements[: len(places) - 1 - depth]
        # One that is unrolled before it is compiled is none here.
        heads = [_head(node) for node in around if "static_range" not in _head(node)]
        loops += [(*calls, Statement(function.name, head)) for head in heads]
    return loops


@functools.cache
def source_of(places: tuple[tuple[str, int], ...]) -> tuple[Statement, ...]:
    """Return the calls that lead to a place, the outermost first, and the statement there."""
    functions = [_function(*place) for place in places]
    names = ["" if function is None else function.name for function in functions]
    inner: list[str | None] = [None, *names]
    return tuple(
        Statement(name, _text(file, line, called))
        for (file, line), name, called in reversed(list(zip(places, names, inner, strict=False)))
    )


def _text(file: str, line: int, called: str | None) -> str:
    """Return the call of a function at a line, or the statement there, on one line."""
    function = _function(file, line)
    if function is None:
        return ""
    if called:
        calls = [
            node
            for node in _nodes(function)
            if isinstance(node, ast.Call)
            and _holds(node, line)
            and ast.unparse(node.func).split(".")[-1] == called
        ]
        if calls:
            return ast.unparse(max(calls, key=lambda node: node.lineno))
    held = [node for node in _nodes(function) if isinstance(node, ast.stmt) and _holds(node, line)]
    inner = max(held, key=lambda node: (node.lineno, -(node.end_lineno or 0)), default=function)
    return _head(inner)


@functools.cache
def _nodes(function: ast.FunctionDef) -> list[ast.AST]:
    return list(ast.walk(function))


def _head(node: ast.AST) -> str:
    return ast.unparse(node).splitlines()[0]


def _holds(node: ast.expr | ast.stmt, line: int) -> bool:
    return node.lineno <= line <= (node.end_lineno or node.lineno)


def _function(file: str, line: int) -> ast.FunctionDef | None:
    """Return the function of a file that a line is in."""
    inside = [node for node in _functions(file) if _holds(node, line)]
    return max(inside, key=lambda node: node.lineno, default=None)


@functools.cache
def _functions(file: str) -> list[ast.FunctionDef]:
    path = _imported(Path(file))
    if not path.is_file():
        return []
    tree = ast.parse(path.read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def _imported(path: Path) -> Path:
    """Return where this process has the file of a package from."""
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        if package in path.parts and spec is not None and spec.origin is not None:
            behind = path.parts[::-1].index(package)
            within = path.parts[len(path.parts) - behind :]
            return Path(spec.origin).parent.joinpath(*within)
    return path


def matching(loops: Sequence[Loop], pattern: str) -> Iterator[Loop]:
    """Yield the loops whose source, calls and ``for`` joined by " > ", matches a pattern."""
    for loop in loops:
        if re.search(pattern, path_of(loop.source)):
            yield loop


def path_of(source: Sequence[Statement]) -> str:
    """Return calls and statement in one line."""
    return " > ".join(f"{statement.function}: {statement.text}" for statement in source)
