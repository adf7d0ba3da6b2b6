"""The cells of torch's optimizer suite: generic checks, each on every input torch ships for AdamW.

The inputs are those of ``torch.testing._internal.common_optimizers``. The checks ask what
``test/test_optim.py`` of torch, which is not in the wheel, asks on a CPU, in words of our own.
"""

from __future__ import annotations

import itertools
import traceback
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from weyl_megatron import AdamW2

#: What a check varies beside its input, and what an optimizer is built with.
Kwargs = dict[str, Any]

#: Builds the optimizer under test from parameters and keyword arguments.
Build = Callable[..., Optimizer]

#: A check fails by raising; it returns what it stepped, which at τ = ∞ has the bits of AdamW's.
Values = Sequence[Tensor]

ADAMW, UNBOUNDED, BOUNDED = "AdamW", "AdamW2, τ = ∞", "AdamW2, τ = 0.01"
CONTENDERS: dict[str, Build] = {
    ADAMW: AdamW,
    UNBOUNDED: partial(AdamW2, tau=float("inf")),
    BOUNDED: partial(AdamW2, tau=0.01),
}


@dataclass(frozen=True)
class Input:
    """One input: torch's name of it, and keyword arguments, schedulers, or what has to raise."""

    label: str
    given: Any


@dataclass(frozen=True)
class Check:
    """A question, asked once for each of its variants and inputs."""

    run: Callable[..., Values | None]
    inputs: Callable[[Kwargs], list[Input]]
    variants: list[Kwargs]


@dataclass
class Cell:
    """A check of one variant on one input; by contender how it failed, None where it passed."""

    check: str
    variant: str
    input: str
    failures: dict[str, str | None] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.check}[{self.variant}] {self.input}"


#: In the order of definition.
CHECKS: dict[str, Check] = {}


def check(inputs: Callable[[Kwargs], list[Input]], **variants: Sequence[Any]) -> Callable[..., Any]:
    """Register a check over ``inputs`` and the product of ``variants``."""
    product = itertools.product(*variants.values())
    combined = [dict(zip(variants, values, strict=True)) for values in product]

    def register(run: Callable[..., Values | None]) -> Callable[..., Values | None]:
        CHECKS[run.__name__] = Check(run, inputs, combined)
        return run

    return register


def run_check(name: str) -> list[Cell]:
    """Run all cells of a check on all contenders."""
    return [cell for variant in CHECKS[name].variants for cell in _run_variant(name, variant)]


def _run_variant(name: str, variant: Kwargs) -> list[Cell]:
    label = ", ".join(f"{key}={value}" for key, value in variant.items())
    cells = [Cell(name, label, each.label) for each in CHECKS[name].inputs(variant)]
    expected: dict[str, Values | None] = {}
    for contender, build in CONTENDERS.items():
        # Inputs are made anew: steps and schedulers write into the tensors in them.
        for cell, each in zip(cells, CHECKS[name].inputs(variant), strict=True):
            # torch's fused kernel rounds as it likes; ours has the bits of the loop.
            loop = each.label.removesuffix(" & fused")
            torch.manual_seed(zlib.crc32(f"{name} {variant} {loop}".encode()))
            cell.failures[contender], values = _outcome(CHECKS[name], variant, each, build)
            if contender == ADAMW:
                expected[each.label] = values
            elif contender == UNBOUNDED and cell.failures[contender] is None:
                cell.failures[contender] = _difference(values, expected[loop])
    return cells


def _outcome(
    check: Check,
    variant: Kwargs,
    each: Input,
    build: Build,
) -> tuple[str | None, Values | None]:
    """Return how the check failed, None where it passed, and then what was stepped."""
    default = torch.get_default_dtype()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return None, check.run(build, each.given, **variant)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        message = " ".join(str(error).split())[:300]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return f"{type(error).__name__}: {message} ({where})", None
    finally:
        torch.set_default_dtype(default)


