"""Looks at the hosts of a run before it starts, and says in one line each what is wrong with them.

The same on every host, with the launchers' variables NUM_NODES, NODE_RANK, MASTER_ADDR, MASTER_PORT
and GPUS_PER_NODE:

    python launch/preflight.py [--engine deepspeed|megatron] [--local]

All hosts connect to the one of NODE_RANK 0 at MASTER_ADDR:MASTER_PORT and tell it what they have;
it compares. Then every host connects to every other, and all sum a number over NCCL, or gloo where
there is no GPU. The port is closed before that, so that the run may take it at once. With --local a
host looks at itself only.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import datetime
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import socket
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

GREETING = "weyl_megatron preflight"
ENGINES = {"deepspeed": "deepspeed", "megatron": "megatron.core"}
PACKAGES = ("torch", "triton", "deepspeed", "megatron-core", "transformer-engine")
CONNECT = 10.0  # seconds for one host to reach another
PATIENCE = 30.0  # seconds for the first host to hear what another has
REDUCE = 60.0  # seconds for the sum, NCCL's start included

Facts = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="preflight.py", description="Look at the hosts of a run before it starts."
    )
    parser.add_argument("--engine", choices=ENGINES, help="import this engine, too")
    parser.add_argument("--local", action="store_true", help="look at this host only")
    parser.add_argument(
        "--timeout", type=float, default=300.0, help="seconds for all hosts to come (300)"
    )
    options = parser.parse_args()
    nodes, rank = int(os.environ.get("NUM_NODES", 1)), int(os.environ.get("NODE_RANK", 0))
    address = os.environ.get("MASTER_ADDR", "localhost")
    port = int(os.environ.get("MASTER_PORT", 29500))

    warnings.simplefilter("ignore")  # what engines say at their import
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Else torch's import fails where only weyl_megatron's does.
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    facts = look(options.engine)
    if options.local:
        return report(broken(facts), facts, rank=0)
    failures: list[str] = []
    if rank == 0:
        try:
            listener = listen(port)
        except OSError:
            line = f"{facts['host']}: MASTER_PORT takes a free port, got {port}, which is in use"
            return report([line], facts, rank)
        hosts = (listener, nodes, options.timeout)
        meeting = threading.Thread(target=meet, args=hosts, daemon=True)
        meeting.start()
    try:
        first = "localhost" if rank == 0 else address
        failures = take_part(facts, rank, nodes, first, port, options.timeout)
    except (OSError, ValueError) as error:
        failures = [f"{facts['host']}: {error}"]
    if rank == 0:
        meeting.join(PATIENCE)  # until the others have their verdict, too
    return report(failures, facts, rank)


def report(failures: list[str], facts: Facts, rank: int) -> int:
    """Print what is wrong: all of it on the first host, its own on every other."""
    own = [line for line in failures if rank == 0 or line.startswith(f"{facts['host']}: ")]
    if failures and not own:
        own = [
            f"{facts['host']}: stopped, because of {failures[0].split(':')[0]}; the host of "
            "NODE_RANK 0 says why"
        ]
    for line in own:
        print(f"preflight: {line}", file=sys.stderr, flush=True)
    return 1 if failures else 0


# ---- what a host has


def look(engine: str | None) -> Facts:
    """What this host has, of which some must be the same everywhere."""
    versions = {"Python": platform.python_version()}
    facts: Facts = {"host": socket.gethostname(), "versions": versions, "errors": []}
    facts |= {"gpus": 0, "backend": "gloo"}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    for module in ("torch", "weyl_megatron", *([ENGINES[engine]] if engine else [])):
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever an import may raise
            line = " ".join(f"{type(error).__name__}: {error}".split())
            takes = f"{module} takes an installation in {sys.executable}"
            facts["errors"].append(f"{takes}, got {line}")
    if "weyl_megatron" in sys.modules:
        package = Path(sys.modules["weyl_megatron"].__file__ or "").parent
        versions["weyl_megatron's source code"] = sources(package)
    if "torch" in sys.modules:
        import torch

        versions["CUDA"] = str(torch.version.cuda)
        if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
            facts["gpus"], facts["backend"] = torch.cuda.device_count(), "nccl"
            versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    facts["num_nodes"] = int(os.environ.get("NUM_NODES", 1))
    facts["gpus_per_node"] = int(os.environ.get("GPUS_PER_NODE", 1))
    interfaces = [name for _, name in socket.if_nameindex()]
    variable = "NCCL_SOCKET_IFNAME" if facts["backend"] == "nccl" else "GLOO_SOCKET_IFNAME"
    chosen = os.environ.get(variable, "")
    # NCCL takes beginnings of names, "=" for whole ones and "^" for all but these; gloo takes
    # names.
    names = [name for name in chosen.lstrip("=").split(",") if name and chosen[0] != "^"]
    if names and not any(interface.startswith(name) for name in names for interface in interfaces):
        there = ", ".join(interfaces)
        facts["errors"].append(f"{variable} takes an interface of {there}, got {chosen}")
    if not chosen and facts["backend"] == "gloo" and facts["num_nodes"] > 1:
        own = ""
        with contextlib.suppress(OSError):
            own = socket.gethostbyname(facts["host"])
        if own.startswith("127."):
            facts["errors"].append(
                "GLOO_SOCKET_IFNAME takes the interface to the others where the host's own name "
                f"is {own}, got nothing"
            )
    return facts


def sources(package: Path) -> str:
    """A short hash of a package's files: two checkouts of one version may differ."""
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*")):
        if file.suffix in {".py", ".cpp", ".h"}:
            digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:8]


