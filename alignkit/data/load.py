"""Rows for a stage: every source read, checked, adapted to the method, mixed, in a fixed order."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from itertools import combinations, count, groupby, islice
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

from alignkit.data.adapters import ANSWERS, ASKED, LABELS, SCORES
from alignkit.data.files import Entry, Record, read_file
from alignkit.data.formats import Detector, Format, Parsed, rename_columns
from alignkit.data.report import DataReport, Problems, Rejects, Seen, SourceReport
from alignkit.data.rows import METHOD_KINDS, BadRow, Row, as_text, as_turns, digest_row, prompt_key, take_prompt
from alignkit.data.sources import Located, locate, read_entries
from alignkit.data.store import keep_parsed
from alignkit.errors import DataError, Problem
from alignkit.recipe.methods import TASKS
from alignkit.recipe.schema import DataSource
from alignkit.recipe.stage import Stage

_2_64 = float(2**64)
_FIRST_ROWS = 1000  # of a source that is streamed: what is checked, counted and shown before training
# Of a reward function; columns of these names are not given to it.
_ARGUMENTS = ("prompt", "prompts", "completions", "completion_ids")


def read_rows(
    stage: Stage, sources: Sequence[DataSource], *, report: DataReport, rejects: Rejects,
    known_prompts: Sequence[int] | None = None, method: str | None = None, template: bool | None = None,
) -> Iterator[Row]:  # fmt: skip
    """Yield the stage's rows, source after source, in the order of their files; as `method` takes them, where given.
    With `template`, whether the model has a chat template, prompts and answers become turns or joined text, as `chat`
    says. Every source gives its first `max_rows` good rows, without repeats under `dedupe`, as often as `weight` says.
    `report` is filled on the way; with `known_prompts`, sorted, it counts the rows that share a prompt.
    Raises DataError at once for sources that cannot be read, after the last row for rows that do not fit."""
    skipped = rejects if stage.options.on_bad_row == "skip" else None
    problems = Problems(skipped, at_once=not report.remembers)
    seen = Seen() if stage.options.dedupe else None
    method = method or stage.task or stage.method
    kinds: Counter[str] = Counter()  # of this call; the report may hold the rows of another one too
    chosen = [_Source(located, stage, method, problems, template) for located in locate(sources)]
    for source in chosen:
        report.sources.append(source.counts)
        for row, digest, form in source.iter_good(seen):
            copies, share = divmod(source.source.weight, 1)
            if share:  # whole passes, and one more for a seeded share of the rows
                drawn = blake2b(digest, digest_size=8, key=f"weight {stage.seed}".encode()).digest()
                copies += int.from_bytes(drawn, "little") < share * _2_64
            if not copies:
                source.counts.not_sampled += 1
                continue
            source.counts.kept += 1
            report.add_source_row(row, digest, known_prompts)
            for given in int(copies) * _for_method(row, method):
                kinds[given.kind] += 1
                report.add_given_row(given, digest)
                yield source.shape(given, form)
        source.finish()
    num_read = sum(source.counts.read for source in chosen)
    if method == "dpo" and {"pair", "unpaired"} <= kinds.keys():
        counts = " and ".join(f"{count} {kind} rows" for kind, count in kinds.items())
        where = stage.where(f"{stage.name}.data")
        problems.files.append(Problem(f"{counts} cannot be trained on in one dpo stage; give each its own", where))
    problems.raise_any(num_read)
    if not kinds:
        paths = ", ".join(source.path for source in sources)
        raise DataError([*rejects.first, Problem(f"no row is left of {num_read} read", paths)])


def first_rows(stage: Stage, report: DataReport) -> list[DataSource]:
    """The sources of the training rows; of a stage that streams what is looked at first, with sizes for `report`."""
    sources = stage.options.data
    if not streams(stage):
        return sources
    for located in locate(sources):
        report.add_sizes([path.stat().st_size for path in located.files])
    most = [min(source.max_rows or _FIRST_ROWS, _FIRST_ROWS) for source in sources]
    return [source.model_copy(update={"max_rows": rows}) for source, rows in zip(sources, most, strict=True)]


def streams(stage: Stage) -> bool:
    """Whether the training rows are read while it trains."""
    return bool(getattr(stage.options, "streaming", False))


def split_eval(rows: Iterable[Row], share: float, seed: int) -> Iterator[tuple[bool, Row]]:
    """Yield (is for evaluation, row); rows with one prompt all fall on one side, the same side for a seed for ever."""
    key = f"eval split {seed}".encode()
    for row in rows:
        drawn = int.from_bytes(blake2b(prompt_key(row), digest_size=8, key=key).digest(), "little")
        yield drawn < share * _2_64, row


def read_published(
    path: Path, parse: Callable[[Record], _Read], what: str, *, skip: bool, rejects: Rejects
) -> Iterator[tuple[str, _Read]]:
    """Yield (place, parsed row) of a published file; rows that are no `what` go to `rejects`, or are raised."""
    problems, num_read = Problems(rejects if skip else None), 0
    for num_read, (place, record) in enumerate(read_file(path), 1):  # noqa: B007
        try:
            if isinstance(record, BadRow):
                raise record
            parsed = parse(record)
        except BadRow as bad:
            problems.add_row(place, bad.reason)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            problems.add_row(place, f"is no {what} ({type(error).__name__}: {error})")
        else:
            yield place, parsed
    problems.raise_any(num_read)


_Read = TypeVar("_Read")


def _for_method(row: Row, method: str) -> tuple[Row, ...]:
    """Turn a row into what the method trains on: sft takes the best answer, dpo all pairs of a ranked list."""
    if method == "sft" and row.kind in ("pair", "ranked"):
        best = row.completions[1 if row.label is not None and row.label < 0.5 else 0]
        return (Row("prompt_completion", row.prompt, (best,), place=row.place),)
    if method == "dpo" and row.kind == "ranked":
        assert row.scores is not None
        ranked = combinations(zip(row.completions, row.scores, strict=True), 2)
        pairs = ((better, worse) for (better, above), (worse, below) in ranked if above > below)
        return tuple(Row("pair", row.prompt, pair, place=row.place) for pair in pairs)
    return (row,)


def _parse(located: Located, method: str, *, keeps_columns: bool, documents: bool) -> Iterator[Parsed]:
    """Yield what becomes of every record of a source; rows of kinds that the method does not take are not read."""
    source, known = located.source, set[Format]()
    for_prompts = method in ("ppo", "critique", "label")
    if method in TASKS and source.format != "auto":
        raise DataError(f"format: {source.format} has no effect on rows with labels; take it out", where=source.path)
    format_name = method if method in TASKS else source.format
    detector = Detector(format_name, roles=source.roles, for_prompts=for_prompts, keeps_columns=keeps_columns)

    def rename(entry: Entry) -> Entry:
        place, record = entry
        try:
            return place, record if isinstance(record, BadRow) else rename_columns(record, source.columns)
        except BadRow as bad:
            return place, bad

    found = read_entries(located, documents=documents, named=method in TASKS)
    entries = map(rename, found) if method in TASKS else join_threads(map(rename, found))
    for place, record in join_rated(entries) if method in ("rm", "dpo") else entries:
        parsed = Parsed(place)
        try:
            if isinstance(record, BadRow):
                raise record
            parsed.form = form = detector.recognise(record, place)
            if form not in known:
                known.add(form)
                parsed.columns = list(map(str, record))
            if form.kind in METHOD_KINDS[method]:
                row = detector.read(form, record, parsed)
                if source.chat is True and not (row.conversational or form.has_turns):
                    raise BadRow("is raw text, of which chat: true makes no turns: give it a prompt and a completion")
                if source.chat is False and row.conversational:
                    raise BadRow("is a conversation, which chat: false cannot join as text: take chat: false out")
                if method == "sft" and row.kind in ("pair", "ranked"):
                    parsed.noted += ("rows have worse answers beside the best one; sft learns nothing from them",)
                elif method == "dpo":
                    _check_answers(row)
                elif method in ("ppo", "label"):
                    row = take_prompt(row) if method == "ppo" else row
                    row = replace(row, columns=_dump_columns(record)) if keeps_columns else row
                parsed.row, parsed.digest = row, digest_row(row)
        except BadRow as bad:
            parsed.reason, parsed.equal_answers = bad.reason, bad.equal_answers
        yield parsed


def _check_answers(row: Row) -> None:
    """Refuse what a comparison of answers cannot mask: turns of others inside one, and an answer that is not learnt."""
    for messages in row.completions if row.kind in ("pair", "ranked", "unpaired") else ():
        for message in messages if isinstance(messages, list) else ():
            if message["role"] != "assistant":
                raise BadRow(
                    f"holds a turn of the {message['role']} inside an answer, which is never learnt, and answers are "
                    "compared as a whole; end the prompt with that turn, or give each answer a row of its own"
                )
            if not message.get("trained", True):
                raise BadRow("an answer that is compared is marked as not learnt; leave the mark or the row out")


def _dump_columns(record: Record) -> str:
    """A record's columns as a JSON object, but for those whose names a reward function's arguments have."""
    written = []
    for name, value in record.items():
        try:
            written += [json.dumps({name: value}, ensure_ascii=False)[1:-1]] if name not in _ARGUMENTS else []
        except (TypeError, ValueError):
            raise BadRow(f"{name}: holds a value that is no JSON (a date, bytes, ...), and a reward function is given "
                         "the columns as JSON; convert it, or drop the column") from None  # fmt: skip
    return f"{{{', '.join(written)}}}"


class _Source:
    """One source: its good rows sorted from bad ones, and what is wrong with it as a whole."""

    def __init__(self, located: Located, stage: Stage, method: str, problems: Problems, template: bool | None) -> None:
        self.source = located.source
        self.counts = SourceReport(located.source.path)
        self._method, self._problems = method, problems
        self._separator = "" if stage.objective == "seq2seq" else located.source.separator  # each half is a text
        key, wanted = ("chat", stage.options.chat) if self.source.chat == "auto" else ("data.chat", self.source.chat)
        if wanted is True and template is False:
            raise DataError(
                "chat: true needs a chat template, and the model has none: set model.chat_template, or chat: false",
                where=stage.where(f"{stage.name}.{key}"),
            )
        shape = "raw" if stage.objective == "lm" and wanted == "auto" else "chat" if template and wanted else "text"
        self._form = None if template is None else shape
        self._num_rows = Counter[Format]()
        self._columns: dict[Format, list[str]] = {}  # of the first row of each format
        self._places = defaultdict[Format, list[str]](list)  # of the first two
        # Whether a reward is given the rows' columns; whether a row may be as long as a book.
        reads = any(reward.model is None and reward.judge is None for _, reward in stage.rewards)
        flags = {"keeps_columns": reads, "documents": stage.objective == "lm"}
        self._parsed: Callable[[], Iterator[Parsed]] = partial(_parse, located, method, **flags)
        if not problems.at_once:  # a stream may be longer than a disk
            self._parsed = keep_parsed(located, (method, *flags.values()), self._parsed)

    def iter_good(self, seen: Seen | None) -> Iterator[tuple[Row, bytes, Format]]:
        """Yield the first max_rows good rows that are not in `seen`, adding them to it."""
        counts, accepted, problems = self.counts, METHOD_KINDS[self._method], self._problems
        skips, taken, only = problems.skipped is not None, 0, None
        if skips:  # then the commonest format is kept, the first one on a tie
            forms = (parsed.form for parsed in islice(self._parsed(), self.source.max_rows))
            usable = Counter(form for form in forms if form is not None and form.kind in accepted)
            only = usable.most_common(1)[0][0] if usable else None
        for parsed in self._parsed():
            counts.read += 1
            form = parsed.form
            if form is not None:
                self._num_rows[form] += 1
                if self._num_rows[form] <= 2:
                    self._columns.setdefault(form, parsed.columns or [])
                    self._places[form].append(parsed.place)
                if problems.at_once and self._num_rows[form] == 1 < len(self._num_rows):
                    what = f"is a row of {form}; those before it are not: give each its own source"
                    raise DataError(what, where=parsed.place)
                if form.kind not in accepted or (only is not None and form is not only):
                    counts.rejected += 1
                    if skips or problems.at_once:  # else `finish` reports them together
                        why = f"most usable rows of the source are {only}" if only else f"{self._method} cannot take it"
                        problems.add_row(parsed.place, f"is a row of {form}; {why}")
                    continue
            for name in parsed.unread:
                counts.ignored_columns[name] += 1
                counts.ignored_places.setdefault(name, parsed.place)
            for what in parsed.noted:
                times, first = counts.noted.get(what, (0, parsed.place))
                counts.noted[what] = (times + 1, first)
            if parsed.row is None or form is None:
                counts.rejected += 1
                counts.equal_answers += parsed.equal_answers
                problems.add_row(parsed.place, parsed.reason)
            elif seen is not None and not seen.add(parsed.digest):
                counts.duplicates_dropped += 1
            else:
                yield parsed.row, parsed.digest, form
                taken += 1
                if taken == self.source.max_rows:
                    return

    def shape(self, row: Row, form: Format) -> Row:
        """Make turns of a row's prompt and answers, or joined text; conversations and raw text stay."""
        if self._form is None:
            return row
        if row.conversational:
            shape = "chat"
        elif not form.has_turns:
            shape = "text" if form.kind == "pair" else "raw"
        else:
            shape = self._form
            row = as_turns(row) if shape == "chat" else as_text(row, self._separator)
        self.counts.forms[shape] += 1
        return row

    def finish(self) -> None:
        """Complete the counts; add the problems of the source: mixed formats, or one that the method cannot take."""
        self.counts.formats.update({str(form): rows for form, rows in self._num_rows.items()})
        kinds = ", ".join(
            f"{rows} {'row' if rows == 1 else 'rows'} of {form} "
            f"({', '.join(self._places[form])}{', ...' if rows > 2 else ''})"
            for form, rows in self._num_rows.items()
        )
        accepted = METHOD_KINDS[self._method]
        if len(self._columns) > 1 and self._problems.skipped is None:
            advice = "give each kind its own source, or set on_bad_row: skip to keep the commonest"
            self._problems.files.append(Problem(f"mixes kinds of rows: {kinds}; {advice}", self.source.path))
        elif len(self._columns) == 1 and not {form.kind for form in self._columns} & {*accepted}:
            (columns,) = self._columns.values()
            what = f"{kinds}; {self._method} takes {', '.join(accepted)}"
            pair = ("prompt", "chosen", "rejected")
            ours = {"sft": ("prompt", "completion"), "rm": pair, "dpo": pair}.get(self._method, ())
            wanted = ", ".join(f"{name}: COLUMN" for name in ours if name not in columns)
            if self._method == "sft" and {"label", "kto_tag"} & set(columns):
                what += "; columns: {label: null} leaves the labels out"
            elif wanted:
                what += f"; the rows have {', '.join(columns)}: data.columns: {{{wanted}}} names others"
            self._problems.files.append(Problem(what, self.source.path))