def _difference(values: Values | None, expected: Values | None) -> str | None:
    """Say how ``values`` differ from AdamW's; None where the bits are equal or there are none."""
    if values is None or expected is None:
        return None
    if (shapes := [each.shape for each in values]) != [each.shape for each in expected]:
        return f"the shapes are {shapes}, and AdamW's {[each.shape for each in expected]}"
    for number, (ours, theirs) in enumerate(zip(values, expected, strict=True)):
        if not torch.equal(ours, theirs):
            return f"tensor {number} is {float((ours - theirs).abs().max())} from AdamW's"
    return None


@cache
def adamw_info() -> Any:
    """Return torch's description of AdamW."""
    return next(info for info in _common_optimizers().optim_db if info.optim_cls is AdamW)


def _common_optimizers() -> Any:
    # Not above: the import takes seconds and changes torch's global flags, for all of a process.
    from torch.testing._internal import common_optimizers

    return common_optimizers


def once(variant: Kwargs) -> list[Input]:
    """No input: the check brings its own."""
    return [Input("once", {})]


def settings(variant: Kwargs) -> list[Input]:
    """torch's settings of AdamW, suited to the variant's dtype."""
    given = adamw_info().optim_inputs_func(device="cpu", dtype=variant.get("dtype"))
    return [Input(each.desc, each.kwargs) for each in given]


def fused_settings(variant: Kwargs) -> list[Input]:
    """torch's settings of AdamW, each as it is and with ``fused``."""
    return _with_flags(skip=("differentiable",))


def all_settings(variant: Kwargs) -> list[Input]:
    """torch's settings of AdamW, each as it is, with ``fused`` and with ``differentiable``."""
    return _with_flags(skip=())


def undecayed_settings(variant: Kwargs) -> list[Input]:
    """Those of :func:`all_settings` that leave weight decay at its default."""
    return [each for each in all_settings(variant) if "weight_decay" not in each.given]


def errors(variant: Kwargs) -> list[Input]:
    """What torch wants refused."""
    given = adamw_info().optim_error_inputs_func(device="cpu", dtype=torch.float32)
    return [Input(each.optimizer_error_input.desc, each) for each in given]


def schedulers(variant: Kwargs) -> list[Input]:
    """The sets of schedulers that torch runs beside AdamW."""
    sets = adamw_info().scheduler_inputs
    return [Input(f"schedulers {number}", each) for number, each in enumerate(sets)]


def _with_flags(skip: tuple[str, ...]) -> list[Input]:
    combine = _common_optimizers()._get_optim_inputs_including_global_cliquey_kwargs
    return [Input(each.desc, each.kwargs) for each in combine("cpu", None, adamw_info(), skip=skip)]


def assert_same(actual: Any, expected: Any, **tolerance: float) -> None:
    """Compare nested state: tensors to ``tolerance``, or torch's of the dtype, all else exactly."""
    if isinstance(expected, Tensor):
        torch.testing.assert_close(actual, expected, equal_nan=True, **tolerance)
    elif isinstance(expected, Mapping):
        assert list(actual) == list(expected), f"keys {list(actual)} != {list(expected)}"
        for key in expected:
            assert_same(actual[key], expected[key], **tolerance)
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), f"{len(actual)} entries != {len(expected)}"
        for ours, theirs in zip(actual, expected, strict=True):
            assert_same(ours, theirs, **tolerance)
    else:
        assert actual == expected, f"{actual!r} != {expected!r}"


def raised(call: Callable[[], Any]) -> list[Exception | Warning]:
    """Return what ``call`` raises, and else what it warns of."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    except Exception as error:
        return [error]
    return [each.message for each in caught if isinstance(each.message, Warning)]


def held(optimizer: Optimizer) -> list[Tensor]:
    """Return copies of all parameters, and then of the tensors in their state."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    state = [value for param in params for value in optimizer.state.get(param, {}).values()]
    return [each.detach().clone() for each in [*params, *state] if isinstance(each, Tensor)]
