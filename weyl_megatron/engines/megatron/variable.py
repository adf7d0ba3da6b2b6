"""``WEYL_MEGATRON=adamw2:tau=balanced``: AdamW2 in the place of Megatron's Adam, in scripts that
nobody starts through this package.

Megatron-Bridge, verl, slime, ms-swift and NeMo have scripts of their own, some of which take no
other optimizer's name than Megatron's. ``import torch`` loads :mod:`..torch.plugin`, which calls
:func:`act` once a module of Megatron is imported where the variable is set. What then happens is
:func:`.adapter.enable`, as with ``python -m weyl_megatron.engines.megatron``, and one name more.
"""

from __future__ import annotations

import functools
import gc
import inspect
import json
import os
import re
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch.distributed as dist

from ...environment import IN_MEGATRON
from ..on_import import when_imported
from . import arguments
from .adapter import NAME, _options_of, check_options, enable

#: Megatron's name for what AdamW2 takes the place of.
_ADAM = "adam"

_DEFAULTS = {key: each.default for key, each in inspect.signature(enable).parameters.items()}
_OPTIONS = tuple(_DEFAULTS)
_WORDS = {"true": True, "false": False, "none": None, "null": None}

#: What was printed already.
_said: set[str] = set()


def act(module: ModuleType) -> None:
    """Do what the variable asks for to ``module``, which was just imported.

    Args:
        module: ``megatron.core.optimizer`` or ``megatron.training.arguments``.

    Raises:
        ValueError: one sentence: the variable cannot be read, an option is impossible, or Megatron
            has built an optimizer already.
    """
    options = read(os.environ[IN_MEGATRON])
    if module.__name__ == "megatron.core.optimizer":
        _take(module, options)
        return
    if hasattr(module, "add_megatron_arguments") and hasattr(module, "validate_args"):
        arguments.accept(module, arguments.add_choice)
        when_imported("megatron.training.training", arguments.name_configurations)


