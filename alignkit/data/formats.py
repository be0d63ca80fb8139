"""Which format a record is in, and how it becomes a Row.

The format is decided by the record's columns and the types of their values, for every record anew (a dict lookup per
row, `recognise`). Deliberately reads no files and counts nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

from alignkit.data.files import Record
from alignkit.data.rejects import BadRow
from alignkit.data.rows import Kind, Row, Text
from alignkit.data.transcripts import START, split_pair
from alignkit.data.values import (
    check_answer,
    check_conversation,
    check_list,
    check_number,
    check_prompt,
    check_text,
    end_prompt,
    join_prompt,
    need,
    need_text,
    suggest_column,
)


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


# --- which format ---------------------------------------------------------------------------------------------------


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


# --- how it becomes a Row -------------------------------------------------------------------------------------------


def _adapt_text(record: Record, place: str) -> Row:
    return Row("text", "", (need_text(record, "text"),), None, None, None, place)


def _adapt_messages(record: Record, place: str) -> Row:
    return Row("messages", "", (check_conversation(need(record, "messages"), "messages"),), None, None, None, place)


def _adapt_sharegpt(record: Record, place: str) -> Row:
    messages = check_conversation(need(record, "conversations"), "conversations")
    return Row("messages", "", (messages,), None, None, None, place)


def _adapt_prompt(record: Record, place: str) -> Row:
    return Row("prompt", check_prompt(need(record, "prompt"), "prompt"), (), None, None, None, place)


def _adapt_prompt_completion(record: Record, place: str) -> Row:
    prompt = check_prompt(need(record, "prompt"), "prompt")
    answer = check_answer(need(record, "completion"), "completion")
    if type(prompt) is not str or type(answer) is not str:
        prompt, (answer,) = join_prompt(prompt, [answer], ["completion"])
    return Row("prompt_completion", prompt, (answer,), None, None, None, place)


def _adapt_unpaired(record: Record, place: str) -> Row:
    prompt = check_prompt(need(record, "prompt"), "prompt")
    answer = check_answer(need(record, "completion"), "completion")
    prompt, (answer,) = join_prompt(prompt, [answer], ["completion"])
    label = check_number(need(record, "label"), "label")
    if label not in (0.0, 1.0):
        raise BadRow(f"label: is {record['label']}; it must be true or false (1 or 0) where there is one completion")
    return Row("unpaired", prompt, (answer,), None, label, None, place)


def _adapt_pair(record: Record, place: str) -> Row:
    return _pair(record, check_prompt(need(record, "prompt"), "prompt"), place)


def _adapt_sharegpt_pair(record: Record, place: str) -> Row:
    turns = check_list(need(record, "conversations"), "conversations")
    return _pair(record, check_prompt(turns, "conversations"), place)


def _adapt_alpaca_pair(record: Record, place: str) -> Row:
    return _pair(record, _instruction(record), place)


def _pair(record: Record, prompt: Text, place: str) -> Row:
    chosen = check_answer(need(record, "chosen"), "chosen")
    rejected = check_answer(need(record, "rejected"), "rejected")
    if type(prompt) is not str or type(chosen) is not str or type(rejected) is not str:
        prompt, (chosen, rejected) = join_prompt(prompt, [chosen, rejected], ["chosen", "rejected"])
    return _finish_pair(record, prompt, chosen, rejected, place)


def _finish_pair(record: Record, prompt: Text, chosen: Text, rejected: Text, place: str) -> Row:
    if chosen == rejected:
        raise BadRow("rejected: is the same as chosen", equal_answers=True)
    return Row("pair", prompt, (chosen, rejected), None, _soft_label(record), _margin(record), place)


def _soft_label(record: Record) -> float | None:
    field = "soft_label" if record.get("soft_label") is not None else "label"
    value = record.get(field)
    return None if value is None or value == "" else check_number(value, field, low=0, high=1)


def _margin(record: Record) -> float | None:
    value = record.get("margin")
    return None if value is None or value == "" else check_number(value, "margin")  # CSV has no null


def _adapt_implicit(record: Record, place: str) -> Row:
    """Take the common start of two texts as their prompt, cut where a word begins.

    TRL cuts at the first character that differs, which can be inside a word ("bl" of blue and black). What the
    answers share beyond the cut adds the same log-probability to both, so no loss of pairs changes.
    """
    chosen, rejected = need_text(record, "chosen"), need_text(record, "rejected")
    if chosen == rejected:
        raise BadRow("rejected: is the same as chosen", equal_answers=True)
    length = min(len(chosen), len(rejected))
    start = next((at for at in range(length) if chosen[at] != rejected[at]), length)
    while start and not (chosen[start : start + 1].isspace() and rejected[start : start + 1].isspace()):
        start -= 1
    prompt, answers = chosen[:start], (chosen[start:], rejected[start:])
    for answer, field in zip(answers, ("chosen", "rejected"), strict=True):
        check_text(answer, f"{field} after the common prompt")
    return _finish_pair(record, prompt, *answers, place)


def _adapt_implicit_chat(record: Record, place: str) -> Row:
    """Take the common first turns of two conversations as their prompt."""
    chosen = check_conversation(need(record, "chosen"), "chosen")
    rejected = check_conversation(need(record, "rejected"), "rejected")
    if chosen == rejected:
        raise BadRow("rejected: is the same as chosen", equal_answers=True)
    length = min(len(chosen), len(rejected))
    start = next((at for at in range(length) if chosen[at] != rejected[at]), length)
    if start == length:
        raise BadRow(f"{'rejected' if length == len(rejected) else 'chosen'}: is only the beginning of the other")
    if not start or chosen[start]["role"] != "assistant" or rejected[start]["role"] != "assistant":
        raise BadRow(f"rejected[{start}]: the prompts differ; all turns before the answer must be those of chosen")
    end_prompt(chosen[:start], "the common prompt")
    return _finish_pair(record, chosen[:start], chosen[start:], rejected[start:], place)


def _adapt_hh(record: Record, place: str) -> Row:
    prompt, chosen, rejected = split_pair(need_text(record, "chosen"), need_text(record, "rejected"))
    return _finish_pair(record, prompt, chosen, rejected, place)


def _instruction(record: Record) -> str:
    """Join Alpaca's instruction and input by a blank line; an input that is empty adds nothing."""
    instruction = need_text(record, "instruction")
    context = record.get("input")
    if context is None or (type(context) is str and not context.strip()):
        return instruction
    return f"{instruction}\n\n{check_text(context, 'input')}"


