"""Watch a training run: measure its blocks every so many steps.

Under plain torch, FSDP2, DeepSpeed and Megatron.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..layouts.local import is_on_mesh
from ..transformer.blocks import Block, find_blocks
from .attention import classify_numbers
from .bands import heads_of_model
from .capture import Capture, Map
from .jumps import Told, together
from .optimizers import Optimizers
from .ranks import MEAN, NORM, ONCE, Ranks, Reading, gather, joined
from .sinks import Alerting, JsonLines, Sink, engine_sinks
from .warning import Warnings

_LOGGER = logging.getLogger("weyl_megatron")


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
        ValueError: the model's attention is not recognised, torch spreads the model over a part of
            the ranks, or a setting is impossible. The first forward pass raises it where a block is
            spread in a way that no head's weights are on one rank.

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
                group=ranks.tensor_group,
            )
            for chunk, chunk_blocks in zip(self._chunks, chunks_blocks, strict=True)
        ]
        self._blocks = [block for capture in self._captures for block in capture.blocks]
        self._optimizers = Optimizers(engine, self._optimizer, self._chunks, self._blocks)
        self._reads_once = ranks.data_rank == 0
        self._sinks = [*sinks, *engine_sinks(engine)] if self._is_writer else []
        self._lines: JsonLines | None = None
        if out is not None and self._is_writer:
            self._lines = self._open(out, run, chunks_blocks, largest)
        self._warnings = Warnings()
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
        self._optimizers.disarm()
        if self._is_writer:  # closing is not collective
            self._write_spikes(self._optimizers.spikes())
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
        self._optimizers.arm()

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
            value = float(_whole(loss.detach()) if isinstance(loss, Tensor) else loss)
            readings["loss"] = Reading(value, MEAN)
        for tag, number in {**more, **self._optimizers.values()}.items():
            readings[tag] = Reading(float(number), ONCE)
        if not self._reads_once:
            readings = {tag: reading for tag, reading in readings.items() if reading.kind != ONCE}
        ranks = gather((readings, maps, self._optimizers.spikes()))
        if ranks is None:
            return {}
        self.values = joined([rank_readings for rank_readings, *_ in ranks])
        self._classify()
        self._write([kept for _, rank_maps, _ in ranks for kept in rank_maps])
        self._write_spikes(together([spikes for *_, spikes in ranks]))
        return self.values

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
            if self._lines is not None:
                self._lines.write_warning(self._step, block, head, text)
            _LOGGER.warning("step %d: %s", self._step, text)
        if warnings:  # one alert, however many heads
            texts = [text for _, _, text in warnings]
            self._alert(self._step, "Attention narrows", "\n".join(texts))

    def _write_spikes(self, spikes: Sequence[Told]) -> None:
        """Write what jumped since the last measurement, which the optimizer has logged."""
        for told in spikes:
            if self._lines is not None:
                self._lines.write_spike(told.record())
            self._alert(told.step, "Norms jump", told.sentence())

    def _alert(self, step: int, title: str, text: str) -> None:
        """Alert whoever the sinks can reach; on the rank that writes.

        Args:
            step: that it is of.
            title: what it is about, the same for all alerts of a kind.
            text: a line for each thing.
        """
        for sink in self._sinks:
            if isinstance(sink, Alerting):
                sink.alert(step, title, text)

    def _open(
        self, out: Path | str, run: str, chunks_blocks: Sequence[Sequence[Block]], largest: int
    ) -> JsonLines:
        blocks = [block for chunk_blocks in chunks_blocks for block in chunk_blocks]
        is_spread = any(capture.group is not None for capture in self._captures)
        # Those of other pipeline stages are known by their numbers in the tags.
        names = [block.name for block in blocks]
        header = {
            "run": run or Path(out).name,
            "blocks": names,
            "heads": heads_of_model(blocks[0], is_spread=is_spread),
            "sec": largest,
            "interval": self._every,
            "tau": self._optimizers.taus(),
        }
        return JsonLines(out, header)


def _whole(loss: Any) -> Any:
    """Return the loss that all ranks have, where tensor parallelism leaves it to them together."""
    return loss.full_tensor() if is_on_mesh(loss) else loss


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
