"""The prompts of Constitutional AI, with texts of users and models made harmless before they go into one.

The paper's transcripts for base models (arXiv 2212.08073, sections 3.1 and 4.1), whose bytes are those of the published
files; messages for chat models. An answer may hold "The answer is: (A)", a forged turn, closing brackets or a control
token: where such a text could be taken for a part of the prompt it is marked as a quotation. Only what a judge is shown
is changed, never a row. How persuasive a text is cannot be helped here: asking both orders shows it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from alignkit.data import Row, escape_control_tokens
from alignkit.data.rows import Message, Text
from alignkit.feedback.constitution import (
    COMPARISON_FRAME,
    CRITIQUE_FRAME,
    PRINCIPLE_HERE,
    REVISION_FRAME,
    Examples,
    Principle,
    messages_of,
    without_critiques,
)

_TURNS = "Human|Assistant|System|Tool|CritiqueRequest|Critique|RevisionRequest|Revision"
# At the start of a line: labels of turns, the words before a verdict, and options.
_LABEL = re.compile(rf"(?mi)^([^\S\n]*)((?:{_TURNS}|(?:so )?the answer is|options)[^\S\n]*:|\([AB]\))")
_SHORT_LABEL = re.compile(r"(?m)(\n\n[^\S\n]*)([HA]:)")
_BRACKETS = re.compile(r"\[{3,}|\]{3,}")


class Quoter:
    """Quotes texts for one model, and counts those that needed it, each once however often it is asked about."""

    def __init__(self, control_tokens: Sequence[str]) -> None:
        self._tokens = [token for token in control_tokens if len(token) > 1]
        self._changed = set[str]()

    @property
    def count(self) -> int:
        return len(self._changed)

    def __call__(self, text: str) -> str:
        quoted = _LABEL.sub(r"\1> \2", text)
        quoted = _SHORT_LABEL.sub(r"\1> \2", quoted)
        quoted = _BRACKETS.sub(lambda match: " ".join(match[0]), quoted)
        if self._tokens:
            (quoted,) = escape_control_tokens(Row("text", "", (quoted,)), self._tokens).completions  # type: ignore[assignment]
        if quoted != text:
            self._changed.add(text)
        return quoted


Quote = Callable[[str], str]
OPTIONS = (" (A)", " (B)")
# Where a base model has finished its turn and goes on with the next one.
STOPS = ("\n\nHuman:", "\n\nAssistant:", "\n\nCritiqueRequest:", "\n\nRevisionRequest:")
VERDICT = "The answer is:"
_THOUGHT = "Let's think step by step:"
_SO, _SO_VERDICT = "\n\nHuman:\n", "So the answer is:"
_CONSIDER = "\n\nConsider the following conversation between a human and an assistant:"
_CONSIDER_SHORT = "\n\nHuman: Consider the following conversation between a human (H) and an assistant (A):"
_LABELS = {"user": "Human", "assistant": "Assistant", "system": "System", "tool": "Tool"}
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ONLY_ANSWER = "Reply with the new answer only."
_ONLY_LETTER = "Reply with (A) or (B) and nothing else."
_THINK_FIRST = "Think step by step. Then end with a line of its own: The answer is: (A), or: The answer is: (B)."


@dataclass(frozen=True)
class Request:
    """Something to be written: as text for base models, as messages (None: it is plain text for any model) for chat
    models. A chat model's turn begins with `prefill`; a server that takes none is told `closing` instead, at the end of
    the last message, and may use `room` tokens for its verdict."""

    transcript: str
    messages: tuple[Message, ...] | None
    stops: tuple[str, ...] = STOPS
    prefill: str = ""
    closing: str = ""
    room: int = 16

    @property
    def is_plain(self) -> bool:
        """Whether the text simply goes on: then white space at its start belongs to it."""
        return self.messages is None and not self.stops


def conversation(prompt: Text) -> list[Message]:
    """Turn a prompt into messages: HH transcripts by their turns, any other text as one user turn."""
    if not isinstance(prompt, str):
        return list(prompt)
    if not prompt.startswith("\n\nHuman:"):
        return [Message(role="user", content=prompt)]
    pieces = _TURN.split(prompt)[1:]
    turns = [
        Message(role="user" if speaker == "Human" else "assistant", content=said.removeprefix(" "))
        for speaker, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    return turns[:-1] if turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip() else turns


def read_text(text: Text) -> str:
    """Turn an answer into text: of messages their contents."""
    return text if isinstance(text, str) else "\n".join(message["content"] for message in text)


def ask_answer(prompt: Text) -> Request:
    """Ask for an answer to a row's prompt; text stays text, as training has it."""
    if isinstance(prompt, str):
        return Request(prompt, None, stops=STOPS if prompt.startswith("\n\nHuman:") else ())
    return Request(_transcript(prompt) + "\n\nAssistant:", tuple(prompt))


