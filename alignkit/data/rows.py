"""The row every format becomes, and which kinds of row each method takes.

Deliberately knows nothing of files, formats, tokenizers or torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypedDict, get_args


class Message(TypedDict):
    """One turn of a conversation; `role` is system, user, assistant or tool."""

    role: str
    content: str


Text = str | list[Message]
Kind = Literal["text", "messages", "prompt_completion", "pair", "ranked", "unpaired", "prompt"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# What a method can be fed. sft learns the best answer of a pair or a ranked list; dpo breaks a ranked list
# into its pairs; ppo takes the prompt of any row, of a conversation what comes before its last answer; critique and
# label get rows as they are, and take the prompt or the answers themselves; so does eval.
METHOD_KINDS: dict[str, tuple[Kind, ...]] = {
    "sft": ("text", "messages", "prompt_completion", "pair", "ranked"),
    "rm": ("pair", "ranked"),
    "dpo": ("pair", "ranked", "unpaired"),
    "ppo": KINDS,
    "critique": KINDS,
    "label": KINDS,
    "eval": KINDS,
}


@dataclass(frozen=True, slots=True)
class Row:
    """One training row, whatever file and format it came from.

    A conversational prompt is a list of messages that ends with a user (or tool) turn; its completions are lists
    of messages that start and end with an assistant turn. A row is conversational throughout or not at all.
    """

    kind: Kind
    prompt: Text  # "" for text and messages
    completions: tuple[Text, ...]
    # text: (text,); messages: (messages,); prompt_completion and unpaired: (completion,); pair: (chosen, rejected);
    # ranked: best first; prompt: ()
    scores: tuple[float, ...] | None = None  # ranked: one per completion, never rising; equal scores are ties
    label: float | None = None  # pair: P(first preferred) in [0, 1]; unpaired: 1.0 desirable, 0.0 not
    margin: float | None = None  # pair only
    place: str = ""  # "pairs.jsonl:734", "pairs.parquet[row 12]"
    columns: str = ""  # prompt only: the row's other columns as a JSON object, where a reward function reads them

    @property
    def conversational(self) -> bool:
        """Whether prompt and completions are lists of messages."""
        return isinstance(self.prompt, list) or (bool(self.completions) and isinstance(self.completions[0], list))


def iter_contents(row: Row) -> Iterator[str]:
    """Yield every piece of text that came from the file: prompt first, then the completions in order."""
    for text in (row.prompt, *row.completions):
        if isinstance(text, str):
            yield text
        else:
            for message in text:
                yield message["content"]


def take_prompt(row: Row) -> Row:
    """Return the prompt alone of any row: of a conversation the turns before its last answer, of a text all of it.

    Raises ValueError with the reason when a row has none.
    """
    prompt = row.prompt
    if row.kind in ("text", "messages"):
        prompt = row.completions[0]
        if isinstance(prompt, list):
            last = max(number for number, message in enumerate(prompt) if message["role"] in ("user", "tool"))
            prompt = prompt[: last + 1]
    if isinstance(prompt, str) and not prompt.strip():
        raise ValueError("prompt: is empty: the answers begin with different words")
    return Row("prompt", prompt, (), None, None, None, row.place)


def count_chars(text: Text) -> int:
    """Return the length of a text, or of all contents of its messages, in characters."""
    return len(text) if isinstance(text, str) else sum(len(message["content"]) for message in text)
