"""Which format a record is in.

The format is decided by the record's columns and the types of their values, for every record anew (a dict lookup per
row, `recognise`). Deliberately reads no files; what becomes of a record is the business of `adapters`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from alignkit.data import adapters
from alignkit.data.files import Record
from alignkit.data.rejects import BadRow
from alignkit.data.rows import Kind, Row
from alignkit.data.transcripts import START
from alignkit.data.values import suggest_column


@dataclass(frozen=True, slots=True, eq=False)  # compared and hashed by identity: each is made once
class Format:
    """One way to write a kind of row."""

    name: str  # the value of `format:` it belongs to
    kind: Kind
    adapt: Callable[[Record, str], Row]  # record, place -> Row; raises BadRow
    columns: frozenset[str]  # those that are read; others are reported as ignored
    chat: bool = False  # text is in lists of messages

    def __str__(self) -> str:
        name = self.name if self.name == self.kind else f"{self.name} {self.kind}"
        return f"{name} (messages)" if self.chat else name


_COLUMN_HELP = (
    "text; messages; prompt + completion (+ label); prompt + chosen + rejected; chosen + rejected; "
    "prompt + completions + scores or ranking; prompt + responses; conversations; instruction + output; prompt"
)
_ITEM_KEYS = {"role", "content", "from", "value", "response", "overall_score"}
_MAX_KNOWN = 4096  # a file whose columns change with every row must not fill the memory


@dataclass(slots=True)
class _Columns:
    """A set of columns with the types of their values, as seen in the records of a source."""

    form: Format
    ignored: frozenset[str]
    rows: int = 0


class Detector:
    """Finds the format of records, remembering what sets of columns it has seen."""

    def __init__(self, format_name: str = "auto") -> None:
        self._choose = _CHOOSERS[format_name]
        self._known: dict[tuple[tuple[str, ...], tuple[type, ...]], _Columns] = {}
        self._ignored: Counter[str] = Counter()

    def recognise(self, record: Record) -> Format:
        """Return the record's format; BadRow when no format has such columns."""
        signature = (tuple(record), tuple(map(type, record.values())))
        columns = self._known.get(signature)
        if columns is None:
            if len(self._known) >= _MAX_KNOWN:
                self._ignored = self.count_ignored()
                self._known.clear()
            form = self._choose(record)
            columns = self._known[signature] = _Columns(form, frozenset(record) - form.columns | _nested(record, form))
        columns.rows += 1
        if columns.form is _IMPLICIT and record["chosen"].startswith(START):
            return HH
        return columns.form

    def count_ignored(self) -> Counter[str]:
        """Return the columns that no Row carries, with the number of records that have them.

        Extra keys of messages are named too ("messages[].name"), as of the first record with such columns.
        """
        ignored = self._ignored.copy()
        for columns in self._known.values():
            ignored.update(dict.fromkeys(columns.ignored, columns.rows))
        return ignored


def _nested(record: Record, form: Format) -> set[str]:
    """Name the keys of messages that are not read."""
    lists = ((column, record[column]) for column in form.columns & record.keys() if type(record[column]) is list)
    items = ((column, item) for column, held in lists for item in held if type(item) is dict)
    return {f"{column}[].{key}" for column, item in items for key in item.keys() - _ITEM_KEYS}


def rename_columns(record: Record, columns: dict[str, str]) -> Record:
    """Return the record under our names; `columns` maps our name to the file's."""
    if not columns:
        return record
    renamed = {name: value for name, value in record.items() if name not in columns.values()}
    for ours, theirs in columns.items():
        if theirs not in record:
            near = suggest_column(ours, record)
            raise BadRow(f"{theirs}: is missing (columns.{ours}); the row has {', '.join(map(str, record))}{near}")
        renamed[ours] = record[theirs]
    return renamed


def _choose_auto(record: Record) -> Format:
    if "conversations" in record:
        return _choose_sharegpt(record)
    if "chosen" in record or "rejected" in record:
        if "instruction" in record:
            return ALPACA_PAIR
        if type(record.get("prompt")) is str and type(record.get("chosen")) is list:
            return ULTRAFEEDBACK
        return _choose_trl(record)
    if "completions" in record or "responses" in record:
        return _choose_ultrafeedback(record) if "instruction" in record else RANKED
    if "instruction" in record:
        return ALPACA
    if "messages" in record and "completion" not in record:
        return OPENAI
    return _choose_trl(record)


