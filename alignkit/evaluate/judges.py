"""Who says which of two answers is better: the seam between win rates and whatever can compare.

A reward is a judge that does not see the order. One that reads both answers (a language model) has `reads_order` and is
asked both ways round by the win rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from alignkit.data import Text
from alignkit.evaluate.rewards import Reward


class Judge(Protocol):
    """Compares two answers to one prompt."""

    name: str
    reads_order: bool  # whether which answer stands first can change the verdict

    def prefer(self, prompts: Sequence[Text], firsts: Sequence[Text], seconds: Sequence[Text]) -> list[float]:
        """Return P(first is better) of each pair, in [0, 1]; 0.5 is a tie."""


class RewardJudge:
    """The higher reward wins; equal rewards tie. An answer that was cut off is scored as if it had ended there."""

    reads_order = False

    def __init__(self, reward: Reward) -> None:
        self._reward = reward
        self.name = reward.name

    def prefer(self, prompts: Sequence[Text], firsts: Sequence[Text], seconds: Sequence[Text]) -> list[float]:
        """Return 1, 0 or 0.5."""
        scores = self._reward.score([*prompts, *prompts], [*firsts, *seconds])
        ours, theirs = scores[: len(firsts)], scores[len(firsts) :]
        return [0.5 if a == b else float(a > b) for a, b in zip(ours, theirs, strict=True)]