def broken(facts: Facts) -> list[str]:
    """What is wrong with one host by itself."""
    failures = list(facts["errors"])
    if facts["backend"] == "nccl" and facts["gpus"] < facts["gpus_per_node"]:
        takes = f"GPUS_PER_NODE takes at most the {facts['gpus']} GPUs there"
        failures.append(f"{takes}, got {facts['gpus_per_node']}")
    return [f"{facts['host']}: {failure}" for failure in failures]


def unequal(facts: list[Facts]) -> list[str]:
    """What is wrong with the hosts beside each other, the first of which is the measure."""
    first, *others = facts
    names = {"num_nodes": "NUM_NODES", "gpus_per_node": "GPUS_PER_NODE", "backend": "the backend"}
    failures = []
    for other in others:
        for key, name in names.items():
            if other[key] != first[key]:
                takes = f"{other['host']}: {name} takes {first['host']}'s {first[key]}"
                failures.append(f"{takes}, got {other[key]}")
        for name, version in first["versions"].items():
            got = other["versions"].get(name, version)
            if got != version:
                takes = f"{other['host']}: {name} takes {first['host']}'s version {version}"
                failures.append(f"{takes}, got {got}")
    return failures


# ---- the host of NODE_RANK 0, which asks all, itself included


def listen(port: int) -> socket.socket:
    if not socket.has_dualstack_ipv6():
        return socket.create_server(("", port), backlog=1024)
    family = socket.AF_INET6
    return socket.create_server(("", port), family=family, dualstack_ipv6=True, backlog=1024)


def meet(listener: socket.socket, nodes: int, timeout: float) -> None:
    """Gather the hosts, compare them, have them reach each other, and send all the verdict."""
    peers: dict[int, tuple[Link, Facts]] = {}
    try:
        with listener:
            failures = gather(listener, peers, nodes, timeout)
        facts_by_rank = [peers[rank][1] for rank in sorted(peers)]
        failures = failures or [line for facts in facts_by_rank for line in broken(facts)]
        failures = failures or unequal(facts_by_rank)
        if not failures:
            ports = [(facts["host"], facts["address"], facts["port"]) for facts in facts_by_rank]
            failures = ask(peers, {"reach": ports}, (1 + nodes / 32) * CONNECT + PATIENCE)
        if not failures:
            failures = ask(peers, {"reduce": facts_by_rank[0]["store"]}, REDUCE + PATIENCE)
    except Exception as error:  # the others wait for a verdict
        takes = f"{socket.gethostname()}: the preflight takes answers of its own version"
        failures = [f"{takes}, got {error!r}"]
    for link, _ in peers.values():
        link.say({"failures": failures})


def gather(
    listener: socket.socket, peers: dict[int, tuple[Link, Facts]], nodes: int, timeout: float
) -> list[str]:
    """Wait for all hosts, and put them into `peers` by rank."""
    end = time.monotonic() + timeout
    while len(peers) < nodes:
        listener.settimeout(max(0.01, end - time.monotonic()))
        try:
            connection, (address, *_) = listener.accept()
        except TimeoutError:
            lacking = ", ".join(str(rank) for rank in range(nodes) if rank not in peers)
            return [
                f"{socket.gethostname()}: NODE_RANK takes 0 to {nodes - 1}, got no {lacking} "
                f"within {timeout:g} s"
            ]
        try:
            link = Link(connection)
            link.say(GREETING)
            facts = link.hear(PATIENCE)
            host, rank = facts["host"], int(facts["rank"])
        except (OSError, ValueError, TypeError, KeyError):
            continue  # something else knocked
        facts["address"] = address.removeprefix("::ffff:")
        failure = ""
        if rank in peers:
            failure = (
                f"{host}: NODE_RANK takes another number on every host, got {rank}, as "
                f"{peers[rank][1]['host']}"
            )
        elif rank >= nodes:
            failure = f"{host}: NODE_RANK takes 0 to {nodes - 1}, got {rank}"
        if failure:
            link.say({"failures": [failure]})
            return [failure]
        peers[rank] = link, facts
    return []


