"""Rows of a stage as token tables on disk: read, checked, split and tokenised in constant memory; `check` reads the
same ones. Samplers say in which order they are trained on: the same on any number of devices, and after a resume."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Sampler

from alignkit import console
from alignkit.data import DataReport, Problems, Rejects, Row, find_control_tokens, read_rows, split_eval, write_table
from alignkit.data.load import first_rows, streams
from alignkit.data.report import Hashes
from alignkit.data.rows import as_rendered, escape_control_tokens, fingerprint_prompt, iter_contents
from alignkit.errors import DataError
from alignkit.models.chat import Chat, ConversationError, Written, find_tokenizer
from alignkit.models.start import learn_tokenizer
from alignkit.recipe import Stage
from alignkit.recipe.schema import LEARNT_TOKENIZERS
from alignkit.runs.directory import form_of, require_form
from alignkit.runs.signals import pulse
from alignkit.train import ranks
from alignkit.train.encode import EncodedRow, LengthReport, encode_rows, longest_prompt, longest_sequence, write_row

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH_ROWS, _BATCH_CHARS = 1000, 10_000_000
_REMEMBERED_ROWS = 256  # for samples
_VOCABULARY = 30_000  # tokens of a tokenizer that is learnt from rows: the shortlist of arXiv 1409.0473
_MEGA_BATCHES = 50  # global batches whose rows are sorted together: enough to match lengths, few enough to stay random


@dataclass
class Tables:
    """Ready token tables of one stage; of a stage that streams, `train` holds its first rows alone."""

    train: Dataset
    eval: Dataset | None
    report: DataReport
    lengths: LengthReport
    eval_lengths: LengthReport | None = None
    eval_rows: list[Row] = field(default_factory=list)  # a few held-out (or else training) rows, for samples
    prompts: Hashes = field(default_factory=Hashes)  # fingerprints of those trained on


def learn_vocabulary(stage: Stage) -> str | None:
    """Learn the tokenizer that `model.tokenizer` wants of the training rows, held-out ones left out; None for others.
    Equal rows give equal bytes, so that a resumed run, and every rank, reads the same tokens."""
    kind, _ = find_tokenizer(stage)
    if kind not in LEARNT_TOKENIZERS:
        return None
    held_out = stage.training.eval
    rows = read_rows(stage, stage.options.data, report=DataReport(), rejects=Rejects())
    if isinstance(held_out, float):
        rows = (row for is_eval, row in split_eval(rows, held_out, stage.seed) if not is_eval)
    vocab_size = stage.model.config.get("vocab_size", _VOCABULARY)
    return learn_tokenizer(kind, (text for row in rows for text in iter_contents(row)), vocab_size)


def prepare_tables(stage: Stage, chat: Chat, cache: Path, *, rejects: Rejects) -> Tables:
    """Read, check, split and tokenise the rows of a stage into memory-mapped tables below `cache`.
    Memory does not grow with the number of rows."""
    held_out, report, template = stage.training.eval, DataReport(), chat.has_template
    prompts = Hashes()

    def remember(row: Row) -> Row:
        prompts.add(fingerprint_prompt(row).to_bytes(8, sys.byteorder))
        return row

    def write(name: str, rows: Iterable[Row], side: bool | None = None) -> tuple[Dataset | None, LengthReport, list]:
        if side is not None:
            assert isinstance(held_out, float)
            rows = (row for is_eval, row in split_eval(rows, held_out, stage.seed) if is_eval == side)
        if name == "train.arrow":
            rows = map(remember, rows)
        lengths, first = LengthReport(), list[Row]()
        with console.Meter(f"{stage.name}: rows read") as meter, _few_collections():
            found = _encode(stage, chat, meter.over(rows), rejects, lengths, first)
            start = next(found, None)
            return None if start is None else write_table(cache / name, chain([start], found)), lengths, first

    splits = isinstance(held_out, float)
    rows = read_rows(stage, first_rows(stage, report), report=report, rejects=rejects, template=template)
    train, lengths, first = write("train.arrow", rows, side=False if splits else None)
    table, eval_lengths = None, None
    if splits:  # a second pass over the files keeps memory flat, whatever the share is
        rows = read_rows(stage, stage.options.data, report=DataReport(), rejects=Rejects(), template=template)
        table, eval_lengths, first = write("eval.arrow", rows, side=True)
    elif isinstance(held_out, list):
        known = report.prompt_hashes.sort()
        rows = read_rows(stage, held_out, report=report, rejects=rejects, known_prompts=known, template=template)
        table, eval_lengths, first = write("eval.arrow", rows)
    share, most, longest = lengths.truncated_share, stage.training.max_truncated, lengths.longest_tokens
    what = "no row is left to train on" if train is None else ""
    if share > most and stage.method == "ppo":
        what = f"{share:.0%} of the prompts are longer than the {longest_prompt(stage)} tokens that {stage.name}."
        what += f"max_new_tokens leaves of the model's context (the longest has {longest}), more than max_truncated "
        what += f"allows ({most:.0%}); raise it, or lower max_new_tokens"
    elif share > most:
        what = f"{share:.0%} of the rows are longer than {stage.name}.max_length ({longest_sequence(stage)} tokens; "
        what += f"the longest row has {longest}), more than max_truncated allows ({most:.0%}); raise one of the two or "
        what += "shorten the rows"
    elif lengths.num_untrained and not lengths.num_rows:
        what = f"none of the {lengths.num_untrained} rows has a token to learn from: every label is masked; look at "
        what += "the roles of the messages and at max_length"
    if what:
        raise DataError(what, where=stage.where(f"{stage.name}.data"))
    require_form(stage, form_of(report.to_dict()))
    if eval_lengths is not None and table is None:
        what = f"{stage.name}.eval holds out no row that can be used; raise the share or look at the source"
        raise DataError(what, where=stage.where(f"{stage.name}.eval"))
    return Tables(train, table, report, lengths, eval_lengths, first, prompts)


@contextmanager
def _few_collections() -> Iterator[None]:
    """Look for cycles once in 50,000 new objects: rows make none, and looking takes a third of preparing them."""
    usual = gc.get_threshold()
    gc.set_threshold(50_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*usual)


def share_tables(stage: Stage, chat: Chat, cache: Path, *, rejects: Rejects) -> Tables:
    """Prepare the tables once, on rank 0; the others read the files it wrote, without its report and rejects."""
    mine: list[Tables] = []

    def prepare() -> list[Any]:
        mine.append(tables := prepare_tables(stage, chat, cache, rejects=rejects))
        rows = tables.eval_rows[: stage.training.samples.num]
        return [tables.eval is not None, [asdict(row) for row in rows]]

    has_eval, rows = ranks.once(prepare)
    if mine:
        return mine[0]
    from datasets import Dataset

    train = Dataset.from_file(str(cache / "train.arrow"))
    held_out = Dataset.from_file(str(cache / "eval.arrow")) if has_eval else None
    shown = [Row(**{**row, "completions": tuple(row["completions"])}) for row in rows]
    return Tables(train, held_out, DataReport(), LengthReport(), eval_rows=shown)


class Stream:
    """Token rows of a stage that streams, encoded as they are asked for, pass after pass over the sources.
    Rows are asked for in rising order, with gaps where other ranks or earlier sittings have them, so a resumed run
    reads its way to the very row that it stopped at. Memory does not grow with the rows. One that does not fit raises
    DataError when it is reached."""

    column_names: Sequence[str] = ()

    def __init__(self, stage: Stage, chat: Chat) -> None:
        self._stage, self._chat = stage, chat
        self.num_rows = stage.trainer["max_steps"] * stage.training.batch_size
        self._rows, self._next = self._iter_rows(), 0

    def _iter_rows(self) -> Iterator[dict[str, Any]]:
        stage, chat, told = self._stage, self._chat, False
        while True:
            report, left_out = DataReport(remembers=False), Rejects()
            rows = read_rows(stage, stage.options.data, report=report, rejects=Rejects(), template=chat.has_template)
            for columns in _encode(stage, chat, rows, left_out, LengthReport(), []):
                if left_out.count and not told:
                    told = True
                    console.warn(f"{stage.name}: {left_out.first[0]}: such rows of the stream are left out")
                for values in zip(*columns.values(), strict=True):
                    yield dict(zip(columns, values, strict=True))

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, number: int) -> dict[str, Any]:
        if not 0 <= number < self.num_rows:
            raise IndexError(number)
        if number < self._next:
            self._rows, self._next = self._iter_rows(), 0
        skipped, self._next = number - self._next, number + 1
        return next(islice(self._rows, skipped, None))


def _encode(
    stage: Stage, chat: Chat, rows: Iterable[Row], rejects: Rejects, lengths: LengthReport, first: list[Row]
) -> Iterator[dict[str, list[Any]]]:
    """Check, tokenise and encode rows, batch by batch; a few of them are put into `first`. Batches are bounded in
    characters too: a few rows, where each is as long as a book."""

    packed = not streams(stage) and stage.method != "rm" and stage.task is None  # into columns of flat lists

    def batches() -> Iterator[list[EncodedRow]]:
        written = _write_texts(stage, chat, rows, rejects)
        while True:
            batch, num_chars = list[tuple[Row, list[Written]]](), 0
            for row, texts in written:
                batch.append((row, texts))
                num_chars += sum(len(text.text) for text in texts)
                if len(batch) == _BATCH_ROWS or num_chars > _BATCH_CHARS:
                    break
            if not batch:
                return
            pulse("reading data")
            shown = [row for row, _ in batch if row.tokens is None]  # token ids have no text to sample from
            first.extend(shown[: _REMEMBERED_ROWS - len(first)])
            encoded = iter(chat.tokenize([text for _, texts in batch for text in texts], packed=packed))
            yield [(row, [next(encoded) for _ in texts]) for row, texts in batch]

    return encode_rows(stage, batches(), lengths, rejects)


def _write_texts(
    stage: Stage, chat: Chat, rows: Iterable[Row], rejects: Rejects
) -> Iterator[tuple[Row, list[Written]]]:
    """Check the template at the first conversation, deal with control tokens in the text of rows, and render them.
    Written by whoever wrote the text, such tokens would end a turn or open another one in the model's own language.
    They are refused, left out, defused or kept, as `special_tokens_in_text` says."""
    choice, tokens = stage.training.special_tokens_in_text, chat.control_tokens
    skipped = rejects if stage.options.on_bad_row == "skip" else None
    # Of a stream the last row, after which the others are told of, may never come.
    problems, num_read = Problems(skipped, at_once=streams(stage)), 0
    found, template_checked = Counter[str](), False
    key = f"{stage.name}.special_tokens_in_text"
    rendered, unwanted = "is rendered already", "control tokens of the tokenizer in the text"
    remedies = {
        rendered: f"rows are rendered already; set {key}: keep, which adds no second BOS or end",
        unwanted: f"rows hold control tokens; set {key}: escape or keep, or on_bad_row: skip",
    }
    for row in rows:
        num_read += 1
        if row.conversational and not template_checked:
            chat.check()
            template_checked = True
        try:
            if choice == "escape":
                row = escape_control_tokens(row, tokens)
            elif choice == "keep":
                row = as_rendered(row, tokens) or row
            elif inside := find_control_tokens(row, tokens):
                what = unwanted if as_rendered(row, tokens) is None else rendered
                found[what] += 1
                raise ConversationError(f"{what}: {', '.join(inside)}")
            yield row, write_row(stage, chat, row)
        except ConversationError as error:
            problems.add_row(row.place, str(error))
    problems.raise_any(num_read, [f"{found[what]} {remedy}" for what, remedy in remedies.items() if found[what]])


def shuffled_order(num_rows: int, *, seed: int, epoch: int) -> np.ndarray:
    """A permutation of the row numbers, (num_rows,) int64; a resumed run sees the same one."""
    return np.random.default_rng((seed, epoch)).permutation(num_rows)


def grouped_order(lengths: Sequence[int] | np.ndarray, *, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation in which the rows of one global batch are of like length.
    Rows are shuffled, cut into stretches of _MEGA_BATCHES batches, sorted by length inside a stretch, and the batches
    are shuffled again; the incomplete batch stays last. Inside a batch the longest row comes first."""
    rng = np.random.default_rng((seed, epoch))
    lengths = np.asarray(lengths)
    order = rng.permutation(len(lengths))
    stretch = batch_size * _MEGA_BATCHES
    parts = [order[start : start + stretch] for start in range(0, len(order), stretch)]
    order = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in parts])
    num_whole = len(order) // batch_size
    whole, rest = np.split(order, [num_whole * batch_size])
    return np.concatenate([whole.reshape(num_whole, batch_size)[rng.permutation(num_whole)].reshape(-1), rest])


