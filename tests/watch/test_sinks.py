"""What a run writes, as each library has it afterwards, and the table of all tags."""

from __future__ import annotations

import json
import logging
import math
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.logged import Lines
from tests.processes import run_ranks
from tests.watch.plain_adamw import loss_of, separate, stacked
from weyl_megatron import AdamW2
from weyl_megatron.watch.sinks import Comet, Csv, MLflow, Sink, TensorBoard, Trackio, WandB
from weyl_megatron.watch.watch import Watch

wandb = pytest.importorskip("wandb")
EventAccumulator = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator"
).EventAccumulator

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
Steps = list[dict[str, float]]


def narrowing(sinks: list[Sink], **options: Any) -> Steps:
    """Two measurements; in between attention of the first two blocks becomes sparse."""
    model = separate()
    optimizer = torch.optim.AdamW(model.parameters())
    watch = Watch(model, optimizer, every=1, sinks=sinks, steps_done=6, **options)
    steps = []
    for number in range(2):
        tokens = torch.randint(50, (4, 17), generator=torch.Generator().manual_seed(number))
        loss = loss_of(model, tokens)
        loss.backward()
        optimizer.step()
        steps.append(dict(watch.step(loss, sharpness=math.nan, headroom=math.inf)))
        with torch.no_grad():
            for block in model.blocks[:2]:
                block.attn.q.weight.mul_(1000)
    watch.close()
    return steps


