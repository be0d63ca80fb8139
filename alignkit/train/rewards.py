"""The reward of an answer: reward models, functions, judges and the toy world's own, as one weighted sum.

Normalisation on the starting policy, clipping, the penalty for a missing end and the KL are not here: they change what
a score means for the policy, not what the sources say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.data import true_reward
from alignkit.errors import ModelError, NonFiniteError, RewardError
from alignkit.models.chat import Chat
from alignkit.models.classifier import Classifier, ScoreIds, load_classifier, name_source, read_norm, scorer
from alignkit.recipe import Stage
from alignkit.recipe.schema import BUILTIN_REWARD, RewardSource
from alignkit.rewards.function import load_function
from alignkit.train import ranks
from alignkit.train.reward_model import ModelReward, choose_encoder
from alignkit.train.rollout import Rollout

Score = Callable[[Rollout], Tensor]


@dataclass
class Scored:
    """Rewards of a rollout, float32 on the CPU; `total_B` is the weighted sum of the parts."""

    total_B: Tensor
    parts: dict[str, Tensor]


class Rewards:
    """All sources of a reward; call it with a rollout."""

    def __init__(self, sources: Mapping[str, tuple[Score, float]]) -> None:
        self._sources = dict(sources)

    @property
    def names(self) -> list[str]:
        """Return the names of the parts, as metrics call them."""
        return list(self._sources)

    @property
    def modules(self) -> list[nn.Module]:
        """Return the models that were loaded for it."""
        scores = [score for score, _ in self._sources.values()]
        return [score.module for score in scores if isinstance(score, ModelReward) and score.module is not None]

    def __call__(self, rollout: Rollout) -> Scored:
        """Score every answer; raises RewardError or NonFiniteError with the source and the answer."""
        total_B = torch.zeros(len(rollout))
        parts = {}
        for name, (score, weight) in self._sources.items():
            part_B = score(rollout).float()
            if not bool(part_B.isfinite().all()):
                number = int((~part_B.isfinite()).nonzero()[0])
                raise NonFiniteError(
                    f"the reward {name} of answer {number} is {float(part_B[number])}; its weights or dtype are not "
                    "fit for these texts"
                )
            parts[name] = part_B
            total_B = total_B + weight * part_B
        return Scored(total_B, parts)


def build_rewards(
    stage: Stage,
    sources: Sequence[RewardSource],
    *,
    chat: Chat,
    key: str = "reward",
    device: str = "auto",
    held: Mapping[int, tuple[Classifier, ScoreIds]] | None = None,
) -> Rewards:
    """Return what scores the answers of a stage; `key` is reward or gold, for messages.

    `held` gives, by their place in `sources`, the models that the caller holds on the policy's base: nothing is loaded
    for them. Raises RewardError or ModelError with the place in the recipe.
    """
    built: dict[str, tuple[Score, float]] = {}
    for place, source in enumerate(sources):
        score = _build(stage, source, chat, key=key, device=device, held=(held or {}).get(place))
        built[_unique(_name(stage, source), built)] = (score, source.weight)
    return Rewards(built)


def _build(
    stage: Stage,
    source: RewardSource,
    chat: Chat,
    *,
    key: str,
    device: str,
    held: tuple[Classifier, ScoreIds] | None,
) -> Score:
    if source.function is not None:
        function = load_function(stage, source.function, key=key)
        # Once for all ranks: a function may look at the answers together, or count its calls.
        return lambda rollout: torch.tensor(
            ranks.once(lambda: function(rollout.prompts, rollout.completions, rollout.columns))
        )
    if source.judge is not None:
        return _build_judge(stage, source, key=key)
    assert source.model is not None
    if source.model == BUILTIN_REWARD:
        return _score_truly
    name = _name(stage, source)
    try:
        norm = read_norm(source.model)
        classifier = held[0] if held else load_classifier(source.model, device=device, trust_code=stage.trust_code)
    except ModelError as error:
        where = stage.where(f"{stage.name}.{key}")
        raise RewardError(f"{stage.name}.{key}: {error}", where=where) from error
    encode = choose_encoder(classifier, chat, name=name)
    score_ids, module = (held[1], None) if held else (scorer(classifier), classifier.model)
    return ModelReward(score_ids, encode, norm, limit=classifier.positions, name=name, module=module)


def _build_judge(stage: Stage, source: RewardSource, *, key: str) -> Score:
    """Return the score of a judge, which rank 0 alone holds and asks: nothing is asked, or paid for, twice."""
    from alignkit.rewards.judge import build_reward  # with a judge alone: its libraries are not everybody's

    assert source.judge is not None and source.constitution is not None
    where = stage.where(f"{stage.name}.{key}")
    directory = Path(stage.run_dir).expanduser().absolute()
    asked = build_reward(stage, source.judge, source.constitution, directory, where=where) if ranks.is_main() else None

    def ask(rollout: Rollout) -> list[float]:
        assert asked is not None
        return list(asked(rollout.prompts, rollout.completions))

    return lambda rollout: torch.tensor(ranks.once(lambda: ask(rollout)))


def _score_truly(rollout: Rollout) -> Tensor:
    return torch.tensor([true_reward(read_answer(answer)) for answer in rollout.completions])


def read_answer(completion: Any) -> str:
    """Return the text of an answer, which may be text or messages."""
    return completion if isinstance(completion, str) else "\n".join(message["content"] for message in completion)


def _name(stage: Stage, source: RewardSource) -> str:
    if source.function is not None:
        return source.function.rpartition(":")[2]
    if source.judge is not None:
        return "judge"
    assert source.model is not None
    if source.model == BUILTIN_REWARD:
        return "true_reward"
    return stage.reward_stages.get(source.model) or name_source(source.model)


def _unique(name: str, taken: Mapping[str, Any]) -> str:
    number = 2
    unique = name
    while unique in taken:
        unique, number = f"{name}_{number}", number + 1
    return unique
