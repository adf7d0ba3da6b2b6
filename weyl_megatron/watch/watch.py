"""Watch a training run: measure its blocks every so many steps.

Under plain torch, FSDP2, DeepSpeed and Megatron.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..layouts.buffers import model_name
from ..layouts.local import is_on_mesh
from ..optimizer import AdamW2, MatrixStats
from ..transformer.blocks import Block, find_blocks
from .attention import classify_numbers
from .capture import Capture, Map
from .ranks import MEAN, NORM, ONCE, Ranks, Reading, gather, joined, refuse_bands
from .sinks import JsonLines, Sink, engine_sinks
from .warning import Warnings

_LOGGER = logging.getLogger("weyl_megatron")

#: Of `MatrixStats`, what is told of every matrix, and beside it of a projected one.
_CLIP = ("lr", "sigma_weight", "sigma_update", "clipped")
_PROJECTED = ("directions", "share", "unseen")


class Watch:
    """Measures a model's blocks every ``every`` steps.

    The tags and what they mean are in docs/watch.md.

    Between measurements nothing is hooked and nothing costs. Collective: make it, and call
    :meth:`step`, on every rank.

    Args:
        model: a module, a DeepSpeed engine, or Megatron's list of chunks.
        optimizer: what steps it, for α, clips and gradient norms; a DeepSpeed engine brings its
            own.
        every: steps between measurements; the first step is measured, too.
        out: a folder for ``stability.jsonl``, which ``weyl-megatron report`` reads; None: none is
            written.
        sinks: further writers, beside those that the engine has (DeepSpeed's monitor, Megatron's
            writers).
        run: what the report calls the run.
        blocks: the numbers of the blocks to look at; None: all.
        rows, sequences: queries of each sequence, and sequences of a rank's micro-batch, that
            attention is formed for.
        largest: s of SEC(d_q, s).
        maps: heads whose attention map is kept, of every block.
        steps_done: steps before the next one, of a run that goes on; None: what a DeepSpeed engine
            counts, or 0.
        names: for a model that is not recognised, see
            :func:`weyl_megatron.transformer.blocks.find_blocks`.

    Raises:
        ValueError: the model's attention is not recognised, torch's tensor parallelism spreads it,
            or a setting is impossible.

    Example::

        watch = Watch(engine, every=100, out="runs/adamw2")
        for batch in loader:
            loss = engine(batch)
            engine.backward(loss)
            engine.step()
            watch.step(loss)
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any = None,
        *,
        every: int = 100,
        out: Path | str | None = None,
        sinks: Sequence[Sink] = (),
        run: str = "",
        blocks: Sequence[int] | None = None,
        rows: int = 64,
        sequences: int = 8,
        largest: int = 4,
        maps: Sequence[int] = (),
        names: Mapping[str, Any] | None = None,
        steps_done: int | None = None,
    ) -> None:
        counts = {"every": every, "rows": rows, "sequences": sequences, "largest": largest}
        for key, value in counts.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"watch: {key} got {value!r}, it takes a whole number from 1 on.")
        engine = model if hasattr(model, "basic_optimizer") else None
        self._engine = engine
        self._optimizer = optimizer
        if optimizer is None:
            self._optimizer = getattr(engine, "basic_optimizer", None)
        self._chunks: list[nn.Module] = [engine.module] if engine is not None else _chunks(model)
        self._every = every
        refuse_bands(self._chunks)
        counted = int(getattr(engine, "global_steps", 0))
        self._step = counted if steps_done is None else steps_done
        self._before = self._step - counted  # steps that the engine does not count
        self._is_first = True
        ranks = Ranks(engine, self._chunks)
        self._data_parallel = ranks.data_parallel
        self._is_writer = ranks.is_writer
        chunks_blocks = _blocks_of(self._chunks, names)
        self._captures = [
            Capture(
                chunk,
                [block for block in chunk_blocks if blocks is None or block.number in blocks],
                rows=rows,
                sequences=sequences,
                largest=largest,
                maps=maps,
                is_first=ranks.tensor_rank == 0,
                sequence_parallel=ranks.sequence_parallel,
            )
            for chunk, chunk_blocks in zip(self._chunks, chunks_blocks, strict=True)
        ]
        self._blocks = [block for capture in self._captures for block in capture.blocks]
        self._reads_once = ranks.data_rank == 0
        self._sinks = [*sinks, *engine_sinks(engine)] if self._is_writer else []
        self._lines: JsonLines | None = None
        if out is not None and self._is_writer:
            self._lines = self._open(out, run, chunks_blocks, largest)
        self._warnings = Warnings()
        self._grads: dict[str, float] = {}
        self._hook: Any = None
        self.values: dict[str, float] = {}  #: the last measurement by tag, on rank 0
        if self._is_due():
            self._arm()

    def step(self, loss: Tensor | float | None = None, **more: float) -> Mapping[str, float]:
        """Say that the optimizer has made a step; measure where a measurement is due.

        With a DeepSpeed engine it may be called after every micro-batch: calls between steps do
        nothing.

        Args:
            loss: of the step; the mean over data-parallel ranks is written.
            more: further numbers to write, like ``sharpness=…``.

        Returns:
            The measurement of this step by tag, on rank 0; empty where there is none.
        """
        if self._engine is not None and int(self._engine.global_steps) + self._before <= self._step:
            return {}  # engine.step() ended a micro-batch, and no step
        was_due = self._is_due()
        self._step += 1
        self._is_first = False
        measured: dict[str, float] = {}
        if was_due:
            measured = self._finish(loss, more)
        if self._is_due():
            self._arm()
        return measured

    def close(self) -> None:
        """Take all hooks away and close what this object opened."""
        for capture in self._captures:
            capture.disarm()
        if self._hook is not None:
            self._hook.remove()
        for sink in self._sinks:
            sink.close()
        if self._lines is not None:
            self._lines.close()

    def _is_due(self) -> bool:
        """Whether the step that comes next is measured."""
        return self._is_first or (self._step + 1) % self._every == 0

    def _arm(self) -> None:
        for capture in self._captures:
            capture.arm()
        self._grads = {}
        has_whole_gradients = self._engine is None and not hasattr(
            self._optimizer, "chained_optimizers"
        )
        for optimizer in _plain_optimizers(self._optimizer):
            if isinstance(optimizer, AdamW2):
                optimizer.measure_gradients()
            elif has_whole_gradients and self._hook is None:
                self._hook = optimizer.register_step_pre_hook(lambda *_: self._read_gradients())

    def _read_gradients(self) -> None:
        """Norms of the gradients of W_q, W_k and W_v, which plain torch has whole, FSDP2 not."""
        if not self._is_due():
            return
        for block in self._blocks:
            for role in ("q", "k", "v"):
                weight = block.weights.get(role)
                gradient = None if weight is None else getattr(weight.owner, weight.attribute).grad
                if weight is not None and gradient is not None and not is_on_mesh(gradient):
                    norm = float(weight.cut(gradient.float()).norm())
                    self._grads[f"block/{block.number}/grad_{role}"] = norm

    def _finish(self, loss: Tensor | float | None, more: Mapping[str, float]) -> dict[str, float]:
        readings: dict[str, Reading] = {}
        maps: list[Map] = []
        for capture in self._captures:
            capture.disarm()
            readings |= capture.readings
            maps += capture.attention_maps if self._reads_once else []
        # The global loss is the mean of the ranks'.
        scale = 1 / (self._loss_scale() * self._data_parallel)
        for tag, reading in readings.items():
            if tag.endswith("/grad_x"):
                readings[tag] = Reading(reading.value * scale, NORM)
        if loss is not None:
            value = float(loss.detach() if isinstance(loss, Tensor) else loss)
            readings["loss"] = Reading(value, MEAN)
        for tag, number in {**more, **self._of_optimizer()}.items():
            readings[tag] = Reading(float(number), ONCE)
        if not self._reads_once:
            readings = {tag: reading for tag, reading in readings.items() if reading.kind != ONCE}
        ranks = gather((readings, maps))
        if ranks is None:
            return {}
        self.values = joined([rank_readings for rank_readings, _ in ranks])
        self._classify()
        self._write([kept for _, rank_maps in ranks for kept in rank_maps])
        return self.values

    def _of_optimizer(self) -> dict[str, float]:
        """Return the scheduled rate, gradient norms, and what AdamW² did to every matrix."""
        values = dict(self._grads)
        stats: dict[str, MatrixStats] = {}
        for optimizer in _plain_optimizers(self._optimizer):
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
        shares: dict[str, list[bool]] = {}
        for name, entry in stats.items():
            for key in _CLIP if entry.directions is None else (*_CLIP, *_PROJECTED):
                values[f"clip/{name}/{key}"] = float(getattr(entry, key))
            kind, number = _place(name)
            shares.setdefault(f"clip_share/{kind}", []).append(entry.clipped)
            if number is not None:
                shares.setdefault(f"clip_share_block/{number}", []).append(entry.clipped)
        return values | {tag: sum(clipped) / len(clipped) for tag, clipped in shares.items()}

    def _loss_scale(self) -> float:
        wrapper = self._optimizer
        if self._engine is not None:
            wrapper = getattr(self._engine, "optimizer", None)
        scale = getattr(wrapper, "get_loss_scale", None)
        if callable(scale):
            return float(scale())
        value = getattr(wrapper, "loss_scale", 1.0)
        return float(value) if isinstance(value, (int, float)) and value > 0 else 1.0

    def _classify(self) -> None:
        """Name the mode of every head from the means over the global batch."""
        uniform = self.values.get("uniform_entropy")
        if not uniform:
            return
        for tag, value in list(self.values.items()):
            if tag.endswith("/map_rank"):
                head = tag.removesuffix("/map_rank")
                relative = self.values[f"{head}/entropy"] / uniform
                mode = classify_numbers(relative, value, int(self.values["map_rows"]))
                self.values[f"{head}/mode"] = float(mode)

    def _write(self, maps: Sequence[Map]) -> None:
        for sink in self._sinks:
            sink.write(self._step, self.values)
        warnings = self._warnings.look(self.values)
        if self._lines is not None:
            self._lines.write(self._step, self.values)
            for kept in maps:
                self._lines.write_map(self._step, kept)
        for block, head, text in warnings:
            _LOGGER.warning("step %d: %s", self._step, text)
            if self._lines is not None:
                self._lines.write_warning(self._step, block, head, text)

    def _open(
        self, out: Path | str, run: str, chunks_blocks: Sequence[Sequence[Block]], largest: int
    ) -> JsonLines:
        blocks = [block for chunk_blocks in chunks_blocks for block in chunk_blocks]
        group = blocks[0].group
        heads = blocks[0].heads * (1 if group is None else dist.get_world_size(group))
        # Those of other pipeline stages are known by their numbers in the tags.
        names = [block.name for block in blocks]
        header = {
            "run": run or Path(out).name,
            "blocks": names,
            "heads": heads,
            "sec": largest,
            "interval": self._every,
            "tau": _taus(self._optimizer),
        }
        return JsonLines(out, header)


