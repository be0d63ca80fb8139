"""Stages trained by one process or by several, and what their runs differ in; for the tests of many processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

WORKER = Path(__file__).parent / "train" / "ranks_worker.py"
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
UNEQUAL = ("_runtime", "_per_second", "_seconds", "step_time")  # times, not results


def start(
    directory: Path, strategy: str, jobs: list[dict[str, Any]], *, processes: int = 2, timeout: float = 900
) -> str:
    """Train the jobs in one process or in several and return what they said."""
    spec = directory / f"{strategy}.json"
    spec.write_text(json.dumps(jobs))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])}
    command = [str(WORKER), str(spec)]
    if strategy != "one":
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *command]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=directory,
        env=environment | (FSDP if strategy == "fsdp" else {}),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stderr


def read_curve(run: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without times."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if not name.endswith(UNEQUAL)} for row in rows]


def largest_difference(first: Path, second: Path) -> dict[str, float]:
    """Return for each metric the largest difference between two runs at any step."""
    rows = list(zip(read_curve(first), read_curve(second), strict=True))
    assert rows and all(one.keys() == other.keys() for one, other in rows)
    found: dict[str, float] = {}
    for one, other in rows:
        for name in one:
            found[name] = max(found.get(name, 0.0), abs(one[name] - other[name]))
    return found


def read_weights(run: Path) -> dict[str, Any]:
    (path,) = (run / "model").glob("*model.safetensors")
    return load_file(path)


def weight_difference(first: Path, second: Path) -> float:
    one, other = read_weights(first), read_weights(second)
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def outcome(runs: Path, name: str, rank: int) -> dict[str, Any]:
    return json.loads((runs / f"{name}.outcome-{rank}.json").read_text())