class Written:
    """A run that wrote everywhere."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
            # Read at import; Comet else patches libraries for the tests that come after.
            patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
            patch.setenv("COMET_DISABLE_AUTO_LOGGING", "1")
            import comet_ml
            import mlflow
            import trackio
            from trackio.sqlite_storage import SQLiteStorage

            mlflow.set_tracking_uri(f"file://{folder}/mlflow")
            self.wandb = wandb.init(mode="offline", settings=wandb.Settings(silent=True))
            self.trackio = trackio.init(project="runs", name="narrow", auto_log_cpu=False)
            config = comet_ml.ExperimentConfig(
                offline_directory=str(folder / "comet"),
                log_code=False,
                log_git_metadata=False,
                log_env_details=False,
                auto_output_logging=False,
            )
            self.comet = comet_ml.start(online=False, project="runs", experiment_config=config)
            self.mlflow = mlflow.MlflowClient()
            self.mlflow_run = self.mlflow.create_run("0").info.run_id
            sinks = [
                Csv(folder / "a" / "numbers.csv"),
                TensorBoard(folder / "tensorboard"),
                WandB(self.wandb),
                Trackio(self.trackio),
                Comet(self.comet),
                MLflow(self.mlflow_run),
            ]
            logger, handler = logging.getLogger("weyl_megatron"), Lines()
            said = handler.texts
            logger.addHandler(handler)
            self.steps = narrowing(sinks, out=folder / "run", maps=[0], run="first")
            logger.removeHandler(handler)
            self.said: list[str] = said
            # A user's run is the user's to end.
            self.were_open = [
                not self.wandb._is_finished,
                self.comet.alive,
                self.mlflow.get_run(self.mlflow_run).info.status == "RUNNING",
            ]
            self.wandb.log({}, step=9)  # W&B has a step when the next begins
            self.summary = dict(self.wandb.summary)
            self.wandb_file = next(Path(self.wandb.dir).parent.glob("*.wandb"))
            self.wandb.finish()
            self.trackio.finish()
            self.comet.end()
            self.trackio_rows = SQLiteStorage.get_logs("runs", "narrow")
            self.trackio_alerts = SQLiteStorage.get_alerts("runs", "narrow")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp("sinks"))


def same(value: float, expected: float) -> bool:
    return value == expected or (math.isnan(value) and math.isnan(expected))


def check(written: dict[str, float], expected: dict[str, float]) -> None:
    """Every number under its tag, those that are not finite too, and nothing else."""
    assert written.keys() == expected.keys()
    assert [tag for tag in expected if not same(written[tag], expected[tag])] == []


def test_the_run_has_what_is_hard_to_write(run: Written) -> None:
    first, second = run.steps
    assert math.isnan(first["sharpness"]) and first["headroom"] == math.inf
    assert len(first) > 100 and second.keys() == first.keys()


def test_csv_has_a_row_for_every_number(run: Written) -> None:
    header, *rows = (run.folder / "a" / "numbers.csv").read_text().splitlines()
    assert header == "step,tag,value" and len(rows) == 2 * len(run.steps[0])
    for number, expected in enumerate(run.steps):
        fields = [row.split(",") for row in rows if row.startswith(f"{7 + number},")]
        check({tag: float(value) for _, tag, value in fields}, expected)


def test_tensorboard_has_every_number(run: Written) -> None:
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == set(run.steps[0])
    for tag, value in run.steps[1].items():
        _, last = events.Scalars(tag)
        # It keeps float32.
        assert last.step == 8 and last.value == pytest.approx(value, rel=1e-6, nan_ok=True)


def test_wandb_has_every_number_of_the_last_step(run: Written) -> None:
    assert run.summary["_step"] == 8
    written = {tag: float(run.summary[tag]) for tag in run.steps[1]}
    check(written, run.steps[1])


def test_trackio_has_every_number_at_its_step(run: Written) -> None:
    for number, (row, expected) in enumerate(zip(run.trackio_rows, run.steps, strict=True)):
        assert row.pop("step") == 7 + number and row.pop("timestamp")
        check(row, expected)


def comet_messages(run: Written) -> tuple[list[dict[str, Any]], list[str]]:
    """The messages of the offline archive, and its texts."""
    (archive,) = (run.folder / "comet").glob("*.zip")
    with zipfile.ZipFile(archive) as zipped:
        lines = zipped.read("messages.json").decode().splitlines()
        messages = [json.loads(line) for line in lines]
        texts = [m["payload"] for m in messages if m["payload"].get("file_path")]
        return messages, [zipped.read(Path(t["file_path"]).name).decode() for t in texts]


def test_comet_has_every_number_at_its_step(run: Written) -> None:
    messages, _ = comet_messages(run)
    metrics = [m["payload"]["metric"] for m in messages if m["type"] == "metric_msg"]
    for number, expected in enumerate(run.steps):
        of_step = (m for m in metrics if m["step"] == 7 + number)
        written = {m["metricName"]: float(m["metricValue"]) for m in of_step}
        check({tag: written[tag] for tag in expected}, expected)


def test_mlflow_has_every_number_at_its_step(run: Written) -> None:
    for tag in run.steps[0]:
        history = run.mlflow.get_metric_history(run.mlflow_run, tag)
        assert [metric.step for metric in history] == [7, 8]
        for metric, expected in zip(history, run.steps, strict=True):
            assert same(metric.value, expected[tag]), tag


def test_mlflow_takes_names_with_brackets_and_thousands_of_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = mlflow.MlflowClient(f"file://{tmp_path}")
    created = client.create_run(client.create_experiment("runs"))
    sink = MLflow(created, client)
    numbers = {f"block/{number}/x": float(number) for number in range(1200)}
    sink.write(3, {"clip/h.0.c_attn.weight[q]/lr": 0.5, "clip/a#b/lr": 0.25, **numbers})
    sink.close()
    written = client.get_run(created.info.run_id).data.metrics
    assert len(written) == 1202 and written["block/1199/x"] == 1199
    assert written["clip/h.0.c_attn.weight.q/lr"] == 0.5 and written["clip/a_b/lr"] == 0.25


def lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines():
        yield json.loads(line)


def test_the_report_s_file_has_every_number_maps_and_warnings(run: Written) -> None:
    start, *events = lines(run.folder / "run" / "stability.jsonl")
    assert start["run"] == "first" and start["heads"] == 2
    assert start["blocks"] == ["blocks.0", "blocks.1", "blocks.2"]
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == [7, 8]
    assert steps[0]["values"].keys() == run.steps[0].keys()
    value = run.steps[0]["block/1/sigma_qk"]
    assert steps[0]["values"]["block/1/sigma_qk"] == pytest.approx(value, rel=1e-5)
    assert steps[0]["values"]["sharpness"] is None  # JSON has no NaN
    maps = [event for event in events if event["event"] == "map"]
    assert [(event["block"], event["head"]) for event in maps[:3]] == [(0, 0), (1, 0), (2, 0)]
    kept = torch.tensor(list(bytes.fromhex(maps[0]["levels"]))).view(16, 16) / 255
    assert torch.allclose(kept.square().sum(1), torch.ones(16), atol=0.1)
    warned = {(e["block"], e["head"]) for e in events if e["event"] == "warning"}
    assert {(0, 0), (0, 1), (1, 0), (1, 1)} >= warned and len(warned) >= 2


def test_each_head_is_a_line_of_log_and_all_are_one_alert(run: Written) -> None:
    events = lines(run.folder / "run" / "stability.jsonl")
    texts = [event["text"] for event in events if event["event"] == "warning"]
    assert len(texts) >= 2 and run.said == [f"step 8: {text}" for text in texts]
    text = "\n".join(texts)
    (alert,) = run.trackio_alerts
    assert (alert["title"], alert["text"], alert["step"]) == ("Attention narrows", text, 8)
    assert alert["level"] == "warn"
    assert comet_messages(run)[1] == [text]  # among the experiment's texts
    # The file is a log of messages; an alert's has its title, text and level one after the other.
    strings = ("\n\x11Attention narrows", f"step 8: {text}", "\x1a\x04WARN")
    record = run.wandb_file.read_bytes()
    assert record.count(strings[0].encode()) == 1
    assert record.count("".join(strings[1:]).encode()) == 1


def test_a_user_s_run_stays_open(run: Written) -> None:
    assert run.were_open == [True, True, True]


def test_a_sink_without_alerts_is_left_alone(tmp_path: Path) -> None:
    class Kept:
        def __init__(self) -> None:
            self.steps: Steps = []

        def write(self, step: int, values: Any) -> None:
            self.steps.append(dict(values))

        def close(self) -> None: ...

    sink = Kept()
    steps = narrowing([sink, Csv(tmp_path / "numbers.csv")])
    assert [values.keys() for values in sink.steps] == [values.keys() for values in steps]


def test_deepspeed_s_monitor_passes_alerts_on(tmp_path: Path) -> None:
    run_ranks("deepspeed", HERE / "monitor_worker.py", 1, str(tmp_path))
    (wandb_file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    record = wandb_file.read_bytes()
    assert record.count(b"Attention narrows") == 1 and b"block 0, head 0" in record
    (archive,) = (tmp_path / "comet").glob("*.zip")
    with zipfile.ZipFile(archive) as zipped:
        texts = [zipped.read(name).decode() for name in zipped.namelist() if "json" not in name]
    assert any(text.startswith("block 0, head 0: attention entropy fell") for text in texts)


def watched(model: nn.Module, make: Callable[[nn.Module], torch.optim.Optimizer]) -> set[str]:
    optimizer = make(model)
    watch = Watch(model, optimizer)
    loss = loss_of(model, torch.randint(50, (4, 17), generator=torch.Generator().manual_seed(0)))
    loss.backward()
    optimizer.step()
    tags = set(watch.step(loss, sharpness=1.0))
    watch.close()
    return tags


def table() -> dict[str, re.Pattern[str]]:
    """The tags of docs/watch.md's table, each as a pattern for what it stands for."""
    text = (ROOT / "docs/watch.md").read_text(encoding="utf-8")
    rows = text.partition("| tag |")[2].partition("\n\n")[0].splitlines()[2:]
    places = {"{i}": r"\d+", "{j}": r"\d+", "{matrix}": r"[^/]+", "{kind}": r"[^/]+"}
    patterns: dict[str, re.Pattern[str]] = {}
    for row in rows:
        first, *others = re.findall(r"`([^`]+)`", row.split(" | ")[0])
        for name in (first, *others):
            tag = name if "/" in name or "/" not in first else f"{first.rpartition('/')[0]}/{name}"
            pattern = re.escape(tag).replace(r"\{", "{").replace(r"\}", "}")
            for place, stands_for in places.items():
                pattern = pattern.replace(place, stands_for)
            patterns[tag] = re.compile(pattern)
    return patterns


def test_the_table_has_every_tag_that_a_run_writes_and_no_other() -> None:
    def projected(model: nn.Module) -> torch.optim.Optimizer:
        return AdamW2(model.named_parameters(), clip="project", vectors=4)

    written = watched(separate(), projected)
    written |= watched(stacked(), lambda model: AdamW2(model.named_parameters(), spike="log"))
    written |= watched(separate(), lambda model: torch.optim.AdamW(model.parameters()))
    patterns = table()
    unknown = {tag for tag in written if not any(p.fullmatch(tag) for p in patterns.values())}
    assert not unknown
    unwritten = [t for t, p in patterns.items() if not any(p.fullmatch(tag) for tag in written)]
    assert unwritten == ["sharpness_adam", "sharpness_threshold"]
    assert len(patterns) > 45
