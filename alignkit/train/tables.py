"""Rows of a stage as token tables on disk, and the order in which an epoch takes them.

Tables are read, checked, split and tokenised in constant memory; `check` reads the same ones. The order is a pure
function of (lengths, seed, epoch), so that a resumed run sees the rows it would have seen, on any number of devices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Sampler

from alignkit import console
from alignkit.data import (
    DataReport,
    Problems,
    Rejects,
    Row,
    as_rendered,
    escape_control_tokens,
    find_control_tokens,
    read_rows,
    split_eval,
    write_table,
)
from alignkit.data.load import first_rows, streams
from alignkit.data.rows import iter_contents
from alignkit.errors import DataError
from alignkit.models.chat import Chat, ConversationError, Written
from alignkit.models.tokens import load_chat
from alignkit.recipe import Stage
from alignkit.runs.directory import RunDir
from alignkit.runs.files import read_json
from alignkit.runs.form import form_of, require_form
from alignkit.runs.heartbeat import pulse
from alignkit.train import ranks
from alignkit.train.encode import LengthReport, choose_encoder, longest_prompt, write_row

if TYPE_CHECKING:
    from datasets import Dataset


MEGA_BATCHES = 50  # global batches whose rows are sorted together: enough to match lengths, few enough to stay random


def shuffled_order(num_rows: int, *, seed: int, epoch: int) -> np.ndarray:
    """Return a permutation of the row numbers, (num_rows,) int64."""
    return np.random.default_rng((seed, epoch)).permutation(num_rows)


def grouped_order(lengths: Sequence[int] | np.ndarray, *, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Return a permutation in which the rows of one global batch are of like length.

    Rows are shuffled, cut into stretches of MEGA_BATCHES batches, sorted by length inside a stretch, and the batches
    are shuffled again; the incomplete batch stays last. Inside a batch the longest row comes first.
    """
    rng = np.random.default_rng((seed, epoch))
    lengths = np.asarray(lengths)
    order = rng.permutation(len(lengths))
    stretch = batch_size * MEGA_BATCHES
    parts = [order[start : start + stretch] for start in range(0, len(order), stretch)]
    order = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in parts])
    num_whole = len(order) // batch_size
    whole, rest = order[: num_whole * batch_size], order[num_whole * batch_size :]
    batches = whole.reshape(num_whole, batch_size)[rng.permutation(num_whole)]
    return np.concatenate([batches.reshape(-1), rest])


def fill_up(order: np.ndarray, *, batch_size: int) -> np.ndarray:
    """Return an order of whole batches: the incomplete last one gets rows from the beginning of the epoch.

    Every optimizer step then has the same number of rows, and so the same rows on any number of devices; PyTorch's
    DistributedSampler fills up in the same way.
    """
    missing = -len(order) % batch_size
    return np.concatenate([order, np.resize(order, missing)]) if missing else order


@dataclass(frozen=True)
class Rest:
    """Where a run stands whose batch size was changed: after `step`, in `epoch`, with these rows of it left."""

    step: int
    epoch: int
    rows: np.ndarray


