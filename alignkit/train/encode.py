"""From rows to tokens, one encoder a method: what is learnt, what is masked, what is cut.

Columns, int32 lists unless said otherwise:

    sft   input_ids, labels (-100 where nothing is learnt), length
    rm    answers_ids (one list per answer, best first), scores (float, one per answer), label, margin (float), length
    dpo   prompt_ids, chosen_ids, rejected_ids, label (float), length
    kto   prompt_ids, completion_ids, label (bool), length
    ppo   prompt_ids, prompt (JSON of its text or messages), columns (JSON of the row's others), length
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignkit.data import Rejects, Row
from alignkit.errors import DataError
from alignkit.models.chat import Chat, ConversationError, Encoded, Written
from alignkit.models.start import context_length
from alignkit.recipe import Stage
from alignkit.recipe.schema import PpoOptions, RmOptions
from alignkit.train.losses import is_logistic

IGNORED = -100


@dataclass
class LengthReport:
    """Token counts of one table and what was cut or left out for its length."""

    num_rows: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    longest_tokens: int = 0
    num_truncated: int = 0
    first_cut: str = ""  # the place of the first row that was cut
    num_too_long: int = 0
    num_apart: int = 0  # answers in a text of their own: the template rewrites them once later turns follow
    num_untrained: int = 0  # nothing to learn was left: every label masked, or every pair a tie

    def cut(self, row: Row) -> None:
        """Count a row that is cut to max_length."""
        self.num_truncated += 1
        self.first_cut = self.first_cut or row.place

    @property
    def truncated_share(self) -> float:
        """Share of rows cut or left out for their length."""
        seen = self.num_rows + self.num_too_long + self.num_untrained
        return (self.num_truncated + self.num_too_long) / seen if seen else 0.0


# A row with its texts as ids: of sft one and those that need a text of their own (of token ids none), else one a
# completion.
EncodedRow = tuple[Row, Sequence[Encoded]]
# Called with no rows at the end: what an encoder has kept back is given then.
Encode = Callable[[Sequence[EncodedRow], LengthReport, Rejects], dict[str, list[Any]]]


def write_row(stage: Stage, chat: Chat, row: Row) -> list[Written]:
    """Return the texts of a row as its stage trains on them. Raises ConversationError."""
    if stage.method == "ppo":
        return [chat.write_prompt(row.prompt)]
    if stage.method != "sft":
        return [chat.write_pair(row.prompt, completion)[-1] for completion in row.completions]
    if row.tokens is not None:
        if (most := max(row.tokens[0])) >= (size := len(chat.tokenizer)):
            raise ConversationError(f"input_ids: {most} is no token of the model's tokenizer, which has {size}")
        return []
    if row.kind == "segments":
        return [chat.write_segments(list(map(str, row.completions)), [bool(score) for score in row.scores or ()])]
    content = row.completions[0]
    if row.prompt or isinstance(content, str):
        written = chat.write_pair(row.prompt, content)
        return written if stage.trainer.get("completion_only_loss", True) else written[-1:]
    masks = not _packs(stage) and stage.trainer.get("assistant_only_loss", True)
    return chat.write(content, mask=masks)


def _packs(stage: Stage) -> bool:
    return bool(stage.options.model_dump().get("objective") == "lm")


def choose_encoder(stage: Stage) -> Encode:
    """Return the encoder of a stage; it may keep state between batches, so each table takes a new one."""
    max_length = stage.trainer.get("max_length")
    if stage.method == "sft":
        return _SftEncoder(stage, max_length)
    if stage.method == "ppo":
        return PromptEncoder(longest_prompt(stage))
    if stage.method == "rm":
        options = stage.expect(RmOptions)
        return _RewardEncoder(max_length, pairs_only=options.grouping == "pairs", best_only=options.loss == "best_of")
    if stage.is_unpaired:
        return _UnpairedEncoder(max_length)
    return _PairEncoder(max_length, soft_labels=_reads_soft_labels(stage))


def _reads_soft_labels(stage: Stage) -> bool:
    """Tell whether the stage's loss is plain cross-entropy, which alone knows what a soft label means."""
    others = {"ld_alpha", "f_divergence_type", "use_weighting", "loss_weights"} & stage.trainer.keys()
    return is_logistic(stage.trainer) and not others


