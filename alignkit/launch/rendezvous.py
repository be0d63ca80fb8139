"""Where the processes of a job meet, and what the supervisors of its nodes tell each other.

Torch opens the port; here it is only found out beforehand whether it can. The supervisors write files in the shared run
directory: node 0 which try is running, each node that it is there, and the first that fails why.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alignkit import __version__
from alignkit.errors import RunError
from alignkit.launch.placement import LOOPBACK, Placement
from alignkit.recipe import Stage
from alignkit.runs.files import write_json

_LOOK_SECONDS = 0.5


def choose_port(stage: Stage, placement: Placement) -> int:
    """Return the port node 0 opens: the one that was given when it is free, else any free one.

    Raises RunError when a port that was given is in use.
    """
    wanted = placement.main_port or 0
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # torch sets it too: a dying connection is no user
        try:
            probe.bind((LOOPBACK if placement.nodes == 1 else "", wanted))
        except OSError as error:
            which = f"port {wanted}" if wanted else "no free port"
            state = "is in use" if error.errno == errno.EADDRINUSE else "cannot be opened"
            raise RunError(
                f"{which} {state} on {socket.gethostname()} ({error.strerror}); choose another with "
                "--main-port or launch.main_port",
                where=stage.where("launch.main_port"),
            ) from error
        return int(probe.getsockname()[1])


def require_known(stage: Stage, address: str) -> None:
    """Raise RunError when the main address is no host that can be found."""
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise RunError(
            f"the main address {address} cannot be resolved on {socket.gethostname()} ({error.strerror}); give the "
            "name or IP of node 0 with --main-address or launch.main_address",
            where=stage.where("launch.main_address"),
        ) from error


def wait_for_main(stage: Stage, placement: Placement, *, look: Callable[[], bool], pause: Callable[[], None]) -> None:
    """Wait until node 0 answers at its port and `look` agrees; `pause` is called between two tries and may raise.

    Raises RunError when the host is unknown, or nobody answers for launch.timeout_seconds.
    """
    address, port = str(placement.main_address), placement.main_port
    require_known(stage, address)
    deadline = time.monotonic() + stage.launch.timeout_seconds
    while not (_answers(address, int(port or 0)) and look()):
        if time.monotonic() > deadline:
            raise RunError(
                f"nobody answers at {address}:{port} after {stage.launch.timeout_seconds:g} s; start the same command "
                "on node 0, check --main-address and --main-port, and that no firewall stands between",
                where=stage.where("launch.main_address"),
            )
        pause()
        time.sleep(_LOOK_SECONDS)


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=2).close()
    except OSError:
        return False
    return True


def network_interface(placement: Placement) -> str | None:
    """Return the interface the processes reach each other through, None where it cannot be told.

    gloo would take the one this host's name resolves to, which on many machines is none the others reach.
    """
    import psutil

    if placement.nodes == 1:
        return "lo" if sys.platform == "linux" else None
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            str(placement.main_address), placement.main_port, type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # sends nothing: it only asks the kernel for the way
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == own for address in addresses):
            return str(name)
    return None


CURRENT = "current.json"
_ABORT = "abort.json"
_COMPARED = ("processes", "nodes", "strategy", "device", "version")


@dataclass(frozen=True)
class Abort:
    """Why a node ended the job."""

    node: int
    host: str
    exit_code: int
    problems: tuple[str, ...]


def _facts(placement: Placement) -> dict[str, Any]:
    return {
        "processes": placement.processes,
        "nodes": placement.nodes,
        "strategy": placement.strategy,
        "device": placement.device,
        "version": __version__,
        "host": socket.gethostname(),
    }


def announce(launch_dir: Path, attempt: int, placement: Placement) -> None:
    """Say, as node 0, which try is the current one."""
    write_json(launch_dir / CURRENT, {"attempt": attempt, **_facts(placement)})


def arrive(attempt_dir: Path, placement: Placement) -> None:
    """Say that this node takes part in a try."""
    write_json(attempt_dir / f"node-{placement.node_rank}.json", _facts(placement))


def arrived(attempt_dir: Path) -> set[int]:
    """Return the nodes that take part in a try."""
    return {int(path.stem.removeprefix("node-")) for path in attempt_dir.glob("node-*.json")}


def current_attempt(launch_dir: Path) -> int:
    """Return the number of the try that node 0 announced last, 0 for none."""
    return int(_read(launch_dir / CURRENT).get("attempt", 0))


def require_same_job(stage: Stage, launch_dir: Path, placement: Placement) -> None:
    """Raise RunError naming both values when this node would start something else than node 0."""
    theirs, ours = _read(launch_dir / CURRENT), _facts(placement)
    for key in _COMPARED:
        if theirs.get(key) != ours[key]:
            raise RunError(
                f"the nodes do not start the same job: {key} is {theirs.get(key)} on node 0 ({theirs.get('host')}) and "
                f"{ours[key]} on node {placement.node_rank} ({ours['host']}); start the same command, recipe and "
                "alignkit on all of them",
                where=stage.where(f"launch.{key}"),
            )


def abort(attempt_dir: Path, placement: Placement, exit_code: int, problems: tuple[str, ...]) -> None:
    """Tell the other nodes to end too, unless one has told already."""
    text = json.dumps(asdict(Abort(int(placement.node_rank or 0), socket.gethostname(), exit_code, problems)))
    temporary = attempt_dir / f".abort-{placement.node_rank}.tmp"
    try:
        if not (attempt_dir / _ABORT).exists():
            temporary.write_text(text)
            os.replace(temporary, attempt_dir / _ABORT)
    except OSError:  # no room: then silence tells them, after launch.heartbeat_seconds
        pass


def read_abort(attempt_dir: Path) -> Abort | None:
    """Return why the job is to end, None while nobody says so."""
    data = _read(attempt_dir / _ABORT)
    return Abort(**{**data, "problems": tuple(data["problems"])}) if data else None


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