def token_batches(lengths: Sequence[int] | np.ndarray, *, num_tokens: int, seed: int) -> list[np.ndarray]:
    """Cut all rows into batches of like lengths, each as long as `num_tokens` allows when padded to its longest row."""
    lengths = np.asarray(lengths)
    order = np.random.default_rng(seed).permutation(len(lengths))
    batches = []
    for start in range(0, len(order), 1000):
        rows = order[start : start + 1000]
        rows = rows[np.argsort(-lengths[rows], kind="stable")]
        while len(rows):
            size = max(num_tokens // int(lengths[rows[0]]), 1)
            batches.append(rows[:size])
            rows = rows[size:]
    return batches


def fill_up(order: np.ndarray, *, batch_size: int) -> np.ndarray:
    """Make whole batches of an order: the incomplete last one gets rows from the beginning of the epoch, as PyTorch's
    DistributedSampler does. Every optimizer step then has the same rows on any number of devices."""
    return np.resize(order, -(-len(order) // batch_size) * batch_size)


@dataclass(frozen=True)
class Rest:
    """Where a run stands whose batch size was changed: after `step`, in `epoch`, with these rows of it left."""

    step: int
    epoch: int
    rows: np.ndarray


def go_on(batches: Sequence[Sequence[int]], whole: Callable[[int, int], np.ndarray], *, batch_size: int) -> Rest | None:
    """The rows that are left of the epoch in which a run was stopped, None where its batch size never changed.
    `batches` are (last step, rows of each) of the sittings so far; `whole(epoch, batch_size)` is the order of an epoch
    that begins with batches of that size. One that goes on with another size deals out what is left, in order."""
    if all(size == batch_size for _, size in batches):
        return None
    epoch, step = 0, 0
    rows = whole(0, batches[0][1])
    for last, size in batches:
        while step < last:
            taken = min(last - step, -(-len(rows) // size))  # as many as the epoch has
            step, rows = step + taken, rows[taken * size :]
            if not len(rows):
                epoch, rows = epoch + 1, whole(epoch + 1, size)
    if len(rows) == len(whole(epoch, batch_size)):  # an epoch that has not begun is dealt out anew
        rows = whole(epoch, batch_size)
    return Rest(step, epoch, rows)


@dataclass
class EpochSampler(Sampler[int]):
    """Hand the order of the current epoch to a data loader.
    The epoch is asked for when iteration starts, not counted here: a resumed run starts in the middle of one."""

    num_rows: int
    order: Callable[[int], np.ndarray]
    epoch: Callable[[], int]

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch()).tolist())
