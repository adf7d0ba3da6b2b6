"""The name ``adamw2`` where trainers choose an optimizer by a word: timm's ``--opt``, and
``--optim`` of Hugging Face's Trainer and of what is built on it.

Both hand over parameters without names. What is made gets the model, too, which has them.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..on_import import wrap

NAME = "adamw2"


def join_timm(module: ModuleType) -> None:
    """Give timm's registry (``timm.optim._optim_factory``, timm 1.0.12 and newer) the name."""
    info = module.OptimInfo(
        name=NAME,
        opt_class="weyl_megatron.AdamW2",
        description="AdamW whose rate is bounded by the spectral norms of weight and update",
        has_betas=True,
    )
    module.default_registry.register(info)

    def showing(create: Callable[..., Any]) -> Callable[..., Any]:
        def create_and_show(
            registry: Any, params: Any, opt: str, *args: Any, **options: Any
        ) -> Any:
            if isinstance(params, nn.Module) and opt.lower().split("_")[-1] == NAME:
                options.setdefault("model", params)
            return create(registry, params, opt, *args, **options)

        return create_and_show

    wrap(module.OptimizerRegistry, "create_optimizer", showing)


def join_arguments(module: ModuleType) -> None:
    """Give the enumeration ``OptimizerNames`` (``transformers.training_args``) the name.

    Its members are what TrainingArguments and the command line take. Enumerations have no call for
    one more.
    """
    names: Any = module.OptimizerNames
    member = str.__new__(names, NAME)
    member._name_, member._value_ = NAME.upper(), NAME
    member._sort_order_ = len(names._member_names_)
    type.__setattr__(names, member._name_, member)  # Enum's own refuses
    names._member_names_.append(member._name_)
    names._member_map_[member._name_] = names._value2member_map_[NAME] = member


def join_trainer(module: ModuleType) -> None:
    """Have the Trainer (``transformers.trainer``) make what the name says, with the options that
    ``optim_args`` has.
    """

    def choosing(choose: Callable[..., Any]) -> Callable[..., Any]:
        def choose_by_name(args: Any, model: Any = None) -> Any:
            if args.optim != NAME:
                return choose(args, model)
            options = {
                "lr": args.learning_rate,
                "betas": (args.adam_beta1, args.adam_beta2),
                "eps": args.adam_epsilon,
            }
            return _with_model(model), options | read_options(args.optim_args)

        return choose_by_name

    wrap(module.Trainer, "get_optimizer_cls_and_kwargs", choosing)


def read_options(text: str | None) -> dict[str, Any]:
    """Return the options of ``"tau=0.01,clip=project"``.

    Raises:
        ValueError: an entry is no pair, or its key is there twice.
    """
    options: dict[str, Any] = {}
    for entry in (text or "").replace(" ", "").split(","):
        key, _, value = entry.partition("=")
        if entry and not (key and value and key not in options):
            raise ValueError(
                f"AdamW2: optim_args got {entry!r}, it takes pairs such as 'tau=0.01,clip=project',"
                " each once."
            )
        if entry:
            options[key] = _value(value)
    return options


def _value(text: str) -> Any:
    for read in (ast.literal_eval, float):  # the second for "inf"
        try:
            return read(text)
        except (ValueError, SyntaxError):
            pass
    return text


def _with_model(model: nn.Module | None) -> type[Optimizer]:
    """Return a class that makes an AdamW2 which was shown ``model``.

    The Trainer gives its groups to a class alone, and takes an option ``model`` for groups.
    """
    from ...optimizer import AdamW2  # not where a Trainer steps another one

    class OfModel(Optimizer):
        def __new__(cls, params: Any, **options: Any) -> Any:
            return AdamW2(params, model=model, **options)

    return OfModel