class _SftEncoder:
    """Rows of text, messages or prompt-completion -> input_ids and labels."""

    def __init__(self, stage: Stage, max_length: int | None) -> None:
        self._max_length = max_length
        self._packs = _packs(stage)
        self._completion_only = stage.trainer.get("completion_only_loss", True)
        self._rest = np.empty(0, dtype=np.int32)  # the tail of the stream that does not fill a block yet

    def __call__(self, rows: Sequence[EncodedRow], lengths: LengthReport, rejects: Rejects) -> dict[str, list[Any]]:
        if self._packs:
            return self._pack(rows, lengths)
        columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "length": []}
        for row, texts in rows:
            whole = row.prompt and not self._completion_only
            found = [row.tokens] if row.tokens else [(text.ids, text.ids if whole else text.labels) for text in texts]
            lengths.num_apart += len(found) - 1
            for ids, labels in found:
                lengths.longest_tokens = max(lengths.longest_tokens, len(ids))
                if self._max_length and len(ids) > self._max_length:
                    lengths.cut(row)
                    ids, labels = ids[: self._max_length], labels[: self._max_length]
                trained = int((np.asarray(labels[1:]) != IGNORED).sum())
                if not trained:
                    lengths.num_untrained += 1
                    rejects.add(row.place, "no token to learn from within max_length")
                    continue
                lengths.num_rows += 1
                lengths.num_tokens += len(ids)
                lengths.num_trained_tokens += trained
                columns["input_ids"].append(ids)
                columns["labels"].append(labels)
                columns["length"].append(len(ids))
        return columns

    def _pack(self, rows: Sequence[EncodedRow], lengths: LengthReport) -> dict[str, list[Any]]:
        """Concatenate documents, each closed by eos, and cut the stream into blocks of max_length.

        What does not fill a block waits for the next rows; when there are none, it is a shorter block of its own.
        """
        block = self._max_length or 1024
        if not rows:
            tail, self._rest = self._rest, self._rest[:0]
            if len(tail) < 2:  # one token has nothing that it could be learnt from
                return {"input_ids": [], "labels": [], "length": []}
            lengths.num_rows += 1
            lengths.num_tokens += len(tail)
            lengths.num_trained_tokens += len(tail) - 1
            return {"input_ids": [tail], "labels": [tail], "length": [len(tail)]}
        documents = (row.tokens[0] if row.tokens else texts[-1].ids for row, texts in rows)
        pieces = [self._rest, *(np.asarray(ids, dtype=np.int32) for ids in documents)]
        stream = np.concatenate(pieces)
        num_blocks = len(stream) // block
        self._rest = stream[num_blocks * block :]
        lengths.longest_tokens = max(lengths.longest_tokens, *(len(piece) for piece in pieces))
        lengths.num_rows += num_blocks
        lengths.num_tokens += num_blocks * block
        lengths.num_trained_tokens += num_blocks * (block - 1)
        blocks = list(stream[: num_blocks * block].reshape(num_blocks, block))
        return {"input_ids": blocks, "labels": blocks, "length": [block] * num_blocks}


class _RewardEncoder:
    """Pairs and ranked answers -> all answers of a prompt in one row, best first, each a whole conversation."""

    def __init__(self, max_length: int | None, *, pairs_only: bool, best_only: bool) -> None:
        self._max_length = max_length
        self._pairs_only, self._best_only = pairs_only, best_only

    def __call__(self, rows: Sequence[EncodedRow], lengths: LengthReport, rejects: Rejects) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {
            name: [] for name in ("answers_ids", "scores", "label", "margin", "length")
        }  # fmt: skip
        for row, texts in rows:
            answers = [text.ids for text in texts]
            longest = max(len(ids) for ids in answers)
            lengths.longest_tokens = max(lengths.longest_tokens, longest)
            if self._max_length and longest > self._max_length:
                # A reward is read at the end of an answer: a cut answer would be scored on a text nobody judged.
                lengths.num_too_long += 1
                rejects.add(row.place, f"longer than max_length ({longest} tokens)")
                continue
            scores = list(row.scores) if row.scores else [float(len(answers) - rank) for rank in range(len(answers))]
            if self._best_only and (row.label not in (None, 1.0) or row.margin or scores[0] == scores[1]):
                raise DataError(
                    "has a soft label, a margin or a tie for the best, which loss: best_of cannot read; use pairwise",
                    where=row.place,
                )
            if len(set(scores)) < 2:
                lengths.num_untrained += 1
                rejects.add(row.place, "all answers tie")
                continue
            for group in self._groups(len(answers), scores):
                tokens = sum(len(answers[number]) for number in group)
                lengths.num_rows += 1
                lengths.num_tokens += tokens
                lengths.num_trained_tokens += tokens
                columns["answers_ids"].append([answers[number] for number in group])
                columns["scores"].append([scores[number] for number in group])
                columns["label"].append(1.0 if row.label is None else row.label)
                columns["margin"].append(row.margin or 0.0)
                columns["length"].append(max(len(answers[number]) for number in group))
        return columns

    def _groups(self, num_answers: int, scores: Sequence[float]) -> list[tuple[int, ...]]:
        if not self._pairs_only:
            return [tuple(range(num_answers))]
        pairs = [(i, j) for i in range(num_answers) for j in range(i + 1, num_answers)]
        return [(i, j) for i, j in pairs if scores[i] != scores[j]]


