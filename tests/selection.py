"""What a session tests of a file, so that a fixture which all its tests share runs that alone."""

from __future__ import annotations

from typing import Any

import pytest


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