def read(text: str) -> dict[str, Any]:
    """Return the keyword arguments of ``enable`` that the variable's value holds.

    Args:
        text: ``adamw2``, ``adamw2:tau=balanced,clip=project``, the same without ``adamw2:``, or the
            options as a JSON object.

    Raises:
        ValueError: one sentence: it cannot be read, or an option is impossible.
    """
    stripped = text.strip()
    name, colon, rest = stripped.partition(":")
    is_named = name.strip().lower() == NAME
    if not stripped.startswith("{"):
        if is_named:
            stripped = rest.strip()
        elif (colon and "=" not in name) or not stripped.strip(" ,"):
            raise _unreadable(text)
    if stripped.startswith("{"):
        try:
            options: dict[str, Any] = json.loads(stripped, object_pairs_hook=_object)
        except ValueError as error:
            raise _unreadable(text, f" ({error})") from None
    else:
        options = _pairs(text, stripped)
    for key in options:
        if key not in _OPTIONS:
            raise ValueError(
                f"AdamW2: {IN_MEGATRON} got the option {key!r}, it takes {', '.join(_OPTIONS)}."
            )
    try:
        check_options({**_DEFAULTS, **options})
    except ValueError as error:
        keys = "|".join(_OPTIONS)
        raise ValueError(
            re.sub(rf"^AdamW2: (?=({keys})\b)", f"AdamW2: {IN_MEGATRON}'s ", str(error))
        ) from None
    return options


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, as Python does where no key is there twice."""
    if twice := [key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number])]:
        raise ValueError(f"{twice[0]} is there twice")
    return dict(pairs)


def _pairs(text: str, stripped: str) -> dict[str, Any]:
    """Return the options of ``key=value,key=value``."""
    options: dict[str, Any] = {}
    for pair in filter(None, map(str.strip, stripped.split(","))):
        key, equals, value = (part.strip() for part in pair.partition("="))
        key = key.replace("-", "_")
        if not equals or not key or not value or key in options:
            raise _unreadable(text)
        options[key] = value.split() if key == "io" else _value(value)
    return options


def _value(text: str) -> Any:
    return _WORDS[text.lower()] if text.lower() in _WORDS else arguments.number(text)


def _unreadable(text: str, why: str = "") -> ValueError:
    return ValueError(
        f"AdamW2: {IN_MEGATRON} got {text!r}{why}, it takes '{NAME}', "
        f"'{NAME}:tau=balanced,clip=project' or a JSON object of options."
    )


def _take(factory: ModuleType, options: Mapping[str, Any]) -> None:
    """Have ``megatron.core.optimizer`` build AdamW2 where it is to build Adam, and nothing else."""
    _refuse_built(factory)
    when_imported("megatron.core.optimizer.muon", _refuse_muon)
    if hasattr(factory, "_get_megatron_emerging_optimizer"):
        # Below the adapter's wrapper, which asks its caller's frame for more.
        _refuse_calls(factory, "_get_megatron_emerging_optimizer")
    enable(**options)
    name_of_build = "_get_megatron_optimizer_based_on_param_groups"
    build: Callable[..., Any] = getattr(factory, name_of_build)
    signature, adam = inspect.signature(build), factory.Adam

    @functools.wraps(build)
    def build_named(*args: Any, **kwargs: Any) -> Any:
        config = signature.bind(*args, **kwargs).arguments["config"]
        name = config.optimizer
        if name not in (_ADAM, NAME):
            raise _other(name)
        if factory.Adam is not adam:
            raise ValueError(
                f"AdamW2: {IN_MEGATRON} is set, but this script has put "
                f"{getattr(factory.Adam, '__name__', factory.Adam)} in the place of Megatron's "
                "Adam; it takes one of them."
            )
        config.optimizer = NAME
        try:
            built = build(*args, **kwargs)
        finally:
            config.optimizer = name
        _say(name, config)
        return built

    setattr(factory, name_of_build, build_named)


def _refuse_built(factory: ModuleType) -> None:
    """Raise ValueError where Megatron has an optimizer, which would go on with plain Adam."""
    for thing in gc.get_objects():
        if issubclass(type(thing), factory.MegatronOptimizer):
            raise ValueError(
                f"AdamW2: {IN_MEGATRON} was read after Megatron had built a "
                f"{type(thing).__name__}, it takes a process in which `import torch` loads plugins "
                "(TORCH_DEVICE_BACKEND_AUTOLOAD)."
            )


def _refuse_muon(module: ModuleType) -> None:
    """Refuse Muon where its function, until 0.16, has Megatron build an "adam" for what is left."""
    name = "get_megatron_muon_optimizer"
    if "config" in inspect.signature(getattr(module, name)).parameters:
        _refuse_calls(module, name)


def _refuse_calls(module: ModuleType, name: str) -> None:
    build: Callable[..., Any] = getattr(module, name)
    signature = inspect.signature(build)

    @functools.wraps(build)
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise _other(signature.bind(*args, **kwargs).arguments["config"].optimizer)

    setattr(module, name, refuse)


def _other(name: str) -> ValueError:
    return ValueError(
        f"AdamW2: OptimizerConfig.optimizer got {name!r} where {IN_MEGATRON} is set, it takes "
        f"'{_ADAM}' or '{NAME}'."
    )


def _say(name: str, config: Any) -> None:
    """Print, on the first rank and once, what Megatron's name stands for."""
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))
    options = [
        f"{key}={value!r}"
        for key, value in _options_of(config).items()
        if key == "tau" or value != _DEFAULTS[key]
    ]
    line = (
        f"AdamW2: Megatron's optimizer '{name}' is AdamW2 in this process, "
        f"{', '.join(options)} ({IN_MEGATRON})."
    )
    if rank == 0 and line not in _said:
        _said.add(line)
        print(line, flush=True)
