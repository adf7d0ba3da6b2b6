"""Three hosts on one machine: namespaces of Linux with their own network, name, processes and
mounts.

Each has an address on a common bridge, `sshd` on port 22, and, where a test asks for SLURM,
`munged` and `slurmd`. Nothing of the machine itself is changed: files in /etc are replaced by bind
mounts that only the namespaces see, and a host goes with all its processes when its first process
does, which is when the pipe to this one closes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.processes import HANGS, ROOT

NAMES = ["node1", "node2", "node3"]
ADDRESSES = {name: f"10.77.0.{i}" for i, name in enumerate(NAMES, start=1)}
PROGRAMS = {  # what a host needs, and Debian's package of it
    "unshare": "util-linux",
    "ip": "iproute2",
    "ssh": "openssh-client",
    "/usr/sbin/sshd": "openssh-server",
    "pdsh": "pdsh",
}
SLURM = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}

#: As a user's shell would have it, with the environment's Python first; gloo is told its interface.
ENVIRONMENT = {
    "PATH": os.pathsep.join(
        [
            str(Path(sys.executable).parent),
            *("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"),
        ]
    ),
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PYTHONPATH": str(ROOT),
    "TORCH_EXTENSIONS_DIR": os.environ["TORCH_EXTENSIONS_DIR"],  # tests/conftest.py
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "GLOO_SOCKET_IFNAME": "eth0",
    "GPUS_PER_NODE": "1",
}

# The first process of a host. It reaps what it inherits, as bash does, and ends when its input
# does.
FIRST = """
set -e
hostname "$1"
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd /run/munge
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/ssh_config" /etc/ssh/ssh_config
ip link set lo up
echo up
read -r _ || true
"""

SSH_CONFIG = """
Host *
    IdentityFile {folder}/key
    IdentitiesOnly yes
    UserKnownHostsFile {folder}/known_hosts
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking yes
    BatchMode yes
"""

SSHD_CONFIG = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
"""

# Accounting, cgroups and task plugins want more than a test has; everything else is Debian's SLURM
# as it is.
SLURM_CONF = """
ClusterName=launch
SlurmctldHost=node1({address})
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
KillWait=5
SchedulerParameters=batch_sched_delay=1,sched_interval=2
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=test Nodes=ALL Default=YES PriorityTier=1
PartitionName=urgent Nodes=ALL PriorityTier=2
"""


def missing(*needs: dict[str, str]) -> str | None:
    """Return why hosts cannot be made here, or None."""
    if os.geteuid() != 0:
        return "three hosts on one machine need root (network namespaces)"
    wanted = {program: package for need in needs for program, package in need.items()}
    lacking = sorted({package for program, package in wanted.items() if not shutil.which(program)})
    if lacking:
        return f"three hosts on one machine need apt-get install {' '.join(lacking)}"
    unshared = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True
    )
    return (
        f"namespaces cannot be made here: {unshared.stderr.decode().strip()}"
        if unshared.returncode
        else None
    )


