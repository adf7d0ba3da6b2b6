"""The launchers by themselves: what they would run, what they say of wrong input, and one host's
preflight.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.launch.hosts import ENVIRONMENT
from tests.processes import HANGS, ROOT

SCRIPTS = ["launch/torchrun.sh", "launch/deepspeed.sh", "launch/slurm.sbatch"]
SCRIPT = "examples/deepspeed/pretrain_gpt.py"
ODD = [
    "two words",
    "$(touch pwned)",
    "`touch pwned`",
    "; touch pwned",
    "it's",
    '"',
    "\\",
    "%n 50%",
    "*",
    "",
    "a\nb",
    "é",
]


def run(command: list[str], **environment: str) -> tuple[int, str, str]:
    """Run a launcher; return its exit status and both streams."""
    variables = {**ENVIRONMENT, **environment}
    done = subprocess.run(
        ["bash", *command],
        env=variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANGS,
        stdin=subprocess.DEVNULL,
    )
    return done.returncode, done.stdout, done.stderr


def refusal(command: list[str], **environment: str) -> str:
    """The one line that a launcher says before it ends with status 2, without having started
    anything.
    """
    status, printed, said = run(command, **environment)
    assert status == 2 and not printed and said.count("\n") == 1, (status, printed, said)
    return said.strip()


def commands(printed: str) -> list[list[str]]:
    """What a dry run printed, as a shell reads it."""
    return [shlex.split(line) for line in printed.splitlines()]


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    file = tmp_path / "hostfile"
    file.write_text(
        "node1 slots=8\nnode2\tslots=4 # half\n\n# node3 slots=8\nroot@node-4.cluster slots=8"
    )
    return file


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs apt-get install shellcheck")
def test_shellcheck_has_nothing_to_say() -> None:
    done = subprocess.run(["shellcheck", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_torchrun_takes_both_engines() -> None:
    several = {"NUM_NODES": "3", "NODE_RANK": "1", "MASTER_ADDR": "node1", "GPUS_PER_NODE": "8"}
    status, printed, said = run(
        ["launch/torchrun.sh", "--dry-run", "--engine", "deepspeed", SCRIPT, "r.yaml"], **several
    )
    assert status == 0 and not said
    check, start = commands(printed)[-2:]
    assert check == ["python", "launch/preflight.py", "--engine", "deepspeed"]
    assert (
        start
        == (
            "python -m torch.distributed.run --nproc-per-node=8 --nnodes=3 --node-rank=1 "
            f"--master-addr=node1 --master-port=29500 {SCRIPT} r.yaml"
        ).split()
    )
    megatron = ["-m", "weyl_megatron.engines.megatron", "pretrain_gpt.py", "--optimizer", "adamw2"]
    status, printed, said = run(
        ["launch/torchrun.sh", "--dry-run", "--no-preflight", *megatron], **several
    )
    assert commands(printed)[-1] == [*start[:8], *megatron] and "preflight" not in printed


def test_torchrun_on_one_host_takes_no_variables() -> None:
    status, printed, _ = run(["launch/torchrun.sh", "--dry-run", SCRIPT])
    assert (
        status == 0
        and "--nnodes=1 --node-rank=0 --master-addr=localhost --master-port=29500" in printed
    )


def test_torchrun_elastic_meets_at_the_first_host() -> None:
    several = {"MASTER_ADDR": "node1", "MASTER_PORT": "4000", "MAX_RESTARTS": "7"}
    status, printed, _ = run(
        ["launch/torchrun.sh", "--dry-run", "--elastic", "2:4", SCRIPT], **several
    )
    check, start = commands(printed)[-2:]
    assert status == 0 and "--local" in check
    assert (
        start
        == (
            "python -m torch.distributed.run --nproc-per-node=1 --nnodes=2:4 --rdzv-backend=c10d "
            f"--rdzv-endpoint=node1:4000 --rdzv-id=weyl_megatron --max-restarts=7 {SCRIPT}"
        ).split()
    )
    # With as many hosts as at the start, all are met before, and the first is known to hold the
    # meeting place.
    status, printed, _ = run(
        ["launch/torchrun.sh", "--dry-run", "--elastic", "3:3", SCRIPT], NODE_RANK="0", **several
    )
    check, start = commands(printed)[-2:]
    assert status == 0 and "--local" not in check and "--rdzv-conf=is_host=1" in start


def test_slurm_starts_a_task_per_node() -> None:
    status, printed, said = run(
        ["launch/slurm.sbatch", "--dry-run", "--engine", "megatron", SCRIPT, *ODD]
    )
    assert status == 0 and not said
    assert (ROOT / "launch/torchrun.sh").is_file()
    assert (
        shlex.split(printed.splitlines()[-1])[: -len(ODD)]
        == (
            f"srun --nodes=1 --ntasks-per-node=1 --kill-on-bad-exit=1 {ROOT}/launch/torchrun.sh "
            f"--elastic 1:1 --engine megatron {SCRIPT}"
        ).split()
    )


def test_deepspeed_reads_the_hostfile(hostfile: Path) -> None:
    command = ["launch/deepspeed.sh", "--hostfile", str(hostfile), "--dry-run", SCRIPT, "r.yaml"]
    status, printed, said = run(command, GPUS_PER_NODE="", HF_TOKEN="secret", NCCL_DEBUG="INFO")
    assert status == 0 and not said and "secret" not in printed
    *checks, start = commands(printed)
    assert [command[3] for command in checks] == ["node1", "node2", "root@node-4.cluster"] * 2
    assert (
        "NCCL_DEBUG=INFO" in start
        and "GPUS_PER_NODE=4" in checks[-2][-1]
        and "GPUS_PER_NODE=8" in checks[-1][-1]
    )
    assert "NODE_RANK=2" in checks[-1][-1] and "NUM_NODES=3" in checks[-1][-1]
    python = str(Path(sys.executable).parent / "python")
    assert start[:4] == [python, "-m", "deepspeed.launcher.runner", "--hostfile"]
    assert (
        "--num_nodes=3" in start
        and "--master_addr=node1" in start
        and "CUDA_VISIBLE_DEVICES=" not in start
    )
    assert start[-4:] == [python, "-u", SCRIPT, "r.yaml"]
    command = [
        "launch/deepspeed.sh",
        "--hostfile",
        str(hostfile),
        "--dry-run",
        "--launcher",
        "openssh",
        SCRIPT,
    ]
    status, printed, _ = run(command, NUM_NODES="2", GPUS_PER_NODE="2")
    assert status == 0 and len(commands(printed)) == 6
    assert (
        "--node_rank=1" in commands(printed)[-1][-1] and "NUM_NODES=2" in commands(printed)[-1][-1]
    )


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("node2", 'takes "host slots=N"'),
        ("node2 slots=", 'takes "host slots=N"'),
        ("node2 slots=0", 'takes "host slots=N"'),
        ("node2 slots=8x", 'takes "host slots=N"'),  # which DeepSpeed reads as 8
        ("node2 slot=8", 'takes "host slots=N"'),
        ("node2 slots=8 slots=9", 'takes "host slots=N"'),
        ("-oProxyCommand=touch$IFS/tmp/pwned slots=8", 'takes "host slots=N"'),
        ("node[2-3] slots=8", 'takes "host slots=N"'),
        ("node2;true slots=8", 'takes "host slots=N"'),
        ("node1 slots=8", "takes a host that no line above has"),
    ],
)
def test_a_wrong_line_of_a_hostfile_is_named(tmp_path: Path, line: str, what: str) -> None:
    file = tmp_path / "hosts of mine"
    file.write_text(f"# two\nnode1 slots=8\n{line}\nnode9 slots=8\n")
    assert (
        refusal(["launch/deepspeed.sh", "--hostfile", str(file), SCRIPT])
        == f'{file}:3 {what}, got "{line}"'
    )


def test_an_empty_hostfile_is_named(tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("# none\n\n")
    said = refusal(["launch/deepspeed.sh", "--hostfile", str(tmp_path / "hostfile"), SCRIPT])
    assert said == f'{tmp_path}/hostfile takes a line "host slots=N" for every host, got none'


@pytest.mark.parametrize(
    ("options", "environment", "said"),
    [
        ([], {}, "SCRIPT takes a file or -m MODULE, got nothing"),
        (["no/such.py"], {}, "SCRIPT takes a file or -m MODULE, got no/such.py, which is no file"),
        (["-m"], {}, "-m takes a module, got nothing"),
        (["--fast", SCRIPT], {}, "OPTIONS take those of --help, got --fast"),
        (["--engine"], {}, "the last option takes a value, got none"),
        (["--engine", "jax", SCRIPT], {}, "--engine takes deepspeed or megatron, got jax"),
        (
            [SCRIPT],
            {"GPUS_PER_NODE": "all"},
            "GPUS_PER_NODE takes a whole number from 1 on, got all",
        ),
        ([SCRIPT], {"MASTER_PORT": "70000"}, "MASTER_PORT takes a port from 1 to 65535, got 70000"),
        (
            [SCRIPT],
            {"MASTER_PORT": "a[$(touch pwned)]"},
            "MASTER_PORT takes a port from 1 to 65535, got a[$(touch pwned)]",
        ),
    ],
)
def test_wrong_input_is_told_in_a_line(
    options: list[str], environment: dict[str, str], said: str, hostfile: Path
) -> None:
    assert refusal(["launch/torchrun.sh", *options], **environment) == f"torchrun.sh: {said}"
    command = ["launch/deepspeed.sh", "--hostfile", str(hostfile), *options]
    assert refusal(command, **environment) == f"deepspeed.sh: {said}"


@pytest.mark.parametrize(
    ("options", "environment", "said"),
    [
        ([], {"NUM_NODES": "0"}, "NUM_NODES takes a whole number from 1 on, got 0"),
        (
            [],
            {"NUM_NODES": "2", "NODE_RANK": "0"},
            "MASTER_ADDR takes the first host's name or address, got nothing",
        ),
        (
            [],
            {"NUM_NODES": "2", "MASTER_ADDR": "node1"},
            "NODE_RANK takes 0 to 1, another on every host, got nothing",
        ),
        (
            [],
            {"NUM_NODES": "2", "MASTER_ADDR": "node1", "NODE_RANK": "2"},
            "NODE_RANK takes 0 to 1, got 2",
        ),
        (["--elastic", "4:2"], {}, "--elastic takes MIN:MAX hosts, as 2:4, got 4:2"),
    ],
)
def test_torchruns_wrong_input_is_told_in_a_line(
    options: list[str], environment: dict[str, str], said: str
) -> None:
    assert (
        refusal(["launch/torchrun.sh", *options, SCRIPT], **environment) == f"torchrun.sh: {said}"
    )


def test_deepspeeds_wrong_input_is_told_in_a_line(hostfile: Path) -> None:
    command = ["launch/deepspeed.sh", "--hostfile", str(hostfile)]
    said = "deepspeed.sh: NUM_NODES takes 1 to the 3 hosts of"
    assert refusal([*command, SCRIPT], NUM_NODES="4") == f"{said} {hostfile}, got 4"
    assert "--launcher takes pdsh or openssh, got mpi" in refusal(
        [*command, "--launcher", "mpi", SCRIPT]
    )
    assert "--hostfile takes a file, got nothing" in refusal(["launch/deepspeed.sh", SCRIPT])
    assert "name of a variable that is set, got NOT_SET" in refusal(
        [*command, "--export", "NOT_SET", SCRIPT]
    )
    assert "a name or an address, got $(id)" in refusal([*command, SCRIPT], MASTER_ADDR="$(id)")


def test_torchrun_hands_over_what_it_is_given(tmp_path: Path) -> None:
    script = tmp_path / "show me.py"
    script.write_text("import json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    status, printed, _ = run(
        ["launch/torchrun.sh", "--no-preflight", str(script), *ODD], MASTER_PORT=str(free_port())
    )

    assert status == 0 and json.loads(printed.splitlines()[-1]) == ODD
    assert not (ROOT / "pwned").exists()


def free_port() -> int:
    """Return a free port that is still free when it is used: below 32768, from where Linux takes
    those that it gives out, to gloo for one.
    """
    dice = random.SystemRandom()
    while True:
        port = dice.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


def test_preflight_of_one_host() -> None:
    port = free_port()
    command = [sys.executable, "launch/preflight.py"]
    variables = {**os.environ, **ENVIRONMENT, "MASTER_PORT": str(port)}
    del variables["GLOO_SOCKET_IFNAME"]
    good = subprocess.run(
        command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=HANGS
    )
    assert good.returncode == 0 and not good.stderr
    with socket.create_server(("", port)):
        bad = subprocess.run(
            command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=HANGS
        )
    name = socket.gethostname()
    assert bad.returncode == 1
    assert (
        bad.stderr
        == f"preflight: {name}: MASTER_PORT takes a free port, got {port}, which is in use\n"
    )


@pytest.fixture(scope="module")
def preflight() -> ModuleType:
    spec = importlib.util.spec_from_file_location("preflight", ROOT / "launch" / "preflight.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def facts(host: str, rank: int, **others: Any) -> dict[str, Any]:
    versions = {"torch": "2.15.0", "deepspeed": "0.19.8", **others.pop("versions", {})}
    common = {
        "errors": [],
        "gpus": 8,
        "backend": "nccl",
        "num_nodes": 2,
        "gpus_per_node": 8,
        "port": 1,
        "store": 2,
    }
    return {"host": host, "rank": rank, "versions": versions, **common, **others}


def verdict(preflight: ModuleType, *peers: dict[str, Any], timeout: float = HANGS) -> list[str]:
    """What the first host says to these, of which it waits for two."""
    listener = preflight.listen(0)
    port = listener.getsockname()[1]
    meeting = threading.Thread(target=preflight.meet, args=(listener, 2, timeout))
    meeting.start()
    links = [preflight.connect("localhost", port, HANGS) for _ in peers[:1]]
    links[0].say(peers[0])
    for peer in peers[1:]:
        links.append(preflight.connect("localhost", port, HANGS))
        links[-1].say(peer)
    answer = links[-1].hear(HANGS)
    meeting.join()
    assert list(answer) == ["failures"]
    return list(answer["failures"])


def test_preflight_compares_hosts(preflight: ModuleType) -> None:
    other = facts(
        "b", 1, versions={"torch": "2.9.1", "deepspeed": "not installed"}, gpus_per_node=4
    )
    assert verdict(preflight, facts("a", 0), other) == [
        "b: GPUS_PER_NODE takes a's 8, got 4",
        "b: torch takes a's version 2.15.0, got 2.9.1",
        "b: deepspeed takes a's version 0.19.8, got not installed",
    ]
    assert verdict(preflight, facts("a", 0), facts("b", 1, gpus=4)) == [
        "b: GPUS_PER_NODE takes at most the 4 GPUs there, got 8"
    ]
    assert verdict(preflight, facts("a", 0, num_nodes=3), facts("b", 1, backend="gloo")) == [
        "b: NUM_NODES takes a's 3, got 2",
        "b: the backend takes a's nccl, got gloo",
    ]


def test_preflight_counts_hosts(preflight: ModuleType) -> None:
    said = "b: NODE_RANK takes another number on every host, got 0, as a"
    assert verdict(preflight, facts("a", 0), facts("b", 0)) == [said]
    assert verdict(preflight, facts("a", 0), facts("b", 2)) == ["b: NODE_RANK takes 0 to 1, got 2"]
    said = f"{socket.gethostname()}: NODE_RANK takes 0 to 1, got no 1 within 2 s"
    assert verdict(preflight, facts("a", 0), timeout=2) == [said]


def test_preflight_survives_who_else_knocks(preflight: ModuleType) -> None:
    listener = preflight.listen(0)
    port = listener.getsockname()[1]
    meeting = threading.Thread(target=preflight.meet, args=(listener, 1, HANGS))
    meeting.start()
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"rank": "x"}\n', b""):
        with socket.create_connection(("localhost", port)) as stranger:
            stranger.sendall(words)
    link = preflight.connect("localhost", port, HANGS)
    link.say(facts("a", 0, errors=["x takes y, got z"]))
    assert link.hear(HANGS) == {"failures": ["a: x takes y, got z"]}
    meeting.join()
