"""Labels per second of the local judge, beside what a script would do: two generations for each pair.

Both judge the same pairs in both orders with the same model in one process, in turn. Ours scores the two options of a
question on one shared prefix, in batches, and keeps every answer on the disk; the script generates a few tokens for
one question at a time and reads the letter.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from inputs import write_model
from table import Row

SIZES = {"0.14 M": (64, 2, 96), "13.9 M": (512, 4, 12)}  # name -> hidden size, layers, pairs
_NEW_TOKENS = 8
_BATCH = 16


def measure_labels(directory: Path, *, runs: int) -> list[Row]:
    """Compare labels per second; medians over rounds."""
    rows = []
    for size, (hidden, layers, count) in SIZES.items():
        model = write_model(directory / f"model-{hidden}", hidden_size=hidden, num_layers=layers, positions=2048)
        pairings = _make_pairings(count)
        ours, theirs = [], []
        for number in range(runs + 1):
            speeds = _label(model, pairings, directory / f"{hidden}-{number}"), _generate(model, pairings)
            print(f"  {size}: {speeds[0]:.1f} and {speeds[1]:.1f} labels/s", file=sys.stderr, flush=True)
            if number:  # the first round warms up
                ours.append(speeds[0])
                theirs.append(speeds[1])
        ratio = statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))
        medians = [f"{statistics.median(speeds):,.1f} labels/s" for speeds in (ours, theirs)]
        rows.append(Row(f"labels {size}, both orders", *medians, "two generations per pair", ratio, ">= 1"))
    return rows


def _make_pairings(count: int) -> list:
    from alignkit.data.builtin import iter_builtin, parse_builtin
    from alignkit.feedback.comparisons import Pairing

    rows = iter_builtin(parse_builtin(f"builtin:preferences?rows={count}"))
    return [Pairing(row["prompt"], row["chosen"], row["rejected"], place, place) for place, row in rows]


def _make_judge(model) -> object:
    from alignkit.feedback.comparisons import Judge
    from alignkit.feedback.constitution import load_constitution
    from alignkit.feedback.examples import Examples
    from alignkit.feedback.quoting import Quoter

    constitution = load_constitution("builtin:harmlessness", needs="comparison")
    return Judge(model, constitution, Examples(), Quoter(model.control_tokens), seed=0)


def _label(path: Path, pairings: Sequence, directory: Path) -> float:
    from alignkit.feedback.comparisons import judge_all
    from alignkit.feedback.desk import Desk
    from alignkit.feedback.local import LocalModel
    from alignkit.feedback.stop import Stop
    from alignkit.feedback.store import Store

    directory.mkdir()
    judge = _make_judge(LocalModel(str(path), device="cpu", batch_size=_BATCH))
    desk = Desk("bench", Store(directory / "feedback.jsonl"), Stop())
    began = time.perf_counter()
    labels = judge_all(desk, judge, pairings)
    seconds = time.perf_counter() - began
    assert all(label.p_first is not None for label in labels)
    return len(labels) / seconds


def _generate(path: Path, pairings: Sequence) -> float:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from alignkit.feedback.choice import parse_choice
    from alignkit.feedback.comparisons import Comparison
    from alignkit.feedback.prompts import comparison_question

    model = AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    question = "Which answer is better?"
    began = time.perf_counter()
    for pairing in pairings:
        answers = [pairing.first[0]["content"], pairing.second[0]["content"]]
        for first, second in (answers, answers[::-1]):
            text = comparison_question(Comparison(tuple(pairing.prompt), first, second, question), str)
            inputs = tokenizer(text, return_tensors="pt")
            with torch.no_grad():
                output = model.generate(**inputs, do_sample=False, max_new_tokens=_NEW_TOKENS, pad_token_id=0)
            parse_choice(tokenizer.decode(output[0, inputs.input_ids.shape[1] :]))
    return len(pairings) / (time.perf_counter() - began)
