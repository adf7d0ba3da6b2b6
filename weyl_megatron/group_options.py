"""What a parameter group has of its own, beside what ``torch.optim.AdamW`` keeps in it."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from .settings import (
    PROJECT,
    Settings,
    check_clip,
    check_harmless,
    clip_of,
    is_number,
    is_scalar,
    read_tau,
)


def options_of(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what every parameter group has of its own of ``tau``, ``clip`` and ``vectors``."""
    keys = "tau", "clip", "vectors"
    return [{key: group[key] for key in keys if key in group} for group in groups]


def restore_options(
    groups: Sequence[MutableMapping[str, Any]],
    options: Sequence[Mapping[str, Any]],
    saved: Sequence[Mapping[str, Any]],
) -> None:
    """Give every parameter group, as it was loaded, its own ``clip`` and ``vectors``, as those of a
    checkpoint are of another run, and τ where the checkpoint, of an AdamW, has none.

    Args:
        groups: the optimizer's.
        options: what :func:`options_of` returned of them before.
        saved: the groups of the state dict.
    """
    for group, own, loaded in zip(groups, options, saved, strict=True):
        group.pop("clip", None)
        group.pop("vectors", None)
        group.update(own)
        group["tau"] = read_tau("a parameter group's tau", loaded.get("tau", own["tau"]))
        group.update({"foreach": None, "fused": None, "capturable": False})


def read_group(group: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Return a parameter group that is added, with the options that it has of its own checked.

    Raises:
        ValueError: one of them is impossible, or is the optimizer's alone.
    """
    # torch's ZeroRedundancyOptimizer repeats in its groups what the optimizer has.
    given = settings.given.items()
    if shared := [key for key, value in given if key in group and group[key] != value]:
        raise ValueError(
            f"AdamW2: a parameter group got {shared[0]} {group[shared[0]]!r}, which the optimizer "
            "takes for all of them; a group takes lr, betas, eps, weight_decay, amsgrad, maximize, "
            "tau, clip, vectors."
        )
    holder, (clip, _) = "a parameter group's ", clip_of(group, settings)
    check_clip(group, clip, holder)
    check_harmless(group)
    return {**group, "tau": read_tau(f"{holder}tau", group.get("tau", settings.tau))}


def check_group(group: Mapping[str, Any]) -> None:
    """Check what may have become of a parameter group since it was made.

    Raises:
        ValueError: a hyperparameter is no number, or a flag asks for what is not done.
    """
    check_harmless(group)
    numbers = {key: (group[key],) for key in ("lr", "eps", "weight_decay")}
    for key, values in {"betas": group["betas"], **numbers}.items():
        if not all(is_number(value) or is_scalar(value) for value in values):
            raise ValueError(
                f"AdamW2: a parameter group's {key} got {group[key]!r}, it takes numbers."
            )
    check_clip(group, PROJECT, "a parameter group's ")
