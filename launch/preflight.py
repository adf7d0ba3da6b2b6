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
    address, port = (
        os.environ.get("MASTER_ADDR", "localhost"),
        int(os.environ.get("MASTER_PORT", 29500)),
    )

    warnings.simplefilter("ignore")  # what engines say at their import
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # else torch's import fails where only weyl_megatron's does
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    facts = look(options.engine)
    if options.local:
        return report(broken(facts), facts, rank=0)
    failures: list[str] = []
    if rank == 0:
        try:
            listener = listen(port)
        except OSError:
            failures = [
                f"{facts['host']}: MASTER_PORT takes a free port, got {port}, which is in use"
            ]
            return report(failures, facts, rank)
        meeting = threading.Thread(
            target=meet, args=(listener, nodes, options.timeout), daemon=True
        )
        meeting.start()
    try:
        failures = take_part(
            facts, rank, nodes, "localhost" if rank == 0 else address, port, options.timeout
        )
    except (OSError, ValueError) as error:
        failures = [f"{facts['host']}: {error}"]
    if rank == 0:
        meeting.join(PATIENCE)  # until the others have their verdict, too
    return report(failures, facts, rank)


def report(failures: list[str], facts: Facts, rank: int) -> int:
    """Print what is wrong: all of it on the first host, its own on every other."""
    mine = [line for line in failures if rank == 0 or line.startswith(f"{facts['host']}: ")]
    if failures and not mine:
        mine = [
            f"{facts['host']}: stopped, because of {failures[0].split(':')[0]}; the host of "
            "NODE_RANK 0 says why"
        ]
    for line in mine:
        print(f"preflight: {line}", file=sys.stderr, flush=True)
    return 1 if failures else 0


# ---- what a host has


def look(engine: str | None) -> Facts:
    """What this host has, of which some must be the same everywhere."""
    facts: Facts = {
        "host": socket.gethostname(),
        "errors": [],
        "gpus": 0,
        "backend": "gloo",
        "versions": {},
    }
    versions: dict[str, str] = facts["versions"]
    versions["Python"] = platform.python_version()
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
            facts["errors"].append(
                f"{module} takes an installation in {sys.executable}, got {line}"
            )
    if "weyl_megatron" in sys.modules:
        versions["weyl_megatron's source code"] = sources(
            Path(sys.modules["weyl_megatron"].__file__ or "").parent
        )
    if "torch" in sys.modules:
        import torch

        versions["CUDA"] = str(torch.version.cuda)
        if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
            facts["gpus"], facts["backend"] = torch.cuda.device_count(), "nccl"
            versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    facts["num_nodes"], facts["gpus_per_node"] = (
        int(os.environ.get(name, 1)) for name in ("NUM_NODES", "GPUS_PER_NODE")
    )
    interfaces = [name for _, name in socket.if_nameindex()]
    variable = "NCCL_SOCKET_IFNAME" if facts["backend"] == "nccl" else "GLOO_SOCKET_IFNAME"
    chosen = os.environ.get(variable, "")
    # NCCL takes beginnings of names, "=" for whole ones and "^" for all but these; gloo takes
    # names.
    names = (
        [] if chosen.startswith("^") else [name for name in chosen.lstrip("=").split(",") if name]
    )
    if names and not any(interface.startswith(name) for name in names for interface in interfaces):
        facts["errors"].append(
            f"{variable} takes an interface of {', '.join(interfaces)}, got {chosen}"
        )
    if not chosen and facts["backend"] == "gloo" and facts["num_nodes"] > 1:
        own = resolve(facts["host"])
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


