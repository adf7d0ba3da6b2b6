"""Each launcher trains a GPT over three hosts, and its losses are those of one host; a run that
loses a worker, or its
nodes to another job, resumes and ends at them, too.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.hosts import ENVIRONMENT, NAMES, PROGRAMS, SLURM, Hosts, missing
from tests.launch.test_launch import ODD
from tests.processes import HANGS, ROOT

reason = missing(PROGRAMS)
lacking = [
    name
    for name in ("deepspeed", "yaml", "sentencepiece")
    if importlib.util.find_spec(name) is None
]
if reason is None and lacking:
    reason = f"the runs take {', '.join(lacking)}"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(reason is not None, reason=str(reason))]
no_slurm = missing(PROGRAMS, SLURM)

STEPS, SAVED = 40, 4  # a checkpoint every so many steps
SETTINGS = {
    "num_layers": 1,
    "hidden_size": 32,
    "seq_length": 32,
    "global_batch_size": 12,
    "train_steps": STEPS,
    "save_interval": SAVED,
    "eval_batches": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launch")


@pytest.fixture(scope="module")
def hosts(folder: Path) -> Iterator[Hosts]:
    made = Hosts(folder)
    yield made
    made.close()


@pytest.fixture(scope="module")
def slurm(hosts: Hosts) -> dict[str, str]:
    """SLURM on the hosts; the variable that its commands take."""
    hosts.slurm()
    return {"SLURM_CONF": str(hosts.folder / "slurm.conf")}


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    """Some files of the standard library, as tokens."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [str(file) for file in sorted(library.glob("[ac]*.py"))]
    command = [
        sys.executable,
        "-m",
        "examples.data.prepare_text",
        *files,
        "--out",
        str(folder / "data"),
    ]
    command += ["--vocab-size", "512", "--valid", "0.3"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, check=True, timeout=HANGS)
    return folder / "data"


def gpt(data: Path, out: Path) -> list[str]:
    """The script and its arguments: the same for every launcher."""
    command = ["examples/deepspeed/pretrain_gpt.py", "examples/deepspeed/recipes/gpt_tiny.yaml"]
    for key, value in SETTINGS.items():
        command += ["--set", f"{key}={value}"]
    return [*command, "--data", str(data), "--out", str(out)]


