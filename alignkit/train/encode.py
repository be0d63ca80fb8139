"""From rows to tokens, one encoder per kind of training: what is learnt, what is masked, what is cut.

It reads no file and loads no model. Columns, int32 lists unless said otherwise:

    sft   input_ids, labels (-100 where nothing is learnt), length
    rm    answers_ids (one list per answer, best first), scores (float, one per answer), label, margin (float), length
    dpo   prompt_ids, chosen_ids, rejected_ids, label (float), length
    kto   prompt_ids, completion_ids, label (bool), length
    ppo   prompt_ids, prompt (JSON of its text or messages), columns (JSON of the row's others), length
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignkit.data import Message, Rejects, Row
from alignkit.errors import DataError
from alignkit.models.chat import Chat
from alignkit.recipe import Stage
from alignkit.recipe.schema import RmOptions
from alignkit.train.prompts import PromptEncoder, longest_prompt

IGNORED = -100


@dataclass
class LengthReport:
    """Token counts of one table and what was cut or left out for its length."""

    num_rows: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    longest_tokens: int = 0
    num_truncated: int = 0
    num_too_long: int = 0
    num_untrained: int = 0  # nothing to learn was left: every label masked, or every pair a tie

    @property
    def truncated_share(self) -> float:
        """Share of rows cut or left out for their length."""
        seen = self.num_rows + self.num_too_long + self.num_untrained
        return (self.num_truncated + self.num_too_long) / seen if seen else 0.0


# Called with no rows at the end: what an encoder has kept back is given then.
Encode = Callable[[Sequence[Row], LengthReport, Rejects], dict[str, list[Any]]]


def choose_encoder(stage: Stage, chat: Chat) -> Encode:
    """Return the encoder of a stage; it may keep state between batches, so each table takes a new one."""
    max_length = stage.trainer.get("max_length")
    if stage.method == "sft":
        return _SftEncoder(stage, chat, max_length)
    if stage.method == "ppo":
        return PromptEncoder(chat, longest_prompt(stage))
    if stage.method == "rm":
        options = stage.expect(RmOptions)
        return _RewardEncoder(
            chat, max_length, pairs_only=options.grouping == "pairs", best_only=options.loss == "best_of"
        )
    if stage.is_unpaired:
        return _UnpairedEncoder(chat, max_length)
    return _PairEncoder(chat, max_length, soft_labels=_reads_soft_labels(stage))


def _reads_soft_labels(stage: Stage) -> bool:
    """Tell whether the stage's loss is plain cross-entropy, which alone knows what a soft label means."""
    others = {"ld_alpha", "f_divergence_type", "use_weighting", "loss_weights"} & stage.trainer.keys()
    return stage.trainer.get("loss_type", ["sigmoid"]) in (["sigmoid"], ["cdpo"]) and not others


