"""Checkpoints of examples/deepspeed: a rank that is killed at one, files that are damaged; and a
rank that hangs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import HANGS, ROOT, run_ranks

for module in ("deepspeed", "sentencepiece", "yaml"):
    pytest.importorskip(module)

Record = Callable[[str, object], None]

SCRIPT = ROOT / "examples" / "deepspeed" / "pretrain_gpt.py"
RECIPE = ROOT / "examples" / "deepspeed" / "recipes" / "gpt_tiny.yaml"
KILLED = Path(__file__).with_name("killed_worker.py")
SETTINGS = [
    "train_steps=6",
    "save_interval=2",
    "keep_checkpoints=5",
    "eval_batches=1",
    "tau=0.01",
    "clip_grad=0",
]
OPTIM = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:20]
    command = [
        sys.executable,
        "-m",
        "examples.data.prepare_text",
        *map(str, sources),
        "--out",
        str(folder),
    ]
    subprocess.run(
        [*command, "--vocab-size", "512", "--valid", "0.1"], cwd=ROOT, check=True, timeout=HANGS
    )
    return folder


def begin(
    text: Path, out: Path, *worker: str, settings: tuple[str, ...] = (), ranks: int = 2
) -> subprocess.Popen[str]:
    """Start the example on real processes."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
    ]
    command += [*(worker or [str(SCRIPT)]), str(RECIPE), "--data", str(text), "--out", str(out)]
    command += [part for one in [*SETTINGS, *settings] for part in ("--set", one)]
    environment = dict(os.environ, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", PYTHONPATH=str(ROOT))
    environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def end(run: subprocess.Popen[str], timeout: float = HANGS) -> tuple[int, str]:
    try:
        said, _ = run.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        run.terminate()
        raise
    return run.returncode, said


def losses(out: Path) -> list[float]:
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [one["loss"] for one in records if "loss" in one]


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs, with checkpoints of steps 2, 4 and 6."""
    out = tmp_path_factory.mktemp("whole")
    status, said = end(begin(text, out))
    assert status == 0, said
    return out


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_in_a_save_leaves_the_checkpoint_before(
    text: Path, whole: Path, tmp_path: Path, rank: int, record_property: Record
) -> None:
    record_property(
        "tried",
        f"examples/deepspeed, 2 ranks: rank {rank} SIGKILLed in the middle of a file of a save",
    )
    status, said = end(begin(text, tmp_path, str(KILLED), str(rank), "step_4"))
    assert status != 0 and "SIGKILL" in said, said
    folder = tmp_path / "checkpoints"
    assert (folder / "step_4").is_dir() and (folder / "latest").read_text() == "step_2"
    status, said = end(begin(text, tmp_path))
    assert status == 0 and "steps 2 to 6" in said, said
    assert losses(tmp_path) == losses(whole)
    assert (folder / "latest").read_text() == "step_6"
    record_property(
        "survived", "the run goes on from the save before, bit for bit the undisturbed one"
    )


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "optimizer states cut in half": (OPTIM.format(1), cut, "{} is damaged"),
    "one bit of the model states": ("mp_rank_00_model_states.pt", flip, "{} is damaged"),
    "no optimizer states of rank 0": (OPTIM.format(0), Path.unlink, "got 2 ranks and files of 1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_with_the_file_s_name(
    text: Path, whole: Path, tmp_path: Path, damage: str, record_property: Record
) -> None:
    record_property("tried", f"examples/deepspeed, 2 ranks: {damage} of the newest checkpoint")
    name, harm, sentence = DAMAGE[damage]
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoints" / "step_6" / name
    harm(path)
    before = (tmp_path / "log.jsonl").read_text()
    started = time.monotonic()
    status, said = end(begin(text, tmp_path, settings=("train_steps=8",)))
    took = time.monotonic() - started
    told = [line for line in said.splitlines() if "pretrain_gpt.py: error:" in line]
    assert status != 0 and len(told) == 1, said
    assert (
        sentence.format(path) in told[0]
        and "there are step_2, step_4, too: write one's name into" in told[0]
    )
    assert re.search(r"exitcode\s*: 2 ", said), said
    assert (tmp_path / "log.jsonl").read_text() == before
    record_property(
        "survived",
        f"refused in one sentence that names file and older checkpoints; all ends in {took:.0f} s",
    )


@pytest.mark.slow
def test_another_number_of_ranks_is_refused_in_one_sentence(
    text: Path, whole: Path, record_property: Record
) -> None:
    record_property("tried", "examples/deepspeed: a checkpoint of 2 ranks on 3")
    status, said = end(begin(text, whole, settings=("train_steps=8",), ranks=3))
    assert (
        status != 0
        and (
            "takes as many ranks as saved it, whose files are all there, got 3 ranks and "
            "files of 0, 1"
        )
        in said
    )
    record_property("survived", "refused in one sentence")


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def line_with(words: str, run: subprocess.Popen[str]) -> str:
    """Return the next line of a run that has these words. The run prints on, or ends."""
    assert run.stdout is not None
    said = ""
    while words not in said:
        said = run.stdout.readline()
        assert said, f"it ended without {words!r}"
    return said


def environment_of(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/environ").is_file(), reason="finds the ranks' processes in Linux's /proc"
)
def test_a_rank_that_hangs_is_named_by_another(
    text: Path, whole: Path, tmp_path: Path, record_property: Record
) -> None:
    record_property(
        "tried", "examples/deepspeed, 2 ranks: one is stopped (SIGSTOP) in the middle of the run"
    )
    run = begin(text, tmp_path, settings=("hang_after=3", "train_steps=300", "save_interval=0"))
    log, until = tmp_path / "log.jsonl", time.monotonic() + HANGS
    while not (log.is_file() and len(log.read_text().splitlines()) >= 3):
        assert run.poll() is None and time.monotonic() < until, end(run)[1]
        time.sleep(0.05)
    time.sleep(1)
    stopped = next(pid for pid in children(run.pid) if environment_of(pid).get("RANK") == "1")
    began = time.monotonic()
    os.kill(stopped, signal.SIGSTOP)
    try:
        named = line_with("has been silent", run)
    finally:
        os.kill(stopped, signal.SIGCONT)
    took = time.monotonic() - began
    assert re.match(
        rf"rank 1 \(\S+, pid {stopped}\) has been silent for 3 s, after step \d+: its process",
        named,
    )
    assert took < 120  # 3 s, and what a busy machine makes of them
    assert f"pid {stopped}" in line_with("is heard of again", run)
    run.send_signal(signal.SIGTERM)
    _, rest = end(run)
    assert "saved after a SIGTERM" in rest, rest
    record_property(
        "survived",
        f"named with host and pid after {took:.0f} s (hang_after=3), and the run goes on",
    )


def test_a_rank_that_is_busy_with_something_else_says_where(record_property: Record) -> None:
    record_property(
        "tried", "examples/deepspeed/heartbeat.py, 2 ranks: one does not come back from a function"
    )
    said = run_ranks("deepspeed", Path(__file__).with_name("hang_worker.py"), 2)
    busy = [line for line in said.splitlines() if "has been in step" in line]
    assert len(busy) == 1, said
    assert re.search(
        r"rank 1 \(\S+, pid \d+\) has been in step 3 for 1 s, at \S+hang_worker.py:\d+, stuck; the",
        busy[0],
    )
    # A core that others hold for a second makes a rank silent; it is heard of again.
    assert said.count("has been silent for") <= said.count("is heard of again"), said
    record_property(
        "survived",
        "it names itself, with file, line and function; the rank that waits says nothing",
    )
