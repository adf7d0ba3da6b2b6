"""The recipe: every number of a run, read from YAML and checked before anything starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Takes:
    """What a key takes: in words, and as a function from what YAML read to the value, which raises if it cannot."""

    words: str
    convert: Callable[[Any], Any]


def _key(takes: Takes, default: Any = MISSING) -> Any:
    return field(default=default, metadata={"takes": takes})


def _integer(smallest: int) -> Takes:
    def convert(value: Any) -> int:
        if type(value) is not int or value < smallest:
            raise ValueError
        return value

    return Takes(f"an integer of {smallest} or more", convert)


def _number(words: str, accepts: Callable[[float], bool]) -> Takes:
    def convert(value: Any) -> float:
        if isinstance(value, bool) or not accepts(number := float(value)):  # YAML reads 6e-4 as text
            raise ValueError
        return number

    return Takes(words, convert)


def _choice(*values: Any) -> Takes:
    def convert(value: Any) -> Any:
        if not any(value is known or (isinstance(value, str) and value == known) for known in values):
            raise ValueError
        return value

    return Takes(" or ".join(str(value).lower() for value in values), convert)


def _pair(words: str, accepts: Callable[[float, float], bool]) -> Takes:
    def convert(value: Any) -> tuple[float, float]:
        first, second = map(float, value)
        if isinstance(value, str) or not accepts(first, second):
            raise ValueError
        return first, second

    return Takes(words, convert)


_POSITIVE = _number("a number above 0", lambda x: 0 < x < math.inf)
_NOT_NEGATIVE = _number("a number of 0 or more", lambda x: 0 <= x < math.inf)
_ABOVE_ZERO = _number("a number above 0", lambda x: x > 0)
_TAU = Takes("a number above 0 or auto", lambda value: value if value == "auto" else _ABOVE_ZERO.convert(value))
_BETAS = _pair("two numbers from 0 up to but not 1", lambda first, second: 0 <= first < 1 and 0 <= second < 1)
_SPLIT = _pair("two weights above 0, of training and validation", lambda *parts: all(0 < x < math.inf for x in parts))
_SWITCH = _choice(True, False)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run. The keys are those of the YAML file; `read_recipe` makes it."""

    num_layers: int = _key(_integer(1))
    hidden_size: int = _key(_integer(1))
    num_attention_heads: int = _key(_integer(1))
    seq_length: int = _key(_integer(1), 1024)

    optimizer: str = _key(_choice("adamw2", "adam"), "adamw2")
    tau: float | str = _key(_TAU, 0.01)
    lr: float = _key(_POSITIVE)
    min_lr: float = _key(_NOT_NEGATIVE, 0.0)
    lr_warmup_steps: int = _key(_integer(0), 0)
    betas: tuple[float, float] = _key(_BETAS, (0.9, 0.95))
    eps: float = _key(_POSITIVE, 1e-8)
    weight_decay: float = _key(_NOT_NEGATIVE, 0.1)
    clip_grad: float = _key(_NOT_NEGATIVE, 1.0)

    train_steps: int = _key(_integer(1))
    global_batch_size: int = _key(_integer(1))
    micro_batch_size: int = _key(_integer(1))
    split: tuple[float, float] = _key(_SPLIT, (99.0, 1.0))
    dataloader_workers: int = _key(_integer(0), 2)
    seed: int = _key(_integer(0), 1234)

    tensor_parallel: int = _key(_integer(1), 1)
    pipeline_parallel: int = _key(_integer(1), 1)
    sequence_parallel: bool = _key(_SWITCH, False)
    distributed_optimizer: bool = _key(_SWITCH, True)
    bf16: bool = _key(_SWITCH, True)

    log_interval: int = _key(_integer(1), 10)
    eval_interval: int = _key(_integer(0), 0)  # 0: at the end only
    eval_batches: int = _key(_integer(1), 20)
    save_interval: int = _key(_integer(0), 0)  # 0: at the end only
    watch_interval: int = _key(_integer(1), 100)  # of --watch

    def data_parallel(self, world_size: int) -> int:
        """How many replicas of the model `world_size` ranks hold."""
        return world_size // (self.tensor_parallel * self.pipeline_parallel)

    def micro_batches(self, world_size: int) -> int:
        """How many micro batches each replica takes in a step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel(world_size))


def read_recipe(path: Path, overrides: Sequence[str] = (), world_size: int = 1) -> Recipe:
    """The recipe at `path` with each `key=value` of `overrides` put over it, checked for `world_size` ranks."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"{path} takes lines of key: value, got {values!r}")
        for override in overrides:
            key, equals, text = override.partition("=")
            if not equals:
                raise ValueError(f"--set takes key=value, got {override!r}")
            values[key] = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} and --set take YAML, got {' '.join(str(error).split())}") from None
    recipe = Recipe(**_converted(values, path))
    _check_together(recipe, world_size)
    return recipe


def _converted(values: dict[Any, Any], path: Path) -> dict[str, Any]:
    known = {key.name: key for key in fields(Recipe)}
    for name in values:
        if name not in known:
            raise ValueError(f"{path} takes the keys {', '.join(known)}; got {name!r}")
    for name, key in known.items():
        if name not in values and key.default is MISSING:
            raise ValueError(f"{name} takes {key.metadata['takes'].words}, got nothing: {path} lacks it")
    converted = {}
    for name, value in values.items():
        takes = known[name].metadata["takes"]
        try:
            converted[name] = takes.convert(value)
        except (TypeError, ValueError):
            raise ValueError(f"{name} takes {takes.words}, got {value!r}") from None
    return converted


def _check_together(recipe: Recipe, world_size: int) -> None:
    r, model_parallel, heads = recipe, recipe.tensor_parallel * recipe.pipeline_parallel, recipe.num_attention_heads
    if r.hidden_size % heads:
        raise ValueError(f"num_attention_heads takes a divisor of hidden_size {r.hidden_size}, got {heads}")
    if heads % r.tensor_parallel:
        raise ValueError(f"tensor_parallel takes a divisor of num_attention_heads {heads}, got {r.tensor_parallel}")
    if r.num_layers % r.pipeline_parallel:
        raise ValueError(f"pipeline_parallel takes a divisor of num_layers {r.num_layers}, got {r.pipeline_parallel}")
    if r.sequence_parallel and (r.tensor_parallel == 1 or r.seq_length % r.tensor_parallel):
        raise ValueError(
            f"sequence_parallel takes a tensor_parallel above 1 that divides seq_length {r.seq_length}, "
            f"got {r.tensor_parallel}"
        )
    if world_size % model_parallel:
        raise ValueError(
            "WORLD_SIZE takes a multiple of tensor_parallel × pipeline_parallel = "
            f"{r.tensor_parallel} × {r.pipeline_parallel}, got {world_size}"
        )
    replicas = r.data_parallel(world_size)
    if r.global_batch_size % (r.micro_batch_size * replicas):
        raise ValueError(
            f"global_batch_size takes a multiple of micro_batch_size × data-parallel ranks = {r.micro_batch_size} × "
            f"{replicas}, got {r.global_batch_size}"
        )
    if r.min_lr > r.lr:
        raise ValueError(f"min_lr takes at most lr {r.lr}, got {r.min_lr}")
    if r.lr_warmup_steps >= r.train_steps:
        raise ValueError(f"lr_warmup_steps takes less than train_steps {r.train_steps}, got {r.lr_warmup_steps}")
