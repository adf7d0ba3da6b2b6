"""Where measurements go: JSON lines (for ``weyl-megatron report``), CSV, TensorBoard, and the run
that Weights & Biases, Trackio, Comet or MLflow has.

Or an engine's own writer. Numbers that are not finite are written as they are; a run that the user
opened is for the user to end.
"""

from __future__ import annotations

import csv
import json
import math
import re
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from .capture import Map

#: Characters that W&B takes of an alert's title.
_WANDB_TITLE = 63


class Sink(Protocol):
    """Gets every measurement, on the rank that writes."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of a step, by tag."""

    def close(self) -> None:
        """Flush; nothing is written afterwards."""


@runtime_checkable
class Alerting(Protocol):
    """A sink that can also reach a person; a sink without the method is not asked."""

    def alert(self, step: int, title: str, text: str) -> None:
        """Send an alert of a step; ``text`` has a line for each thing that it is about."""


class JsonLines:
    """``FOLDER/stability.jsonl``, one object a line; a resumed run goes on in the same file.

    Beside the numbers it holds attention maps and warnings, as docs/watch.md says.
    """

    def __init__(self, folder: Path | str, header: Mapping[str, Any]) -> None:
        self.path = Path(folder) / "stability.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")
        if self._file.tell() and not self._ends_a_line():
            self._file.write("\n")  # the run before was cut off inside a line
        self._put({"event": "start", "version": 1, **header})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        short = {tag: _short(value) for tag, value in values.items()}
        self._put({"event": "step", "step": step, "values": short})

    def write_map(self, step: int, kept: Map) -> None:
        levels = (kept.attention.float().clamp(0, 1).sqrt() * 255).round().to(torch.uint8)
        rows, cols = levels.shape
        self._put(
            {
                "event": "map",
                "step": step,
                "block": kept.block,
                "head": kept.head,
                "rows": rows,
                "cols": cols,
                "queries": kept.queries,
                "levels": levels.numpy().tobytes().hex(),
            }
        )

    def write_spike(self, record: Mapping[str, Any]) -> None:
        self._put(record)

    def write_warning(self, step: int, block: int, head: int, text: str) -> None:
        self._put({"event": "warning", "step": step, "block": block, "head": head, "text": text})

    def close(self) -> None:
        self._file.close()

    def _ends_a_line(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, 2)
            return file.read(1) == b"\n"

    def _put(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()


class Csv:
    """A file of ``step,tag,value`` rows: steps need not have the same tags."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", newline="", encoding="utf-8")
        self._rows = csv.writer(self._file)
        if not self._file.tell():
            self._rows.writerow(["step", "tag", "value"])

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._rows.writerows([step, tag, value] for tag, value in values.items())
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """A TensorBoard writer: a log folder, or the writer that a run has (Megatron's, your own)."""

    def __init__(self, writer: Any) -> None:
        self._is_own = isinstance(writer, (str, Path))
        if self._is_own:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                sentence = "watch: TensorBoard is not installed; pip install tensorboard."
                raise ValueError(sentence) from error
            writer = SummaryWriter(str(writer))
        self._writer = writer

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def close(self) -> None:
        if self._is_own:
            self._writer.close()


class WandB:
    """A run of Weights & Biases: what ``wandb.init`` returned, or the module."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def alert(self, step: int, title: str, text: str) -> None:
        # W&B drops alerts of a title that it sent in the last minute, and takes 0 for that minute.
        shortest = timedelta(milliseconds=1)
        text = f"step {step}: {text}"
        self._run.alert(title[:_WANDB_TITLE], text, level="WARN", wait_duration=shortest)

    def close(self) -> None: ...


class Trackio:
    """A run of Trackio: what ``trackio.init`` returned."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def alert(self, step: int, title: str, text: str) -> None:
        self._run.alert(title, text, step=step)

    def close(self) -> None: ...


class Comet:
    """An experiment of Comet, online or offline: what ``comet_ml.start`` returned.

    An alert is kept among the experiment's texts; Comet mails it, too, where the experiment is
    online and notifications are on.
    """

    def __init__(self, experiment: Any) -> None:
        self._experiment = experiment

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._experiment.log_metrics(dict(values), step=step)

    def alert(self, step: int, title: str, text: str) -> None:
        self._experiment.log_text(text, step=step, metadata={"alert": title})
        self._experiment.send_notification(title, "warning", {"step": step, "text": text})

    def close(self) -> None: ...


class MLflow:
    """A run of MLflow, which has no alerts: what ``mlflow.start_run`` returned, or a run's id.

    MLflow takes no brackets in names: ``clip/….weight[q]/lr`` is ``clip/….weight.q/lr`` there.

    Args:
        run: the run.
        client: an ``MlflowClient``; None: one of the tracking server that is set.

    Raises:
        ValueError: MLflow is not installed.
    """

    def __init__(self, run: Any, client: Any = None) -> None:
        try:
            from mlflow import MlflowClient
        except ImportError as error:
            sentence = "watch: MLflow is not installed; pip install mlflow."
            raise ValueError(sentence) from error
        self._client = MlflowClient() if client is None else client
        self._run: str = run if isinstance(run, str) else run.info.run_id

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(_in_mlflow(tag), value, now, step) for tag, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self) -> None: ...


class DeepSpeedMonitor:
    """The monitor of a DeepSpeed engine: TensorBoard, W&B, Comet or CSV, as its JSON says.

    Alerts go to W&B and Comet.
    """

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._monitor.write_events([(tag, value, step) for tag, value in values.items()])

    def alert(self, step: int, title: str, text: str) -> None:
        if getattr(self._monitor, "wandb_monitor", None) is not None:
            import wandb  # which DeepSpeed has initialised

            WandB(wandb).alert(step, title, text)
        experiment = getattr(getattr(self._monitor, "comet_monitor", None), "experiment", None)
        if experiment is not None:
            Comet(experiment).alert(step, title, text)

    def close(self) -> None: ...


def engine_sinks(engine: Any) -> list[Sink]:
    """Return the writers that an engine already has.

    The engine is DeepSpeed's, or Megatron's training loop in this process.
    """
    monitor = getattr(engine, "monitor", None)
    if monitor is not None and getattr(monitor, "enabled", False):
        return [DeepSpeedMonitor(monitor)]
    try:
        from megatron.training import get_tensorboard_writer, get_wandb_writer
    except ImportError:  # megatron-core alone has no training loop
        return []
    try:
        tensorboard, wandb = get_tensorboard_writer(), get_wandb_writer()
    except AssertionError:  # its globals are not set up
        return []
    sinks: list[Sink] = []
    if tensorboard is not None:
        sinks.append(TensorBoard(tensorboard))
    if wandb is not None:
        sinks.append(WandB(wandb))
    return sinks


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _in_mlflow(tag: str) -> str:
    return re.sub(r"[^\w\-./: ]", "_", re.sub(r"\[(\w+)\]", r".\1", tag))