class _SftEncoder:
    """Rows of text, messages or prompt-completion -> input_ids and labels."""

    def __init__(self, stage: Stage, chat: Chat, max_length: int | None) -> None:
        self._chat, self._max_length = chat, max_length
        self._packs = stage.options.model_dump().get("objective") == "lm"
        self._assistant_only = stage.trainer.get("assistant_only_loss", True)
        self._completion_only = stage.trainer.get("completion_only_loss", True)
        self._rest = np.empty(0, dtype=np.int32)  # the tail of the stream that does not fill a block yet

    def __call__(self, rows: Sequence[Row], lengths: LengthReport, rejects: Rejects) -> dict[str, list[Any]]:
        if self._packs:
            return self._pack(rows, lengths)
        columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "length": []}
        for row, (ids, labels) in zip(rows, self._tokenise(rows), strict=True):
            lengths.longest_tokens = max(lengths.longest_tokens, len(ids))
            if self._max_length and len(ids) > self._max_length:
                lengths.num_truncated += 1
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

    def _tokenise(self, rows: Sequence[Row]) -> Iterator[tuple[Any, Any]]:
        """Yield ids and labels in the order of `rows`, tokenising each kind in one call."""
        found: dict[int, tuple[Any, Any]] = {}
        first: list[Any] = [row.completions[0] if row.completions else None for row in rows]
        mixed = [number for number, row in enumerate(rows) if row.prompt and not _is_learnt(row.completions[0])]
        if mixed:
            joined = [_join_turns(rows[number]) for number in mixed]
            for number, item in zip(mixed, self._chat.encode(joined), strict=True):
                found[number] = (item.ids, item.labels if self._completion_only else item.ids)
        paired = [number for number, row in enumerate(rows) if row.prompt and number not in found]
        if paired:
            prompts = [rows[number].prompt for number in paired]
            encoded = self._chat.encode_prompt_completion(prompts, [first[number] for number in paired])
            for number, split in zip(paired, encoded, strict=True):
                masked = split.prompt_length if self._completion_only else 0
                found[number] = (split.ids, [IGNORED] * masked + split.ids[masked:])
        chats = [number for number, row in enumerate(rows) if not row.prompt and row.kind == "messages"]
        if chats:
            for number, item in zip(chats, self._chat.encode([first[n] for n in chats]), strict=True):
                found[number] = (item.ids, item.labels if self._assistant_only else item.ids)
        for number, row in enumerate(rows):
            if row.tokens is not None:
                self._check_ids(row)
                found[number] = row.tokens
            elif row.kind == "segments":
                item = self._chat.encode_segments(list(map(str, row.completions)), [bool(x) for x in row.scores or ()])
                found[number] = (item.ids, item.labels)
        texts = [number for number, row in enumerate(rows) if number not in found]
        if texts:
            for number, ids in zip(texts, self._chat.encode_texts([first[n] for n in texts]), strict=True):
                found[number] = (ids, ids)
        for number in range(len(rows)):
            yield found[number]

    def _check_ids(self, row: Row) -> None:
        assert row.tokens is not None
        if (most := max(row.tokens[0])) >= (size := len(self._chat.tokenizer)):
            raise DataError(
                f"input_ids: {most} is no token of the model's tokenizer, which has {size}", where=row.place
            )

    def _pack(self, rows: Sequence[Row], lengths: LengthReport) -> dict[str, list[Any]]:
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
        pieces = [self._rest, *(np.asarray(ids, dtype=np.int32) for ids, _ in self._tokenise(rows))]
        stream = np.concatenate(pieces)
        num_blocks = len(stream) // block
        self._rest = stream[num_blocks * block :]
        lengths.longest_tokens = max(lengths.longest_tokens, *(len(piece) for piece in pieces))
        lengths.num_rows += num_blocks
        lengths.num_tokens += num_blocks * block
        lengths.num_trained_tokens += num_blocks * (block - 1)
        blocks = list(stream[: num_blocks * block].reshape(num_blocks, block))
        return {"input_ids": blocks, "labels": blocks, "length": [block] * num_blocks}


def _is_learnt(completion: Any) -> bool:
    """Tell whether all of a completion is learnt: it holds nothing but the assistant's turns, none of them masked."""
    return isinstance(completion, str) or all(
        message["role"] == "assistant" and message.get("trained", True) for message in completion
    )


def _join_turns(row: Row) -> Any:
    """Return prompt and completion as one conversation, of which the prompt's answers are only read."""
    assert isinstance(row.prompt, list)
    read = [Message(**{**turn, "trained": False}) if turn["role"] == "assistant" else turn for turn in row.prompt]
    return [*read, *row.completions[0]]


