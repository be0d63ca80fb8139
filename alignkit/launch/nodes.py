"""What the supervisors of a job's nodes tell each other, as files in the shared run directory.

Node 0 writes which try is running, each node that it is there, and the first that fails why. Nothing here waits.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alignkit import __version__
from alignkit.errors import RunError
from alignkit.launch.placement import Placement
from alignkit.recipe import Stage
from alignkit.runs.files import write_json

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
