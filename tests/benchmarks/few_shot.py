"""Few-shot tasks with K = 8, each context read once: beside a read for each choice, and one to score, one to answer.

Exact match is held against both: what a script does with transformers alone, and our own scores, then our own answers.

The weights are random, so most answers part from the right one at their first token and are followed no further but for
the eight that a report shows; both ways must find the same answers right, and the same log-probabilities of choices. In
items a processor second. A row of exact match also tells what one read alone, without any answer, would reach.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from inputs import write_model
from labels import SIZES
from table import Row

_PAIRS = "hot cold big small fast slow light dark early late rich poor happy sad wet dry hard soft high low strong weak"


_CHOICES = 4
_BATCH = 16


def measure_few_shot(directory: Path, *, runs: int) -> list[Row]:
    """Compare items per second; medians over rounds."""
    from transformers import AutoModelForCausalLM

    from alignkit.evaluate.metrics.tasks import Item, write_prompt
    from alignkit.evaluate.policy import Policy

    words = _PAIRS.split()
    pairs = [*zip(words[::2], words[1::2], strict=True), *zip(words[1::2], words[::2], strict=True)]
    items = [Item(f"Q: What is the opposite of {one}?\n\nA:", f" {other}") for one, other in pairs]
    prompts = [write_prompt(items, place, shots=8, seed=0) for place in range(len(items))]
    wanted = [item.completion for item in items]
    contexts = [prompt for prompt in prompts for _ in range(_CHOICES)]
    choices = [
        f" {words[(3 * place + number) % len(words)]}" for place in range(len(items)) for number in range(_CHOICES)
    ]

    def share(policy: Policy) -> list[float]:
        return [found.logp for found in policy.score_continuations(contexts, choices)]

    def score_plainly(policy: Policy, contexts: Sequence[str], tails: Sequence[str]) -> list[float]:
        tokenizer = policy.loaded.tokenizer
        asked = zip(*(tokenizer(texts, add_special_tokens=False).input_ids for texts in (contexts, tails)), strict=True)
        return _score_each(plain, list(asked), int(tokenizer.pad_token_id))

    def read_again(policy: Policy) -> list[float]:
        return score_plainly(policy, contexts, choices)

    def once(policy: Policy) -> list[bool]:
        found = policy.match(prompts, wanted, spare_tokens=8, num_whole=8)
        return [text.strip() == each.strip() for (_, text), each in zip(found, wanted, strict=True)]

    def read_once(policy: Policy) -> list[float]:
        return [found.logp for found in policy.score_continuations(prompts, wanted)]

    def twice(policy: Policy) -> list[bool]:
        longest = max(item.tokens for item in policy.score_continuations(prompts, wanted))
        answers = policy.answer(prompts, max_new_tokens=longest + 8, plain=True)
        return [group[0].text.strip() == each.strip() for group, each in zip(answers, wanted, strict=True)]

    def script(policy: Policy) -> list[bool]:
        score_plainly(policy, prompts, wanted)
        texts = _answer_each(plain, policy.loaded.tokenizer, prompts, max(map(len, wanted)) + 8)
        return [text.split("\n", 1)[0].strip() == each.strip() for text, each in zip(texts, wanted, strict=True)]

    rows = []
    for size, (hidden, layers, _, _) in SIZES.items():
        model = write_model(directory / f"model-{hidden}", hidden_size=hidden, num_layers=layers, positions=4096)
        plain = AutoModelForCausalLM.from_pretrained(model).eval()  # ours leaves out padding and repeats
        for what, theirs, ways in (
            (f"few-shot, {_CHOICES} choices", "the context read for each choice", (share, read_again)),
            ("few-shot exact match", "a script's read to score and one to answer", (once, script)),
            ("few-shot exact match", "our own read to score and one to answer", (once, twice)),
        ):
            speeds = _time_both(model, ways, len(items), runs)
            ratio = statistics.median(mine / other for mine, other in zip(*speeds, strict=True))
            medians = [f"{statistics.median(values):,.1f} items/s" for values in speeds]
            if ways[0] is once:
                (reads,) = _time_both(model, (read_once,), len(items), runs)
                bound = statistics.median(read / other for read, other in zip(reads, speeds[1], strict=True))
                what += f", one read alone: {bound:.1f} x"
            what += ", one round" if runs == 1 else ""
            rows.append(Row(f"{what}; {size}, K = 8", *medians, theirs, ratio, ">= 3"))
    return rows


def _time_both(model: Path, ways: Sequence[Callable[..., Any]], count: int, runs: int) -> list[list[float]]:
    import pytest

    from alignkit.evaluate.policy import Policy
    from alignkit.rewards import Workspace

    speeds: list[list[float]] = [[] for _ in ways]
    for number in range(runs + 1):  # the first round warms up
        answers = []
        for way, values in zip(ways, speeds, strict=True):
            policy = Policy(str(model), Workspace(device="cpu"))
            assert policy.loaded
            began = time.process_time()
            answers.append(way(policy))
            values += [count / (time.process_time() - began)] if number else []
        assert answers[0] == pytest.approx(answers[-1], abs=1e-4)  # of sums over tokens
    return speeds


def _score_each(model: Any, asked: list[tuple[list[int], list[int]]], pad_id: int) -> list[float]:
    """What a script would do: log-probabilities from the logits of padded batches of like length."""
    import torch

    order, found = sorted(range(len(asked)), key=lambda place: -sum(map(len, asked[place]))), [0.0] * len(asked)
    for start in range(0, len(order), _BATCH):
        places = order[start : start + _BATCH]
        rows = [asked[place][0] + asked[place][1] for place in places]
        width = max(map(len, rows))
        ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        with torch.no_grad():
            logps = model(ids, attention_mask=mask, use_cache=False).logits.log_softmax(dim=-1)
        for row, place in enumerate(places):
            begin, end = len(asked[place][0]), len(rows[row])
            tail = ids[row, begin:end, None]
            found[place] = float(logps[row, begin - 1 : end - 1].gather(1, tail).sum())
    return found


def _answer_each(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """What a script would do: greedy answers of padded batches of like length."""
    import torch

    order, texts = sorted(range(len(prompts)), key=lambda place: len(prompts[place])), [""] * len(prompts)
    for start in range(0, len(order), _BATCH):
        places = order[start : start + _BATCH]
        inputs = tokenizer([prompts[place] for place in places], return_tensors="pt", padding=True, padding_side="left")
        with torch.no_grad():
            output = model.generate(
                **inputs, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id
            )
        said = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        for place, text in zip(places, said, strict=True):
            texts[place] = text
    return texts
