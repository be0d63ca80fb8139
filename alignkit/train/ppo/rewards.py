"""The reward of a rollout: all sources of a ppo stage as one weighted sum, and what becomes of it before the KL."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.errors import ModelError, NonFiniteError, RewardError
from alignkit.models.chat import Chat
from alignkit.models.frozen import Classifier, ScoreIds
from alignkit.recipe import Stage
from alignkit.recipe.schema import PpoOptions, RewardSource
from alignkit.rewards.base import Reward, stage_space
from alignkit.rewards.classifier import ClassifierReward
from alignkit.rewards.kinds import open_reward
from alignkit.train import ranks
from alignkit.train.ppo.sampling import Rollout


class Rewards:
    """All sources of a reward; call it with a rollout. `modules` are the models that were loaded for it."""

    def __init__(self, sources: Mapping[str, tuple[Reward, float]], modules: Sequence[nn.Module] = ()) -> None:
        self.sources, self.modules = dict(sources), list(modules)

    def __call__(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """Score every answer: the weighted sum and its parts, each (R,) float32 on the CPU."""
        total_R = torch.zeros(len(rollout))
        parts = {}
        for name, (reward, weight) in self.sources.items():
            part_R = torch.tensor(reward.score(rollout), dtype=torch.float32)
            if not bool(part_R.isfinite().all()):
                number = int((~part_R.isfinite()).nonzero()[0])
                raise NonFiniteError(
                    f"the reward {name} of answer {number} is {float(part_R[number])}; its weights or dtype are not "
                    "fit for these texts"
                )
            parts[name] = part_R
            total_R = total_R + weight * part_R
        return total_R, parts


def build_rewards(
    stage: Stage, sources: Sequence[RewardSource], *, chat: Chat, key: str = "reward", device: str = "auto",
    held: Mapping[int, tuple[Classifier, ScoreIds]] | None = None,
) -> Rewards:  # fmt: skip
    """Open what scores the answers of a stage; `key` is reward or gold, for messages.

    `held` gives, by their place in `sources`, the models that the caller holds on the policy's base.
    """
    space = replace(stage_space(stage, key), device=device, once=ranks.once, split=_split)
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


def _split(items: Sequence[Any], score: Callable[[Sequence[Any]], list[float]]) -> list[float]:
    """Score a part of the items on each rank, and share the scores."""
    mine, num_own = ranks.share_out(range(len(items)))
    scores_R = torch.zeros(len(items))
    scores_R[mine[:num_own]] = torch.tensor(score([items[number] for number in mine]))[:num_own]
    return list(map(float, ranks.total(scores_R)))


def encode_ids(
    rollout: Rollout, stop_ids: Sequence[int], *, end_of_text: int, end_of_turn: int | None
) -> list[list[int]]:
    """Encode for a reward model that reads the policy's own tokens: nothing is written and cut anew.

    An answer that ended is given its end token where truncation has cut it off: whole answers are what an rm stage has
    been trained on.
    """
    sequences = []
    answers = zip(rollout.prompts, rollout.whole_ids, rollout.completion_ids, rollout.ended, strict=True)
    for prompt, ids, answer, ended in answers:
        closed = bool(answer) and answer[-1] in stop_ids
        end = end_of_text if isinstance(prompt, str) or end_of_turn is None else end_of_turn
        sequences.append([*ids, end] if ended and not closed else ids)
    return sequences


def measure_norm(options: PpoOptions, rewards_R: Tensor) -> tuple[float, float]:
    """Gain and bias that give these rewards mean 0, and with gain_and_bias deviation 1 (Ziegler 2019)."""
    gain = 1.0
    if options.reward_normalize == "gain_and_bias":
        gain = 1.0 / max(float(rewards_R.std(correction=0)), 1e-8)
    return gain, -gain * float(rewards_R.mean())


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
            scores_R = torch.where(cut_R, torch.full_like(scores_R, options.missing_eos.score), scores_R)
        else:
            scores_R = scores_R - cut_R * float(options.missing_eos.penalty or 0.0)
    return scores_R
