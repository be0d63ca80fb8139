"""From rows to tokens, one encoder a method: what is learnt, what is masked, what is cut; and a batch of them as
the loss sees it, every token as text.

Columns, int32 lists unless said otherwise:

    sft   input_ids, labels (-100 where nothing is learnt), length
          with objective: seq2seq source_ids, target_ids, length
          with objective: distill and a context, teacher_input_ids and teacher_labels: what the teacher reads
          with one that learns labels: sequences (lists of ids), label (its name or number), length
    rm    answers_ids (one list per answer, best first), scores (float, one per answer), label, margin (float), length
    dpo   prompt_ids, chosen_ids, rejected_ids, label (float), length
    kto   prompt_ids, completion_ids, label (bool), length
    ppo   prompt_ids, prompt (JSON of its text or messages), columns (JSON of the row's others), length
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, combinations, groupby, pairwise
from typing import Any

import numpy as np

from alignkit.data import Rejects, Row
from alignkit.errors import DataError, RecipeError
from alignkit.models.chat import Chat, ConversationError, Encoded, Written
from alignkit.models.heads import arrange, write_task
from alignkit.models.start import context_length
from alignkit.recipe import Stage
from alignkit.recipe.methods import TASKS, PpoOptions, RmOptions, SftOptions
from alignkit.train.losses import is_logistic

IGNORED = -100
_SHOWN_TOKENS = 400  # of each sequence

Tokens = tuple[str, Sequence[int], Sequence[str]]  # label, ids, kinds


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

    def add(self, num_tokens: int, num_trained: int, *, num_rows: int = 1) -> None:
        self.num_rows += num_rows
        self.num_tokens += num_tokens
        self.num_trained_tokens += num_trained

    def cut(self, row: Row) -> None:
        self.num_truncated += 1
        self.first_cut = self.first_cut or row.place

    @property
    def truncated_share(self) -> float:
        """Share of rows cut or left out for their length."""
        seen = self.num_rows + self.num_too_long + self.num_untrained
        return (self.num_truncated + self.num_too_long) / max(seen, 1)


Texts = Sequence[Encoded]  # of a row: of sft one and those that need a text of their own, else one a completion
EncodedRow = tuple[Row, Texts]
# Columns of a row of the table, its `length` among them, and its tokens, all and trained ones; or why it is left out,
# and which count of the report that raises.
Examples = Iterator[tuple[dict[str, Any], int, int] | tuple[str, str]]


def write_row(stage: Stage, chat: Chat, row: Row) -> list[Written]:
    """Write the texts of a row as its stage trains on them. Raises ConversationError."""
    if stage.method == "ppo":
        return [chat.write_prompt(row.prompt)]
    if stage.task is not None:
        name_label(stage, row)
        return write_task(str(row.prompt), list(map(str, row.completions)))
    if stage.method != "sft":
        return [chat.write_pair(row.prompt, completion)[-1] for completion in row.completions]
    if stage.objective == "seq2seq":
        if not row.prompt:
            raise ConversationError("objective: seq2seq reads a prompt and writes its completion; this row has none")
        return chat.write_pair(row.prompt, row.completions[0])
    if stage.objective == "distill" and (teacher := stage.expect(SftOptions).teacher) is not None:
        if teacher.on_policy and isinstance(row.completions[0] if row.completions else "", str) and not row.prompt:
            raise ConversationError("teacher.on_policy lets the student answer prompts; this row has none")
        if teacher.context is not None:
            own, theirs = (_write_sft(stage, chat, each) for each in (row, _put_before(row, teacher.context)))
            if len(own) != len(theirs):
                raise ConversationError("teacher.context changes which answers the template rewrites")
            return [*own, *theirs]
    return _write_sft(stage, chat, row)


def _put_before(row: Row, context: str) -> Row:
    """Put a text before a row: into the system message of a conversation, in front of any other text."""
    if row.kind in ("tokens", "segments"):
        raise ConversationError(f"teacher.context is put before texts and turns, and this is a row of {row.kind}")
    if not row.conversational:
        return replace(row, prompt=f"{context}{row.prompt}")
    given: Any = row.prompt or row.completions[0]
    first, others = dict(given[0]), given[1:]
    if first["role"] == "system":
        turns = [{**first, "content": f"{context}\n\n{first['content']}"}, *others]
    else:  # what a row gives the template beside its turns travels with the first of them
        extra = {name: first.pop(name) for name in ("template_kwargs",) if name in first}
        turns = [{"role": "system", "content": context, **extra}, first, *others]
    return replace(row, prompt=turns) if row.prompt else replace(row, completions=(turns,))


def _write_sft(stage: Stage, chat: Chat, row: Row) -> list[Written]:
    if row.tokens is not None:
        if (most := max(row.tokens[0])) >= (size := len(chat.tokenizer)):
            raise ConversationError(f"input_ids: {most} is no token of the model's tokenizer, which has {size}")
        return []
    if row.kind == "segments":
        segments = list(map(str, row.completions))
        borders = pairwise([0, *accumulate(map(len, segments))])
        spans = [span for span, is_learnt in zip(borders, row.scores or (), strict=True) if is_learnt]
        return [Written("".join(segments), spans, plain=True)]
    content = row.completions[0]
    if row.prompt or isinstance(content, str):
        written = chat.write_pair(row.prompt, content)
        return written if stage.trainer.get("completion_only_loss", True) else written[-1:]
    masks = stage.objective != "lm" and stage.trainer.get("assistant_only_loss", True)
    return chat.write(content, mask=masks)


def name_label(stage: Stage, row: Row) -> str:
    """Name a row's label, which may stand as its number in `labels`. Raises ConversationError for one not in there."""
    labels = stage.expect(SftOptions).labels
    if labels is None or row.answer in labels:
        return row.answer
    if row.answer.isdecimal() and int(row.answer) < len(labels):
        return labels[int(row.answer)]
    raise ConversationError(f"label: is {row.answer}, which is none of {stage.name}.labels: {', '.join(labels)}")