def losses(out: Path) -> dict[int, float]:
    """The loss of every step that is in the log."""
    lines = (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").is_file() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def difference(out: Path, reference: dict[int, float]) -> float:
    """The largest relative difference of two runs' losses; both have all steps."""
    made = losses(out)
    assert sorted(made) == sorted(reference) == list(range(1, STEPS + 1))
    return max(abs(made[step] / loss - 1) for step, loss in reference.items())


@pytest.fixture(scope="module")
def reference(hosts: Hosts, data: Path, folder: Path) -> dict[int, float]:
    """The losses of three processes on one host."""
    command = ["launch/torchrun.sh", "--no-preflight", *gpt(data, folder / "one")]
    status, output = hosts.run("node1", command, GPUS_PER_NODE="3", timeout=HANGS)
    assert status == 0, output[-6000:]
    return losses(folder / "one")


def torchrun(
    hosts: Hosts, log: str, command: list[str], nodes: int = 3
) -> list[subprocess.Popen[bytes]]:
    """Start torchrun.sh on the hosts, the last of which comes first."""
    started = []
    for rank, name in reversed(list(enumerate(NAMES[:nodes]))):
        variables = {"NUM_NODES": str(nodes), "NODE_RANK": str(rank), "MASTER_ADDR": "node1"}
        started.append(hosts.start(name, ["launch/torchrun.sh", *command], log, **variables))
    return started


def until_end(
    hosts: Hosts, log: str, started: list[subprocess.Popen[bytes]], seconds: float = HANGS
) -> str:
    """Wait until all have ended well; return what they printed."""
    end = time.monotonic() + seconds
    try:
        for process in started:
            process.wait(max(1.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    printed = "".join(
        file.read_text(errors="replace") for file in sorted(hosts.folder.glob(f"{log}-node*.log"))
    )
    assert all(process.poll() == 0 for process in started), printed[-6000:]
    return printed


def until_step(out: Path, step: int, seconds: float = HANGS) -> None:
    end = time.monotonic() + seconds
    while max(losses(out), default=0) < step:
        assert time.monotonic() < end, f"no step {step} within {seconds} s"
        time.sleep(0.02)


def resumed_at(printed: str) -> list[int]:
    """The steps from which the starts of a run went on."""
    return [int(step) for step in re.findall(rf"steps (\d+) to {STEPS}\n", printed)]


def test_torchrun(hosts: Hosts, data: Path, folder: Path, reference: dict[int, float]) -> None:
    started = torchrun(hosts, "static", gpt(data, folder / "static"))
    until_end(hosts, "static", started)
    assert difference(folder / "static", reference) <= 1e-6


def test_torchrun_that_loses_a_worker(
    hosts: Hosts, data: Path, folder: Path, reference: dict[int, float]
) -> None:
    out = folder / "elastic"
    started = torchrun(hosts, "elastic", ["--elastic", "3:3", "--no-preflight", *gpt(data, out)])
    until_step(out, 1)
    (worker,) = hosts.workers("node2")
    until_step(out, SAVED + 2)
    os.kill(worker, signal.SIGKILL)
    first, *others = resumed_at(until_end(hosts, "elastic", started))
    assert first == 0 and others and others[0] > 0 and others[0] % SAVED == 0
    assert difference(out, reference) <= 1e-6


@pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="Megatron's run takes megatron-core"
)
def test_torchrun_with_megatron(hosts: Hosts, folder: Path) -> None:
    """The other engine, tensor parallel over two hosts: the losses to the digits that it prints."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [str(file) for file in sorted(library.glob("[ac]*.py"))]
    prepare = [
        sys.executable,
        "examples/megatron/prepare.py",
        *files,
        "--prefix",
        str(folder / "text"),
    ]
    subprocess.run(
        [*prepare, "--vocab-size", "512"], cwd=ROOT, check=True, timeout=HANGS, capture_output=True
    )
    # The worker is examples/megatron/pretrain_gpt.py, made to run without a GPU.
    command = ["tests/examples/pretrain_worker.py", "examples/megatron/recipes/tiny.yaml"]
    command += [
        "--data",
        str(folder / "text_text_document"),
        "--tokenizer",
        str(folder / "text.model"),
    ]
    command += ["--set", "train_steps=4", "--set", "log_interval=1", "--set", "eval_batches=1"]
    printed = until_end(
        hosts, "megatron", torchrun(hosts, "megatron", ["--engine", "megatron", *command], nodes=2)
    )
    status, one = hosts.run(
        "node1",
        ["launch/torchrun.sh", "--no-preflight", *command],
        GPUS_PER_NODE="2",
        timeout=HANGS,
    )
    assert status == 0, one[-6000:]
    steps = re.findall(r"step \d: loss [\d.]+, lr [\d.e-]+, grad norm [\d.]+", one)
    assert len(steps) == 4 and steps == re.findall(
        r"step \d: loss [\d.]+, lr [\d.e-]+, grad norm [\d.]+", printed
    )


def test_deepspeed_by_pdsh(
    hosts: Hosts, data: Path, folder: Path, reference: dict[int, float]
) -> None:
    hostfile = folder / "hostfile"
    hostfile.write_text(
        "# rank 0 is on the first\n\n" + "".join(f"{name} slots=1\n" for name in NAMES)
    )
    out = folder / '$(touch pwned) "it\'s" 50%n \\'
    command = ["launch/deepspeed.sh", "--hostfile", str(hostfile), *gpt(data, out)]
    status, output = hosts.run("node1", command, timeout=HANGS)
    assert status == 0, output[-6000:]
    assert difference(out, reference) <= 1e-6
    assert not (ROOT / "pwned").exists()


SHOW = """
import json, os, sys, time
with open(f"{sys.argv[1]}-{os.environ['RANK']}", "w") as file:
    said = [os.uname().nodename, os.environ["WORLD_SIZE"], os.environ.get("ODD"), sys.argv[2:]]
    json.dump(said, file)
names = [f"{sys.argv[1]}-{rank}" for rank in range(3)]
while os.environ["RANK"] != "2" or not all(map(os.path.exists, names)):
    time.sleep(0.1)
sys.exit(7)
"""


def test_deepspeed_by_openssh(hosts: Hosts, folder: Path) -> None:
    """Without pdsh, with rank 0 where the hostfile says; a worker that fails ends the others, which
    would wait.
    """
    (folder / "hostfile2").write_text("node3 slots=2\nnode1 slots=1\n")
    (folder / "show me.py").write_text(SHOW)
    odd = " ".join(ODD[:-1])
    command = [
        "launch/deepspeed.sh",
        "--hostfile",
        str(folder / "hostfile2"),
        "--launcher",
        "openssh",
    ]
    command += [
        "--no-preflight",
        "--export",
        "ODD",
        str(folder / "show me.py"),
        str(folder / "shown"),
        *ODD,
    ]
    status, output = hosts.run("node2", command, timeout=HANGS, ODD=odd, GPUS_PER_NODE="")
    assert status == 7, output[-6000:]
    shown = [json.loads((folder / f"shown-{rank}").read_text()) for rank in range(3)]
    assert shown == [[host, "3", odd, ODD] for host in ("node3", "node3", "node1")]
    assert not (ROOT / "pwned").exists()
    end = time.monotonic() + HANGS
    while hosts.workers("node1") + hosts.workers("node3"):
        assert time.monotonic() < end, "workers are left"
        time.sleep(0.2)


@pytest.mark.skipif(no_slurm is not None, reason=str(no_slurm))
def test_slurm_that_is_preempted(
    hosts: Hosts, slurm: dict[str, str], data: Path, folder: Path, reference: dict[int, float]
) -> None:
    out, log = folder / "slurm", folder / "job.log"
    command = [
        "sbatch",
        "--parsable",
        "--nodes=3",
        f"--output={log}",
        "launch/slurm.sbatch",
        *gpt(data, out),
    ]
    status, job = hosts.run("node1", command, **slurm)
    assert status == 0, job
    until_step(out, SAVED + 2)
    for worker in [worker for name in NAMES for worker in hosts.workers(name)]:
        os.kill(worker, signal.SIGSTOP)  # until SLURM, which wakes what it is about to end
    urgent = ["sbatch", "--partition=urgent", "--nodes=3", "--wrap=true", "--output=/dev/null"]
    assert hosts.run("node1", urgent, **slurm)[0] == 0
    hosts.until("node1", ended(job), 400, **slurm)
    printed = log.read_text(errors="replace")
    first, *others = resumed_at(printed)
    assert "DUE TO PREEMPTION" in printed and first == 0 and len(others) == 1 and others[0] > 0, (
        printed[-6000:]
    )
    assert difference(out, reference) <= 1e-6


LONG = """
import json, os, sys, time
print(json.dumps([os.environ.get("SLURM_RESTART_COUNT"), sys.argv[1:]]), flush=True)
time.sleep(0 if os.environ.get("SLURM_RESTART_COUNT") else 300)
"""


@pytest.mark.skipif(no_slurm is not None, reason=str(no_slurm))
def test_slurm_near_its_time_limit(hosts: Hosts, slurm: dict[str, str], folder: Path) -> None:
    """SLURM's signal before the limit, sent by hand, because limits are minutes."""
    (folder / "long.py").write_text(LONG)
    log = folder / "long.log"
    command = ["sbatch", "--parsable", f"--output={log}", "launch/slurm.sbatch", "--no-preflight"]
    status, job = hosts.run("node1", [*command, str(folder / "long.py"), *ODD], **slurm)
    assert status == 0, job
    hosts.until("node1", ["grep", "-q", "two words", str(log)], 120)
    assert hosts.run("node1", ["scancel", "--batch", "--signal=USR1", job.strip()], **slurm)[0] == 0
    hosts.until("node1", ended(job), 120, **slurm)
    printed = log.read_text(errors="replace")
    assert f"job {job.strip()} is near its time limit and goes back into the queue" in printed
    shown = [
        json.loads(line)
        for line in printed.splitlines()
        if line.startswith("[null") or line.startswith('["1"')
    ]
    assert shown == [[None, ODD], ["1", ODD]] and not (ROOT / "pwned").exists()


def ended(job: str) -> list[str]:
    """A command that succeeds when a job has ended well, or badly for good."""
    show = (
        f"scontrol show job {job.strip()} | grep -qE "
        "'JobState=(COMPLETED|FAILED|CANCELLED|NODE_FAIL)'"
    )
    return ["bash", "-c", show]


def preflight(hosts: Hosts, log: str, environment: dict[str, dict[str, str]]) -> dict[str, str]:
    """Run the preflight on all hosts, each with its own environment; it fails on all. Return what
    each says.
    """
    started = []
    for rank, name in enumerate(NAMES):
        variables = {
            "NUM_NODES": "3",
            "NODE_RANK": str(rank),
            "MASTER_ADDR": "node1",
            **environment.get(name, {}),
        }
        started.append(hosts.start(name, ["python", "launch/preflight.py"], log, **variables))
    assert [process.wait(300) for process in started] == [1, 1, 1]
    return {name: (hosts.folder / f"{log}-{name}.log").read_text() for name in NAMES}


def test_preflight_names_what_hosts_lack(hosts: Hosts, folder: Path) -> None:
    (folder / "broken" / "weyl_megatron").mkdir(parents=True)
    (folder / "broken" / "weyl_megatron" / "__init__.py").write_text(
        "raise ImportError('not here')\n"
    )
    without = {"PYTHONPATH": str(folder / "broken")}
    said = preflight(hosts, "lacking", {"node2": {"GLOO_SOCKET_IFNAME": "eth9"}, "node3": without})
    python = f"{Path(sys.executable).parent}/python"
    lines = [
        "preflight: node2: GLOO_SOCKET_IFNAME takes an interface of lo, eth0, got eth9\n",
        f"preflight: node3: weyl_megatron takes an installation in {python}, got ImportError: not "
        "here\n",
    ]
    assert said == {"node1": "".join(lines), "node2": lines[0], "node3": lines[1]}


def test_preflight_names_hosts_that_do_not_reach_each_other(hosts: Hosts) -> None:
    hosts.run("node2", ["ip", "route", "add", "unreachable", "10.77.0.3/32"])
    try:
        said = preflight(hosts, "unreachable", {})
    finally:
        hosts.run("node2", ["ip", "route", "delete", "unreachable", "10.77.0.3/32"])
    assert re.search(
        r"^preflight: node2: the others' ports take connections, got .* from node3 \(10",
        said["node1"],
        re.M,
    )
