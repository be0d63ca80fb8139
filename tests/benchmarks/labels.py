"""Labels per second of the local judge, beside what a script would do: two generations for each pair.

Both judge the same pairs in both orders with the same base model in one process, in turn, with and without the paper's
worked examples in front. Ours reads what questions have in common once, in batches, and keeps every answer on the disk;
the script generates a few tokens for one question at a time and reads the letter. In labels a processor second.

A row also tells what reuse alone could reach: a plain read of every token that differs, once, in all layers, without
padding and without attention to worked examples. Ours may pass it: its last layer runs only where something is read.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from inputs import write_model
from table import Row

if TYPE_CHECKING:
    from alignkit.feedback.judge import Judge, Pairing

SIZES = {"0.14 M": (64, 2, 48, 12), "13.9 M": (512, 4, 48, 3)}  # hidden size, layers, pairs, those for the script
_NEW_TOKENS = 8
_BATCH = 16


def measure_labels(directory: Path, *, runs: int) -> list[Row]:
    """Compare labels per second; medians over rounds."""
    rows = []
    for size, (hidden, layers, count, few) in SIZES.items():
        model = write_model(directory / f"model-{hidden}", hidden_size=hidden, num_layers=layers, positions=4096)
        pairings = _make_pairings(count)
        for examples in ("none", "builtin"):
            ours, theirs, bounds = list[float](), list[float](), list[float]()
            for number in range(runs + 1):
                judge = _make_judge(model, examples)
                speeds = (
                    _label(judge, pairings, directory / f"{hidden}-{examples}-{number}"),
                    _generate(model, judge, pairings[:: count // few]),
                )
                bound = _read_once(judge, pairings) / speeds[1]
                print(
                    f"  {size}, {examples}: {speeds[0]:.1f} and {speeds[1]:.1f} labels/s, at most {bound:.1f} x",
                    file=sys.stderr,
                    flush=True,
                )
                if number:  # the first round warms up
                    ours.append(speeds[0])
                    theirs.append(speeds[1])
                    bounds.append(bound)
            ratio = statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))
            medians = [f"{statistics.median(speeds):,.1f} labels/s" for speeds in (ours, theirs)]
            what = f"labels {size}, {'3 worked examples' if examples == 'builtin' else 'no examples'}"
            what += f"; every token read once: {statistics.median(bounds):.1f} x"
            rows.append(Row(what, *medians, "two generations per pair", ratio, ">= 5"))
    return rows


def _make_pairings(count: int) -> list[Pairing]:
    from alignkit.data.builtin import iter_builtin, parse_builtin
    from alignkit.feedback.judge import Pairing

    rows = iter_builtin(parse_builtin(f"builtin:preferences?rows={count}"))
    return [Pairing(row["prompt"], row["chosen"], row["rejected"], place, place) for place, row in rows]


def _make_judge(path: Path, examples: str) -> Judge:
    from alignkit.feedback.constitution import load_constitution, load_examples
    from alignkit.feedback.judge import Judge
    from alignkit.feedback.local import LocalModel
    from alignkit.feedback.prompts import Quoter

    model = LocalModel(str(path), device="cpu", batch_size=_BATCH)
    constitution = load_constitution("builtin:harmlessness", needs="comparison")
    return Judge(model, constitution, load_examples(examples), Quoter(model.control_tokens), seed=0)


def _label(judge: Judge, pairings: Sequence[Pairing], directory: Path) -> float:
    from alignkit.feedback.cache import Asker, Store
    from alignkit.feedback.judge import judge_all
    from alignkit.runs.signals import Stop

    directory.mkdir()
    asker = Asker("bench", Store(directory / "feedback.jsonl"), Stop())
    began = time.process_time()
    labels = judge_all(asker, judge, pairings)
    seconds = time.process_time() - began
    assert all(label.p_first is not None for label in labels)
    return len(labels) / seconds


def _generate(path: Path, judge: Judge, pairings: Sequence[Pairing]) -> float:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from alignkit.feedback.judge import _ask, _show_all
    from alignkit.feedback.writer import parse_choice

    model = AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    requests = [_ask(judge, item) for item in _show_all(judge, pairings)]
    began = time.process_time()
    for request in requests:
        inputs = tokenizer(request.transcript, return_tensors="pt")
        with torch.no_grad():
            output = model.generate(**inputs, do_sample=False, max_new_tokens=_NEW_TOKENS, pad_token_id=0)
        parse_choice(tokenizer.decode(output[0, inputs.input_ids.shape[1] :]))
    return len(pairings) / (time.process_time() - began)


def _read_once(judge: Judge, pairings: Sequence[Pairing]) -> float:
    """Read every token that no question before has in the same place after the same text, in rows of 512."""
    import torch

    from alignkit.feedback.judge import _ask, _show_all
    from alignkit.feedback.local import LocalModel

    assert isinstance(judge.model, LocalModel)
    asked = sorted(judge.model._encoder.split(_ask(judge, item))[0] for item in _show_all(judge, pairings))
    new = [ids[len(os.path.commonprefix([before, ids])) :] for before, ids in pairwise([[], *asked])]
    flat = [token for ids in new for token in ids]
    began = time.process_time()
    with torch.no_grad():
        for start in range(0, len(flat), 512):
            judge.model._model(torch.tensor([flat[start : start + 512]]), use_cache=False, logits_to_keep=1)
    return len(pairings) / (time.process_time() - began)
