"""Answers of the policy: which prompts come when, which random numbers choose the tokens, where an answer ends, and
what it is worth before the KL."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alignkit.errors import ModelError, NonFiniteError, RewardError
from alignkit.models.chat import Chat
from alignkit.models.frozen import Classifier, ScoreIds
from alignkit.recipe import Stage
from alignkit.recipe.methods import PpoOptions
from alignkit.recipe.schema import RewardSource
from alignkit.rewards import Answers, Reward, stage_space
from alignkit.rewards.kinds import open_reward
from alignkit.rewards.kinds.model import ClassifierReward
from alignkit.train import ranks

Key = tuple[int, ...]  # which answers these are: the run's seed, what they are for, and their number


def draw_uniforms(key: Key, num_answers: int, num_tokens: int) -> Tensor:
    """Numbers in [0, 1), float32 (num_answers, num_tokens): one for every token an answer may have."""
    return torch.from_numpy(np.random.default_rng(key).random((num_answers, num_tokens), dtype=np.float32))


@dataclass
class Rollout(Answers):
    """Answers of the policy, one entry per answer; the answers of one prompt stand together.
    `completion_ids` and `completions` are what a reward sees: cut by `truncate`, stop token included where one came.
    `sampled_ids` is everything that was sampled; the KL is taken over all of it."""

    prompt_ids: list[list[int]] = field(default_factory=list)
    completion_ids: list[list[int]] = field(default_factory=list)
    sampled_ids: list[list[int]] = field(default_factory=list)
    engine_logps: list[list[float]] = field(default_factory=list)  # of sampled_ids, where another engine drew them

    def replace(self, rows: Sequence[int], others: Rollout) -> None:
        """Put other answers in the place of some; `columns` of one of the two alone become None in the other."""
        names = ("prompts", "completions", "ended", "prompt_ids", "completion_ids", "sampled_ids", "engine_logps")
        lists: list[tuple[Any, Any]] = [(getattr(self, name), getattr(others, name)) for name in names]
        columns: Any = self.columns
        for name in {**columns, **others.columns}:
            own = columns.setdefault(name, [None] * len(self))
            lists.append((own, others.columns.get(name, [None] * len(others))))
        for own, new in lists:
            for row, value in zip(rows, new, strict=False):  # an engine that is the trainer gives no log-probabilities
                own[row] = value

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


def cut_at_text(sampled: Sequence[int], stops: Sequence[str], decode: Callable[[Sequence[int]], str]) -> int | None:
    """Count the tokens up to the first that completes one of the texts `stops`, None where none comes."""

    def holds(count: int) -> bool:
        text = decode(sampled[:count])
        return any(stop in text for stop in stops)

    if not stops or not holds(len(sampled)):
        return None
    return bisect.bisect_left(range(len(sampled) + 1), True, key=holds)


def cut_answer(
    sampled: Sequence[int], *, stop_ids: Sequence[int], truncation: tuple[int, int] | None
) -> tuple[list[int], bool]:
    """Cut an answer to the tokens a reward sees, and tell whether it ended by itself: with a stop token, or with the
    first `truncation` token at or after that position (Ziegler 2019: '.' after 16 tokens), which alone counts then."""
    if truncation is None:
        return list(sampled), bool(sampled) and sampled[-1] in stop_ids
    token, after = truncation
    for position in range(after, len(sampled)):
        if sampled[position] == token:
            return list(sampled[: position + 1]), True
    return list(sampled), False


def repetition(answers: Sequence[Sequence[int]]) -> float:
    """Share of the bigrams that occurred before among all answers: 1 - distinct-2 (Li et al., arXiv 1510.03055)."""
    pairs = [pair for answer in answers for pair in zip(answer, answer[1:], strict=False)]
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def prompt_numbers(first: int, count: int, *, num_prompts: int, seed: int) -> list[int]:
    """Places `first` to `first + count` of the endless stream of prompts: one shuffled pass after the other."""
    numbers: list[int] = []
    for turn in range(first // num_prompts, (first + count - 1) // num_prompts + 1):
        order = np.random.default_rng((seed, turn)).permutation(num_prompts)
        numbers += order[max(first - turn * num_prompts, 0) : first + count - turn * num_prompts].tolist()
    return numbers


def answer_order(num_answers: int, *, seed: int, rollout: int, epoch: int) -> np.ndarray:
    """The order in which an epoch goes through a rollout, (R,). The first keeps the rollout's own: its prompts are in
    random order already, and the first minibatch is then computed as its log-probabilities were: its ratio is 1."""
    if epoch == 0:
        return np.arange(num_answers)
    return np.random.default_rng((seed, rollout, epoch)).permutation(num_answers)


def sort_steps(rows: np.ndarray, lengths: Sequence[int], *, step_size: int) -> np.ndarray:
    """Sort the answers of each optimizer step by length, longest first: micro batches then hold little padding.
    A step's loss is a sum over its tokens, so that the order inside a step changes no more than rounding."""
    sizes = np.asarray(lengths)
    parts = [rows[start : start + step_size] for start in range(0, len(rows), step_size)]
    return np.concatenate([part[np.argsort(-sizes[part], kind="stable")] for part in parts])


