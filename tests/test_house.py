"""The house's rules: which room imports which, what the core may not name, words that are gone."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "weyl_megatron"

#: The rooms from the ground up: a module imports from its own room and from those before it. A room
#: is the longest entry that a module's name begins with. ``transformer`` is below ``thresholds``,
#: which asks it for a model's embeddings and head; Megatron's folder and
#: PyTorch's plugin are above the optimizer, which they build or give out.
ROOMS = (
    "environment",
    "spectral",
    "rule",
    "reference",
    "layouts",
    "kernels",
    "moments",
    "settings",
    "group_options",
    "transformer",
    "thresholds",
    "nonfinite",
    "names",
    "state",
    "steady",
    "batches",
    "projection",
    "limits",
    "host_step",
    "device_step",
    "stats",
    "matrices",
    "saved",
    "packed",
    "matrix_groups",
    "spikes",
    "tensors",
    "engines",
    "engines.torch",
    "engines.deepspeed",
    "optimizer",
    "engines.torch.by_name",
    "engines.torch.plugin",
    "engines.megatron",
    "watch",
    "report",
    "plan",
    "demo",
    "doctor",
    "cli",
    "",
)

#: What knows no engine.
CORE = (
    "optimizer.py",
    "matrices.py",
    "host_step.py",
    "device_step.py",
    "limits.py",
    "rule.py",
    "spectral",
    "layouts",
    "kernels",
)

#: Locals that say nothing of what they hold.
EMPTY = {"of", "one", "mine", "theirs", "found"}

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    .removesuffix("__init__")
    .rstrip("."): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def room(module: str) -> str:
    """Return the room of a module, both without the package's name."""
    parts = module.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((name for name in names if name in ROOMS), "")


def imports(module: str) -> Iterator[str]:
    """Yield the package's modules that one imports, wherever in it the import stands."""
    path = MODULES[module]
    folder = list(path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == PACKAGE.name:
                    yield alias.name.partition(".")[2]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = folder[: len(folder) - node.level + 1]
            elif (node.module or "").split(".")[0] == PACKAGE.name:
                base = []
            else:
                continue
            source = (node.module or "").split(".") if node.module else []
            source = source[1:] if not node.level else source
            name = ".".join([*base, *source])
            for alias in node.names:  # a module of a folder, or something in a module
                inner = f"{name}.{alias.name}".lstrip(".")
                yield inner if inner in MODULES else name


def arrows() -> list[tuple[str, str]]:
    return [(module, target) for module in MODULES for target in imports(module)]


def test_every_module_has_its_room() -> None:
    """Nothing but the package itself is in the topmost room, which may import everything."""
    assert [module for module in MODULES if room(module) == ""] == [""]
    assert {room(module) for module in MODULES} == set(ROOMS)


def test_no_import_goes_upwards() -> None:
    upwards = [
        f"{module} imports {target}"
        for module, target in arrows()
        if target  # the package itself, which has the version
        and ROOMS.index(room(target)) > ROOMS.index(room(module))
    ]
    assert not upwards, "\n".join(upwards)


def test_no_circle_in_a_room() -> None:
    """Modules of one room, too, can be read one after the other."""
    edges = {module: {t for t in imports(module) if t != module} for module in MODULES}
    done: list[str] = []
    while waiting := [module for module in edges if module not in done]:
        free = [module for module in waiting if edges[module] <= {*done, ""}]
        assert free, f"a circle among {waiting}"
        done += free


def test_a_planted_arrow_is_found() -> None:
    assert room("engines.megatron.layout") == "engines.megatron"
    assert room("engines.shutdown") == "engines"
    assert ROOMS.index(room("optimizer")) > ROOMS.index(room("engines.deepspeed.adapter"))
    assert ("optimizer", "matrix_groups") in arrows()


@pytest.mark.parametrize("place", CORE)
def test_the_core_names_no_engine(place: str) -> None:
    top = PACKAGE / place
    files = [top] if top.is_file() else [path for path in sorted(top.rglob("*")) if path.is_file()]
    lines = (
        f"{path.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for path in files
        if path.suffix != ".pyc"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if "deepspeed" in line.lower() or "megatron" in line.lower()
    )
    assert not (named := list(lines)), "\n".join(named)


def locals_of(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and name of whatever a module binds: variables, arguments, loop variables."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg


def test_locals_say_what_they_hold() -> None:
    bound = [
        f"{path.relative_to(PACKAGE)}:{line}: {name}"
        for path in MODULES.values()
        for line, name in locals_of(path.read_text(encoding="utf-8"))
        if name in EMPTY
    ]
    assert not bound, "\n".join(bound)


def test_files_are_of_a_length_that_is_read() -> None:
    """At most 400 lines; pages' styles and scripts are files of their own."""
    lengths = {
        str(path.relative_to(PACKAGE)): len(path.read_text(encoding="utf-8").splitlines())
        for path in itertools.chain(
            PACKAGE.rglob("*.py"), PACKAGE.rglob("*.cpp"), PACKAGE.rglob("*.h")
        )
    }
    assert not (long := {path: lines for path, lines in lengths.items() if lines > 400}), long