def go_on(batches: Sequence[Sequence[int]], whole: Callable[[int, int], np.ndarray], *, batch_size: int) -> Rest | None:
    """Return the rows that are left of the epoch in which a run was stopped, None where its batch size never changed.

    `batches` are (last step, rows of each) of the sittings so far; `whole(epoch, batch_size)` is the order of an epoch
    that begins with batches of that size. One that goes on with another size deals out what is left, in order.
    """
    if all(size == batch_size for _, size in batches):
        return None
    epoch, step = 0, 0
    rows = whole(0, batches[0][1])
    for last, size in batches:
        while step < last:
            in_epoch = -(-len(rows) // size)
            taken = min(last - step, in_epoch)
            step, rows = step + taken, rows[taken * size :]
            if not len(rows):
                epoch, rows = epoch + 1, whole(epoch + 1, size)
    if len(rows) == len(whole(epoch, batch_size)):  # an epoch that has not begun is dealt out anew
        rows = whole(epoch, batch_size)
    return Rest(step, epoch, rows)


class EpochSampler(Sampler[int]):
    """Hand the order of the current epoch to a data loader.

    The epoch is asked for when iteration starts, not counted here: a resumed run starts in the middle of one.
    """

    def __init__(self, num_rows: int, order: Callable[[int], np.ndarray], epoch: Callable[[], int]) -> None:
        self._num_rows = num_rows
        self._order = order
        self._epoch = epoch

    def __len__(self) -> int:
        return self._num_rows

    def __iter__(self) -> Iterator[int]:
        return iter(self._order(self._epoch()).tolist())


_BATCH_ROWS, _BATCH_CHARS = 1000, 10_000_000
_REMEMBERED_ROWS = 256  # for samples


class Stream:
    """Token rows of a stage, encoded as they are asked for: `num_rows` of them, pass after pass over the sources.

    Rows are asked for in rising order, with gaps where other ranks or earlier sittings have them, so a resumed run
    reads its way to the very row that it stopped at. Memory does not grow with the rows.
    """

    column_names: Sequence[str] = ()

    def __init__(self, encode: Callable[[], Iterator[dict[str, list[Any]]]], num_rows: int) -> None:
        self._encode, self.num_rows = encode, num_rows
        self._restart()

    def _restart(self) -> None:
        self._rows, self._next = self._iter_rows(), 0

    def _iter_rows(self) -> Iterator[dict[str, Any]]:
        while True:
            for columns in self._encode():
                for values in zip(*columns.values(), strict=True):
                    yield dict(zip(columns, values, strict=True))

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, number: int) -> dict[str, Any]:
        if not 0 <= number < self.num_rows:
            raise IndexError(number)
        if number < self._next:
            self._restart()
        while self._next < number:
            next(self._rows)
            self._next += 1
        self._next += 1
        return next(self._rows)


@dataclass
class Tables:
    """Ready token tables of one stage; of a stage that streams, `train` holds its first rows alone."""

    train: Dataset
    eval: Dataset | None
    report: DataReport
    lengths: LengthReport
    eval_lengths: LengthReport | None = None
    eval_rows: list[Row] = field(default_factory=list)  # a few held-out (or else training) rows, for samples


def open_chat(stage: Stage, run: RunDir) -> Chat:
    """Load the tokenizer and template of a stage; a template that reads the clock reads when the run began."""
    kept = read_json(run.stage).get("clock") if run.stage.exists() else None
    clock = datetime.fromisoformat(ranks.share(kept or datetime.now().isoformat()))
    return load_chat(stage, clock=clock)


def prepare_tables(stage: Stage, chat: Chat, cache: Path, *, rejects: Rejects) -> Tables:
    """Read, check, split and tokenise the rows of a stage into memory-mapped tables below `cache`.

    Memory does not grow with the number of rows. Raises DataError for rows that do not fit, for an empty table, and
    when more than `max_truncated` of the rows are cut or too long.
    """
    cache.mkdir(parents=True, exist_ok=True)
    options, report = stage.training, DataReport()
    share = options.eval if isinstance(options.eval, float) else None
    template = chat.has_template
    rows = read_rows(stage, first_rows(stage, report), report=report, rejects=rejects, template=template)
    train = _write(stage, chat, cache / "train.arrow", _take_side(stage, rows, share, held_out=False), rejects)
    held_out = None
    if share is not None:  # a second pass over the files keeps memory flat, whatever the share is
        rows = read_rows(stage, options.data, report=DataReport(), rejects=Rejects(), template=template)
        held_out = _write(stage, chat, cache / "eval.arrow", _take_side(stage, rows, share, held_out=True), rejects)
    elif isinstance(options.eval, list):
        known = report.prompt_hashes()
        rows = read_rows(stage, options.eval, report=report, rejects=rejects, known_prompts=known, template=template)
        held_out = _write(stage, chat, cache / "eval.arrow", rows, rejects)
    _require_rows(stage, train)
    require_form(stage, form_of(report.to_dict()))
    assert train.table is not None
    if held_out is None:
        return Tables(train.table, None, report, train.lengths, None, train.first_rows)
    if held_out.table is None:
        raise DataError(
            f"{stage.name}.eval holds out no row that can be used; raise the share or look at the source",
            where=stage.where(f"{stage.name}.eval"),
        )
    return Tables(train.table, held_out.table, report, train.lengths, held_out.lengths, held_out.first_rows)


