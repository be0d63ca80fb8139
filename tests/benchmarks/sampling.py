"""Tokens per second of sampled answers: ours, continuous batching and transformers' own generate, in turn.

A 13.9 M Llama writes 4 answers to each of 32 prompts, 32 answers at a time, of at most 96 tokens; about one token in 37
ends an answer. Processor seconds of one thread: a busy machine stretches them less than the wall's.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from inputs import write_model
from table import Row

NEW_TOKENS, AT_A_TIME, ANSWERS, PAD = 96, 32, 4, 257
_STOPS = list(range(0, 250, 40))


def measure_sampling(directory: Path, *, runs: int) -> list[Row]:
    """Compare tokens per second; medians over rounds."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    source = write_model(directory / "model", hidden_size=512, num_layers=4)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 64, (32,), generator=generator).tolist()
    prompts = [torch.randint(8, 250, (length,), generator=generator).tolist() for length in sorted(lengths)]
    rows = [prompt for prompt in prompts for _ in range(ANSWERS)]
    makers: dict[str, Callable[[Any, list[list[int]]], list[list[int]]]] = {
        "generate": _generate, "ours": _ours, "continuous": _continuous,
    }  # fmt: skip
    speeds: dict[str, list[float]] = {name: [] for name in makers}
    for number in range(runs + 1):
        for name, make in makers.items():
            began = time.process_time()
            answers = make(model, rows)
            speed = sum(map(len, answers)) / (time.process_time() - began)
            print(f"  {number} {name}: {speed:.0f} tokens/s", file=sys.stderr, flush=True)
            if number:  # the first round warms up
                speeds[name].append(speed)
    found = []
    for name, what in (("ours", "sampling 13.9 M, 4 answers a prompt"), ("continuous", "the same, engine: continuous")):
        ratio = statistics.median(mine / other for mine, other in zip(speeds[name], speeds["generate"], strict=True))
        medians = [f"{statistics.median(speeds[kind]):,.0f} tokens/s" for kind in (name, "generate")]
        found.append(Row(what, *medians, "transformers' generate", ratio, ">= 1" if name == "ours" else ""))
    return found


def _generate(model: Any, rows: Sequence[list[int]]) -> list[list[int]]:
    """What a script would do: batches as they come, padded on the left."""
    import torch

    answers: list[list[int]] = []
    for start in range(0, len(rows), AT_A_TIME):
        batch = rows[start : start + AT_A_TIME]
        width = max(map(len, batch))
        ids = torch.tensor([[PAD] * (width - len(row)) + row for row in batch])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
        output = model.generate(
            ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=NEW_TOKENS, eos_token_id=_STOPS,
            pad_token_id=PAD,
        )  # fmt: skip
        for row in output[:, width:].tolist():
            end = next((at + 1 for at, token in enumerate(row) if token in _STOPS), len(row))
            answers.append(row[:end])
    return answers


def _ours(model: Any, rows: list[list[int]], **how: Any) -> list[list[int]]:
    from alignkit.models.generation import generate_answers

    step = len(rows) if how else AT_A_TIME
    answers: list[list[int]] = []
    for start in range(0, len(rows), step):
        batch = rows[start : start + step]
        answers += generate_answers(
            model, batch, range(start, start + len(batch)), temperature=1.0, max_new_tokens=NEW_TOKENS, eos_ids=_STOPS,
            pad_id=PAD, **how,
        )  # fmt: skip
    return answers


def _continuous(model: Any, rows: list[list[int]]) -> list[list[int]]:
    return _ours(model, rows, in_flight=AT_A_TIME)
