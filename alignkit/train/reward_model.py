"""A sequence classifier as a reward: the policy's tokens where it reads the same ones, else the text in its own.

Deliberately knows no functions and no weights of a sum (`rewards`), and trains nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from alignkit.errors import ModelError, RewardError
from alignkit.models.chat import Chat, ConversationError
from alignkit.models.classifier import Classifier
from alignkit.models.files import REWARD_NORM, find_model_dir
from alignkit.runs.files import read_json
from alignkit.train import ranks
from alignkit.train.rollout import Rollout

ScoreIds = Callable[[list[list[int]]], Tensor]
Encode = Callable[[Rollout], list[list[int]]]
_BATCH_SIZE = 16


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


def read_norm(source: str) -> tuple[float, float]:
    """Return gain and bias of a reward model's reward_norm.json; 1 and 0 without one."""
    directory = find_model_dir(source)
    if directory is None or not (directory / REWARD_NORM).is_file():
        return 1.0, 0.0
    file = directory / REWARD_NORM
    try:
        norm = read_json(file)
        return float(norm["gain"]), float(norm["bias"])
    except (KeyError, TypeError, ValueError, json.JSONDecodeError) as error:
        raise ModelError("does not hold gain and bias; train the rm stage again", where=str(file)) from error


def scorer(classifier: Classifier) -> ScoreIds:
    """Return a function from token sequences to raw rewards: the logit of one label, the log-odds of the second."""

    @torch.no_grad()
    def score_ids(sequences: list[list[int]]) -> Tensor:
        model, pad = classifier.model, _pad_id(classifier)
        device = next(model.parameters()).device
        scores_B = torch.empty(len(sequences))
        # Like lengths together: less padding, and which answers share a batch changes nothing.
        order = sorted(range(len(sequences)), key=lambda number: len(sequences[number]))
        for start in range(0, len(order), _BATCH_SIZE):
            chosen = order[start : start + _BATCH_SIZE]
            batch = [torch.tensor(sequences[number], dtype=torch.long) for number in chosen]
            input_ids_BT = pad_sequence(batch, batch_first=True, padding_value=pad)
            mask_BT = torch.arange(input_ids_BT.size(1)) < torch.tensor([len(ids) for ids in batch])[:, None]
            logits = model(input_ids=input_ids_BT.to(device), attention_mask=mask_BT.long().to(device)).logits.float()
            odds = logits[:, 0] if logits.size(1) == 1 else logits[:, 1] - logits[:, 0]
            scores_B[chosen] = odds.cpu()
        return scores_B

    return score_ids


def _pad_id(classifier: Classifier) -> int:
    model = classifier.model.get_base_model() if isinstance(classifier.model, PeftModel) else classifier.model
    # A decoder's score is read at the last token that is not this one.
    return int(model.config.pad_token_id)


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
    """Write prompt and answer as the rm stage did; an answer that did not end loses the end it would be given."""

    def encode(rollout: Rollout) -> list[list[int]]:
        _require_template(chat.tokenizer.chat_template, rollout, name)
        try:
            splits = chat.encode_prompt_completion(rollout.prompts, rollout.completions)
        except ConversationError as error:
            raise RewardError(f"the reward model {name} cannot read answer {error.index}: {error}") from error
        stops = chat.stop_ids
        return [
            split.ids if ended or split.ids[-1] not in stops else split.ids[:-1]
            for split, ended in zip(splits, rollout.ended, strict=True)
        ]

    return encode


def _encode_foreign(classifier: Classifier, name: str) -> Encode:
    """Write conversations with the classifier's own template, texts with whatever its tokenizer puts around them."""
    tokenizer = classifier.tokenizer

    def encode(rollout: Rollout) -> list[list[int]]:
        _require_template(tokenizer.chat_template, rollout, name)
        sequences: list[list[int]] = []
        for number, (prompt, completion) in enumerate(zip(rollout.prompts, rollout.completions, strict=True)):
            if isinstance(prompt, str):
                sequences.append(list(tokenizer(prompt + completion).input_ids))
                continue
            try:
                text = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
            except Exception as error:  # a template raises what it likes
                raise RewardError(
                    f"the chat template of the reward model {name} refuses answer {number}: {error}"
                ) from error
            sequences.append(list(tokenizer(text, add_special_tokens=False).input_ids))
        if any(not ids for ids in sequences):
            raise RewardError(f"the reward model {name} has no token for an empty prompt with an empty answer")
        return sequences

    return encode


def _require_template(template: Any, rollout: Rollout, name: str) -> None:
    if template is None and any(not isinstance(prompt, str) for prompt in rollout.prompts):
        raise RewardError(
            f"the reward model {name} has no chat template and the prompts are conversations; add one "
            "(chat_template.jinja) to its directory, or give prompts as text"
        )