class _RewardEncoder:
    """Pairs and ranked answers -> all answers of a prompt in one row, best first, each a whole conversation."""

    def __init__(self, chat: Chat, max_length: int | None, *, pairs_only: bool, best_only: bool) -> None:
        self._chat, self._max_length = chat, max_length
        self._pairs_only, self._best_only = pairs_only, best_only

    def __call__(self, rows: Sequence[Row], lengths: LengthReport, rejects: Rejects) -> dict[str, list[Any]]:
        prompts = [row.prompt for row in rows for _ in row.completions]
        encoded = iter(self._chat.encode_prompt_completion(prompts, [text for row in rows for text in row.completions]))
        columns: dict[str, list[Any]] = {
            name: [] for name in ("answers_ids", "scores", "label", "margin", "length")
        }  # fmt: skip
        for row in rows:
            answers = [next(encoded).ids for _ in row.completions]
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

    def __init__(self, chat: Chat, max_length: int | None, *, soft_labels: bool) -> None:
        self._chat, self._max_length, self._soft_labels = chat, max_length, soft_labels

    def __call__(self, rows: Sequence[Row], lengths: LengthReport, rejects: Rejects) -> dict[str, list[Any]]:
        soft = next((row for row in rows if row.label not in (None, 1.0)), None)
        if soft is not None and not self._soft_labels:
            raise DataError(
                f"has the soft label {soft.label}, which only plain sigmoid and cdpo losses can read; "
                "change loss_type, or take the label column out",
                where=soft.place,
            )
        prompts = [row.prompt for row in rows for _ in range(2)]
        if any(row.kind != "pair" for row in rows):
            single = next(row for row in rows if row.kind != "pair")
            raise DataError(
                "is a single answer, which this loss cannot compare with another; set loss_type: kto",
                where=single.place,
            )
        encoded = iter(self._chat.encode_prompt_completion(prompts, [text for row in rows for text in row.completions]))
        columns: dict[str, list[Any]] = {
            name: [] for name in ("prompt_ids", "chosen_ids", "rejected_ids", "label", "length")
        }  # fmt: skip
        for row in rows:
            chosen, rejected = next(encoded), next(encoded)
            limit = self._max_length or max(len(chosen.ids), len(rejected.ids))
            prompt = chosen.ids[: chosen.prompt_length]
            longest = max(len(chosen.ids), len(rejected.ids))
            lengths.longest_tokens = max(lengths.longest_tokens, longest)
            if len(prompt) >= limit:
                lengths.num_too_long += 1
                rejects.add(row.place, f"the prompt alone fills max_length ({len(prompt)} tokens)")
                continue
            lengths.num_truncated += longest > limit
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

    def __init__(self, chat: Chat, max_length: int | None) -> None:
        self._chat, self._max_length = chat, max_length

    def __call__(self, rows: Sequence[Row], lengths: LengthReport, rejects: Rejects) -> dict[str, list[Any]]:
        singles = [
            (row, text, bool(row.label) if row.kind == "unpaired" else rank == 0)
            for row in rows
            for rank, text in enumerate(row.completions)
        ]
        encoded = self._chat.encode_prompt_completion([row.prompt for row, _, _ in singles], [t for _, t, _ in singles])
        columns: dict[str, list[Any]] = {name: [] for name in ("prompt_ids", "completion_ids", "label", "length")}
        for (row, _, desirable), item in zip(singles, encoded, strict=True):
            limit = self._max_length or len(item.ids)
            lengths.longest_tokens = max(lengths.longest_tokens, len(item.ids))
            if item.prompt_length >= limit:
                lengths.num_too_long += 1
                rejects.add(row.place, f"the prompt alone fills max_length ({item.prompt_length} tokens)")
                continue
            lengths.num_truncated += len(item.ids) > limit
            ids = item.ids[:limit]
            lengths.num_rows += 1
            lengths.num_tokens += len(ids)
            lengths.num_trained_tokens += len(ids) - item.prompt_length
            columns["prompt_ids"].append(ids[: item.prompt_length])
            columns["completion_ids"].append(ids[item.prompt_length :])
            columns["label"].append(desirable)
            columns["length"].append(len(ids))
        return columns
