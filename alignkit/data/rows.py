"""The row every format becomes, which kinds each method takes, hashes of rows, and control tokens in their text."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Literal, NotRequired, TypedDict, get_args

from alignkit.recipe.methods import TASKS


class BadRow(ValueError):
    """A row that cannot be used; `reason` reads "field: what is wrong", and equal answers are counted by themselves."""

    def __init__(self, reason: str, *, equal_answers: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.equal_answers = equal_answers


class Message(TypedDict):
    """One turn of a conversation as a chat template gets it, but for `trained` and `template_kwargs`.
    Keys beyond role and content are there only where they say something: a message without `trained` is trained if
    the assistant wrote it. What the row gives the template beside its messages travels with the first of them, so that
    a prompt has it wherever it goes (a rollout, a judge, a table on disk)."""

    role: str  # system, user, assistant or tool
    content: str  # "" only beside tool_calls or reasoning_content
    trained: NotRequired[bool]  # of an assistant's turn: False is read and never learnt
    reasoning_content: NotRequired[str]  # what the assistant thought before its content
    tool_calls: NotRequired[list[dict[str, Any]]]  # {type: function, function: {name, arguments: an object}}, with id
    name: NotRequired[str]  # of the tool that answers, or of a speaker
    tool_call_id: NotRequired[str]
    template_kwargs: NotRequired[dict[str, Any]]  # first message only: `tools` and the row's chat_template_kwargs


_MESSAGE_KEYS = Message.__annotations__.keys()
Text = str | list[Message]
Kind = Literal[
    "text", "messages", "prompt_completion", "pair", "ranked", "unpaired", "prompt", "segments", "tokens", "labelled"
]
_TOKENISED: tuple[Kind, ...] = ("segments", "tokens")  # what is learnt of them is said token by token
KINDS: tuple[Kind, ...] = tuple(kind for kind in get_args(Kind) if kind not in (*_TOKENISED, "labelled"))

# What a method can be fed. sft learns the best answer of a pair or a ranked list; dpo breaks a ranked list
# into its pairs; ppo takes the prompt of any row, of a conversation what comes before its last answer; critique and
# label get rows as they are, and take the prompt or the answers themselves; so does eval.
METHOD_KINDS: dict[str, tuple[Kind, ...]] = {
    "sft": ("text", "messages", "prompt_completion", "pair", "ranked", *_TOKENISED), "rm": ("pair", "ranked"),
    "dpo": ("pair", "ranked", "unpaired"), "ppo": KINDS, "critique": KINDS, "label": KINDS, "eval": KINDS,
    **dict.fromkeys(TASKS, ("labelled",)),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One training row, whatever file and format it came from.
    A conversational prompt is a list of messages that ends with a user (or tool) turn; its completions are lists
    of messages that start and end with an assistant turn. A row is conversational throughout or not at all."""

    kind: Kind
    prompt: Text  # "" for text and messages
    completions: tuple[Text, ...]
    # text: (text,); messages: (messages,); prompt_completion and unpaired: (completion,); pair: (chosen, rejected);
    # ranked: best first; prompt and tokens: (); segments: pieces of one text; labelled: one text, two, or the choices
    # ranked: one per completion, never rising; equal scores are ties. segments: 1.0 where the piece is learnt, else 0.0
    scores: tuple[float, ...] | None = None
    label: float | None = None  # pair: P(first preferred) in [0, 1]; unpaired: 1.0 desirable, 0.0 not
    margin: float | None = None  # pair only
    place: str = ""  # "pairs.jsonl:734", "pairs.parquet[row 12]"
    columns: str = ""  # prompt only: the row's other columns as a JSON object, where a reward function reads them
    tokens: tuple[list[int], list[int]] | None = None  # tokens only: ids and labels, -100 where nothing is learnt
    answer: str = ""  # labelled only: the name of its label, or the number of the right choice

    @property
    def conversational(self) -> bool:
        """Whether prompt and completions are lists of messages."""
        return isinstance(self.prompt, list) or (bool(self.completions) and isinstance(self.completions[0], list))


def iter_contents(row: Row) -> Iterator[str]:
    """Yield every piece of text that came from the file: prompt first, then the completions in order."""
    for text in (row.prompt, *row.completions):
        if isinstance(text, str):
            yield text
            continue
        for message in text:
            yield from [message["content"]] if len(message) == 2 else iter_strings(message)


def iter_strings(value: Any) -> Iterator[str]:
    """Yield the texts inside a text, a conversation, or any other JSON value, names that are the row's own included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from iter_strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in _MESSAGE_KEYS:
                yield key
            if key != "role":
                yield from iter_strings(item)


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Apply `change` to what `iter_strings` yields of a value."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [map_strings(item, change) for item in value]
    if isinstance(value, dict):
        return {
            key if key in _MESSAGE_KEYS else change(key): item if key == "role" else map_strings(item, change)
            for key, item in value.items()
        }
    return value


# WORD JOINER: invisible, no line break, left alone by Unicode normalisation. Behind a token's first character it
# keeps the tokenizer from matching the rest.
BREAKER = "\u2060"


def find_control_tokens(row: Row, tokens: Sequence[str]) -> list[str]:
    """Find the tokens that occur in the row's text, each once, in their order."""
    if not tokens:
        return []
    search = _exact(tuple(tokens)).findall
    return list(dict.fromkeys(token for text in iter_contents(row) for token in search(text)))


