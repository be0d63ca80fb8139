"""What a sequence classifier says of whole answers: how they become its tokens, and its raw and normalised scores.

Deliberately knows no rollouts, ranks or weighted sums: training and evaluation both score through here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from alignkit.errors import ModelError, RewardError
from alignkit.models.chat import Chat, ConversationError
from alignkit.models.classifier import Classifier
from alignkit.models.files import REWARD_NORM, find_model_dir

ScoreIds = Callable[[list[list[int]]], Tensor]
_BATCH_SIZE = 16


def read_norm(source: str) -> tuple[float, float]:
    """Return gain and bias of a reward model's reward_norm.json; 1 and 0 without one."""
    directory = find_model_dir(source)
    if directory is None or not (directory / REWARD_NORM).is_file():
        return 1.0, 0.0
    file = directory / REWARD_NORM
    try:
        norm = json.loads(file.read_text(encoding="utf-8"))
        return float(norm["gain"]), float(norm["bias"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ModelError("does not hold gain and bias; train the rm stage again", where=str(file)) from error


@torch.no_grad()
def score_ids(model: Any, sequences: Sequence[Sequence[int]], *, pad_id: int, batch_size: int = _BATCH_SIZE) -> Tensor:
    """Score whole token sequences: the logit of one label, or the log-odds of the second; (B,) float32 on the CPU.

    The model is a classifier in eval mode; of a sharded one every rank must ask for the same sequences.
    """
    device = next(model.parameters()).device
    scores_B = torch.empty(len(sequences))
    # Like lengths together: less padding, and which answers share a batch changes nothing.
    order = sorted(range(len(sequences)), key=lambda number: len(sequences[number]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = [torch.tensor(sequences[number], dtype=torch.long) for number in chosen]
        input_ids_BT = pad_sequence(batch, batch_first=True, padding_value=pad_id)
        mask_BT = torch.arange(input_ids_BT.size(1)) < torch.tensor([len(ids) for ids in batch])[:, None]
        logits = model(input_ids=input_ids_BT.to(device), attention_mask=mask_BT.long().to(device)).logits.float()
        odds = logits[:, 0] if logits.size(1) == 1 else logits[:, 1] - logits[:, 0]
        scores_B[chosen] = odds.cpu()
    return scores_B


def cut_at_score(ids: Sequence[int], pad_id: int) -> list[int]:
    """Cut a sequence after the token a decoder's score is read at: the last one that is not the pad token.

    That is the rule of transformers' classifiers. Where pad and eos are one token, no score sees the end of an answer.
    """
    last = max((place for place, token in enumerate(ids) if token != pad_id), default=0)
    return list(ids[: last + 1])


def scorer(classifier: Classifier) -> ScoreIds:
    """Make the function from token sequences to raw rewards of a loaded classifier."""
    model = classifier.model.get_base_model() if isinstance(classifier.model, PeftModel) else classifier.model
    return partial(score_ids, classifier.model, pad_id=int(model.config.pad_token_id))


def encode_own(
    chat: Chat, prompts: Sequence[Any], completions: Sequence[Any], ended: Sequence[bool], *, name: str
) -> list[list[int]]:
    """Write prompt and answer as the rm stage did; an answer that did not end loses the end it would be given.

    Prompts are text, or messages; completions likewise. Raises RewardError for what the template cannot write.
    """
    _require_template(chat.tokenizer.chat_template, prompts, name)
    try:
        splits = chat.encode_prompt_completion(prompts, completions)
    except ConversationError as error:
        raise RewardError(f"the reward model {name} cannot read answer {error.index}: {error}") from error
    stops = chat.stop_ids
    return [
        split.ids if has_ended or split.ids[-1] not in stops else split.ids[:-1]
        for split, has_ended in zip(splits, ended, strict=True)
    ]


def encode_foreign(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Any], completions: Sequence[Any], *, name: str
) -> list[list[int]]:
    """Write conversations with the classifier's own template, texts with whatever its tokenizer puts around them."""
    _require_template(tokenizer.chat_template, prompts, name)
    sequences: list[list[int]] = []
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
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


def _require_template(template: Any, prompts: Sequence[Any], name: str) -> None:
    if template is None and any(not isinstance(prompt, str) for prompt in prompts):
        raise RewardError(
            f"the reward model {name} has no chat template and the prompts are conversations; add one "
            "(chat_template.jinja) to its directory, or give prompts as text"
        )