def encode_rows(
    stage: Stage, batches: Iterable[Sequence[EncodedRow]], lengths: LengthReport, rejects: Rejects
) -> Iterator[dict[str, list[Any]]]:
    """Turn batches of rows into batches of columns, counting them; rows that are left out go to `rejects`."""
    if stage.objective == "lm":  # one stream of tokens
        return (yield from _cut_blocks(longest_sequence(stage) or 1024, batches, lengths))
    encode = _ENCODERS["kto" if stage.is_unpaired else stage.objective or stage.method]
    limit = (longest_prompt if stage.method == "ppo" else longest_sequence)(stage)
    for batch in batches:
        columns: dict[str, list[Any]] = defaultdict(list)
        for row, texts in batch:
            sizes = [len(text.ids) for text in texts] or [len(row.tokens[0] if row.tokens else ())]
            lengths.longest_tokens = max(lengths.longest_tokens, *sizes)
            for found in encode(stage, limit, row, texts, lengths):
                if len(found) == 2:
                    reason, count = found
                    setattr(lengths, count, getattr(lengths, count) + 1)
                    rejects.add(row.place, reason)
                    continue
                values, num_tokens, num_trained = found
                lengths.add(num_tokens, num_trained)
                for name, value in values.items():
                    columns[name].append(value)
        if columns:
            yield dict(columns)


def _encode_sft(stage: Stage, limit: int | None, row: Row, texts: Texts, lengths: LengthReport) -> Examples:
    """Rows of text, messages or prompt-completion."""
    whole = row.prompt and not stage.trainer.get("completion_only_loss", True)
    found = [row.tokens] if row.tokens else [(text.ids, text.ids if whole else text.labels) for text in texts]
    lengths.num_apart += len(found) - 1
    for ids, labels in found:
        if limit and len(ids) > limit:
            lengths.cut(row)
            ids, labels = ids[:limit], labels[:limit]
        predicted = labels[1:]
        if trained := len(predicted) - predicted.count(IGNORED):
            yield {"input_ids": ids, "labels": labels, "length": len(ids)}, len(ids), trained
        else:
            yield "no token to learn from within max_length", "num_untrained"


def _encode_distill(stage: Stage, limit: int | None, row: Row, texts: Texts, lengths: LengthReport) -> Examples:
    """Rows of sft; with a context the teacher reads other tokens than the student, and predicts the same ones."""
    teacher = stage.expect(SftOptions).teacher
    if teacher is None or teacher.context is None:
        return (yield from _encode_sft(stage, limit, row, texts, lengths))
    half = len(texts) // 2
    examples = _encode_sft(stage, limit, row, texts[:half], lengths)
    for found, own, theirs in zip(examples, texts[:half], texts[half:], strict=True):
        if len(found) == 3:
            values, num_tokens, num_trained = found
            learnt = [label for label in own.labels[1:] if label != IGNORED]  # of a text all but the first token
            places = [place for place, label in enumerate(theirs.labels) if label != IGNORED][-len(learnt) :]
            places, ids = places[:num_trained], np.asarray(theirs.ids)[: places[num_trained - 1] + 1]
            labels = np.full(len(ids), IGNORED)
            labels[places] = ids[places]
            found = {**values, "teacher_input_ids": ids, "teacher_labels": labels}, num_tokens, num_trained
            if ids[places].tolist() != learnt[:num_trained]:
                found = "teacher.context changes the tokens of what is learnt", "num_untrained"
        yield found


