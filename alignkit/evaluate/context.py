"""What the groups of metrics share: models, reward, rows, prompts and sampled answers, each made when first asked for.

No figure is computed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from alignkit.data import Row, Text
from alignkit.data.rows import Message
from alignkit.errors import UsageError
from alignkit.evaluate.metrics.pairs import Pair, list_pairs
from alignkit.evaluate.policy import Answer, Policy, Shelf
from alignkit.evaluate.rewards import Reward, TrueReward, make_reward
from alignkit.evaluate.target import Measured, Subject, split_answer
from alignkit.recipe.schema import EvaluateOptions

_BUILTIN = "builtin:"


class Material:
    """The models, rows and answers of one evaluation."""

    def __init__(
        self,
        subject: Subject,
        options: EvaluateOptions,
        measured: Measured | None,
        shelf: Shelf,
        *,
        seed: int,
        folder: Path,
    ) -> None:
        """Keep what is given; `measured` is None where only tasks are asked for."""
        self.subject, self.options, self.shelf = subject, options, shelf
        self.seed, self.folder = seed, folder
        self.rows: list[Row] = measured.rows if measured else []
        self.label = measured.label if measured else ""

    @cached_property
    def policy(self) -> Policy:
        return Policy(self.subject.source, self.shelf)

    @cached_property
    def reference_source(self) -> str | None:
        return self.options.reference or self.subject.reference()

    @cached_property
    def reference(self) -> Policy:
        assert self.reference_source is not None
        reference = Policy(self.reference_source, self.shelf)
        if reference.tokens != self.policy.tokens:
            raise UsageError(
                f"{self.reference_source} and {self.subject.source} read different tokens (tokenizer or template), so "
                "their log-probabilities cannot be compared; name another --reference"
            )
        return reference

    @cached_property
    def reward(self) -> Reward | None:
        if self.options.reward is not None:
            return make_reward(self.options.reward, self.shelf, folder=self.folder)
        return TrueReward() if self.is_toy else None

    @property
    def is_toy(self) -> bool:
        return self.label.startswith(_BUILTIN)

    @cached_property
    def pairs(self) -> list[Pair]:
        return list_pairs(self.rows)

    @cached_property
    def asked(self) -> list[tuple[Text, Text | None]]:
        return [found for found in map(split_answer, self.rows) if found is not None]

    @cached_property
    def prompts(self) -> list[Text]:
        """Prompts to sample from, each once: a repeated one would get the same answers, which tell nothing new."""
        return list({repr(prompt): prompt for prompt, _ in self.asked}.values())

    @property
    def referenced(self) -> list[tuple[Text, Text]]:
        """Prompts with their one right answer; the better of two is not that unless overlap is asked for."""
        named = self.options.metrics is not None
        if not named and any(row.kind in ("pair", "ranked", "unpaired") for row in self.rows):
            return []
        return [(prompt, answer) for prompt, answer in self.asked if answer is not None]

    def sample(self, policy: Policy, samples: int) -> list[list[Answer]]:
        return policy.answer(
            self.prompts,
            max_new_tokens=self.options.max_new_tokens,
            temperature=self.options.temperature,
            samples=samples,
            seed=self.seed,
        )

    @cached_property
    def sampled(self) -> list[list[Answer]]:
        """Answers of the policy: as many as any group needs."""
        most = max([self.options.samples, *(self.options.best_of if self.reward is not None else ())])
        return self.sample(self.policy, most)

    def score(self, reward: Reward, answers: Sequence[Sequence[Answer]]) -> list[list[float]]:
        """Score answers to the prompts, group by group."""
        flat = [(prompt, answer) for prompt, group in zip(self.prompts, answers, strict=True) for answer in group]
        scores = iter(
            reward.score(
                [prompt for prompt, _ in flat],
                [as_completion(prompt, answer.text) for prompt, answer in flat],
                [answer.ended for _, answer in flat],
            )
        )
        return [[next(scores) for _ in group] for group in answers]


def as_completion(prompt: Text, text: str) -> Text:
    """Return an answer as its prompt is written: text, or a message."""
    return text if isinstance(prompt, str) else [Message(role="assistant", content=text)]
