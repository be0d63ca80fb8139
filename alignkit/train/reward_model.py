"""A sequence classifier as a reward: the policy's tokens where it reads the same ones, else the text in its own.

Deliberately knows no functions and no weights of a sum (`rewards`), and trains nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from alignkit.errors import RewardError
from alignkit.models.chat import Chat
from alignkit.models.classifier import Classifier, ScoreIds, encode_foreign, encode_own
from alignkit.train import ranks
from alignkit.train.rollout import Rollout

Encode = Callable[[Rollout], list[list[int]]]


class ModelReward:
    """Scores of one classifier, with the gain and bias that its rm stage measured; all ranks call it together."""

    def __init__(
        self,
        score_ids: ScoreIds,
        encode: Encode,
        norm: tuple[float, float],
        *,
        limit: int | None,
        name: str,
        module: nn.Module | None = None,
    ) -> None:
        self._score_ids, self._encode, self._norm, self._limit, self._name = score_ids, encode, norm, limit, name
        self.module = module  # what was loaded for it; None where it lies on the policy's base

    def __call__(self, rollout: Rollout) -> Tensor:
        """Return the normalised reward of each answer, (B,) float32 on the CPU."""
        sequences = self._encode(rollout)
        for number, ids in enumerate(sequences):
            if self._limit is not None and len(ids) > self._limit:
                raise RewardError(
                    f"the reward model {self._name} reads {self._limit} tokens, and answer {number} with its prompt "
                    f"has {len(ids)}; lower max_new_tokens, leave out long prompts, or take another reward"
                )
        gain, bias = self._norm
        mine, num_own = ranks.share_out(range(len(sequences)))
        found_M = self._score_ids([sequences[number] for number in mine]).float().cpu()
        scores_B = torch.zeros(len(sequences))
        scores_B[mine[:num_own]] = found_M[:num_own]
        scores_B = ranks.total(scores_B)
        return scores_B if self._norm == (1.0, 0.0) else gain * scores_B + bias


def encode_ids(stop_ids: Sequence[int], end_of_text: int, end_of_turn: int | None) -> Encode:
    """Return an encoder for a reward model that reads the policy's own tokens.

    An answer that ended is given its end token where truncation has cut it off: whole answers are what an rm stage has
    been trained on.
    """

    def encode(rollout: Rollout) -> list[list[int]]:
        sequences = []
        for prompt, ids, answer, ended in zip(
            rollout.prompts, rollout.whole_ids, rollout.completion_ids, rollout.ended, strict=True
        ):
            closed = bool(answer) and answer[-1] in stop_ids
            end = end_of_text if isinstance(prompt, str) or end_of_turn is None else end_of_turn
            sequences.append([*ids, end] if ended and not closed else ids)
        return sequences

    return encode


def choose_encoder(classifier: Classifier, chat: Chat, *, name: str) -> Encode:
    """Return how answers become tokens of a reward model: the policy's, alignkit's template path, or its own way."""
    if is_same_encoding(classifier, chat) and classifier.is_own:
        return encode_ids(chat.stop_ids, chat.tokenizer.eos_token_id, chat.end_of_turn)
    if classifier.is_own:
        return _encode_own(Chat(classifier.tokenizer), name)
    return _encode_foreign(classifier, name)


def is_same_encoding(classifier: Classifier, chat: Chat) -> bool:
    """Tell whether a reward model reads the same tokens for the same conversation as the policy."""
    mine, other = chat.tokenizer, classifier.tokenizer
    same_tokens = mine.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
    return same_tokens and mine.chat_template == other.chat_template and mine.eos_token_id == other.eos_token_id


def _encode_own(chat: Chat, name: str) -> Encode:
    return lambda rollout: encode_own(chat, rollout.prompts, rollout.completions, rollout.ended, name=name)


def _encode_foreign(classifier: Classifier, name: str) -> Encode:
    return lambda rollout: encode_foreign(classifier.tokenizer, rollout.prompts, rollout.completions, name=name)
