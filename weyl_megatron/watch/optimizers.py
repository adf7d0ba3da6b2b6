"""What a run's optimizers tell: the rate, ‖G‖ of W_q, W_k and W_v, and what AdamW² clipped."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..layouts.buffers import model_name
from ..optimizer import AdamW2, MatrixStats
from ..transformer.blocks import Block
from .gradients import Gradients, Wrapped
from .jumps import NewSpikes, Told

_LOGGER = logging.getLogger("weyl_megatron")

#: Of `MatrixStats`, what is told of every matrix, and beside it of a projected one.
_CLIP = ("lr", "sigma_weight", "sigma_update", "clipped", "update_norm")
_PROJECTED = ("directions", "share", "unseen")


class Optimizers:
    """The optimizers that step a model, out of their wrappers.

    Args:
        engine: DeepSpeed's, or None.
        optimizer: what steps the model, or None.
        chunks: the model.
        blocks: those to look at.
    """

    def __init__(
        self, engine: Any, optimizer: Any, chunks: Sequence[nn.Module], blocks: Sequence[Block]
    ) -> None:
        self._optimizer, self._blocks = optimizer, blocks
        self._gradients = Gradients(engine, chunks, blocks)
        self._new_spikes = NewSpikes()
        self._has_said = False  # that gradients are missing

    def arm(self) -> None:
        """Note the gradients of the next step. Collective."""
        wrapped = _wrapped(self._optimizer)
        for _, optimizer in wrapped:
            if isinstance(optimizer, AdamW2):
                optimizer.measure_gradients()
        self._gradients.arm(wrapped)

    def disarm(self) -> None:
        """Take every hook away again."""
        self._gradients.disarm()

    def taus(self) -> list[float | str]:
        """Return every τ that a parameter group asks for; JSON lacks ∞, so that it is "inf"."""
        wrapped = _wrapped(self._optimizer)
        groups = [group for _, optimizer in wrapped for group in optimizer.param_groups]
        taus = dict.fromkeys(group.get("tau", math.inf) for group in groups)
        return ["inf" if tau == math.inf else tau for tau in taus]

    def spikes(self) -> list[Told]:
        """Return this rank's spikes that were not returned yet."""
        return self._new_spikes.take([inner for _, inner in _wrapped(self._optimizer)])

    def values(self) -> dict[str, float]:
        """Return the scheduled rate, gradient norms, and what AdamW² did to every matrix.

        Collective.
        """
        values = self._gradients.norms()
        stats: dict[str, MatrixStats] = {}
        for _, optimizer in _wrapped(self._optimizer):
            if optimizer.param_groups:
                values["lr"] = float(optimizer.param_groups[0]["lr"])
            if isinstance(optimizer, AdamW2):
                stats |= optimizer.stats()
                norms = optimizer.gradient_norms()
                for block in self._blocks:
                    for role in ("q", "k", "v"):
                        name = _matrix_name(block, role, norms)
                        if name is not None:
                            values[f"block/{block.number}/grad_{role}"] = norms[name]
        self._say_what_is_missing(values)
        shares: dict[str, list[bool]] = {}
        for name, entry in stats.items():
            for key in _CLIP if entry.directions is None else (*_CLIP, *_PROJECTED):
                values[f"clip/{name}/{key}"] = float(getattr(entry, key))
            if entry.update_ratio is not None:
                values[f"clip/{name}/update_ratio"] = entry.update_ratio
            kind, number = _place(name)
            shares.setdefault(f"clip_share/{kind}", []).append(entry.clipped)
            if number is not None:
                shares.setdefault(f"clip_share_block/{number}", []).append(entry.clipped)
        return values | {tag: sum(clipped) / len(clipped) for tag, clipped in shares.items()}

    def _say_what_is_missing(self, values: Mapping[str, float]) -> None:
        missing = {
            tag: reason for tag, reason in self._gradients.missing.items() if tag not in values
        }
        if missing and not self._has_said:
            self._has_said = True
            first, *others = missing
            sentence = "watch: %s and %d more are not measured: %s"
            _LOGGER.warning(sentence, first, len(others), missing[first])


def _wrapped(optimizer: Any) -> list[Wrapped]:
    """Return the optimizers inside an engine's wrappers, each with its wrapper."""
    wrappers = getattr(optimizer, "chained_optimizers", [optimizer])
    pairs = ((wrapper, _unwrapped(wrapper)) for wrapper in wrappers)
    return [pair for pair in pairs if isinstance(pair[1], torch.optim.Optimizer)]


def _unwrapped(optimizer: Any) -> Any:
    """Return the innermost optimizer: Accelerate's wrapper is one of torch's, too, by its class."""
    inner = getattr(optimizer, "optimizer", None)
    while inner is not None:
        if isinstance(optimizer, torch.optim.Optimizer) > isinstance(inner, torch.optim.Optimizer):
            break
        optimizer, inner = inner, getattr(inner, "optimizer", None)
    return optimizer


def _place(matrix: str) -> tuple[str, int | None]:
    """Return a matrix's kind, and the number of the block it is in."""
    inside = re.match(r"(?:.*?\.)?(\d+)\.(.+)", matrix)
    kind = inside[2] if inside else matrix
    return kind.replace(".weight", ""), int(inside[1]) if inside else None


def _matrix_name(block: Block, role: str, known: Mapping[str, float]) -> str | None:
    """Return the optimizer's name for W_q, W_k or W_v of a block."""
    weight = block.weights.get(role)
    if weight is None:
        return None
    modules = block.module.named_modules()
    path = next((path for path, module in modules if module is weight.owner), "")
    prefix = block.name
    if hasattr(block.attention, "linear_qkv"):
        prefix = re.sub(r"\d+$", str(block.number), prefix)
    whole = ".".join(part for part in (prefix, path, weight.attribute) if part)
    short = model_name(whole)  # not the optimizer's where it would be another weight's, too
    names = [f"{short}[{role}]", f"{whole}[{role}]"]
    if not weight.is_part:  # else these are norms of all that the parameter stacks
        names = [names[0], short, names[1], whole]
    return next((name for name in names if name in known), None)
