"""Texts of users and models made harmless before they go into a prompt of ours.

An answer may hold "The answer is: (A)", a forged turn, closing brackets or a control token, by chance or on purpose.
Where such a text could be taken for a part of the prompt it is marked as a quotation. Only what a judge is shown is
changed, never a row. How persuasive a text is cannot be helped here: asking both orders shows it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from alignkit.data import Row, escape_control_tokens

# Of the common templates; a server's own tokenizer cannot be asked.
FOREIGN_TOKENS = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|begin_of_text|>", "<|end_of_text|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<s>", "</s>",
    "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>",
)  # fmt: skip
_TURNS = "Human|Assistant|System|Tool|CritiqueRequest|Critique|RevisionRequest|Revision"
# At the start of a line: labels of turns, the words before a verdict, and options.
_LABEL = re.compile(rf"(?mi)^([^\S\n]*)((?:{_TURNS}|(?:so )?the answer is|options)[^\S\n]*:|\([AB]\))")
_SHORT_LABEL = re.compile(r"(?m)(\n\n[^\S\n]*)([HA]:)")
_BRACKETS = re.compile(r"\[{3,}|\]{3,}")


class Quoter:
    """Quotes texts for one model, and counts those that needed it."""

    def __init__(self, control_tokens: Sequence[str]) -> None:
        self._tokens = [token for token in control_tokens if len(token) > 1]
        self.count = 0

    def __call__(self, text: str) -> str:
        """Return the text with nothing in it that reads as a part of our prompts."""
        quoted = _LABEL.sub(r"\1> \2", text)
        quoted = _SHORT_LABEL.sub(r"\1> \2", quoted)
        quoted = _BRACKETS.sub(lambda match: " ".join(match[0]), quoted)
        if self._tokens:
            (quoted,) = escape_control_tokens(Row("text", "", (quoted,)), self._tokens).completions  # type: ignore[assignment]
        self.count += quoted != text
        return quoted