def ask(peers: dict[int, tuple[Link, Facts]], question: Any, seconds: float) -> list[str]:
    """Put a question to all hosts, and gather what failed."""
    for link, _ in peers.values():
        link.say(question)
    failures = []
    for link, facts in peers.values():
        try:
            failures += [f"{facts['host']}: {line}" for line in link.hear(seconds)]
        except (OSError, ValueError) as error:
            takes = f"{facts['host']}: its preflight takes at most {seconds:g} s"
            failures.append(f"{takes}, got {error}")
    return failures


# ---- every host


class Link:
    """A connection on which each message is a line of JSON."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.lines = connection.makefile("rb")

    def say(self, what: Any) -> None:
        with contextlib.suppress(OSError):  # it is gone, which hearing from it tells
            self.connection.sendall(json.dumps(what).encode() + b"\n")

    def hear(self, seconds: float) -> Any:
        self.connection.settimeout(seconds)
        line = self.lines.readline(1 << 20)
        if not line:
            raise ConnectionError("the end of the connection")
        return json.loads(line)


def take_part(
    facts: Facts, rank: int, nodes: int, address: str, port: int, timeout: float
) -> list[str]:
    """Answer the first host's questions until its verdict."""
    listener = listen(0)  # stays open for the other hosts to connect to
    facts |= {"rank": rank, "port": listener.getsockname()[1]}
    store = None
    if rank == 0 and not facts["errors"]:
        import torch.distributed as dist

        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        facts["store"] = store.port
    link = connect(address, port, timeout)
    link.say(facts)
    while True:
        question = link.hear(timeout + REDUCE)
        if "reach" in question:
            link.say(reach(question["reach"], rank))
        elif "reduce" in question:
            link.say(reduce(facts, rank, nodes, address, question["reduce"]))
        else:
            return list(question["failures"])


def connect(address: str, port: int, timeout: float) -> Link:
    """Connect to the preflight of the first host, which may not have started yet."""
    where = f"MASTER_ADDR:MASTER_PORT takes the host of NODE_RANK 0, got {address}:{port}"
    end = time.monotonic() + timeout
    while True:
        try:
            link = Link(socket.create_connection((address, port), timeout=CONNECT))
        except socket.gaierror:
            raise ValueError(f"{where}, a name that is not known here") from None
        except OSError as error:
            if time.monotonic() > end:
                late = f"{where}, which does not answer within {timeout:g} s ({error})"
                raise ValueError(late) from None
            time.sleep(0.2)
            continue
        try:
            if link.hear(timeout) == GREETING:
                return link
        except (OSError, ValueError):
            pass
        raise ValueError(f"{where}, where something else answers")


def reach(ports: list[tuple[str, str, int]], rank: int) -> list[str]:
    """Connect to every other host."""

    def knock(other: tuple[str, str, int]) -> str | None:
        host, address, port = other
        # The first host came to itself by localhost; the others know it as MASTER_ADDR.
        if address in ("127.0.0.1", "::1"):
            address = os.environ.get("MASTER_ADDR", "localhost")
        try:
            socket.create_connection((address, port), timeout=CONNECT).close()
        except OSError as error:
            return f"the others' ports take connections, got {error} from {host} ({address}:{port})"
        return None

    others = [port for number, port in enumerate(ports) if number != rank]
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        return [line for line in pool.map(knock, others) if line]


def reduce(facts: Facts, rank: int, nodes: int, address: str, port: int) -> list[str]:
    """Sum a number over all hosts, one process each."""
    backend = facts["backend"]
    failures: list[str] = []

    def work() -> None:
        import torch
        import torch.distributed as dist

        try:
            # NCCL's watchdog ends the process, which is to say why first.
            limit = datetime.timedelta(seconds=2 * REDUCE)
            store = dist.TCPStore(address, port, timeout=limit)
            world = {"rank": rank, "world_size": nodes}
            dist.init_process_group(backend, store=store, **world, timeout=limit)
            ones = torch.ones(1 << 16, device="cuda:0" if backend == "nccl" else "cpu")
            dist.all_reduce(ones)
            if (got := ones[0].item()) != nodes:
                failures.append(f"{backend} takes a sum of {nodes} over all hosts, got {got}")
        except Exception as error:  # whatever a backend may raise
            line = " ".join(f"{type(error).__name__}: {error}".split())[:400]
            failures.append(f"{backend} takes a sum over all hosts, got {line}")

    # A start of NCCL that hangs cannot be stopped, only left.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(REDUCE)
    if thread.is_alive():
        name = f"{backend.upper()}_SOCKET_IFNAME"
        failures.append(
            f"{backend} takes a sum over all hosts within {REDUCE:g} s, got none; {name} names its "
            "interface"
        )
    return failures


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # threads of a backend that hangs would be waited for