def open_stream(stage: Stage, chat: Chat) -> Stream:
    """The rows of a stage that streams; a row that does not fit raises DataError when it is reached."""

    told: list[bool] = []

    def encode() -> Iterator[dict[str, list[Any]]]:
        report, lengths = DataReport(remembers=False), LengthReport()
        rows = read_rows(stage, stage.options.data, report=report, rejects=Rejects(), template=chat.has_template)
        for columns in _encode(stage, chat, rows, (left_out := Rejects()), lengths, []):
            if left_out.count and not told:
                told.append(True)
                console.warn(f"{stage.name}: {left_out.first[0]}: such rows of the stream are left out")
            yield columns

    return Stream(encode, stage.trainer["max_steps"] * stage.training.batch_size)


def share_tables(stage: Stage, chat: Chat, cache: Path, *, rejects: Rejects) -> Tables:
    """Prepare the tables once, on rank 0; the others read the files it wrote, without its report and rejects.

    Raises on every rank what `prepare_tables` raises.
    """
    mine: list[Tables] = []

    def prepare() -> dict[str, Any]:
        tables = prepare_tables(stage, chat, cache, rejects=rejects)
        mine.append(tables)
        return {
            "lengths": asdict(tables.lengths),
            "eval_lengths": asdict(tables.eval_lengths) if tables.eval_lengths else None,
            "eval_rows": [asdict(row) for row in tables.eval_rows[: stage.training.samples.num]],
        }

    facts = ranks.once(prepare)
    if mine:
        return mine[0]
    from datasets import Dataset

    held_out = facts["eval_lengths"]
    return Tables(
        Dataset.from_file(str(cache / "train.arrow")),
        Dataset.from_file(str(cache / "eval.arrow")) if held_out else None,
        DataReport(),
        LengthReport(**facts["lengths"]),
        LengthReport(**held_out) if held_out else None,
        [Row(**{**row, "completions": tuple(row["completions"])}) for row in facts["eval_rows"]],
    )


def _take_side(stage: Stage, rows: Iterable[Row], share: float | None, *, held_out: bool) -> Iterable[Row]:
    """Return the rows of one side of a split by prompt; all of them without a share."""
    if share is None:
        return rows
    return (row for is_eval, row in split_eval(rows, share, stage.seed) if is_eval == held_out)


def _write_texts(
    stage: Stage, chat: Chat, rows: Iterable[Row], rejects: Rejects
) -> Iterator[tuple[Row, list[Written]]]:
    """Check the template at the first conversation, deal with control tokens in the text of rows, and render them.

    Written by whoever wrote the text, such tokens would end a turn or open another one in the model's own language.
    They are refused, left out, defused or kept, as `special_tokens_in_text` says.
    """
    choice = stage.training.special_tokens_in_text
    tokens = chat.control_tokens
    problems, num_read, found = Problems(), 0, Counter[bool]()
    template_checked = False
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
                rendered = as_rendered(row, tokens) is not None
                found[rendered] += 1
                what = "is rendered already" if rendered else "control tokens of the tokenizer in the text"
                raise ConversationError(f"{what}: {', '.join(inside)}")
            written = write_row(stage, chat, row)
        except ConversationError as error:
            if stage.options.on_bad_row == "skip":
                rejects.add(row.place, str(error))
            elif streams(stage):  # the last row, after which the others are told of, may never come
                raise DataError(str(error), where=row.place) from None
            else:
                problems.add_row(row.place, str(error))
        else:
            yield row, written
    key = f"{stage.name}.special_tokens_in_text"
    advice = [
        f"{found[True]} rows are rendered already; set {key}: keep, which adds no second BOS or end"
        if found[True]
        else "",
        f"{found[False]} rows hold control tokens; set {key}: escape or keep, or on_bad_row: skip"
        if found[False]
        else "",
    ]
    problems.raise_any(num_read, [remedy for remedy in advice if remedy])


