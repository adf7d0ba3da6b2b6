"""The Megatron example from text to a resumed run, and what it refuses before it starts."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.examples.example import RECIPES, sources
from tests.processes import run_ranks
from weyl_megatron.report.runs import read_run

import checkpoint  # isort: skip
import prepare  # isort: skip
import pretrain_gpt  # isort: skip

TINY = str(RECIPES / "tiny.yaml")
WORKER = Path(__file__).with_name("pretrain_worker.py")
# Without Transformer Engine, megatron-core 0.14 cannot load the distributed optimizer's moments.
SHARDED = f"distributed_optimizer={str(checkpoint.RESHARDABLE).lower()}"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prefix of prepared data: <text>.model, <text>_text_document.bin and .idx."""
    prefix = tmp_path_factory.mktemp("data") / "text"
    assert (
        prepare.main([*map(str, sources(60)), "--prefix", str(prefix), "--vocab-size", "512"]) == 0
    )
    return prefix


def pretrain(text: Path, *arguments: str) -> str:
    data = ["--data", f"{text}_text_document", "--tokenizer", f"{text}.model"]
    return run_ranks("megatron", WORKER, 4, TINY, *data, *arguments)


def losses(output: str) -> dict[int, str]:
    return {int(step): loss for step, loss in re.findall(r"^step (\d+): loss (\S+),", output, re.M)}


def validation(output: str) -> str:
    (loss,) = re.findall(r"validation loss (\S+)", output)
    return loss


@pytest.mark.slow
def test_adamw2_learns_without_a_warmup_is_watched_and_resumes_where_it_was(
    text: Path, tmp_path: Path
) -> None:
    saved, watched = tmp_path / "saved", tmp_path / "watched"
    options = ["--set", "log_interval=1", "--set", SHARDED]
    watching = ["--watch", str(watched), "--set", "watch_interval=50"]
    whole = pretrain(text, *options, *watching, "--set", "save_interval=90", "--save", str(saved))
    assert "adamw2, tensor × pipeline × data parallel 2 × 1 × 2, steps 0 to 100" in whole
    assert float(losses(whole)[100]) < float(losses(whole)[1]) - 0.3
    assert abs(float(validation(whole)) - float(losses(whole)[100])) < 1.0
    run = read_run(watched)
    assert [step for step, _ in run.series["block/1/head/3/entropy"]] == [1, 50, 100]
    assert f"{run.series['loss'][-1][1]:.4f}" == losses(whole)[100]
    assert not run.notes
    shutil.rmtree(saved / "step_100")
    resumed = pretrain(text, *options, "--load", str(saved))
    assert losses(resumed) == {step: loss for step, loss in losses(whole).items() if step > 90}
    assert validation(resumed) == validation(whole)


@pytest.mark.slow
def test_pipelines_of_sharded_stages_in_bf16_on_a_blend(text: Path) -> None:
    data = ["--data", "0.7", f"{text}_text_document", "0.3", f"{text}_text_document"]
    settings = [
        "optimizer=adam",
        "pipeline_parallel=2",
        "bf16=true",
        "train_steps=20",
        "micro_batch_size=4",
    ]
    output = pretrain(text, *data, *(part for setting in settings for part in ("--set", setting)))
    assert "tensor × pipeline × data parallel 2 × 2 × 1" in output
    assert float(losses(output)[20]) < float(losses(output)[1]) - 0.5


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert pretrain_gpt.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("pretrain_gpt.py: error: ") and error.count("\n") == 1
    assert not dist.is_initialized()
    return error


@pytest.fixture
def prefix(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A copy of the prepared data that a test may damage, under a world of two ranks."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{text}_text_document{suffix}", tmp_path / f"copy{suffix}")
    return str(tmp_path / "copy")


def test_damaged_data_is_refused(
    text: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [TINY, "--tokenizer", f"{text}.model", "--data"]
    with open(f"{prefix}.bin", "ab") as file:
        file.truncate(1000)
    assert re.search(
        r"takes the \d+ bytes that its \.idx counts, got 1000", refused(capsys, *arguments, prefix)
    )
    Path(f"{prefix}.idx").write_bytes(b"not an index")
    assert "--data takes Megatron's index files, got " in refused(capsys, *arguments, prefix)
    Path(f"{prefix}.idx").unlink()
    assert f"which lacks {prefix}.idx" in refused(capsys, *arguments, prefix)
    assert "--data takes PREFIX... or WEIGHT PREFIX" in refused(
        capsys, *arguments, "0.5", prefix, prefix
    )
    assert "--data takes weights above 0, got 0" in refused(capsys, *arguments, "0", prefix)


def test_a_tokenizer_that_did_not_prepare_the_data_is_refused(
    text: Path, prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = refused(capsys, TINY, "--data", prefix, "--tokenizer", "missing.model")
    assert (
        "--tokenizer takes a SentencePiece model, got missing.model, which is not a file" in missing
    )
    assert "which is not one" in refused(capsys, TINY, "--data", prefix, "--tokenizer", __file__)
    (tmp_path / "a.txt").write_text("some other text\n" * 9)
    assert (
        prepare.main(
            [str(tmp_path / "a.txt"), "--prefix", str(tmp_path / "a"), "--vocab-size", "275"]
        )
        == 0
    )
    capsys.readouterr()
    other = refused(capsys, TINY, "--data", prefix, "--tokenizer", str(tmp_path / "a.model"))
    assert "got one of 275 pieces for token" in other
    little = [
        TINY,
        "--data",
        str(tmp_path / "a_text_document"),
        "--tokenizer",
        str(tmp_path / "a.model"),
    ]
    assert (
        "takes more than seq_length 64 tokens for validation, got 0 in 0 of 1 documents"
        in refused(capsys, *little)
    )


def test_a_run_that_cannot_start_is_refused(
    text: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [TINY, "--data", prefix, "--tokenizer", f"{text}.model"]
    assert "takes the keys num_layers" in refused(capsys, *run, "--set", "layers=3")
    assert "tensor_parallel takes a divisor of" in refused(
        capsys, *run, "--set", "tensor_parallel=3"
    )
    assert "WORLD_SIZE takes a multiple of" in refused(capsys, *run, "--set", "pipeline_parallel=2")
    assert "which has no checkpoint" in refused(
        capsys, *run, "--set", SHARDED, "--load", str(Path(prefix).parent)
    )
    assert "takes RANK and WORLD_SIZE from torchrun" in refused(capsys, *run)
    assert "No such file" in refused(capsys, "missing.yaml", *run[1:])
