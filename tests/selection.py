"""Which cases of a file `make test` runs, and which of them a session runs: a fixture that all its
tests share runs those alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def quick_and_slow(cases: Iterable[dict[str, Any]], quick: Collection[str]) -> list[Any]:
    """Return parameters with the cases' names, of which those in ``quick`` are not marked slow."""
    return [
        pytest.param(case, id=case["name"], marks=() if case["name"] in quick else pytest.mark.slow)
        for case in cases
    ]


def values_of(request: pytest.FixtureRequest, name: str, **others: object) -> list[Any]:
    """Return the values of the parameter ``name`` in the tests of the requesting file that this
    session runs, of those whose other parameters have the values of ``others``.
    """
    parameters = [
        getattr(item, "callspec").params  # noqa: B009 (pytest.Item knows it where parametrized)
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]
    return [
        each[name]
        for each in parameters
        if name in each and all(each.get(key) == value for key, value in others.items())
    ]