@dataclass
class _Written:
    """A table and what was counted while it was written; no table when no row was left."""

    table: Dataset | None
    lengths: LengthReport
    first_rows: list[Row]


def _write(stage: Stage, chat: Chat, path: Path, rows: Iterable[Row], rejects: Rejects) -> _Written:
    """Check, encode and write rows, batch by batch, remembering the first few."""
    lengths = LengthReport()
    first: list[Row] = []
    found = _encode(stage, chat, rows, rejects, lengths, first)
    start = next(found, None)
    table = None if start is None else write_table(path, chain([start], found))
    return _Written(table, lengths, first)


def _encode(
    stage: Stage, chat: Chat, rows: Iterable[Row], rejects: Rejects, lengths: LengthReport, first: list[Row]
) -> Iterator[dict[str, list[Any]]]:
    """Check and encode rows, batch by batch; a few of them are put into `first`."""
    encode = choose_encoder(stage)
    for batch in chain(_batched(_write_texts(stage, chat, rows, rejects)), [[]]):
        pulse("reading data")
        shown = [row for row, _ in batch if row.tokens is None]  # token ids have no text to sample from
        first.extend(shown[: _REMEMBERED_ROWS - len(first)])
        encoded = iter(chat.tokenize([text for _, texts in batch for text in texts]))
        columns = encode([(row, [next(encoded) for _ in texts]) for row, texts in batch], lengths, rejects)
        if columns["length"]:
            yield columns


def _batched(rows: Iterable[tuple[Row, list[Written]]]) -> Iterator[list[tuple[Row, list[Written]]]]:
    """Cut rows into batches of bounded size: a few of them, where each is as long as a book."""
    batch: list[tuple[Row, list[Written]]] = []
    num_chars = 0
    for row, texts in rows:
        batch.append((row, texts))
        num_chars += sum(map(len, iter_contents(row)))
        if len(batch) == _BATCH_ROWS or num_chars > _BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def _require_rows(stage: Stage, train: _Written) -> None:
    lengths = train.lengths
    where = stage.where(f"{stage.name}.data")
    if stage.method == "ppo" and lengths.truncated_share > stage.training.max_truncated:
        raise DataError(
            f"{lengths.truncated_share:.0%} of the prompts are longer than the {longest_prompt(stage)} tokens that "
            f"{stage.name}.max_new_tokens leaves of the model's context (the longest has {lengths.longest_tokens}), "
            f"more than max_truncated allows ({stage.training.max_truncated:.0%}); raise it, or lower max_new_tokens",
            where=where,
        )
    if lengths.truncated_share > stage.training.max_truncated:
        raise DataError(
            f"{lengths.truncated_share:.0%} of the rows are longer than {stage.name}.max_length "
            f"({stage.trainer.get('max_length')} tokens; the longest row has {lengths.longest_tokens}), more than "
            f"max_truncated allows ({stage.training.max_truncated:.0%}); raise one of the two or shorten the rows",
            where=where,
        )
    if lengths.num_untrained and not lengths.num_rows:
        raise DataError(
            f"none of the {lengths.num_untrained} rows has a token to learn from: every label is masked; look at the "
            "roles of the messages and at max_length",
            where=where,
        )
    if train.table is None:
        raise DataError("no row is left to train on", where=where)