# Rows that belong together: trees of messages (OpenAssistant's), rated answers to one prompt (HelpSteer2's). Every path
# from the root of a tree to its end is a conversation; an answer is learnt in the first one that has it.
_OF_MESSAGES = ("message_id", "parent_id", "text", "role")
_MAX_DEPTH = 200


def join_threads(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Yield {"messages": ...} for the conversations of trees, whose rows follow each other; other entries pass."""

    def is_of_tree(record: Record) -> bool:
        if type(record.get("prompt")) is dict:
            return "replies" in record["prompt"]
        ids = type(record.get("message_id")), type(record.get("parent_id"))
        return record.keys() >= {*_OF_MESSAGES} and ids[0] in (str, int) and ids[1] in (str, int, NoneType)

    tree: dict[Any, tuple[str, dict[str, Any]]] = {}
    for place, record in entries:
        if isinstance(record, BadRow) or not is_of_tree(record):
            yield from _list_threads(tree) if tree else ()
            tree = {}
            yield place, record
        elif type(record.get("prompt")) is dict:
            try:
                nodes = _flatten(record["prompt"], count(), None, 0)
                yield from _list_threads({node["message_id"]: (place, node) for node in nodes})
            except BadRow as bad:
                yield place, bad
        elif record["parent_id"] is None:
            yield from _list_threads(tree)
            tree = {record["message_id"]: (place, record)}
        elif record["message_id"] in tree:
            yield place, BadRow(f"message_id: {record['message_id']!r} is another message's of the same tree")
        elif record["parent_id"] in tree:
            tree[record["message_id"]] = (place, record)
        else:
            what = f"parent_id: {record['parent_id']!r} is no message of the tree"
            yield place, BadRow(f"{what}; the rows of a tree must follow each other, parents first")
    yield from _list_threads(tree)


def _flatten(node: Any, numbers: Iterator[int], parent: int | None, depth: int) -> Iterator[dict[str, Any]]:
    if type(node) is not dict or type(node.get("replies", [])) is not list or depth > _MAX_DEPTH:
        raise BadRow("prompt: is no tree of messages with replies")
    number = next(numbers)
    yield {**{key: node[key] for key in node if key != "replies"}, "message_id": number, "parent_id": parent}
    for reply in node.get("replies", []):
        yield from _flatten(reply, numbers, number, depth + 1)


def _list_threads(tree: dict[Any, tuple[str, dict[str, Any]]]) -> Iterator[Entry]:
    """Yield the conversations of one tree, the best ranked replies first."""
    replies: dict[Any, list[Any]] = {}
    for name, (_, node) in tree.items():
        if node.get("deleted") is not True:
            replies.setdefault(node["parent_id"], []).append(name)
    learnt: set[Any] = set()
    waiting: list[list[Any]] = [[name] for name in replies.get(None, [])]
    while waiting:
        path = waiting.pop()
        ranks: dict[Any, Any] = {name: tree[name][1].get("rank") for name in replies.get(path[-1], [])}
        following = sorted(ranks, key=lambda name: ranks[name] if type(ranks[name]) in (int, float) else math.inf)
        waiting += [[*path, name] for name in reversed(following)]
        if following:
            continue
        while path and tree[path[-1]][1].get("role") != "assistant":
            path.pop()
        if path and path[-1] not in learnt:
            place, _ = tree[path[-1]]
            messages = []
            for name in path:
                node = tree[name][1]
                kept = {key: node[key] for key in node if key not in (*_OF_MESSAGES[:3], "deleted")}
                messages.append({**kept, "content": node.get("text"), **({"train": False} if name in learnt else {})})
            yield place, {"messages": messages}
            learnt.update(path)


def join_rated(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Yield rows of one prompt that follow each other, each an answer and its score, as one ranked row; others pass."""

    def find_rated(entry: Entry) -> tuple[str, str, list[Any]] | None:
        """Tell a row of one answer and its score: the columns of both, and what was asked."""
        record = entry[1]
        if isinstance(record, BadRow) or not record.keys().isdisjoint((*LABELS, "chosen", "rejected", "completions")):
            return None
        answer = next((name for name in ANSWERS if type(record.get(name)) is str), None)
        score = next((name for name in SCORES if record.get(name) is not None), None)
        asked = [record.get(name) for name in ASKED]
        return (answer, score, asked) if answer and score and any(asked) else None

    for rated, group in groupby(entries, find_rated):
        if rated is None:
            yield from group
            continue
        answer, score, _ = rated
        rows = list(group)
        place, first = rows[0]
        if len(rows) == 1:
            what = "one rated answer to its prompt, which is compared with nothing"
            yield place, BadRow(f"{score}: is of {what}; the rows of a prompt must follow each other")
            continue
        answers, scores = ([row[name] for _, row in rows] for name in (answer, score))  # type: ignore[index]
        asked = {name: value for name, value in first.items() if name not in (answer, score)}  # type: ignore[union-attr]
        yield place, {**asked, "completions": answers, "scores": scores}