def as_rendered(row: Row, tokens: Sequence[str]) -> Row | None:
    """Take a row that a chat template has written, which begins with a control token, as text; None for any other."""
    completions = list(row.completions)
    text = row.prompt or next(iter(completions), "")
    if isinstance(row.prompt, list):
        turns = [turn[0]["content"] for turn in (row.prompt, *completions) if isinstance(turn, list) and len(turn) == 1]
        if len(turns) != 1 + len(completions):
            return None
        text, completions = turns[0], list(turns[1:])
    pattern = _exact(tuple(tokens))
    if not isinstance(text, str) or not pattern.match(text.lstrip()) or len(pattern.findall(text)) < 2:
        return None
    return replace(row, prompt=text if row.prompt else "", completions=tuple(completions))


def escape_control_tokens(row: Row, tokens: Sequence[str]) -> Row:
    """Put a WORD JOINER behind the first character of every token in the row's text."""
    if not find_control_tokens(row, tokens):
        return row
    if single := [token for token in tokens if len(token) == 1]:
        raise ValueError(f"tokens of one character cannot be escaped: {single}")
    starts = re.compile(f"(?={_exact(tuple(tokens)).pattern}).", re.DOTALL)

    def escape(text: str) -> str:
        return starts.sub(lambda start: start[0] + BREAKER, text)

    completions = tuple(map_strings(text, escape) for text in row.completions)
    return replace(row, prompt=map_strings(row.prompt, escape), completions=completions)


@lru_cache(maxsize=8)
def _exact(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(set(tokens) - {""}, key=len, reverse=True))))


def as_turns(row: Row) -> Row:
    """Make a user's turn of a text prompt, and an assistant's turn of each completion."""
    answers: tuple[Text, ...] = tuple(
        [{"role": "assistant", "content": text.removeprefix(" ")}] for text in row.completions if isinstance(text, str)
    )
    assert isinstance(row.prompt, str)
    return replace(row, prompt=[{"role": "user", "content": row.prompt}], completions=answers)


def as_text(row: Row, separator: str) -> Row:
    """End a text prompt with the separator, whose blank begins the completions, where neither side has white space."""
    texts = [str(text) for text in row.completions]
    own = texts and all(text[:1].isspace() for text in texts)
    if own or not isinstance(row.prompt, str) or row.prompt[-1:].isspace():
        return row
    mark = separator.removesuffix(" ")
    prompt = row.prompt if row.prompt.endswith(mark) else row.prompt + mark  # rows that a stage made have it
    blank = separator[len(mark) :]
    return replace(row, prompt=prompt, completions=tuple(blank + text.removeprefix(" ") for text in texts))


def take_prompt(row: Row) -> Row:
    """Take the prompt alone of any row: the turns before its last answer, or a whole text; BadRow without one."""
    prompt = row.prompt
    if row.kind in ("text", "messages"):
        prompt = row.completions[0]
        if isinstance(prompt, list):
            last = max(number for number, message in enumerate(prompt) if message["role"] in ("user", "tool"))
            prompt = prompt[: last + 1]
    if isinstance(prompt, str) and not prompt.strip():
        raise BadRow("prompt: is empty: the answers begin with different words")
    return Row("prompt", prompt, (), place=row.place)


def count_chars(text: Text) -> int:
    """The length of a text, or of all that the messages of a conversation say, in characters."""
    if isinstance(text, str):
        return len(text)
    return sum([len(turn["content"]) if len(turn) == 2 else sum(map(len, iter_strings(turn))) for turn in text])


# Digests and keys depend on content only (never on the place of a row, the Python version or the process), so that data
# fingerprints, splits and half-weighted sources are the same on every machine. Not for secrets.


def digest_row(row: Row) -> bytes:
    """Give 16 bytes that two rows share only when all but their place is equal; BadRow for half of a surrogate pair."""
    parts = [row.kind, _netstring(row.prompt), *map(_netstring, row.completions)]
    if row.scores is not None or row.label is not None or row.margin is not None:
        parts.append(repr((row.scores, row.label, row.margin)))
    parts += [repr(row.tokens)] if row.tokens is not None else []
    parts += [row.columns or row.answer] if row.columns or row.answer else []
    return blake2b(_encode("\x1e".join(parts)), digest_size=16).digest()


def fingerprint_prompt(row: Row) -> int:
    """Give 64 bits of the row's prompt that are the same in every process."""
    return int.from_bytes(blake2b(prompt_key(row), digest_size=8).digest(), "little")


def prompt_key(row: Row) -> bytes:
    """What decides whether two rows have the same prompt.
    A prompt of one user turn equals the same prompt as plain text. Rows without a prompt use what stands in for it:
    a conversation the turns before its first answer, a text the text itself, tokens and segments all of them."""
    prompt = row.prompt
    if row.kind in ("segments", "tokens"):
        return digest_row(row)
    if not prompt and row.completions:
        prompt = row.completions[0]
        if isinstance(prompt, list):
            end = 1
            while end < len(prompt) and prompt[end]["role"] != "assistant":
                end += 1
            prompt = prompt[:end]
    if isinstance(prompt, str):
        return _encode(prompt.strip())
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return _encode(prompt[0]["content"].strip())
    return _encode(_netstring(prompt))


def _netstring(text: Text) -> str:
    """Join lengths and contents so that no two different texts give the same string."""
    if isinstance(text, str):
        return f"{len(text)}:{text}"
    parts = []
    for message in text:
        parts.append(f"{message['role']}:{len(message['content'])}:{message['content']}")
        if len(message) > 2:
            rest = {key: value for key, value in message.items() if key not in ("role", "content")}
            parts.append(json.dumps(rest, sort_keys=True, ensure_ascii=False))
    return "".join(parts)


def _encode(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise BadRow(f"text holds {half}, half of a surrogate pair: it is not valid Unicode; remove it") from error
