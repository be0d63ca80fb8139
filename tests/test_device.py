"""What only a card would show, found without one: tensors on two devices, and how often the host waits for a device.

What cannot run so, and waits for `make test-gpu`: kernels of Triton (TRL's fused head takes them on cuda alone), and
streams and CUDA graphs of continuous batching (transformers 5.23, generation/continuous_batching/utils.py: the module
of a device is asked for them). `Params4bit` is made by torch's `_make_subclass` (bitsandbytes 0.50, nn/modules.py),
which refuses a tensor that has a class of its own, as fakes have: 4-bit layers keep plain parameters here, and run
bitsandbytes' own operators on them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

# How often the host may wait: by `.item()`, by what is moved to it, by shapes that depend on numbers. Those of a critic
# are its weights, copied from the policy's through the host, once; a token of a chat is read by one.
MOST = {"ppo step": 9, "ppo": 68, "critic": 23, "sampler": 26, "continuous": 13, "judge": 3, "evaluation": 3, "chat": 6,
        "reward": 3, "probe": 2, "sft": 19, "packed": 15, "distill": 22, "classify": 21, "dpo": 49, "own": 23,
        "kto": 63, "rm": 21, "best": 23, "nf4": 19, "rnnsearch": 13, "t5": 21}  # fmt: skip


@pytest.fixture(scope="module")
def found(alignkit_in: Callable, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    done = alignkit_in(tmp_path_factory.mktemp("card"), main="card_worker:main")
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(MOST), done.stderr[-2000:]
    return {line["name"]: line for line in lines}


def flat(value: Any) -> list[float]:
    return [number for part in value for number in flat(part)] if isinstance(value, list) else [value]


@pytest.mark.parametrize("name", MOST)
def test_a_device_computes_what_the_cpu_does_and_the_host_seldom_waits(name: str, found: dict[str, Any]) -> None:
    check = found[name]
    assert "card error" not in check, check["card error"]
    assert flat(check["card"]) == pytest.approx(flat(check["cpu"]), rel=1e-4, abs=1e-5)
    assert sum(check["card syncs"].values()) <= MOST[name], check["card syncs"]


@pytest.mark.parametrize("name", MOST)
def test_mistakes_that_are_planted_are_caught(name: str, found: dict[str, Any]) -> None:
    """A weight that stays on the host, and a number that is read at every pass."""
    assert "mixes devices" in found[name].get("host error", "")
    assert sum(found[name]["wait syncs"].values()) > MOST[name]
