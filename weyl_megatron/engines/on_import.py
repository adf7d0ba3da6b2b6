"""Calls a function once a module is imported: engines may be imported before or after an optimizer
is made.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_waiting: dict[str, Callable[[ModuleType], None]] = {}


def when_imported(name: str, act: Callable[[ModuleType], None]) -> None:
    """Call ``act`` with the module ``name``: now where it is imported, else once it is; one ``act``
    a module.
    """
    if name in sys.modules:
        act(sys.modules[name])
        return
    _waiting[name] = act
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def wrap(owner: Any, name: str, wrapping: Callable[[Callable[..., Any]], Any]) -> None:
    """Put what ``wrapping`` makes of ``owner.name`` in its place, once, and where there is one."""
    original = getattr(owner, name, None)
    if original is None or hasattr(original, "adamw2"):
        return
    wrapped: Any = functools.wraps(original)(wrapping(original))
    wrapped.adamw2 = True
    setattr(owner, name, wrapped)


class _Finder(MetaPathFinder):
    """Finds nothing itself: it has the loader that the others find call what waits for its
    module.
    """

    def find_spec(self, fullname: str, *_: object) -> ModuleSpec | None:
        act = _waiting.pop(fullname, None)  # so that the other finders are asked next
        if act is None:
            return None
        try:
            spec = find_spec(fullname)
        finally:
            # Whoever asks may only want to know whether there is such a module, or may import it
            # again where that failed.
            _waiting[fullname] = act
        if spec is None or spec.loader is None or hasattr(spec.loader.exec_module, "adamw2"):
            return spec
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            waits = _waiting.get(module.__name__)  # a loader may be that of many modules
            if waits is not None:
                waits(module)

        execute_and_act.adamw2 = True  # type: ignore[attr-defined]
        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec
