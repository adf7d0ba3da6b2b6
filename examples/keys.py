"""The keys of a recipe: what each takes.

A YAML file and `--set key=value` become a checked dataclass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

RecipeType = TypeVar("RecipeType")


@dataclass(frozen=True)
class Takes:
    """What a key takes."""

    words: str
    convert: Callable[[Any], Any]  # from what YAML read to the value; raises if it cannot


def key(takes: Takes, default: Any = MISSING) -> Any:
    """A field of a recipe; without a default every file has to name it."""
    return field(default=default, metadata={"takes": takes})


def integer(smallest: int) -> Takes:
    def convert(value: Any) -> int:
        if type(value) is not int or value < smallest:
            raise ValueError
        return value

    return Takes(f"an integer of {smallest} or more", convert)


def number(words: str, accepts: Callable[[float], bool]) -> Takes:
    def convert(value: Any) -> float:
        if isinstance(value, bool):
            raise ValueError
        read = float(value)  # YAML reads 6e-4 as text
        if not accepts(read):
            raise ValueError
        return read

    return Takes(words, convert)


def choice(*values: Any) -> Takes:
    def convert(value: Any) -> Any:
        is_text = isinstance(value, str)
        if not any(value is known or (is_text and value == known) for known in values):
            raise ValueError
        return value

    words = (str(value).lower() if isinstance(value, bool) else value for value in values)
    return Takes(" or ".join(words), convert)


def pair(words: str, accepts: Callable[[float, float], bool]) -> Takes:
    def convert(value: Any) -> tuple[float, float]:
        first, second = map(float, value)
        if isinstance(value, str) or not accepts(first, second):
            raise ValueError
        return first, second

    return Takes(words, convert)


def text(words: str) -> Takes:
    def convert(value: Any) -> str:
        if not isinstance(value, str) or not value:
            raise ValueError
        return value

    return Takes(words, convert)


def mapping(words: str) -> Takes:
    def convert(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise ValueError
        return value

    return Takes(words, convert)


ABOVE_ZERO = number("a number above 0", lambda x: x > 0)
POSITIVE = number("a number above 0", lambda x: 0 < x < math.inf)
NOT_NEGATIVE = number("a number of 0 or more", lambda x: 0 <= x < math.inf)
SHARE = number("a number from 0 up to but not 1", lambda x: 0 <= x < 1)
#: "auto" is what "balanced" was called first.
TAU = Takes(
    "a number above 0 or balanced",
    lambda value: "balanced" if value in ("balanced", "auto") else ABOVE_ZERO.convert(value),
)
BETAS = pair(
    "two numbers from 0 up to but not 1", lambda first, second: 0 <= first < 1 and 0 <= second < 1
)
SWITCH = choice(True, False)


def read(kind: type[RecipeType], path: Path, overrides: Sequence[str] = ()) -> RecipeType:
    """Return the recipe at `path` with each `key=value` of `overrides` put over it.

    Raises:
        ValueError: in one sentence, where a key is missing, unknown, or takes something else.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"{path} takes lines of key: value, got {values!r}")
        for override in overrides:
            name, equals, given = override.partition("=")
            if not equals:
                raise ValueError(f"--set takes key=value, got {override!r}")
            values[name] = yaml.safe_load(given)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        got = " ".join(str(error).split())
        raise ValueError(f"{path} and --set take YAML, got {got}") from None
    return kind(**_converted(kind, values, path))


def _converted(kind: type[Any], values: dict[Any, Any], path: Path) -> dict[str, Any]:
    known = {entry.name: entry for entry in fields(kind)}
    for name in values:
        if name not in known:
            raise ValueError(f"{path} takes the keys {', '.join(known)}; got {name!r}")
    for name, entry in known.items():
        if name not in values and entry.default is MISSING:
            words = entry.metadata["takes"].words
            raise ValueError(f"{name} takes {words}, got nothing: {path} lacks it")
    converted = {}
    for name, value in values.items():
        takes = known[name].metadata["takes"]
        try:
            converted[name] = takes.convert(value)
        except (TypeError, ValueError):
            raise ValueError(f"{name} takes {takes.words}, got {value!r}") from None
    return converted
