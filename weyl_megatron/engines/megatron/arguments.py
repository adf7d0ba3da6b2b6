"""Megatron-LM's command line with ``--optimizer adamw2`` in it, and what Megatron decides by an
optimizer's name.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from inspect import signature
from types import ModuleType
from typing import Any

from ...settings import PROJECT, SCALE, VECTORS, check_settings
from .adapter import NAME, enable

_PREFIX = f"{NAME}_"

#: Megatron's flags, by their names in its namespace, under which no optimizer of ours can be built
#: or can be right.
_EXCLUDED = (
    "use_torch_fsdp2",
    "optimizer_cuda_graph",
)


def number(text: str) -> int | float | str:
    """Return the number that ``text`` writes, or ``text`` as it is: the checks of the settings say
    what they take.
    """
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


#: How argparse takes the flag of each option of ``enable``; its ``choices`` would answer another
#: word with all of Megatron's flags.
_FLAGS: dict[str, dict[str, Any]] = {
    "tau": {
        "type": number,
        "metavar": "TAU",
        "help": "Bound on the growth of a matrix's spectral norm per step, or 'balanced'.",
    },
    "power_iters": {"type": number, "metavar": "N", "help": "Block power iterations per step."},
    "floor_std": {
        "type": number,
        "metavar": "STD",
        "help": "sigma_1(W) counts for at least that of a random matrix of this deviation.",
    },
    "clip_vectors": {"action": "store_true", "help": "Bound gains and biases, too."},
    "io": {
        "nargs": "+",
        "metavar": "PATTERN",
        "help": "Names of embeddings and head, for --adamw2-tau balanced.",
    },
    "overrides": {
        "type": _json,
        "metavar": "JSON",
        "help": 'A list like [{"match": "*.word_embeddings.weight", "tau": 0.1}].',
    },
    "nonfinite": {
        "metavar": "{skip,raise,off}",
        "help": (
            "What becomes of a step with a gradient that is not finite; by default it is skipped."
        ),
    },
    "nonfinite_limit": {
        "type": number,
        "metavar": "N",
        "help": "Stop after N skipped steps in a row.",
    },
    "spike": {
        "metavar": "{log,skip}",
        "help": "Tell of updates and gradients that jump; skip: make no step whose gradients do.",
    },
    "clip": {
        "metavar": f"{{{SCALE},{PROJECT}}}",
        "help": "What becomes of an update that is too large: all or its singular values shrink.",
    },
    "vectors": {
        "type": number,
        "metavar": "N",
        "help": (
            f"Vectors that see an update for --adamw2-clip {PROJECT}; {VECTORS} where not given."
        ),
    },
    "split_fused": {
        "action": "store_false",
        "help": "Measure linear_qkv and a gated linear_fc1 whole, not by their parts.",
    },
}
#: Namespaces that ask for adamw2 and that Megatron is validating, as "adam".
_validated: list[argparse.Namespace] = []

_DEFAULTS = {
    option: parameter.default for option, parameter in signature(enable).parameters.items()
}


def install() -> None:
    """Add ``--optimizer adamw2`` and its flags to the command line of the megatron.training that
    can be imported.

    Where they are used, AdamW2 is enabled after Megatron has validated its arguments, which it does
    as with ``--optimizer adam``; where they are not, Megatron is as it was.

    Raises:
        SystemExit: this megatron.training has none of the functions that are to be extended.
    """
    accept(import_module("megatron.training.arguments"), extend)
    name_configurations(import_module("megatron.training.training"))


def accept(
    module: ModuleType, extend_parser: Callable[[argparse.ArgumentParser], argparse.ArgumentParser]
) -> None:
    """Have ``megatron.training.arguments`` extend its parser, and validate adamw2 as it does
    adam.
    """
    _replace(module, "add_megatron_arguments", lambda add: _extending(add, extend_parser))
    _replace(module, "validate_args", _validating)
    if hasattr(module, "_print_args"):
        _replace(module, "_print_args", _printing)


def name_configurations(module: ModuleType) -> None:
    """Have ``megatron.training.training`` make configurations for adamw2 as it does for adam; 0.14
    reads the name from the arguments at once.
    """
    if hasattr(module, "get_megatron_optimizer_config"):
        _replace(module, "get_megatron_optimizer_config", _configuring)


def add_choice(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Let ``--optimizer`` take adamw2, where it has choices; flags of adamw2 are not added."""
    optimizer = parser._option_string_actions.get("--optimizer")
    if optimizer is not None and optimizer.choices is not None and NAME not in optimizer.choices:
        optimizer.choices = [*optimizer.choices, NAME]
    return parser


