"""Which of two options a server's reply chooses, from its text and, where it gives them, its log-probabilities.

Only the reply is read, never the prompt. A reply that names both options or neither is an abstention.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from alignkit.feedback.writer import Decision, share_of_first

_WRAP = r"[\s*_`\"'\[(]*"
_VERDICT = re.compile(rf"answer is\s*:?{_WRAP}(?:option|response|answer)?{_WRAP}([AB])(?![A-Za-z'])", re.IGNORECASE)
_ALONE = re.compile(
    rf"{_WRAP}(?:(?:option|response|answer)\s*:?{_WRAP})?([AB])[\s*_`\"'\])]*[.:!]?\s*\Z", re.IGNORECASE
)
_LEADING = re.compile(rf"{_WRAP}([AB])\s*(?:\)|\]|:|\.\s|\n)")
_MARKED = re.compile(r"\(([AB])\)")
_LETTERS = ("A", "B")


class TokenChances(NamedTuple):
    """A token of a reply with the likeliest tokens at its place and their log-probs."""

    token: str
    top: Mapping[str, float]


def parse_choice(text: str) -> tuple[str, int] | None:
    """Find the letter that a reply chooses and where it stands; None for an abstention."""
    if alone := _ALONE.match(text):
        return alone[1].upper(), alone.start(1)
    lines = [line for line in text.splitlines() if line.strip()]
    start = text.rfind(lines[-1]) if lines else 0
    leading = _LEADING.match(text)
    # A verdict of the last line before one of any line, before a letter in brackets, before one that begins the text.
    kinds = (_VERDICT.finditer(text, start), _VERDICT.finditer(text), _MARKED.finditer(text), [leading] * bool(leading))
    found = next((matches for kind in kinds if (matches := list(kind))), [])
    letters = {match[1].upper() for match in found if match}
    return (letters.pop(), found[-1].start(1)) if len(letters) == 1 and found[-1] else None


def read_decision(text: str, tokens: Sequence[TokenChances]) -> Decision:
    """Read a reply: a probability from the tokens at the deciding letter, else 0 or 1 from the text."""
    choice = parse_choice(text)
    deciding = _deciding_token(text, tokens, choice)
    if deciding is not None and (weighed := _weigh(deciding)) is not None:
        logps, mass = weighed
        return Decision(share_of_first(logps), logps, mass, text)
    if choice is None:
        return Decision(text=text, problem="the reply names neither option, or both" if text.strip() else "empty reply")
    return Decision(1.0 if choice[0] == "A" else 0.0, text=text)


def _deciding_token(text: str, tokens: Sequence[TokenChances], choice: tuple[str, int] | None) -> TokenChances | None:
    """Find the token that holds the chosen letter; without a choice, the first one that says anything."""
    if choice is None:
        return next((token for token in tokens if _letter(token.token)), None)
    if "".join(token.token for token in tokens)[: len(text)] != text:
        return next((token for token in tokens if _letter(token.token) == choice[0]), None)
    end = 0
    for token in tokens:
        end += len(token.token)
        if choice[1] < end:
            return token
    return None


def _weigh(token: TokenChances) -> tuple[tuple[float, float], float] | None:
    """The log-probs of A and B at a token's place, and the probability that they have together.

    Where one of them is not among the likeliest, it is taken to be as likely as the least of those: the most it can be.
    """
    found = [[logp for text, logp in token.top.items() if _letter(text) == letter] for letter in _LETTERS]
    if not any(found):
        return None
    sums = [sum(map(math.exp, logps)) for logps in found]
    least = min(token.top.values())
    logp_a, logp_b = (
        math.log(total) if total else max([least, *logps]) for total, logps in zip(sums, found, strict=True)
    )
    return (logp_a, logp_b), sum(sums)


def _letter(token: str) -> str | None:
    bare = token.strip().strip("()[]*_`\"'.:")
    return bare if bare in _LETTERS else None


def read_chat_tokens(choice: Mapping[str, Any]) -> list[TokenChances]:
    """Read the tokens of a chat completion's choice; none where the server gives no log-probs.

    Raises ValueError, TypeError or the like for what is none, as `read_text_tokens` does.
    """
    content = (choice.get("logprobs") or {}).get("content") or []
    return [
        TokenChances(item["token"], _chances((top["token"], top["logprob"]) for top in item["top_logprobs"]))
        for item in content
        if item.get("top_logprobs")
    ]


def read_text_tokens(choice: Mapping[str, Any]) -> list[TokenChances]:
    """Read the tokens of a text completion's choice; none where the server gives no log-probs."""
    logprobs = choice.get("logprobs") or {}
    pairs = zip(logprobs.get("tokens") or [], logprobs.get("top_logprobs") or [], strict=False)
    return [TokenChances(token, _chances(top.items())) for token, top in pairs if top]


def _chances(top: Iterable[tuple[str, float]]) -> dict[str, float]:
    chances = {}
    for token, logp in top:
        # A little above 0 is what rounding makes of a certain token; -9999 is OpenAI's word for next to never.
        if not isinstance(token, str) or type(logp) not in (int, float) or not logp <= 1e-3:
            raise ValueError(f"a log-probability of {logp!r}")
        chances[token] = max(float(logp), -9999.0)
    return chances
