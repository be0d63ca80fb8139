"""Requests as token ids: chats up to the model's turn and its prefill, transcripts as they are.

It runs no model.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from alignkit.feedback.prompts import OPTIONS, Request
from alignkit.models.chat import Chat


class Encoder:
    """Encodes for one tokenizer; chat models get messages, others the transcript."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self._chat = Chat(tokenizer)
        self.chat_template = tokenizer.chat_template
        self.control_tokens = self._chat.control_tokens
        self.stop_ids = self._chat.stop_ids

    def encode(self, request: Request) -> list[int]:
        """Return the ids that a text is written after."""
        if not self._speaks(request):
            return self._chat.encode_prompts([request.transcript])[0]
        (ids,) = self._chat.encode_prompts([list(request.messages or ())])
        return ids + self._plain(request.prefill) if request.prefill else ids

    def split(self, request: Request) -> tuple[list[int], tuple[list[int], list[int]]]:
        """Return what a question has in common with either option, and the one or more tokens of each that follow.

        The options stand at the very end of the ids, whatever the question says.
        """
        if not self._speaks(request):
            whole = self._chat.encode_prompts([request.transcript + option for option in OPTIONS])
        else:
            (head,) = self._chat.encode_prompts([list(request.messages or ())])
            whole = [head + self._plain(request.prefill + option) for option in OPTIONS]
        first, second = whole
        same = next(place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
        return first[:same], (first[same:], second[same:])

    def decode(self, ids: Sequence[int]) -> str:
        """Return what was written, without control tokens."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def stops(self, request: Request) -> tuple[str, ...]:
        """Return the texts at which a transcript ends; a chat ends with its end of turn."""
        return () if self._speaks(request) else request.stops

    def _speaks(self, request: Request) -> bool:
        return self._chat.has_template and request.messages is not None

    def _plain(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids
