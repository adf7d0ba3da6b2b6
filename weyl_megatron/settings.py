"""The options of AdamW2, checked: whatever is wrong stops at construction with one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import isnan
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from . import moments

#: Keys of AdamW configurations that change nothing here, and the values they may have (None: any).
_HARMLESS: dict[str, tuple[Any, ...] | None] = {
    "torch_adam": None,
    "fp32_optimizer_states": (True, None),
    "adam_w_mode": (True,),
    "bias_correction": (True,),
    "decoupled_weight_decay": (True,),
    "capturable": (False,),
    "differentiable": (False,),
    "foreach": None,
    "fused": None,
}

_OPTIONS = (
    "lr, betas, eps, weight_decay, amsgrad, maximize, tau, power_iters, floor_std, clip_vectors, "
    "io, overrides, nonfinite, nonfinite_limit, spike, clip, vectors, state_dtype, tp_group, "
    "budget_group, model"
)
_OVERRIDES = {"match", "tau", "exempt", "fused", "kind", "clip", "vectors"}
_KINDS = ("convolution", "experts")

#: The τ that needs no tuning: hidden matrices share a budget.
BALANCED = "balanced"

#: What Rule 1 does to an update that is too large: it scales it, or clips its singular values.
SCALE, PROJECT = "scale", "project"
SKIP = "skip"  #: a step that is not finite, or jumps

#: Vectors that see an update whose singular values are clipped: by default, and at most.
VECTORS, MOST_VECTORS = 8, 64

#: Its spellings. The second is taken, too, but not advised: Hugging Face fills in, or refuses,
#: every "auto" that it finds in a DeepSpeed JSON.
_SPELLINGS = (BALANCED, "auto")


@dataclass(frozen=True)
class Settings:
    """AdamW2's options, beyond what ``torch.optim.AdamW`` keeps in its parameter groups."""

    tau: float | str
    power_iters: int
    floor_std: float
    clip_vectors: bool
    io: tuple[str, ...] | None
    overrides: tuple[Mapping[str, Any], ...]
    nonfinite: str | None = None
    nonfinite_limit: int | None = None
    clip: str = SCALE
    vectors: int | None = None
    state_dtype: moments.Dtypes | None = None
    spike: str | None = None
    given: Mapping[str, Any] = field(default_factory=dict)  # as it was, of what groups cannot have

    def override(self, name: str, key: str, default: Any = None) -> Any:
        """Return what the last override that matches ``name`` says of ``key``, or ``default``."""
        for override in reversed(self.overrides):
            if key in override and fnmatchcase(name, override["match"]):
                return override[key]
        return default

    def shares_budget(self) -> bool:
        """Whether a τ hangs on how many matrices there are."""
        return BALANCED in [self.tau, *(override.get("tau") for override in self.overrides)]

    def check_matches(self, names: Sequence[str]) -> None:
        """Raise ValueError where an override's pattern matches none of ``names``."""
        for override in self.overrides:
            if not any(fnmatchcase(name, override["match"]) for name in names):
                raise ValueError(
                    f"AdamW2: overrides got the match {override['match']!r}, which matches no "
                    f"parameter's name (the first is '{names[0] if names else ''}')."
                )


def check_settings(
    *,
    tau: Any,
    power_iters: Any,
    floor_std: Any,
    clip_vectors: Any,
    io: Any,
    overrides: Any,
    others: Mapping[str, Any],
    nonfinite: Any = None,
    nonfinite_limit: Any = None,
    clip: Any = SCALE,
    vectors: Any = None,
    state_dtype: Any = None,
    spike: Any = None,
) -> Settings:
    """Return the settings.

    Raises:
        ValueError: one sentence, with the key, what it got, and what it takes.
    """
    for key, value in others.items():
        if key == "max_grad_norm":
            raise ValueError(
                f"AdamW2: max_grad_norm got {value!r}, but clipping gradients is the engine's: "
                "DeepSpeed takes 'gradient_clipping' beside 'optimizer', torch takes "
                "clip_grad_norm_."
            )
        if key not in _HARMLESS:
            raise ValueError(f"AdamW2: unknown key {key!r} got {value!r}; it takes {_OPTIONS}.")
    check_harmless(others)
    tau = read_tau("tau", tau)
    if not isinstance(power_iters, int) or isinstance(power_iters, bool) or power_iters < 1:
        raise ValueError(
            f"AdamW2: power_iters got {power_iters!r}, it takes a whole number from 1 on."
        )
    if not is_number(floor_std) or not 0 <= floor_std < float("inf"):
        raise ValueError(
            f"AdamW2: floor_std got {floor_std!r}, it takes a number from 0 (no floor) on."
        )
    if not isinstance(clip_vectors, bool):
        raise ValueError(f"AdamW2: clip_vectors got {clip_vectors!r}, it takes True or False.")
    if io is not None and (isinstance(io, str) or not _are_strings(io)):
        raise ValueError(
            f"AdamW2: io got {io!r}, it takes a list of patterns of parameter names, or None."
        )
    if nonfinite not in (None, SKIP, "raise", "off"):
        raise ValueError(
            f"AdamW2: nonfinite got {nonfinite!r}, it takes 'skip', 'raise', 'off' or None."
        )
    if nonfinite_limit is not None and (type(nonfinite_limit) is not int or nonfinite_limit < 1):
        raise ValueError(
            f"AdamW2: nonfinite_limit got {nonfinite_limit!r}, it takes a whole number from 1 on, "
            "or None."
        )
    if spike not in (None, "log", SKIP):
        raise ValueError(f"AdamW2: spike got {spike!r}, it takes 'log', '{SKIP}' or None.")
    given = {"clip": clip} if vectors is None else {"clip": clip, "vectors": vectors}
    check_clip(given, clip)
    return Settings(
        tau=tau,
        power_iters=power_iters,
        floor_std=float(floor_std),
        clip_vectors=clip_vectors,
        io=None if io is None else tuple(io),
        overrides=_check_overrides(overrides, clip),
        nonfinite=nonfinite,
        nonfinite_limit=nonfinite_limit,
        clip=clip,
        vectors=vectors,
        state_dtype=moments.read(state_dtype),
        spike=spike,
        given={
            "power_iters": power_iters,
            "floor_std": floor_std,
            "clip_vectors": clip_vectors,
            "io": io,
            "overrides": overrides,
            "nonfinite": nonfinite,
            "nonfinite_limit": nonfinite_limit,
            "spike": spike,
            "state_dtype": state_dtype,
        },
    )


def check_clip(given: Mapping[str, Any], applies: Any, holder: str = "") -> None:
    """Check what is done to an update that is too large, where it is given.

    Args:
        given: what may have ``clip`` and ``vectors``, and other keys.
        applies: the clip that holds beside ``vectors``.
        holder: what says so, for sentences.

    Raises:
        ValueError: one of them is impossible, or there are vectors for nothing.
    """
    clip, vectors = given.get("clip", SCALE), given.get("vectors", 1)
    if clip not in (SCALE, PROJECT):
        raise ValueError(f"AdamW2: {holder}clip got {clip!r}, it takes '{SCALE}' or '{PROJECT}'.")
    if type(vectors) is not int or not 1 <= vectors <= MOST_VECTORS:
        raise ValueError(
            f"AdamW2: {holder}vectors got {vectors!r}, it takes a whole number from 1 to "
            f"{MOST_VECTORS}."
        )
    if "vectors" in given and applies != PROJECT:
        raise ValueError(
            f"AdamW2: {holder}vectors got {vectors!r} beside clip '{applies}', it takes clip "
            f"'{PROJECT}'."
        )


def clip_of(group: Mapping[str, Any], settings: Settings) -> tuple[str, int]:
    """Return the clip of a parameter group and its vectors, the optimizer's where it has none."""
    vectors = group.get("vectors", settings.vectors)
    return group.get("clip", settings.clip), VECTORS if vectors is None else vectors


def project_any(settings: Settings, groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether hidden matrices of a parameter group may have their singular values clipped."""
    return any(clip_of(group, settings)[0] == PROJECT for group in groups)


def check_harmless(given: Mapping[str, Any]) -> None:
    """Raise ValueError where a key of AdamW configurations has a value that changes something."""
    for key, value in given.items():
        taken = _HARMLESS.get(key)
        if taken is not None and not any(value is option for option in taken):
            raise ValueError(
                f"AdamW2: {key} got {value!r}, it takes {' or '.join(map(repr, taken))}."
            )


def check_adamw(
    lr: Any,
    betas: Any,
    eps: Any,
    weight_decay: Any,
    amsgrad: Any,
    maximize: Any,
    others: Mapping[str, Any],
) -> None:
    """Check torch.optim.AdamW's own hyperparameters, and its flags in ``others``.

    It leaves their types unchecked.

    Raises:
        ValueError: a sentence of ours, with torch's in brackets, where it has one: callers may look
            for that.
        RuntimeError: likewise, of ``foreach`` beside ``fused``.
    """
    foreach = others.get("foreach")
    if foreach and others.get("fused"):
        raise RuntimeError(
            "AdamW2: foreach got True beside fused=True, it takes one of them "
            "(torch.optim.AdamW: `fused` and `foreach` cannot be `True` together)."
        )
    for key, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        number = float(value) if key == "lr" and is_scalar(value) else value
        if not is_number(number) or not 0 <= number < float("inf"):
            raise _refusal(f"{key} got {value!r}, it takes a number from 0 on", **{key: value})
    pair = betas if isinstance(betas, Sequence) and len(betas) == 2 else ()
    numbers = list(map(float, pair)) if pair and all(map(is_scalar, pair)) else list(pair)
    if len(numbers) != 2 or not all(is_number(beta) and 0 <= beta < 1 for beta in numbers):
        raise _refusal(
            f"betas got {betas!r}, it takes two numbers from 0 up to, but without, 1", betas=betas
        )
    for key, value, first in (("lr", lr, lr), ("betas", betas, betas[0])):
        if foreach and isinstance(first, Tensor):
            sentence = f"foreach got {foreach!r}, where {key} is {value!r} it takes False"
            raise _refusal(sentence, foreach=True, **{key: value})
    for key, value in (("amsgrad", amsgrad), ("maximize", maximize)):
        if not isinstance(value, bool):
            raise ValueError(f"AdamW2: {key} got {value!r}, it takes True or False.")


def _refusal(sentence: str, **given: Any) -> ValueError:
    """Return the error that says ``sentence``, and what torch.optim.AdamW says of ``given``."""
    try:
        AdamW([torch.zeros(1)], **given)
    except ValueError as error:
        sentence += f" (torch.optim.AdamW: {error})"
    except Exception:
        pass  # of Python's operators, which say nothing of the argument
    return ValueError(f"AdamW2: {sentence}.")


def read_tau(key: str, tau: Any) -> float | str:
    """Return a positive number (infinity is AdamW) as it is, either spelling of "balanced" as that.

    Raises:
        ValueError: ``tau`` is neither.
    """
    if isinstance(tau, str) and tau in _SPELLINGS:
        return BALANCED
    if not is_number(tau) or isnan(tau) or tau <= 0:
        raise ValueError(
            f"AdamW2: {key} got {tau!r}, it takes a number above 0 (infinity is AdamW) or "
            "'balanced'."
        )
    number: float = tau
    return number


def _check_overrides(overrides: Any, clip: str) -> tuple[Mapping[str, Any], ...]:
    if isinstance(overrides, (str, Mapping)) or not isinstance(overrides, Sequence):
        raise ValueError(
            f"AdamW2: overrides got {overrides!r}, it takes a list of {{'match': pattern, …}}."
        )
    for override in overrides:
        has_match = isinstance(override, Mapping) and isinstance(override.get("match"), str)
        if not has_match or len(override) < 2:
            raise ValueError(
                f"AdamW2: overrides got {override!r}, it takes {{'match': pattern, 'tau': 0.1}} "
                "and the like."
            )
        for key, value in override.items():
            _check_override(key, value)
        check_clip(override, override.get("clip", clip), "overrides' ")
    return tuple(
        {key: read_tau(key, value) if key == "tau" else value for key, value in override.items()}
        for override in overrides
    )


def _check_override(key: Any, value: Any) -> None:
    if key not in _OVERRIDES:
        raise ValueError(
            f"AdamW2: overrides got the key {key!r}, it takes 'match', 'tau', 'exempt', 'fused', "
            "'kind', 'clip', 'vectors'."
        )
    if key == "tau":
        read_tau("overrides' tau", value)
    if key == "exempt" and not isinstance(value, bool):
        raise ValueError(f"AdamW2: overrides' exempt got {value!r}, it takes true or false.")
    if key == "fused" and not _is_split(value):
        raise ValueError(
            f"AdamW2: overrides' fused got {value!r}, it takes a number of parts or their sizes."
        )
    if key == "kind" and value not in _KINDS:
        raise ValueError(
            f"AdamW2: overrides' kind got {value!r}, it takes 'convolution' or 'experts'."
        )


def _is_split(value: Any) -> bool:
    sizes = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return len(sizes) > 0 and all(_is_size(size) for size in sizes)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_scalar(value: Any) -> bool:
    """True of a tensor of one element, as torch.optim.AdamW takes rate and betas."""
    return isinstance(value, Tensor) and value.numel() == 1


def is_number(value: Any) -> bool:
    """True of a real number that is no flag."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _are_strings(value: Any) -> bool:
    return isinstance(value, Sequence) and all(isinstance(item, str) for item in value)
