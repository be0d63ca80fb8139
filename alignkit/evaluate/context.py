"""The models, reward, rows, prompts and answers that metrics share, made when first asked for; what a metric is."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from alignkit.data import Row, Text
from alignkit.data.rows import Message
from alignkit.errors import UsageError
from alignkit.evaluate.intervals import Figure
from alignkit.evaluate.policy import Answer, Policy
from alignkit.evaluate.target import Target, find_target, split_answer
from alignkit.recipe.schema import BUILTIN_REWARD, METRICS, EvaluateOptions
from alignkit.rewards.base import Answers, Reward, Workspace
from alignkit.rewards.kinds import make_comparer, open_reward
from alignkit.rewards.kinds.judge import Comparer


class Context:
    """The models, rows and answers of one evaluation."""

    def __init__(
        self, target: Target, options: EvaluateOptions, rows: list[Row], label: str, space: Workspace, *, seed: int,
        judged: Path | None = None,
    ) -> None:  # fmt: skip
        """`label` names the rows; `judged` is where verdicts are kept."""
        self.target, self.options, self.rows, self.label = target, options, rows, label
        self.space, self.seed, self._judged = space, seed, judged
        self.is_toy = self.label.startswith("builtin:")

    @cached_property
    def policy(self) -> Policy:
        return Policy(self.target.source, self.space)

    @cached_property
    def reference_source(self) -> str | None:
        start = self.target.start() if self.options.start else None
        return self.options.reference or self.target.reference() or start

    @cached_property
    def reference(self) -> Policy:
        assert self.reference_source is not None
        reference = Policy(self.reference_source, self.space)
        if reference.tokens != self.policy.tokens:
            raise UsageError(
                f"{self.reference_source} and {self.target.source} read different tokens (tokenizer or template), so "
                "their log-probabilities cannot be compared; name another --reference"
            )
        return reference

    @cached_property
    def rival(self) -> Policy:
        """The other side of a win rate; raises UsageError for what is no language model."""
        against = str(self.options.against)
        if find_target(against, trust_code=self.space.trust_code).reward:
            raise UsageError(f"--against: {against} is a reward model, which says nothing")
        return Policy(against, self.space)

    @cached_property
    def judge(self) -> Comparer:
        """The judge of a win rate; raises UsageError for what cannot be one."""
        return make_comparer(self.options, self.space, reward=self.reward, seed=self.seed, store=self._judged)

    @cached_property
    def reward(self) -> Reward | None:
        """The reward that is asked for, else the true one in the toy world."""
        if self.options.reward is not None:
            return open_reward(self.options.reward, self.space)
        return self.true_reward if self.is_toy else None

    @cached_property
    def true_reward(self) -> Reward:
        return open_reward(BUILTIN_REWARD, self.space)

    @cached_property
    def asked(self) -> list[tuple[Text, Text | None]]:
        """The prompts of the rows, each with its best answer where it has one."""
        return [found for found in map(split_answer, self.rows) if found is not None]

    @cached_property
    def prompts(self) -> list[Text]:
        """Prompts to sample from, each once: a repeated one would get the same answers, which tell nothing new."""
        return list({repr(prompt): prompt for prompt, _ in self.asked}.values())

    def sample(self, policy: Policy, samples: int) -> list[list[Answer]]:
        """Sample answers to the prompts, the same ones each time."""
        return policy.answer(self.prompts, samples=samples, seed=self.seed, **self.sampling)

    @cached_property
    def sampled(self) -> list[list[Answer]]:
        """Answers of the policy: as many as any metric needs."""
        most = max([self.options.samples, *(self.options.best_of if self.reward is not None else ())])
        return self.sample(self.policy, most)

    def score(self, reward: Reward, answers: Sequence[Sequence[Answer]]) -> list[list[float]]:
        """Score answers to the prompts, group by group."""
        flat = [(prompt, answer) for prompt, group in zip(self.prompts, answers, strict=True) for answer in group]
        completions = [as_completion(prompt, answer.text) for prompt, answer in flat]
        given = Answers([prompt for prompt, _ in flat], completions, [answer.ended for _, answer in flat])
        scores = iter(reward.score(given))
        return [[next(scores) for _ in group] for group in answers]

    @cached_property
    def sampling(self) -> dict[str, Any]:
        """The settings that answers are sampled with."""
        limit = self.options.max_new_tokens or self.policy.usual_length
        cuts = self.options.model_dump(include={"top_p", "top_k"}, exclude_defaults=True)
        engine = self.options.generation.model_dump(exclude_defaults=True)
        return {"temperature": self.options.temperature, "max_new_tokens": limit, **cuts, **engine}

    def place(self, figures: Sequence[Figure], **settings: Any) -> list[Figure]:
        """Say of figures on which rows they were measured, and how."""
        common = {"rows": len(self.rows), "seed": self.seed, **settings}
        return [replace(each, data=self.label, settings=common | each.settings) for each in figures]


def as_completion(prompt: Text, text: str) -> Text:
    """Write an answer as its prompt is written: text, or a message."""
    return text if isinstance(prompt, str) else [Message(role="assistant", content=text)]


Need = tuple[Callable[[Context], Any], str]  # whether it is there, and what is said where it is not
ROWS: Need = (lambda context: context.rows, "there are no rows (--data)")
# KL and what is made of it are of the policy's own distribution.
OWN: Need = (
    lambda context: context.options.temperature > 0 and context.options.top_p == 1 and not context.options.top_k,
    "it is of all that the policy says: take top_p and top_k out, and set temperature above 0",
)
POLICY: Need = (lambda context: not context.target.reward, "it is a reward model, which says nothing, or a classifier")


@dataclass(frozen=True)
class Metric:
    """A metric: what it needs (a policy and rows that hold something), and the function that measures it."""

    measure: Callable[[Context], Sequence[Figure]]
    needs: tuple[Need, ...]  # looked for in this order
    key: str | None = None  # the option that asks for it, as its name in `metrics` does
    optional: bool = False  # left out with a warning where its package is not installed, unless it was asked for
    prepare: Callable[[Context], Any] = lambda context: None  # finds out what is wrong before anything is measured

    def find_lack(self, context: Context) -> str | None:
        """Say why it cannot be measured, None where it can."""
        return next((what for is_there, what in self.needs if not is_there(context)), None)


def load_metrics() -> dict[str, Metric]:
    """Import every metric, by its name."""
    return {name: importlib.import_module(f"alignkit.evaluate.metrics.{name}").METRIC for name in METRICS}