def _choose_trl(record: Record) -> Format:
    if "chosen" in record or "rejected" in record:
        if "prompt" in record:
            return _PAIR_CHAT if list in (type(record["prompt"]), type(record.get("chosen"))) else _PAIR
        both_text = type(record.get("chosen")) is str and type(record.get("rejected")) is str
        return _IMPLICIT if both_text else _IMPLICIT_CHAT
    chat = list in (type(record.get("prompt")), type(record.get("completion")))
    if "completion" in record:
        if "label" in record:
            return _UNPAIRED_CHAT if chat else _UNPAIRED
        return _PROMPT_COMPLETION_CHAT if chat else _PROMPT_COMPLETION
    if "messages" in record:
        return _TRL_MESSAGES
    if "text" in record and "prompt" not in record:
        return TEXT
    if "prompt" in record:
        return _PROMPT_CHAT if chat else _PROMPT
    raise BadRow(f"no known format has the columns {_list_columns(record)}; accepted: {_COLUMN_HELP}")


def _list_columns(record: Record) -> str:
    """List the columns, and the renaming that would make the nearest one fit."""
    hints = [hint for field in ("prompt", "completion", "messages", "text") if (hint := suggest_column(field, record))]
    return f"{', '.join(map(str, record)) or '(none)'}{hints[0] if hints else ''}"


def _choose_sharegpt(record: Record) -> Format:
    return SHAREGPT_PAIR if "chosen" in record or "rejected" in record else SHAREGPT


def _choose_alpaca(record: Record) -> Format:
    return ALPACA_PAIR if "chosen" in record or "rejected" in record else ALPACA


def _choose_ultrafeedback(record: Record) -> Format:
    return ULTRAFEEDBACK_RANKED if "completions" in record else ULTRAFEEDBACK


_PAIR_EXTRAS = ("chosen", "rejected", "label", "soft_label", "margin")
_RANKED_COLUMNS = frozenset({"prompt", "completions", "responses", "scores", "ranking"})


def _trl(kind: Kind, adapt: Callable[[Record, str], Row], *columns: str, chat: bool = False) -> Format:
    return Format("trl", kind, adapt, frozenset(columns), chat)


TEXT = Format("text", "text", adapters.adapt_text, frozenset({"text"}))
OPENAI = Format("openai", "messages", adapters.adapt_messages, frozenset({"messages"}))
SHAREGPT = Format("sharegpt", "messages", adapters.adapt_sharegpt, frozenset({"conversations"}))
SHAREGPT_PAIR = Format("sharegpt", "pair", adapters.adapt_sharegpt_pair, frozenset({"conversations", *_PAIR_EXTRAS}))
ALPACA = Format("alpaca", "prompt_completion", adapters.adapt_alpaca, frozenset({"instruction", "input", "output"}))
ALPACA_PAIR = Format("alpaca", "pair", adapters.adapt_alpaca_pair, frozenset({"instruction", "input", *_PAIR_EXTRAS}))
HH = Format("hh", "pair", adapters.adapt_hh, frozenset(_PAIR_EXTRAS))
ULTRAFEEDBACK = Format("ultrafeedback", "pair", adapters.adapt_pair, frozenset({"prompt", *_PAIR_EXTRAS}))
ULTRAFEEDBACK_RANKED = Format(
    "ultrafeedback", "ranked", adapters.adapt_ultrafeedback_ranked, frozenset({"instruction", "prompt", "completions"})
)
RANKED = Format("ranked", "ranked", adapters.adapt_ranked, _RANKED_COLUMNS)
_TRL_MESSAGES = _trl("messages", adapters.adapt_messages, "messages")
_PAIR = _trl("pair", adapters.adapt_pair, "prompt", *_PAIR_EXTRAS)
_PAIR_CHAT = _trl("pair", adapters.adapt_pair, "prompt", *_PAIR_EXTRAS, chat=True)
_IMPLICIT = _trl("pair", adapters.adapt_implicit, *_PAIR_EXTRAS)
_IMPLICIT_CHAT = _trl("pair", adapters.adapt_implicit_chat, *_PAIR_EXTRAS, chat=True)
_PROMPT_COMPLETION = _trl("prompt_completion", adapters.adapt_prompt_completion, "prompt", "completion")
_PROMPT_COMPLETION_CHAT = _trl("prompt_completion", adapters.adapt_prompt_completion, "prompt", "completion", chat=True)
_UNPAIRED = _trl("unpaired", adapters.adapt_unpaired, "prompt", "completion", "label")
_UNPAIRED_CHAT = _trl("unpaired", adapters.adapt_unpaired, "prompt", "completion", "label", chat=True)
_PROMPT = _trl("prompt", adapters.adapt_prompt, "prompt")
_PROMPT_CHAT = _trl("prompt", adapters.adapt_prompt, "prompt", chat=True)

_CHOOSERS: dict[str, Callable[[Record], Format]] = {
    "auto": _choose_auto,
    "trl": _choose_trl,
    "openai": lambda record: OPENAI,
    "sharegpt": _choose_sharegpt,
    "alpaca": _choose_alpaca,
    "hh": lambda record: HH,
    "ultrafeedback": _choose_ultrafeedback,
    "ranked": lambda record: RANKED,
    "text": lambda record: TEXT,
}
