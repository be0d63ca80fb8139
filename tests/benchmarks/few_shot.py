"""Few-shot exact match with K = 8: scored and answered in one read of each context, beside a read for either.

The weights are random, so most answers part from the right one at their first token and are followed no further but for
the eight that a report shows; both ways must find the same answers right. In items a processor second.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from inputs import write_model
from labels import SIZES
from table import Row

_PAIRS = "hot cold big small fast slow light dark early late rich poor happy sad wet dry hard soft high low strong weak"


def measure_exact_match(directory: Path, *, runs: int) -> list[Row]:
    """Compare items per second; medians over rounds."""
    from alignkit.evaluate.metrics.tasks import Item, write_prompt
    from alignkit.evaluate.policy import Policy
    from alignkit.rewards.base import Workspace

    words = _PAIRS.split()
    pairs = [*zip(words[::2], words[1::2], strict=True), *zip(words[1::2], words[::2], strict=True)]
    items = [Item(f"Q: What is the opposite of {one}?\n\nA:", f" {other}") for one, other in pairs]
    prompts = [write_prompt(items, place, shots=8, seed=0) for place in range(len(items))]
    wanted = [item.completion for item in items]

    def once(policy: Policy) -> list[str]:
        return [text for _, text in policy.match(prompts, wanted, spare_tokens=8, num_whole=8)]

    def twice(policy: Policy) -> list[str]:
        longest = max(item.tokens for item in policy.score_continuations(prompts, wanted))
        answers = policy.answer(prompts, max_new_tokens=longest + 8, plain=True)
        return [group[0].text for group in answers]

    rows = []
    for size, (hidden, layers, _, _) in SIZES.items():
        model = write_model(directory / f"model-{hidden}", hidden_size=hidden, num_layers=layers, positions=4096)
        speeds: dict[str, list[float]] = {"once": [], "twice": []}
        for number in range(runs + 1):  # the first round warms up
            right = []
            for name, ask in (("once", once), ("twice", twice)):
                policy = Policy(str(model), Workspace(device="cpu"))
                assert policy.loaded
                began = time.process_time()
                answers = ask(policy)
                speeds[name] += [len(items) / (time.process_time() - began)] if number else []
                right.append([answer.strip() == each.strip() for answer, each in zip(answers, wanted, strict=True)])
            assert right[0] == right[1]
        ratio = statistics.median(mine / other for mine, other in zip(*speeds.values(), strict=True))
        medians = [f"{statistics.median(values):,.1f} items/s" for values in speeds.values()]
        rows.append(
            Row(f"few-shot exact match {size}, K = 8", *medians, "a read to score and one to answer", ratio, ">= 3")
        )
    return rows
