"""One rollout as plain lists: prompts, what the policy answered, and what rewards are given to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from alignkit.rewards.base import Answers


@dataclass
class Rollout(Answers):
    """Answers of the policy, one entry per answer; the answers of one prompt stand together.

    `completion_ids` and `completions` are what a reward sees: cut by `truncate`, stop token included where one came.
    `sampled_ids` is everything that was sampled; the KL is taken over all of it.
    """

    prompt_ids: list[list[int]] = field(default_factory=list)
    completion_ids: list[list[int]] = field(default_factory=list)
    sampled_ids: list[list[int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.completion_ids)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt with everything sampled after it."""
        return [len(prompt) + len(ids) for prompt, ids in zip(self.prompt_ids, self.sampled_ids, strict=True)]

    @property
    def whole_ids(self) -> list[list[int]]:
        """Prompt and answer of each row in one list."""
        return [prompt + answer for prompt, answer in zip(self.prompt_ids, self.completion_ids, strict=True)]


@dataclass(frozen=True)
class Truncation:
    """Cut an answer after the first `token` at or after position `after` (Ziegler 2019: '.' after 16 tokens)."""

    token: int
    after: int


def cut_answer(
    sampled: Sequence[int], *, stop_ids: Sequence[int], truncation: Truncation | None
) -> tuple[list[int], bool]:
    """Return the tokens a reward sees and whether the answer ended by itself.

    Without a truncation token an answer ends with a stop token; with one, only the truncation token counts.
    """
    if truncation is None:
        return list(sampled), bool(sampled) and sampled[-1] in stop_ids
    for position in range(truncation.after, len(sampled)):
        if sampled[position] == truncation.token:
            return list(sampled[: position + 1]), True
    return list(sampled), False


def repetition(answers: Sequence[Sequence[int]]) -> float:
    """Share of the bigrams that occurred before among all answers: 1 - distinct-2 (Li et al., arXiv 1510.03055)."""
    pairs = [pair for answer in answers for pair in zip(answer, answer[1:], strict=False)]
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0