class Hosts:
    """The hosts, from making them until `close`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.first: dict[str, subprocess.Popen[str]] = {}
        self.pids: dict[str, int] = {}
        self.started: list[subprocess.Popen[bytes]] = []
        try:
            self._network()
            self._ssh()
        except BaseException:
            self.close()
            raise

    def _network(self) -> None:
        lines = [f"{address} {name}" for name, address in ADDRESSES.items()]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")
        (self.folder / "ssh_config").write_text(SSH_CONFIG.format(folder=self.folder))
        for name in ["switch", *NAMES]:
            self._make(name)
        self._in("switch", "ip link add bridge type bridge && ip link set bridge up")
        for name, address in ADDRESSES.items():
            self._in(
                "switch",
                f"ip link add {name} type veth peer name eth0 netns {self.pids[name]}"
                f" && ip link set {name} master bridge up",
                processes=False,
            )
            self._in(name, f"ip address add {address}/24 dev eth0 && ip link set eth0 up")

    def _make(self, name: str) -> None:
        unshare = [
            "unshare",
            "--net",
            "--uts",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ]
        first = subprocess.Popen(
            [*unshare, "bash", "-c", FIRST, "first", name, str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.first[name] = first
        assert first.stdout is not None
        assert first.stdout.readline() == "up\n", f"host {name} did not come up"
        self.pids[name] = int(Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text())

    def _ssh(self) -> None:
        for key in ("key", "host_key"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", key, "-f", self.folder / key],
                check=True,
            )
        public = (self.folder / "host_key.pub").read_text()
        known = [f"{name},{address} {public}" for name, address in ADDRESSES.items()]
        (self.folder / "known_hosts").write_text("".join(known))
        (self.folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=self.folder))
        for name in NAMES:
            self.start(
                name, ["/usr/sbin/sshd", "-D", "-f", str(self.folder / "sshd_config")], "sshd"
            )
        for name in NAMES:
            self.until(name, ["ssh", name, "true"])

    def slurm(self) -> None:
        """Start Debian's SLURM: a controller on node1, a munged and a slurmd on every host."""
        (self.folder / "state").mkdir()
        nodes = [
            f"NodeName={name} NodeAddr={address} CPUs=2 State=UNKNOWN"
            for name, address in ADDRESSES.items()
        ]
        conf = SLURM_CONF.format(
            folder=self.folder, address=ADDRESSES["node1"], nodes="\n".join(nodes)
        )
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o400)
        for name in NAMES:
            files = [f"--{kind}-file={self.folder}/munge-{name}.{kind}" for kind in ("log", "seed")]
            key = f"--key-file={self.folder}/munge.key"
            command = [
                "munged",
                "--foreground",
                "--force",
                key,
                "--pid-file=/run/munge/pid",
                *files,
            ]
            self.start(name, command, "munged")
        for name in NAMES:
            self.until(name, ["munge", "--no-input"])
        environment = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self.start("node1", ["slurmctld", "-D"], "slurmctld", **environment)
        for name in NAMES:
            self.start(name, ["slurmd", "-D", "-N", name], "slurmd", **environment)
        self.until(
            "node1",
            ["bash", "-c", "test $(sinfo --noheader --states=idle --format=%D) = 3"],
            **environment,
        )

    def _in(self, name: str, script: str, processes: bool = True) -> None:
        subprocess.run(
            [*self.enter(name, processes), "bash", "-c", script], check=True, timeout=HANGS
        )

    def enter(self, name: str, processes: bool = True) -> list[str]:
        """The command that runs what follows it on this host."""
        spaces = ["--net", "--uts", *(["--mount", "--pid", f"--wdns={ROOT}"] if processes else [])]
        return ["nsenter", "--target", str(self.pids[name]), *spaces]

    def start(
        self, name: str, command: list[str], log: str, **environment: str
    ) -> subprocess.Popen[bytes]:
        """Start a command on a host, with both its streams in `<folder>/<log>-<host>.log`."""
        with (self.folder / f"{log}-{name}.log").open("ab") as out:
            process = subprocess.Popen(
                [*self.enter(name), *command],
                env={**ENVIRONMENT, **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
            )
        self.started.append(process)
        return process

    def run(
        self, name: str, command: list[str], timeout: float = HANGS, **environment: str
    ) -> tuple[int, str]:
        """Run a command on a host; return its exit status and what it printed, both streams."""
        done = subprocess.run(
            [*self.enter(name), *command],
            env={**ENVIRONMENT, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
            cwd=ROOT,
        )
        return done.returncode, done.stdout

    def until(self, name: str, command: list[str], seconds: float = 30, **environment: str) -> None:
        """Wait until a command succeeds on a host."""
        end = time.monotonic() + seconds
        while True:
            status, output = self.run(name, command, **environment)
            if status == 0:
                return
            assert time.monotonic() < end, (
                f"{' '.join(command)} on {name} failed for {seconds} s: {output}"
            )
            time.sleep(0.2)

    def workers(self, name: str) -> list[int]:
        """The ids, as this process sees them, of the training processes on a host."""
        space = os.readlink(f"/proc/{self.pids[name]}/ns/pid")
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                there = os.readlink(process / "ns/pid") == space
                if there and b"\0LOCAL_RANK=" in (process / "environ").read_bytes():
                    found.append(int(process.name))
            except OSError:
                pass  # it has ended meanwhile
        return found

    def close(self) -> None:
        """End every host, and with it whatever runs there."""
        for first in self.first.values():
            first.kill()
            first.communicate()
        for process in self.started:
            process.wait(timeout=HANGS)