def _encode_seq2seq(stage: Stage, limit: int | None, row: Row, texts: Texts, lengths: LengthReport) -> Examples:
    """Prompt-completion as source and target of an encoder-decoder model, each cut to max_length."""
    (text,) = texts
    source, target = text.ids[: text.prompt_length][:limit], text.ids[text.prompt_length :][:limit]
    if (num_tokens := len(source) + len(target)) < len(text.ids):
        lengths.cut(row)
    yield {"source_ids": source, "target_ids": target, "length": num_tokens}, num_tokens, len(target)


def _encode_task(stage: Stage, limit: int | None, row: Row, texts: Texts, lengths: LengthReport) -> Examples:
    """Rows with labels: the sequences that their task reads."""
    sequences, cut = arrange(str(stage.task), texts, limit)
    if cut:
        lengths.cut(row)
    sizes = list(map(len, sequences))
    yield {"sequences": sequences, "label": name_label(stage, row), "length": max(sizes)}, sum(sizes), sum(sizes)


def _cut_blocks(
    block: int, batches: Iterable[Sequence[EncodedRow]], lengths: LengthReport
) -> Iterator[dict[str, list[Any]]]:
    """Concatenate documents, each closed by eos, and cut the stream into blocks; the last one may be shorter."""
    stream = np.empty(0, dtype=np.int32)
    for batch in batches:
        documents = (row.tokens[0] if row.tokens else texts[-1].ids for row, texts in batch)
        pieces = [stream, *(np.asarray(ids, dtype=np.int32) for ids in documents)]
        lengths.longest_tokens = max(lengths.longest_tokens, *(len(piece) for piece in pieces))
        stream = np.concatenate(pieces)
        if count := len(stream) // block:
            lengths.add(count * block, count * (block - 1), num_rows=count)
            blocks = list(stream[: count * block].reshape(count, block))
            yield {"input_ids": blocks, "labels": blocks, "length": [block] * count}
            stream = stream[count * block :]
    if len(stream) > 1:  # one token has nothing that it could be learnt from
        lengths.add(len(stream), len(stream) - 1)
        yield {"input_ids": [stream], "labels": [stream], "length": [len(stream)]}


def _encode_rm(stage: Stage, limit: int | None, row: Row, texts: Texts, lengths: LengthReport) -> Examples:
    """Pairs and ranked answers: all answers of a prompt in one row, best first, each a whole conversation."""
    options = stage.expect(RmOptions)
    answers = [text.ids for text in texts]
    if limit and (longest := max(map(len, answers))) > limit:
        # A reward is read at the end of an answer: a cut answer would be scored on a text nobody judged.
        yield f"longer than max_length ({longest} tokens)", "num_too_long"
        return
    scores = list(row.scores) if row.scores else [float(rank) for rank in range(len(answers), 0, -1)]
    if options.loss == "best_of" and (row.label not in (None, 1.0) or row.margin or scores[0] == scores[1]):
        what = "has a soft label, a margin or a tie for the best, which loss: best_of cannot read; use pairwise"
        raise DataError(what, where=row.place)
    if len(set(scores)) < 2:
        yield "all answers tie", "num_untrained"
        return
    groups: list[tuple[int, ...]] = [tuple(range(len(answers)))]
    if options.grouping == "pairs":
        groups = [(i, j) for i, j in combinations(range(len(answers)), 2) if scores[i] != scores[j]]
    for group in groups:
        sizes = [len(answers[number]) for number in group]
        values = {
            "answers_ids": [answers[number] for number in group], "scores": [scores[number] for number in group],
            "label": 1.0 if row.label is None else row.label, "margin": row.margin or 0.0, "length": max(sizes),
        }  # fmt: skip
        yield values, sum(sizes), sum(sizes)


