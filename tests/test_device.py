"""What only a card would show, found without one: tensors on two devices, and how often the host waits for a device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
# How often the host may wait: by `.item()`, by what is moved to it, by shapes that depend on numbers. Those of a critic
# are its weights, copied from the policy's through the host, once; a token of a chat is read by one.
MOST = {"ppo step": 9, "critic": 23, "sampler": 26, "judge": 4, "evaluation": 4, "chat": 6, "reward": 3, "probe": 2}


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    command = [sys.executable, str(TESTS / "card_worker.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(MOST) + 1, done.stderr[-2000:]
    return {line["name"]: line for line in lines}


def flat(value: Any) -> list[float]:
    return [number for part in value for number in flat(part)] if isinstance(value, list) else [value]


@pytest.mark.parametrize("name", MOST)
def test_a_device_computes_what_the_cpu_does_and_the_host_seldom_waits(name: str, found: dict[str, Any]) -> None:
    check = found[name]
    assert "error" not in check, check["error"]
    assert flat(check["card"]) == pytest.approx(flat(check["cpu"]), rel=1e-4, abs=1e-5)
    assert sum(check["syncs"].values()) <= MOST[name], check["syncs"]


def test_a_mistake_that_is_planted_is_caught(found: dict[str, Any]) -> None:
    assert "mixes devices" in found["planted"]["error"]