class _PairEncoder:
    """Preference pairs -> prompt, chosen and rejected ids; the completion is cut at max_length, never the prompt."""

    def __init__(self, max_length: int | None, *, soft_labels: bool) -> None:
        self._max_length, self._soft_labels = max_length, soft_labels

    def __call__(self, rows: Sequence[EncodedRow], lengths: LengthReport, rejects: Rejects) -> dict[str, list[Any]]:
        soft = next((row for row, _ in rows if row.label not in (None, 1.0)), None)
        if soft is not None and not self._soft_labels:
            raise DataError(
                f"has the soft label {soft.label}, which only plain sigmoid and cdpo losses can read; "
                "change loss_type, or take the label column out",
                where=soft.place,
            )
        if single := next((row for row, _ in rows if row.kind != "pair"), None):
            raise DataError(
                "is a single answer, which this loss cannot compare with another; set loss_type: kto",
                where=single.place,
            )
        columns: dict[str, list[Any]] = {
            name: [] for name in ("prompt_ids", "chosen_ids", "rejected_ids", "label", "length")
        }  # fmt: skip
        for row, (chosen, rejected) in rows:
            limit = self._max_length or max(len(chosen.ids), len(rejected.ids))
            prompt = chosen.ids[: chosen.prompt_length]
            longest = max(len(chosen.ids), len(rejected.ids))
            lengths.longest_tokens = max(lengths.longest_tokens, longest)
            if len(prompt) >= limit:
                lengths.num_too_long += 1
                rejects.add(row.place, f"the prompt alone fills max_length ({len(prompt)} tokens)")
                continue
            if longest > limit:
                lengths.cut(row)
            answers = [side.ids[side.prompt_length : limit] for side in (chosen, rejected)]
            lengths.num_rows += 1
            lengths.num_tokens += 2 * len(prompt) + len(answers[0]) + len(answers[1])
            lengths.num_trained_tokens += len(answers[0]) + len(answers[1])
            columns["prompt_ids"].append(prompt)
            columns["chosen_ids"].append(answers[0])
            columns["rejected_ids"].append(answers[1])
            columns["label"].append(1.0 if row.label is None else row.label)
            columns["length"].append(len(prompt) + max(len(answers[0]), len(answers[1])))
        return columns


class _UnpairedEncoder:
    """Single answers with a thumb up or down -> prompt and completion ids; a pair gives one of each."""

    def __init__(self, max_length: int | None) -> None:
        self._max_length = max_length

    def __call__(self, rows: Sequence[EncodedRow], lengths: LengthReport, rejects: Rejects) -> dict[str, list[Any]]:
        singles = [
            (row, text, bool(row.label) if row.kind == "unpaired" else rank == 0)
            for row, texts in rows
            for rank, text in enumerate(texts)
        ]
        columns: dict[str, list[Any]] = {name: [] for name in ("prompt_ids", "completion_ids", "label", "length")}
        for row, item, desirable in singles:
            limit = self._max_length or len(item.ids)
            lengths.longest_tokens = max(lengths.longest_tokens, len(item.ids))
            if item.prompt_length >= limit:
                lengths.num_too_long += 1
                rejects.add(row.place, f"the prompt alone fills max_length ({item.prompt_length} tokens)")
                continue
            if len(item.ids) > limit:
                lengths.cut(row)
            ids = item.ids[:limit]
            lengths.num_rows += 1
            lengths.num_tokens += len(ids)
            lengths.num_trained_tokens += len(ids) - item.prompt_length
            columns["prompt_ids"].append(ids[: item.prompt_length])
            columns["completion_ids"].append(ids[item.prompt_length :])
            columns["label"].append(desirable)
            columns["length"].append(len(ids))
        return columns


def longest_prompt(stage: Stage) -> int | None:
    """Return the most tokens a ppo prompt may have: what max_new_tokens leaves of the context; None without a limit.

    Raises DataError when that is nothing.
    """
    context, answer = context_length(stage), stage.expect(PpoOptions).max_new_tokens
    if context is not None and answer >= context:
        raise DataError(
            f"{stage.name}.max_new_tokens is {answer}, and the model reads {context} tokens at once: no room for a "
            "prompt is left; lower it",
            where=stage.where(f"{stage.name}.max_new_tokens"),
        )
    return None if context is None else context - answer


class PromptEncoder:
    """Prompts -> their ids as generation starts from them, the prompt itself and its columns for rewards."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit

    def __call__(self, rows: Sequence[EncodedRow], lengths: LengthReport, rejects: Rejects) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {name: [] for name in ("prompt_ids", "prompt", "columns", "length")}
        for row, (prompt,) in rows:
            ids = prompt.ids
            lengths.longest_tokens = max(lengths.longest_tokens, len(ids))
            if self._limit is not None and len(ids) > self._limit:
                lengths.num_too_long += 1
                rejects.add(row.place, f"a prompt of {len(ids)} tokens, which leaves no room for max_new_tokens")
                continue
            lengths.num_rows += 1
            lengths.num_tokens += len(ids)
            columns["prompt_ids"].append(ids)
            columns["prompt"].append(json.dumps(row.prompt, ensure_ascii=False))
            columns["columns"].append(row.columns or "{}")
            columns["length"].append(len(ids))
        return columns


def join_columns(rows: Iterable[str]) -> dict[str, list[Any]]:
    """Return the `columns` of table rows as a reward function gets them: one list a name, None where a row has none."""
    read = [json.loads(text) for text in rows]
    names = dict.fromkeys(name for row in read for name in row)
    return {name: [row.get(name) for row in read] for name in names}