def _encode_dpo(stage: Stage, limit: int | None, row: Row, texts: Texts, lengths: LengthReport) -> Examples:
    """Preference pairs; the completion is cut at max_length, never the prompt."""
    # Soft labels have a meaning to plain cross-entropy alone.
    others = {"ld_alpha", "f_divergence_type", "use_weighting", "loss_weights"} & stage.trainer.keys()
    if row.label not in (None, 1.0) and (others or not is_logistic(stage.trainer)):
        what = f"has the soft label {row.label}, which only plain sigmoid and cdpo losses can read; change loss_type,"
        raise DataError(f"{what} or take the label column out", where=row.place)
    if row.kind != "pair":
        what = "is a single answer, which this loss cannot compare with another; set loss_type: kto"
        raise DataError(what, where=row.place)
    longest, prompt = max(len(side.ids) for side in texts), texts[0].ids[: texts[0].prompt_length]
    limit = limit or longest
    if len(prompt) >= limit:
        yield f"the prompt alone fills max_length ({len(prompt)} tokens)", "num_too_long"
        return
    if longest > limit:
        lengths.cut(row)
    chosen, rejected = (side.ids[side.prompt_length : limit] for side in texts)
    values = {
        "prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected,
        "label": 1.0 if row.label is None else row.label, "length": len(prompt) + max(len(chosen), len(rejected)),
    }  # fmt: skip
    num_trained = len(chosen) + len(rejected)
    yield values, 2 * len(prompt) + num_trained, num_trained


def _encode_kto(stage: Stage, limit: int | None, row: Row, texts: Texts, lengths: LengthReport) -> Examples:
    """Single answers with a thumb up or down; a pair gives one of each."""
    for rank, text in enumerate(texts):
        start, end = text.prompt_length, limit or len(text.ids)
        if start >= end:
            yield f"the prompt alone fills max_length ({start} tokens)", "num_too_long"
            continue
        if len(text.ids) > end:
            lengths.cut(row)
        ids = text.ids[:end]
        values = {
            "prompt_ids": ids[:start], "completion_ids": ids[start:],
            "label": bool(row.label) if row.kind == "unpaired" else rank == 0, "length": len(ids),
        }  # fmt: skip
        yield values, len(ids), len(ids) - start


def _encode_ppo(stage: Stage, limit: int | None, row: Row, texts: Texts, lengths: LengthReport) -> Examples:
    """Prompts as generation starts from them, with the row's columns for rewards."""
    ids = texts[0].ids
    if limit is not None and len(ids) > limit:
        yield f"a prompt of {len(ids)} tokens, which leaves no room for max_new_tokens", "num_too_long"
        return
    prompt = json.dumps(row.prompt, ensure_ascii=False)
    yield {"prompt_ids": ids, "prompt": prompt, "columns": row.columns or "{}", "length": len(ids)}, len(ids), 0


_ENCODERS = {
    "chat": _encode_sft, "distill": _encode_distill, "seq2seq": _encode_seq2seq, "rm": _encode_rm, "dpo": _encode_dpo,
    "kto": _encode_kto, "ppo": _encode_ppo, **dict.fromkeys(TASKS, _encode_task),
}  # fmt: skip


def longest_sequence(stage: Stage) -> int | None:
    """The most tokens a row may have: max_length, or what the model can read where that is shorter.
    Raises RecipeError for a max_length that is written and longer."""
    wanted, positions = stage.trainer.get("max_length"), context_length(stage, rotary=stage.task is not None)
    key = f"{stage.name}.max_length"
    if wanted and positions and wanted > positions and stage.origins.get(key, "default") != "default":
        what = f"is {wanted}, and the model has positions for {positions} tokens; lower it"
        raise RecipeError(f"{key} {what}", where=stage.where(key))
    return min(filter(None, (wanted, positions)), default=None)


def longest_prompt(stage: Stage) -> int | None:
    """The most tokens a ppo prompt may have: what max_new_tokens leaves of the context; None without a limit."""
    context, answer = context_length(stage), stage.expect(PpoOptions).max_new_tokens
    if context is not None and answer >= context:
        key = f"{stage.name}.max_new_tokens"
        what = f"is {answer}, and the model reads {context} tokens at once: no room for a prompt is left; lower it"
        raise DataError(f"{key} {what}", where=stage.where(key))
    return None if context is None else context - answer


