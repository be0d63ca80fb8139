"""Which format a record is in: the first one of a table whose columns it has; no telling column stays unread."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any

from alignkit.data import adapters
from alignkit.data.adapters import ANSWERS, ASKED, CONVERSATIONS, PROMPTS, START
from alignkit.data.files import Record
from alignkit.data.rows import BadRow, Kind, Row
from alignkit.data.values import (
    CONTENT_KEYS,
    KNOWN,
    REASONING_KEYS,
    ROLE_KEYS,
    Reading,
    check_number,
    is_empty,
    suggest_column,
)
from alignkit.errors import suggest


@dataclass(frozen=True, slots=True, eq=False)  # compared and hashed by identity: each is made once
class Format:
    """One way to write a kind of row."""

    name: str  # the value of `format:` it belongs to
    kind: Kind
    needs: str  # the columns it has, all of these words: a|b is one of two, prompt:str a column of that type
    adapt: Callable[[Reading], Row]  # raises BadRow
    chat: bool = False  # text is in lists of messages
    loose: bool = False  # its names mean other things beside a prompt of ppo, such as what a reward function expects

    def __str__(self) -> str:
        name = self.name if self.name == self.kind else f"{self.name} {self.kind}"
        return f"{name} (messages)" if self.chat else name

    def fits(self, record: Record) -> bool:
        """Whether the record has the columns."""

        def has(word: str) -> bool:
            name, _, kind = word.partition(":")
            columns = [column for column in GROUPS.get(name, (name,)) if column in record]
            return any(not kind or type(record[column]).__name__ == kind for column in columns)

        return all(any(map(has, word.split("|"))) for word in self.needs.split())

    @property
    def has_turns(self) -> bool:
        """Whether a prompt and its answers stand apart, so that they can become turns: not in raw text."""
        return self.kind in ("prompt_completion", "pair", "ranked", "unpaired", "prompt") and self is not _IMPLICIT


# Names of several columns in `needs`.
GROUPS = {
    "PROMPT": (*PROMPTS, *adapters.CONTEXTS), "CONVERSATION": CONVERSATIONS, "ANSWER": ANSWERS,
    "LABEL": adapters.LABELS, "REJECTED": adapters.REJECTED,
}  # fmt: skip

# A record is in the first one that fits. Of a `format:` only its own are tried; the last of them where none fits. Those
# with labels are for the sft objectives of their names alone.
FORMATS = tuple(
    Format(row["name"], row["kind"], row["needs"],
           partial(getattr(adapters, f"adapt_{row['adapt']}"), **row.get("with", {})),
           row.get("chat", False), row.get("loose", False))
    for row in KNOWN["formats"]
)  # fmt: skip
_HH = next(form for form in FORMATS if form.name == "hh")
_IMPLICIT = next(form for form in FORMATS if form.needs == _HH.needs)  # by its text a row is in the other one
# Not read, these are refused: they say what is asked or thought, what is learnt, or what an answer is worth.
_TELLING = {*ASKED, *REASONING_KEYS, "history", "label", "weight", "loss_mask"}
# The beginning of a message, or of a list of them, as JSON or as Python and NumPy show it.
_KEYS = ROLE_KEYS[:3], CONTENT_KEYS[:3]  # what else a message may have for them, other objects have too
_SAYS = [re.compile(rf"""["'](?:{"|".join(names)})["']\s*:""") for names in _KEYS]
_MESSAGE = re.compile(r"""\s*(?:array\()?\[?\s*\{\s*["'](\w+)["']\s*:""")
_CSV = re.compile(r"\.[ct]sv(\.\w+)?:\d+\Z")
_NEAR = {
    "prompt": ("prompt", *PROMPTS), "completion": ("completion", *ANSWERS), "messages": ("messages", *CONVERSATIONS),
    "text": ("text",),
}  # fmt: skip
_RENAMING = "columns: {prompt: COLUMN, completion: COLUMN} names others"
_MAX_KNOWN = 4096  # a file whose columns change with every row must not fill the memory


@dataclass(slots=True)
class Parsed:
    """What became of a record."""

    place: str
    form: Format | None = None  # None where no format has its columns
    row: Row | None = None  # None for a bad row, and for a kind that the method does not take
    digest: bytes = b""
    reason: str = ""  # of a bad row
    equal_answers: bool = False
    columns: list[str] | None = None  # of the first record of a format
    unread: tuple[str, ...] = ()  # columns, and keys of messages, that nothing reads
    noted: tuple[str, ...] = ()  # what is odd about the row


class Detector:
    """Finds the format of records and reads them."""

    def __init__(
        self, format_name: str = "auto", *, roles: Mapping[str, str] | None = None, for_prompts: bool = False,
        keeps_columns: bool = False,
    ) -> None:  # fmt: skip
        """`for_prompts`: only what is asked counts; `keeps_columns`: a reward function gets what is not read."""
        is_auto = format_name == "auto"
        own = [form for form in FORMATS if format_name == form.name or (is_auto and form.kind != "labelled")]
        self._formats = sorted(own, key=lambda form: form.loose) if for_prompts else own
        self._fallback = None if format_name in ("auto", "trl") else self._formats[-1]
        self._for_prompts, self._keeps_columns = for_prompts, keeps_columns
        self._known: dict[Any, Format] = {}
        self._roles = dict(roles or {})

    def recognise(self, record: Record, place: str = "") -> Format:
        """Find the record's format; BadRow when no format has such columns."""
        signature = (tuple(record), tuple(map(type, record.values())))
        form = self._known.get(signature)
        if form is None:
            form = next((form for form in self._formats if form.fits(record)), self._fallback)
            if form is None:
                names = {str(column).lower(): str(column) for column in record}
                near: dict[str, str] = {}  # the renaming that would make the nearest columns fit
                for ours, group in _NEAR.items():
                    like = [name for name in group if name in names] or get_close_matches(ours, names, n=1, cutoff=0.7)
                    if like and names[like[0]] not in group:
                        near[ours] = names[like[0]]
                renaming = ", ".join(f"{ours}: {theirs}" for ours, theirs in near.items())
                hint = f"did you mean columns: {{{renaming}}}?" if near else _RENAMING
                header = " (its first line names the columns)" if _CSV.search(place) else ""
                columns = f"{', '.join(map(str, record)) or '(none)'} ({hint}){header}"
                raise BadRow(f"no known format has the columns {columns}; accepted: {KNOWN['accepted']}")
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[signature] = form
        return _HH if form is _IMPLICIT and record["chosen"].startswith(START) else form

    def read(self, form: Format, record: Record, parsed: Parsed) -> Row:
        """Read the record's row, and note in `parsed` what nothing reads; BadRow for what cannot be honoured."""
        reading = Reading(self._roles, self._for_prompts, record, parsed.place)
        row = form.adapt(reading)
        unread = [name for name in record if name not in reading.used and not is_empty(record[name])]
        for name in unread:
            value = record[name]
            if name in KNOWN["unusable"]:
                raise BadRow(f"{name}: {KNOWN['unusable'][name]}")
            if name not in _TELLING or self._keeps_columns or (self._for_prompts and name not in ASKED):
                continue
            if name == "weight":
                if check_number(value, name) != 1:
                    raise BadRow(f"weight: is {value}; single rows cannot be weighted, sources can: data.weight")
                continue
            # It may repeat what was read, or hold all that (Alpaca's text).
            read = [text for column in reading.used for text in _iter_texts(record.get(column))]
            for text in _iter_texts(value):
                if not any(text in other for other in read) and not all(other in text for other in read):
                    raise BadRow(
                        f"{name}: is not read in a row of {form}, and says something that the columns read do not; "
                        f"name it in columns, or leave it out with columns: {{{name}: null}}"
                    )
        parsed.unread = (*(() if self._keeps_columns else unread), *reading.unread)
        parsed.noted = tuple(reading.noted)
        return row


def _iter_texts(value: Any) -> Iterator[str]:
    """Yield the texts in a value, without the names of roles."""
    if isinstance(value, str):
        if value.strip() and value.strip().lower() not in KNOWN["roles"]:
            yield value.strip()
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _iter_texts(item)
    elif value is not None:
        yield str(value)


def rename_columns(record: Record, columns: Mapping[str, str | None]) -> Record:
    """Put the record under our names (None leaves one out), and read conversations that stand as JSON in a cell."""
    renamed = {name: value for name, value in record.items() if name not in columns.values()} if columns else record
    for ours, theirs in columns.items():
        if theirs is None:
            renamed.pop(ours, None)
        elif theirs in record:
            renamed[ours] = record[theirs]
        else:
            near = suggest(theirs, map(str, record)) or suggest_column(ours, record)
            raise BadRow(f"{theirs}: is missing (columns.{ours}); the row has {', '.join(map(str, record))}{near}")
    for column, value in renamed.items():
        # Most texts begin otherwise, and what is asked of each must be cheap.
        begins = _MESSAGE.match(value) if type(value) is str else None
        if begins is None or not all(says.search(value) for says in _SAYS):
            continue
        try:
            given = json.loads(value)
        except ValueError:
            if not any(begins[1] in names for names in _KEYS):
                continue
            what = "holds a conversation as text that is no JSON; write the cell with json.dumps"
            raise BadRow(f"{column}: {what}") from None
        first = given[0] if type(given) is list else given
        if type(first) is dict and all(first.keys() & {*names} for names in _KEYS):
            renamed = {**renamed, column: given}
    return renamed
