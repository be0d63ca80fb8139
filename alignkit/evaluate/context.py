"""What metrics share: figures with their 95 % intervals, as eval.json keeps them and tables show them; the models,
reward, rows, prompts and answers of an evaluation, made when first asked for; and what a metric is."""

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from alignkit.data import Row, Text
from alignkit.data.rows import Message
from alignkit.errors import UsageError
from alignkit.evaluate.policy import Answer, Policy
from alignkit.evaluate.target import Target, find_target, split_answer
from alignkit.recipe.schema import BUILTIN_REWARD, METRICS, EvaluateOptions
from alignkit.report.text import wilson as score_interval
from alignkit.rewards import Answers, Reward, Workspace
from alignkit.rewards.kinds import make_comparer, open_reward
from alignkit.rewards.kinds.judge import Comparer

Better = Literal["higher", "lower"]
Method = Literal["bootstrap", "wilson", "normal", "none"]
Floats = NDArray[np.float64]
Groups = Sequence[Sequence[float]]  # the values of each group; those of a group are not independent
RESAMPLES = 1000
Z = 1.959963984540054  # the 97.5 % point of the normal distribution
_CHUNK = 4_000_000  # weights held at once


class Sums(NamedTuple):
    """What a statistic was made of: the sums of each independent row, and how sums over rows become the statistic."""

    sums_NK: Floats
    combine: Callable[[Floats], Floats]


@dataclass(frozen=True)
class Figure:
    """A value with its 95 % interval over `n` independent rows, unnamed at first; no interval where `low` is None.
    `slice` is None for all rows, else which of them. `change` is the paired difference to another model on the same
    rows (`compare_rows`); `trained` names the stages that saw some of the prompts. eval.json has these two where they
    are."""

    metric: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    unit: str = ""
    better: Better | None = None
    interval: Method = "none"
    slice: str | None = None
    data: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    details: list[dict[str, Any]] | None = None
    change: dict[str, Any] | None = None
    trained: dict[str, Any] | None = None
    sums: Sums | None = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Turn it into plain data; JSON has no NaN and no infinity, so such a figure has no value."""
        plain = {key: value for key, value in vars(self).items() if key != "sums"}
        plain = {key: value for key, value in plain.items() if value is not None or key not in ("change", "trained")}
        for key in ("value", "low", "high"):
            if plain[key] is not None:
                plain[key] = float(plain[key]) if math.isfinite(plain[key]) else None  # a library's own type is no JSON
        return plain


def make_figure(metric: str, found: Figure, *, settings: dict[str, Any] | None = None, **facts: Any) -> Figure:
    """Name an interval, with what is known of it; `Context.place` adds data and common settings."""
    return replace(found, metric=metric, settings=settings or {}, **facts)


def wilson(successes: float, n: int) -> Figure:
    """Wilson's interval of the share successes / n; `successes` may have halves, where a tie counts as one half."""
    if n == 0:
        return Figure("", None, None, None, 0)
    low, high = score_interval(successes, n)
    return Figure("", successes / n, low, high, n, interval="wilson")


def bootstrap(sums_NK: ArrayLike, combine: Callable[[Floats], Floats], *, resamples: int = RESAMPLES) -> Figure:
    """Percentile bootstrap interval of a statistic of N rows (Efron 1979).
    `combine` maps sums over rows, (R, K), to the statistic, (R,). Rows are drawn with replacement; rows that belong
    together (answers to one prompt) must have been added up before. One row has a value and no interval."""
    rows_NK = np.asarray(sums_NK, dtype=np.float64)
    if (n := len(rows_NK)) == 0:
        return Figure("", None, None, None, 0)
    value, sums = float(combine(rows_NK.sum(axis=0, keepdims=True))[0]), Sums(rows_NK, combine)
    if n == 1:
        return Figure("", value, None, None, 1, sums=sums)
    random = np.random.default_rng(0)
    chunk = max(_CHUNK // n, 1)
    drawn: list[Floats] = []
    for start in range(0, resamples, chunk):
        weights_RN = random.multinomial(n, np.full(n, 1 / n), size=min(chunk, resamples - start))
        with np.errstate(divide="ignore", invalid="ignore"):  # a resample may leave a bin empty
            drawn.append(combine(weights_RN @ rows_NK))
    low, high = np.nanpercentile(np.concatenate(drawn), [2.5, 97.5])
    return Figure("", value, float(low), float(high), n, interval="bootstrap", sums=sums)


def compare_rows(figure: Figure, other: Figure | None, start: str, *, resamples: int = RESAMPLES) -> Figure:
    """Add the paired difference to the same figure of `start`: rows are drawn together, so what they share cancels.
    `rose` and `fell` count the rows on which it is larger and smaller. With another number of rows it stays as it
    was."""
    mine, theirs = figure.sums, other.sums if other else None
    if other is None or mine is None or theirs is None or len(mine.sums_NK) != len(theirs.sums_NK):
        return figure
    width = mine.sums_NK.shape[1]

    def subtract(sums_RK: Floats) -> Floats:
        return mine.combine(sums_RK[:, :width]) - theirs.combine(sums_RK[:, width:])

    both_NK = np.hstack([mine.sums_NK, theirs.sums_NK])
    found = bootstrap(both_NK, subtract, resamples=resamples)
    with np.errstate(all="ignore"):
        rows_N = subtract(both_NK)
    change = {"start": start, "from": other.value, "value": found.value, "low": found.low, "high": found.high,
              "rose": int((rows_N > 0).sum()), "fell": int((rows_N < 0).sum())}  # fmt: skip
    return replace(figure, change=change)


def mean(values: Sequence[float], *, resamples: int = RESAMPLES) -> Figure:
    """Mean of independent rows."""
    return mean_of_groups([[value] for value in values], resamples=resamples)


def mean_of_groups(groups: Groups, *, resamples: int = RESAMPLES) -> Figure:
    """Mean over all values; n counts the groups."""
    rows = [(float(sum(group)), float(len(group))) for group in groups if len(group)]
    return bootstrap(rows, divide, resamples=resamples)


def share(outcomes: Groups, *, resamples: int = RESAMPLES) -> Figure:
    """Share of successes (a tie is 0.5): Wilson's interval where each group has one outcome, else the bootstrap."""
    flat = [value for group in outcomes for value in group]
    if all(len(group) == 1 for group in outcomes) and set(flat) <= {0.0, 0.5, 1.0}:
        sums = Sums(np.asarray([(value, 1.0) for value in flat]).reshape(-1, 2), divide)
        return replace(wilson(sum(flat), len(flat)), sums=sums)
    return mean_of_groups(outcomes, resamples=resamples)


def divide(sums_R2: Floats) -> Floats:
    """Divide the first sum by the second, (R,)."""
    quotient: Floats = sums_R2[:, 0] / sums_R2[:, 1]
    return quotient


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