class Rewards:
    """All sources of a reward; call it with a rollout. `modules` are the models that were loaded for it."""

    def __init__(self, sources: Mapping[str, tuple[Reward, float]], modules: Sequence[nn.Module] = ()) -> None:
        self.sources, self.modules = dict(sources), list(modules)

    def __call__(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """Score every answer: the weighted sum and its parts, each (R,) float32 on the CPU."""
        total_R, parts = torch.zeros(len(rollout)), {}
        for name, (reward, weight) in self.sources.items():
            parts[name] = part_R = torch.tensor(reward.score(rollout), dtype=torch.float32)
            if bad := (~part_R.isfinite()).nonzero().flatten().tolist():
                what = f"the reward {name} of answer {bad[0]} is {float(part_R[bad[0]])} in float32; a function must "
                raise NonFiniteError(f"{what}stay below 3e38, a model's weights or dtype are not fit for these texts")
            total_R = total_R + weight * part_R
        return total_R, parts


def build_rewards(
    stage: Stage, sources: Sequence[RewardSource], *, chat: Chat, key: str = "reward", device: str = "auto",
    held: Mapping[int, tuple[Classifier, ScoreIds]] | None = None,
) -> Rewards:  # fmt: skip
    """Open what scores the answers of a stage; `key` is reward or gold, for messages. `held` gives, by their place in
    `sources`, the models that the caller holds on the policy's base."""

    def split(items: Sequence[Any], score: Callable[[Sequence[Any]], list[float]]) -> list[float]:
        """Score a part of the items on each rank, and share the scores."""
        mine, num_own = ranks.share_out(range(len(items)))
        scores_R = torch.zeros(len(items))
        scores_R[mine[:num_own]] = torch.tensor(score([items[number] for number in mine]))[:num_own]
        return list(map(float, ranks.total(scores_R)))

    space = replace(stage_space(stage, key), device=device, once=ranks.once, split=split)
    opened: dict[str, tuple[Reward, float]] = {}
    modules = []
    for place, source in enumerate(sources):
        try:
            reward = open_reward(source, space)
            if isinstance(reward, ClassifierReward):
                given = (held or {}).get(place, ())
                classifier = reward.hold(*given)
                modules += [] if given else [classifier.model]
                mine, other = chat.tokenizer, classifier.tokenizer
                reads_alike = mine.chat_template == other.chat_template and mine.eos_token_id == other.eos_token_id
                same_tokens = mine.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
                if classifier.is_own and reads_alike and same_tokens:
                    ends = {"end_of_text": chat.tokenizer.eos_token_id, "end_of_turn": chat.end_of_turn}
                    reward.encode = partial(encode_ids, stop_ids=chat.stop_ids, **ends)
        except ModelError as error:
            raise RewardError(f"{stage.name}.{key}: {error}", where=space.where) from error
        name, number = reward.name, 2
        while name in opened:
            name, number = f"{reward.name}_{number}", number + 1
        opened[name] = (reward, source.weight)
    return Rewards(opened, modules)


def encode_ids(
    rollout: Rollout, stop_ids: Sequence[int], *, end_of_text: int, end_of_turn: int | None
) -> list[list[int]]:
    """Encode for a reward model that reads the policy's own tokens: nothing is written and cut anew. An answer that
    ended is given its end token where truncation has cut it off, for an rm stage has been trained on whole answers."""
    sequences = []
    answers = zip(rollout.prompts, rollout.whole_ids, rollout.completion_ids, rollout.ended, strict=True)
    for prompt, ids, answer, ended in answers:
        closed = bool(answer) and answer[-1] in stop_ids
        end = end_of_text if isinstance(prompt, str) or end_of_turn is None else end_of_turn
        sequences.append([*ids, end] if ended and not closed else ids)
    return sequences


def finish_scores(
    options: PpoOptions, total_R: Tensor, ended: Sequence[bool], norm: tuple[float, float] | None,
    lengths: Sequence[int] = (),
) -> Tensor:  # fmt: skip
    """Make the final score of each answer: normalised, clipped, and with what its length and a missing end cost."""
    gain, bias = norm or (1.0, 0.0)
    scores_R = gain * total_R.float() + bias
    if options.reward_clip is not None:
        scores_R = scores_R.clamp(-options.reward_clip, options.reward_clip)
    if options.overlong is not None and options.overlong.buffer:
        buffer = options.overlong.buffer * (options.max_new_tokens if options.overlong.buffer < 1 else 1)
        over_R = (torch.tensor(lengths) - (options.max_new_tokens - buffer)) / buffer
        scores_R = scores_R - options.overlong.penalty * over_R.clamp(0, 1)
    if options.missing_eos is not None:
        cut_R = ~torch.tensor(ended, dtype=torch.bool)
        if options.missing_eos.score is not None:
            return scores_R.masked_fill(cut_R, options.missing_eos.score)
        scores_R = scores_R - cut_R * float(options.missing_eos.penalty or 0.0)
    return scores_R
