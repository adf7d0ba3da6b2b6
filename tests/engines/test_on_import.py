"""What is called once a module is imported, whatever was done to its name before."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from weyl_megatron.engines import on_import

#: By its end pytest takes it for a test, and loads it, as all of them, by one loader.
NAME = "imported_by_a_test"


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ModuleType]]:
    """The modules of the name NAME that were imported."""
    (tmp_path / f"{NAME}.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    modules: list[ModuleType] = []
    on_import.when_imported(NAME, modules.append)
    assert modules == []
    yield modules
    on_import._waiting.pop(NAME, None)
    sys.modules.pop(NAME, None)


def test_a_module_is_shown_once_it_has_run(seen: list[ModuleType]) -> None:
    module = importlib.import_module(NAME)
    assert seen == [module] and module.value == 1
    importlib.import_module(NAME)
    assert len(seen) == 1


def test_a_look_for_the_module_is_no_import(seen: list[ModuleType]) -> None:
    """Frameworks ask whether an engine is installed, long before they import it."""
    for _ in range(2):
        assert find_spec(NAME) is not None and seen == []
    assert seen == [importlib.import_module(NAME)]


def test_a_module_that_is_imported_anew_is_shown_anew(seen: list[ModuleType]) -> None:
    first = importlib.import_module(NAME)
    del sys.modules[NAME]
    assert seen == [first, importlib.import_module(NAME)]


def test_an_import_that_failed_may_be_made_again(tmp_path: Path, seen: list[ModuleType]) -> None:
    path = tmp_path / f"{NAME}.py"
    path.write_text("raise OSError\n")
    with pytest.raises(OSError):
        importlib.import_module(NAME)
    assert seen == []
    path.write_text("value = 12345\n")
    importlib.invalidate_caches()
    assert seen == [importlib.import_module(NAME)]


def test_a_module_that_is_not_there_is_not_found(seen: list[ModuleType]) -> None:
    on_import.when_imported("no_such_module_of_a_test", seen.append)
    assert find_spec("no_such_module_of_a_test") is None and seen == []
    on_import._waiting.pop("no_such_module_of_a_test")