def _chunks(model: Any) -> list[nn.Module]:
    chunks = list(model) if isinstance(model, (list, tuple)) else [model]
    if not chunks or not all(isinstance(chunk, nn.Module) for chunk in chunks):
        raise ValueError(
            f"watch: model got {type(model).__name__}, it takes a module, an engine or a list of "
            "chunks."
        )
    return chunks


def _blocks_of(chunks: Sequence[nn.Module], names: Mapping[str, Any] | None) -> list[list[Block]]:
    """Return the blocks of every chunk.

    Of several chunks, the first and the last may hold nothing but embeddings.
    """
    blocks: list[list[Block]] = []
    unrecognised: ValueError | None = None
    for chunk in chunks:
        try:
            blocks.append(find_blocks(chunk, names))
        except ValueError as error:
            if names is not None:
                raise
            unrecognised = unrecognised or error
            blocks.append([])
    if unrecognised is not None and not any(blocks):
        raise unrecognised
    return blocks


def _plain_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """Return the optimizers inside an engine's wrappers."""
    wrapped = getattr(optimizer, "chained_optimizers", [optimizer])
    unwrapped = (_unwrapped(inner) for inner in wrapped)
    return [inner for inner in unwrapped if isinstance(inner, torch.optim.Optimizer)]


def _taus(optimizer: Any) -> list[float | str]:
    """Return every τ that a parameter group asks for; JSON lacks ∞, so that it is "inf"."""
    groups = [group for each in _plain_optimizers(optimizer) for group in each.param_groups]
    taus = dict.fromkeys(group.get("tau", math.inf) for group in groups)
    return ["inf" if tau == math.inf else tau for tau in taus]


def _unwrapped(optimizer: Any) -> Any:
    while not isinstance(optimizer, torch.optim.Optimizer):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            break
        optimizer = inner
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
    names = (f"{short}[{role}]", short, f"{whole}[{role}]", whole)
    return next((name for name in names if name in known), None)