def resolve(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return ""


def broken(facts: Facts) -> list[str]:
    """What is wrong with one host by itself."""
    failures = list(facts["errors"])
    if facts["backend"] == "nccl" and facts["gpus"] < facts["gpus_per_node"]:
        failures.append(
            f"GPUS_PER_NODE takes at most the {facts['gpus']} GPUs there, got "
            f"{facts['gpus_per_node']}"
        )
    return [f"{facts['host']}: {failure}" for failure in failures]


def unequal(facts: list[Facts]) -> list[str]:
    """What is wrong with the hosts beside each other, the first of which is the measure."""
    first, *others = facts
    failures = []
    for other in others:
        for key, name in (
            ("num_nodes", "NUM_NODES"),
            ("gpus_per_node", "GPUS_PER_NODE"),
            ("backend", "the backend"),
        ):
            if other[key] != first[key]:
                failures.append(
                    f"{other['host']}: {name} takes {first['host']}'s {first[key]}, got "
                    f"{other[key]}"
                )
        for name, version in first["versions"].items():
            if other["versions"].get(name, version) != version:
                failures.append(
                    f"{other['host']}: {name} takes {first['host']}'s version {version}, got "
                    f"{other['versions'][name]}"
                )
    return failures


# ---- the host of NODE_RANK 0, which asks all, itself included


def listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
        )
    return socket.create_server(("", port), backlog=1024)


def meet(listener: socket.socket, nodes: int, timeout: float) -> None:
    """Gather the hosts, compare them, have them reach each other, and tell all of them the
    verdict.
    """
    peers: dict[int, tuple[Link, Facts]] = {}
    try:
        with listener:
            failures = gather(listener, peers, nodes, timeout)
        facts_by_rank = [peers[rank][1] for rank in sorted(peers)]
        failures = (
            failures
            or [line for facts in facts_by_rank for line in broken(facts)]
            or unequal(facts_by_rank)
        )
        if not failures:
            doors = [(facts["host"], facts["address"], facts["door"]) for facts in facts_by_rank]
            failures = ask(peers, {"reach": doors}, (1 + nodes / 32) * CONNECT + PATIENCE)
        if not failures:
            failures = ask(peers, {"reduce": facts_by_rank[0]["store"]}, REDUCE + PATIENCE)
    except Exception as error:  # the others wait for a verdict
        failures = [
            f"{socket.gethostname()}: the preflight takes answers of its own version, got {error!r}"
        ]
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
            failures.append(
                f"{facts['host']}: its preflight takes at most {seconds:g} s, got {error}"
            )
    return failures


# ---- every host


class Link:
    """A connection that carries a line of JSON at a time."""

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
    door = listen(0)  # stays open for the other hosts to knock at
    facts |= {"rank": rank, "door": door.getsockname()[1]}
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
                raise ValueError(
                    f"{where}, which does not answer within {timeout:g} s ({error})"
                ) from None
            time.sleep(0.2)
            continue
        try:
            if link.hear(timeout) == GREETING:
                return link
        except (OSError, ValueError):
            pass
        raise ValueError(f"{where}, where something else answers")


def reach(doors: list[tuple[str, str, int]], rank: int) -> list[str]:
    """Connect to every other host."""

    def knock(door: tuple[str, str, int]) -> str | None:
        host, address, port = door
        # The first host came to itself by localhost; the others know it as MASTER_ADDR.
        if address in ("127.0.0.1", "::1"):
            address = os.environ.get("MASTER_ADDR", "localhost")
        try:
            socket.create_connection((address, port), timeout=CONNECT).close()
        except OSError as error:
            return f"the others' ports take connections, got {error} from {host} ({address}:{port})"
        return None

    others = [door for number, door in enumerate(doors) if number != rank]
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
            limit = datetime.timedelta(
                seconds=2 * REDUCE
            )  # NCCL's watchdog ends the process, which is to say why first
            store = dist.TCPStore(address, port, timeout=limit)
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=nodes, timeout=limit
            )
            one = torch.ones(1 << 16, device="cuda:0" if backend == "nccl" else "cpu")
            dist.all_reduce(one)
            if one[0].item() != nodes:
                failures.append(
                    f"{backend} takes a sum of {nodes} over all hosts, got {one[0].item()}"
                )
        except Exception as error:  # whatever a backend may raise
            line = " ".join(f"{type(error).__name__}: {error}".split())[:400]
            failures.append(f"{backend} takes a sum over all hosts, got {line}")

    thread = threading.Thread(
        target=work, daemon=True
    )  # a start of NCCL that hangs cannot be stopped, only left
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