def _adapt_alpaca(record: Record, place: str) -> Row:
    return Row("prompt_completion", _instruction(record), (need_text(record, "output"),), None, None, None, place)


def _adapt_ultrafeedback_ranked(record: Record, place: str) -> Row:
    """Rank the completions of raw UltraFeedback by overall_score."""
    prompt = need_text(record, "instruction" if "instruction" in record else "prompt")
    answers, scores = [], []
    for index, item in enumerate(check_list(need(record, "completions"), "completions")):
        field = f"completions[{index}]"
        if type(item) is not dict:
            raise BadRow(f"{field}: must be an object with response and overall_score")
        for key in ("response", "overall_score"):
            if item.get(key) is None:
                raise BadRow(f"{field}.{key}: is {'null' if key in item else 'missing'}")
        answers.append(check_text(item["response"], f"{field}.response"))
        scores.append(check_number(item["overall_score"], f"{field}.overall_score"))
    return _ranked(prompt, list(answers), scores, "completions", place)


def _adapt_ranked(record: Record, place: str) -> Row:
    """Read completions with scores (higher is better) or ranking (1 is best, equal ranks are ties), or responses
    from best to worst."""
    prompt = check_prompt(need(record, "prompt"), "prompt")
    field = "responses" if "completions" not in record else "completions"
    values = check_list(need(record, field), field)
    answers = [check_answer(value, f"{field}[{index}]") for index, value in enumerate(values)]
    return _ranked(prompt, answers, _scores(record, field, len(answers)), field, place)