def preview_rows(
    table: Any, collate: Callable[[list[dict[str, Any]]], Any], tokenizer: Any, *, num_rows: int = 3,
    limit: int | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Collate the first rows of a table as one micro batch and describe every token of it.
    Each row is `{"sequences": [{"label", "spans": [{"kind", "tokens", "special"}], "num_left_out"}]}`. Kinds: `read`
    (context, no loss), `learnt` (its log-probability enters the loss), `scored` (where a reward model reads its reward)
    and `padding`. `special` lists the places of control tokens in `tokens`. A row of several packed documents has a
    sequence for each. A sequence of `limit` tokens, which may have been cut there, says so."""
    rows = [table[number] for number in range(min(num_rows, len(table)))]
    found = _read_batch(rows if "prompt" in rows[0] else collate(rows))  # prompts of ppo are only read
    return [{"sequences": [_describe(tokenizer, *each, limit=limit) for each in sequences]} for sequences in found]


def _read_batch(batch: Any) -> Iterator[Sequence[Tokens]]:
    """Yield the sequences of each row of a collated batch; which columns it has depends on the method."""
    if isinstance(batch, list):
        yield from ([("prompt", row["prompt_ids"], ["read"] * len(row["prompt_ids"]))] for row in batch)
        return
    columns = {name: column.tolist() for name, column in batch.items() if hasattr(column, "tolist")}
    ids = columns["input_ids"]
    if "cu_seq_lens_q" in columns:  # padding-free: all documents of all rows end to end
        pieces = [slice(*ends) for ends in pairwise(columns["cu_seq_lens_q"])]
        yield [
            (f"document {number} of {len(pieces)}", ids[0][piece], _kinds(columns["labels"][0][piece]))
            for number, piece in enumerate(pieces, 1)
        ]
    elif "decoder_attention_mask" in columns:
        for source, mask, target, learnt in zip(*columns.values(), strict=True):
            kinds = ["learnt" if kept else "padding" for kept in learnt]
            yield [("source", source, _kinds([IGNORED] * len(source), mask)), ("target", target, kinds)]
    elif of_row := columns.get("prompt_of") or columns.get("row_of"):
        rows: dict[int, list[Tokens]] = defaultdict(list)
        learnt = columns.get("labels") or [[IGNORED] * len(tokens) for tokens in ids]
        for row, tokens, labels, mask in zip(of_row, ids, learnt, columns["attention_mask"], strict=True):
            kinds = _kinds(labels, mask)
            kinds[sum(mask) - 1] = "scored"
            name = f"answer {len(rows[row]) + 1}" if "prompt_of" in columns else ""
            rows[row].append((name, tokens, kinds))
        yield from rows.values()
    elif "labels" in columns:
        masks = columns.get("attention_mask", [None] * len(ids))
        yield from ([("", *row[:1], _kinds(*row[1:]))] for row in zip(ids, columns["labels"], masks, strict=True))
    else:
        labels = ([flag or IGNORED for flag in flags] for flags in columns["completion_mask"])
        kinds_of = [_kinds(*row) for row in zip(labels, columns["attention_mask"], strict=True)]
        sides = list(zip(ids, kinds_of, strict=True))
        if len(columns["label"]) == len(sides):  # single answers, each desired or not
            for good, side in zip(columns["label"], sides, strict=True):
                yield [("desired" if good else "undesired", *side)]
            return
        for chosen, rejected in zip(sides[: len(sides) // 2], sides[len(sides) // 2 :], strict=True):
            yield [("chosen", *chosen), ("rejected", *rejected)]


def _kinds(labels: Sequence[int], mask: Sequence[int] | None = None) -> list[str]:
    # The first token is predicted from nothing: no method learns it.
    kinds = ["learnt" if number and label != IGNORED else "read" for number, label in enumerate(labels)]
    return [kind if kept else "padding" for kind, kept in zip(kinds, mask or [1] * len(kinds), strict=True)]


def _describe(
    tokenizer: Any, label: str, ids: Sequence[int], kinds: Sequence[str], *, limit: int | None
) -> dict[str, Any]:
    num_tokens = len(kinds) - kinds.count("padding")
    read = ids[: min(num_tokens, _SHOWN_TOKENS)]
    texts, shown = [], ""
    for end in range(1, len(read) + 1):  # a character of several tokens belongs to the last of them
        text = tokenizer.decode(read[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        whole = end == len(read) or not text.endswith("\ufffd")
        texts.append(text[len(shown) :] if whole else "")
        shown = text if whole else shown
    controls = set(tokenizer.added_tokens_decoder)
    tokens = zip(kinds, ids, texts, strict=False)
    spans = []
    for kind, group in groupby(tokens, lambda token: token[0]):
        members = list(group)
        special = [number for number, (_, token, _) in enumerate(members) if token in controls]
        spans.append({"kind": kind, "tokens": [text for *_, text in members], "special": special})
    remarks = [f" max_length ({limit}) is reached"] if num_tokens == limit else []
    remarks += [f"{tokenizer.pad_token} x {len(kinds) - num_tokens}"] if len(kinds) > num_tokens else []
    spans += [{"kind": "padding", "tokens": [text], "special": []} for text in remarks]
    return {"label": label, "spans": spans, "num_left_out": max(num_tokens - _SHOWN_TOKENS, 0)}