def ask_critique(turns: Sequence[Message], principle: Principle, examples: Examples, quote: Quote) -> Request:
    """Ask for a critique of the answer that ends the conversation."""
    quoted = _quote_all(turns, quote)
    text = "".join(examples.critiques) + _transcript(quoted) + f"{principle.critique}".join(CRITIQUE_FRAME)
    return Request(text, (*examples.critique_messages, *quoted, Message(role="user", content=f"{principle.critique}")))


def ask_revision(
    turns: Sequence[Message], critique: str | None, principle: Principle, examples: Examples, quote: Quote
) -> Request:
    """Ask for a revision of the last answer; without a critique, the examples have none either."""
    quoted = _quote_all(turns, quote)
    if critique is None:
        examples = without_critiques(examples)
        text, said = "".join(examples.critiques) + _transcript(quoted), list[Message]()
    else:
        critique = quote(critique)
        text = ask_critique(turns, principle, examples, quote).transcript + f" {critique}"
        said = [Message(role="user", content=f"{principle.critique}"), Message(role="assistant", content=critique)]
    text += f"{principle.revision}".join(REVISION_FRAME)
    asked = Message(role="user", content=f"{principle.revision} {_ONLY_ANSWER}")
    return Request(text, (*examples.critique_messages, *quoted, *said, asked))


def cut_at(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Cut a text before the first of the stops; say whether there was one."""
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    return (text[: min(ends)], True) if ends else (text, False)


@dataclass(frozen=True)
class Comparison:
    """Two answers to one conversation, in the order they are shown in."""

    turns: tuple[Message, ...]
    first: str
    second: str
    question: str


def comparison_question(comparison: Comparison, quote: Quote) -> str:
    """Write the paper's text of a comparison, up to and with "The answer is:"."""
    return f"{_CONSIDER}{_compare(comparison, quote, _LABELS)}\n\n{VERDICT}"


def ask_comparison(comparison: Comparison, shown: Sequence[tuple[Comparison, str]], quote: Quote) -> Request:
    """Ask which of two answers is better, by the log-probs of OPTIONS; `shown` are examples with the right option."""
    text = "".join(f"{comparison_question(example, str)}{option}" for example, option in shown)
    messages: list[Message] = []
    for example, option in shown:
        messages.append(Message(role="user", content=_chat_question(example, str)))
        messages.append(Message(role="assistant", content=VERDICT + option))
    messages.append(Message(role="user", content=_chat_question(comparison, quote)))
    text += comparison_question(comparison, quote)
    return Request(text, tuple(messages), prefill=VERDICT, closing=_ONLY_LETTER)


def fill_thought(example: str, question: str) -> str:
    """Put a question into its place in a published chain of thought."""
    return example.replace(PRINCIPLE_HERE, question.join(COMPARISON_FRAME), 1)


def ask_thoughts(comparison: Comparison, shown: Sequence[str], quote: Quote) -> Request:
    """Ask for a chain of thought about two answers; `shown` are worked examples (`fill_thought`)."""
    question = _compare(comparison, quote, _LABELS | {"user": "H", "assistant": "A"})
    text = f"{''.join(shown)}{_CONSIDER_SHORT}{question}\n\nAssistant: {_THOUGHT}"
    messages: list[Message] = []
    for example in shown:  # the question, then the thoughts with their verdict
        thoughts, _, verdict = example.rpartition(_SO)
        *before, last = messages_of(thoughts)
        messages += [*before, Message(role="assistant", content=f"{last['content']}\n\n{verdict}")]
    messages.append(Message(role="user", content=_chat_question(comparison, quote)))
    return Request(text, tuple(messages), prefill=_THOUGHT, closing=_THINK_FIRST)


def ask_after_thoughts(comparison: Comparison, shown: Sequence[str], thoughts: str, quote: Quote) -> Request:
    """Ask which of two answers is better, after the judge's own chain of thought."""
    before = ask_thoughts(comparison, shown, quote)
    text = f"{before.transcript} {quote(thoughts)}{_SO}{_SO_VERDICT}"
    return Request(text, before.messages, prefill=f"{_THOUGHT} {quote(thoughts)}\n\n{_SO_VERDICT}")


def _chat_question(comparison: Comparison, quote: Quote) -> str:
    return (_CONSIDER + _compare(comparison, quote, _LABELS)).lstrip("\n")


def _compare(comparison: Comparison, quote: Quote, labels: dict[str, str]) -> str:
    turns = _transcript(_quote_all(comparison.turns, quote), labels)
    question = comparison.question.join(COMPARISON_FRAME)
    return f"{turns}\n\n{question}\n (A) [[[{quote(comparison.first)}]]]\n (B) [[[{quote(comparison.second)}]]]"


def _quote_all(turns: Sequence[Message], quote: Quote) -> list[Message]:
    return [Message(role=turn["role"], content=quote(turn["content"])) for turn in turns]


def _transcript(turns: Sequence[Message], labels: dict[str, str] = _LABELS) -> str:
    return "".join(f"\n\n{labels[turn['role']]}: {turn['content']}" for turn in turns)
