"""Anthropic's HH transcripts: "\\n\\nHuman: ...\\n\\nAssistant: ..." to messages.

Source of the split: `get_hh` of eric-mitchell/direct-preference-optimization (the DPO paper's code, arXiv 2305.18290):
the prompt is everything up to and including the last "\\n\\nAssistant:" of chosen, and rejected is cut at the same
length. We differ in one thing: where rejected does not start with that prompt, or goes on with further turns, the cut
would pair answers to different prompts, so the row is refused (4 of 1,800 pairs of the harmlessness test set).
"""

from __future__ import annotations

import re

from alignkit.data.rejects import BadRow
from alignkit.data.rows import Message

START = "\n\nHuman:"
_ANSWER = "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def split_pair(chosen: str, rejected: str) -> tuple[list[Message], list[Message], list[Message]]:
    """Return prompt, chosen and rejected as messages.

    Raises:
        BadRow: no transcript, an empty turn or answer, prompts that differ, or a prompt that the assistant ends.
    """
    end = _prompt_end(chosen, "chosen")
    if _prompt_end(rejected, "rejected") != end or rejected[:end] != chosen[:end]:
        raise BadRow("rejected: its prompt (all up to the last '\\n\\nAssistant:') differs from that of chosen")
    prompt = read_turns(chosen[: end - len(_ANSWER)], "chosen")
    if prompt[-1]["role"] != "user":
        raise BadRow("chosen: two assistant turns in a row at its end; the prompt must end with a Human turn")
    return prompt, _answer(chosen[end:], "chosen"), _answer(rejected[end:], "rejected")


def _prompt_end(transcript: str, field: str) -> int:
    if not transcript.startswith(START):
        raise BadRow(f"{field}: does not start with '\\n\\nHuman:'; it is not an HH transcript")
    at = transcript.rfind(_ANSWER)
    if at < 0:
        raise BadRow(f"{field}: has no '\\n\\nAssistant:' turn")
    return at + len(_ANSWER)


def read_turns(transcript: str, field: str) -> list[Message]:
    """Return the turns of a transcript; an empty last one of the assistant, which asks for an answer, is kept empty."""
    _, *pieces = _TURN.split(f"\n\n{transcript.lstrip()}")
    turns: list[Message] = []
    for number, (speaker, said) in enumerate(zip(pieces[::2], pieces[1::2], strict=True)):
        content = said.strip()
        if not content and (speaker != "Assistant" or 2 * number + 2 < len(pieces)):
            raise BadRow(f"{field}: turn {len(turns) + 1} ({speaker}) is empty")
        turns.append({"role": _ROLES[speaker], "content": content})
    return turns


def _answer(said: str, field: str) -> list[Message]:
    content = said.strip()
    if not content:
        raise BadRow(f"{field}: the answer after the last '\\n\\nAssistant:' is empty")
    return [{"role": "assistant", "content": content}]
