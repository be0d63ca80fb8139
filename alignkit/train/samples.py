"""The same prompts answered before, during and after training, so that a person can see what changed.

Greedy, so it draws no random number; a reward model scores the answers of its rows instead of writing its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alignkit.data import Row
from alignkit.models.classifier import score_ids
from alignkit.models.generation import generate_greedy
from alignkit.recipe import Stage
from alignkit.runs.heartbeat import pulse
from alignkit.runs.record import JsonLines
from alignkit.train import ranks
from alignkit.train.built import Built
from alignkit.train.shards import gathered_root


def write_samples(stage: Stage, built: Built, samples: JsonLines, *, step: int, when: str) -> None:
    """Append one row per prompt to samples.jsonl: step, when, prompt, answer or scores, and the row's own answer.

    Every rank answers, for a sharded model needs all of them; rank 0 writes. Leaves the model in the mode it was in.
    Does nothing for language-model pre-training without prompts.
    """
    options = stage.training.samples
    rows = built.tables.eval_rows[: options.num]
    if not rows:
        return
    pulse("samples", step)
    model = built.trainer.model
    was_training = model.training
    model.eval()
    try:
        if built.is_reward:
            fields = _score_answers(built, rows)
        else:
            fields = _answer(built, rows, max_new_tokens=options.max_new_tokens)
    finally:
        model.train(was_training)
    for number, extra in enumerate(fields if ranks.is_main() else ()):
        samples.append({"step": step, "when": when, "number": number, **extra})


def _answer(built: Built, rows: Sequence[Row], *, max_new_tokens: int) -> list[dict[str, Any]]:
    tokenizer = built.chat.tokenizer
    prompts = [_prompt_of(row) for row in rows]
    ids = built.chat.encode_prompts(prompts)
    with gathered_root(built.trainer.model):
        answers = generate_greedy(
            built.trainer.model,
            ids,
            max_new_tokens=max_new_tokens,
            eos_ids=built.chat.stop_ids,
            pad_id=tokenizer.pad_token_id,
        )
    fields = [
        {"prompt": prompt, "answer": tokenizer.decode(answer, skip_special_tokens=True)}
        | ({"reference": _reference_of(row)} if row.completions else {})
        for prompt, answer, row in zip(prompts, answers, rows, strict=True)
    ]
    scores = built.score_answers(rows, answers) if built.score_answers else [{}] * len(rows)
    return [known | more for known, more in zip(fields, scores, strict=True)]


def _score_answers(built: Built, rows: Sequence[Row]) -> list[dict[str, Any]]:
    scored = []
    for row in rows:
        encoded = built.chat.encode_prompt_completion([row.prompt] * len(row.completions), row.completions)
        pad_id = built.chat.tokenizer.pad_token_id
        rewards = score_ids(built.trainer.model, [item.ids for item in encoded], pad_id=pad_id).tolist()
        scored.append({"prompt": row.prompt, "answers": list(row.completions), "rewards": rewards})
    return scored


def _prompt_of(row: Row) -> Any:
    """Return what is asked: the prompt; of a conversation its turns up to the last question; of a text its start."""
    if row.prompt:
        return row.prompt
    content = row.completions[0]
    if isinstance(content, str):
        return content[: max(len(content) // 4, 1)]
    last = max(number for number, message in enumerate(content) if message["role"] == "assistant")
    return content[:last]


def _reference_of(row: Row) -> Any:
    content = row.completions[0]
    return content if isinstance(content, str) or row.prompt else content[-1]["content"]