def extend(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the choice and the flags to Megatron's parser, and check them as soon as it has
    parsed.
    """
    optimizer = parser._option_string_actions.get("--optimizer")
    if optimizer is None or optimizer.choices is None:
        raise SystemExit(
            f"weyl_megatron: this Megatron-LM's --optimizer has no choices, so {NAME} cannot be "
            "one."
        )
    if NAME in optimizer.choices:
        raise SystemExit(
            "weyl_megatron: this Megatron-LM has its patch: run the script itself, --optimizer "
            f"{NAME} is in it."
        )
    add_flags(add_choice(parser))
    parse = parser.parse_known_args

    @wraps(parse)
    def parse_and_check(*args: Any, **kwargs: Any) -> Any:
        parsed, unknown = parse(*args, **kwargs)
        try:
            complete(parsed)
        except ValueError as error:
            parser.exit(
                2, f"{parser.prog}: error: {error}\n"
            )  # parser.error() would print all of Megatron's flags
        return parsed, unknown

    # Here and not in validate_args: Megatron may read a YAML file in the place of all that was
    # parsed, before that.
    parser.parse_known_args = parse_and_check  # type: ignore[method-assign]
    return parser


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the group of flags that belong to adamw2."""
    group = parser.add_argument_group(
        NAME,
        "AdamW2 (--optimizer adamw2). --lr, --adam-beta1, --adam-beta2, --adam-eps and "
        "--weight-decay stay AdamW's.",
    )
    for option, how in _FLAGS.items():
        hint = "" if "action" in how else f" Default: {_DEFAULTS[option] or 'none'}."
        group.add_argument(
            _flag(option),
            dest=_PREFIX + option,
            default=argparse.SUPPRESS,
            **{**how, "help": how["help"] + hint},
        )


def complete(args: argparse.Namespace) -> None:
    """Check the flags that were given, and write the defaults of the others where adamw2 was asked
    for.

    Raises:
        ValueError: one sentence that names the flag, what it got and what it takes.
    """
    given = [option for option in _FLAGS if hasattr(args, _PREFIX + option)]
    if args.optimizer != NAME:
        if given:
            raise ValueError(
                f"{_flag(given[0])} takes --optimizer {NAME}, but --optimizer got "
                f"'{args.optimizer}'."
            )
        return
    if getattr(args, "yaml_cfg", None) is not None:
        raise ValueError(
            f"--yaml-cfg got '{args.yaml_cfg}', which replaces all flags, but --optimizer {NAME} "
            "is one."
        )
    for option in _FLAGS:
        if option not in given:
            setattr(args, _PREFIX + option, _DEFAULTS[option])
    options = options_of(args)
    if isinstance(options["overrides"], str):
        raise ValueError(
            f"{_flag('overrides')} got {options['overrides']!r}, "
            'it takes a JSON list like [{"match": "*.word_embeddings.weight", "tau": 0.1}].'
        )
    options.pop("split_fused")
    try:
        check_settings(**options, others={})
    except ValueError as error:
        raise ValueError(re.sub(r"^AdamW2: (\w+)", lambda key: _flag(key[1]), str(error))) from None


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the keyword arguments of ``enable`` that a completed namespace holds."""
    return {option: getattr(args, _PREFIX + option) for option in _FLAGS}


def _flag(option: str) -> str:
    words = ("no-" if option == "split_fused" else "") + option.replace("_", "-")
    return f"--{NAME}-{words}"


def _extending(
    add_arguments: Callable[..., Any],
    extend_parser: Callable[[argparse.ArgumentParser], argparse.ArgumentParser],
) -> Callable[..., Any]:
    return lambda *args, **kwargs: extend_parser(add_arguments(*args, **kwargs))


def _validating(validate: Callable[..., Any]) -> Callable[..., Any]:
    def validate_args(args: argparse.Namespace, *others: Any, **kwargs: Any) -> Any:
        if args.optimizer != NAME:
            return validate(args, *others, **kwargs)
        _exclude(args)  # before Megatron says that something else is missing
        with _named(
            args, "adam"
        ):  # AdamW2 has Adam's state, and Megatron is to take the paths that it takes for Adam
            _validated.append(args)
            try:
                validated = validate(args, *others, **kwargs)
            finally:
                _validated.pop()
        _exclude(args)
        if not hasattr(args, _PREFIX + "tau"):  # a variable has the options, not flags
            return validated
        try:
            enable(**options_of(args))
        except ValueError as error:  # this megatron-core is one that enable() does not know
            raise SystemExit(str(error)) from None
        return validated

    return validate_args


def _exclude(args: argparse.Namespace) -> None:
    """Stop with one sentence where a flag is set under which no optimizer of ours can be right."""
    for excluded in _EXCLUDED:
        if getattr(args, excluded, False):
            raise SystemExit(
                f"--{excluded.replace('_', '-')} cannot be used with --optimizer {NAME}, "
                f"which takes Megatron's DDP with or without --use-distributed-optimizer."
            )
    ranks = getattr(args, "tensor_model_parallel_size", None) or 1
    for kind, size in (
        ("", ranks),
        ("expert_", getattr(args, "expert_tensor_parallel_size", None) or ranks),
    ):
        shards = getattr(args, f"{kind}tensor_parallel_num_weight_shards", None)
        if shards not in (None, size):
            raise SystemExit(
                f"--{kind.replace('_', '-')}tensor-parallel-num-weight-shards got {shards}, but "
                f"with --optimizer {NAME} it takes {size}, the number of tensor-parallel ranks."
            )


def _configuring(configure: Callable[..., Any]) -> Callable[..., Any]:
    def get_megatron_optimizer_config(args: argparse.Namespace, *others: Any, **kwargs: Any) -> Any:
        if args.optimizer != NAME:
            return configure(args, *others, **kwargs)
        with _named(args, "adam"):
            made = configure(args, *others, **kwargs)
        config = made[0] if isinstance(made, Sequence) else made
        config.optimizer = NAME
        return made

    return get_megatron_optimizer_config


def _printing(show: Callable[..., Any]) -> Callable[..., Any]:
    def _print_args(title: str, args: argparse.Namespace) -> Any:
        if not any(args is validated for validated in _validated):
            return show(title, args)
        with _named(
            args, NAME
        ):  # the log says what trains, though it is written during the validation
            return show(title, args)

    return _print_args


@contextmanager
def _named(args: argparse.Namespace, optimizer: str) -> Iterator[None]:
    name, args.optimizer = args.optimizer, optimizer
    try:
        yield
    finally:
        args.optimizer = name


def _replace(
    module: ModuleType, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Put a wrapped function in the place of ``module.name``, also where other modules have
    imported it by name.
    """
    original = getattr(module, name, None)
    if original is None:
        raise SystemExit(
            f"weyl_megatron: {module.__name__} has no {name}(), so --optimizer {NAME} cannot be "
            f"added to it; Megatron-LM core_v0.14.0 to core_v0.19.0 have one."
        )
    wrapped = wraps(original)(wrap(original))
    for loaded in list(sys.modules.values()):
        if (
            getattr(loaded, "__name__", "").split(".")[0] == "megatron"
            and vars(loaded).get(name) is original
        ):
            setattr(loaded, name, wrapped)