def _scores(record: Record, field: str, count: int) -> list[float]:
    given = [name for name in ("scores", "ranking") if record.get(name) is not None]
    if len(given) > 1:
        raise BadRow("ranking: give scores or ranking, not both")
    if not given:
        if field == "completions":
            raise BadRow("scores: is missing; completions need scores (higher is better) or ranking (1 is best)")
        return [float(count - place) for place in range(count)]
    (name,) = given
    values = check_list(record[name], name)
    if len(values) != count:
        raise BadRow(f"{name}: has {len(values)} entries for {count} {field}")
    numbers = [check_number(value, f"{name}[{index}]") for index, value in enumerate(values)]
    return numbers if name == "scores" else [-number for number in numbers]


def _ranked(prompt: Text, answers: list[Text], scores: list[float], field: str, place: str) -> Row:
    if len(answers) < 2:
        raise BadRow(f"{field}: has one answer; a ranking needs two or more")
    prompt, answers = join_prompt(prompt, answers, [f"{field}[{index}]" for index in range(len(answers))])
    order = sorted(range(len(answers)), key=lambda index: -scores[index])
    if scores[order[0]] == scores[order[-1]]:
        raise BadRow("scores: are all equal; no answer is better than another")
    for above, below in combinations(order, 2):
        if scores[above] != scores[below] and answers[above] == answers[below]:
            raise BadRow(f"{field}[{below}]: is the same as {field}[{above}] with another score", equal_answers=True)
    completions = tuple(answers[index] for index in order)
    return Row("ranked", prompt, completions, tuple(scores[index] for index in order), None, None, place)


_PAIR_EXTRAS = ("chosen", "rejected", "label", "soft_label", "margin")
_RANKED_COLUMNS = frozenset({"prompt", "completions", "responses", "scores", "ranking"})


def _trl(kind: Kind, adapt: Callable[[Record, str], Row], *columns: str, chat: bool = False) -> Format:
    return Format("trl", kind, adapt, frozenset(columns), chat)


TEXT = Format("text", "text", _adapt_text, frozenset({"text"}))
OPENAI = Format("openai", "messages", _adapt_messages, frozenset({"messages"}))
SHAREGPT = Format("sharegpt", "messages", _adapt_sharegpt, frozenset({"conversations"}))
SHAREGPT_PAIR = Format("sharegpt", "pair", _adapt_sharegpt_pair, frozenset({"conversations", *_PAIR_EXTRAS}))
ALPACA = Format("alpaca", "prompt_completion", _adapt_alpaca, frozenset({"instruction", "input", "output"}))
ALPACA_PAIR = Format("alpaca", "pair", _adapt_alpaca_pair, frozenset({"instruction", "input", *_PAIR_EXTRAS}))
HH = Format("hh", "pair", _adapt_hh, frozenset(_PAIR_EXTRAS))
ULTRAFEEDBACK = Format("ultrafeedback", "pair", _adapt_pair, frozenset({"prompt", *_PAIR_EXTRAS}))
ULTRAFEEDBACK_RANKED = Format(
    "ultrafeedback", "ranked", _adapt_ultrafeedback_ranked, frozenset({"instruction", "prompt", "completions"})
)
RANKED = Format("ranked", "ranked", _adapt_ranked, _RANKED_COLUMNS)
_TRL_MESSAGES = _trl("messages", _adapt_messages, "messages")
_PAIR = _trl("pair", _adapt_pair, "prompt", *_PAIR_EXTRAS)
_PAIR_CHAT = _trl("pair", _adapt_pair, "prompt", *_PAIR_EXTRAS, chat=True)
_IMPLICIT = _trl("pair", _adapt_implicit, *_PAIR_EXTRAS)
_IMPLICIT_CHAT = _trl("pair", _adapt_implicit_chat, *_PAIR_EXTRAS, chat=True)
_PROMPT_COMPLETION = _trl("prompt_completion", _adapt_prompt_completion, "prompt", "completion")
_PROMPT_COMPLETION_CHAT = _trl("prompt_completion", _adapt_prompt_completion, "prompt", "completion", chat=True)
_UNPAIRED = _trl("unpaired", _adapt_unpaired, "prompt", "completion", "label")
_UNPAIRED_CHAT = _trl("unpaired", _adapt_unpaired, "prompt", "completion", "label", chat=True)
_PROMPT = _trl("prompt", _adapt_prompt, "prompt")
_PROMPT_CHAT = _trl("prompt", _adapt_prompt, "prompt", chat=True)

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
