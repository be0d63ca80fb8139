"""Greedy answers for samples and checks.

Deliberately greedy only: what a stage shows before, during and after must differ by the weights alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

_BATCH = 16


def generate_greedy(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
) -> list[list[int]]:
    """Return the new tokens of each prompt, the stop token included when one came.

    Prompts are padded on the left; one too long for the model's positions loses its beginning. The model's mode is
    put back.
    """
    positions = getattr(model.config, "max_position_embeddings", None) or 10**9
    new_tokens = min(max_new_tokens, max(positions - 1, 1))
    kept = [list(prompt)[-(positions - new_tokens) :] for prompt in prompts]
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, eos_token_id=list(eos_ids), pad_token_id=pad_id, use_cache=True
    )
    was_training = model.training
    model.eval()
    try:
        answers: list[list[int]] = []
        for start in range(0, len(kept), _BATCH):
            answers += _generate_batch(model, kept[start : start + _BATCH], settings)
        return answers
    finally:
        model.train(was_training)


def _generate_batch(model: Any, prompts: list[list[int]], settings: GenerationConfig) -> list[list[int]]:
    device = next(model.parameters()).device
    width = max(len(prompt) for prompt in prompts)
    ids_BT = torch.full((len(prompts), width), settings.pad_token_id)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, width - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, width - len(prompt) :] = 1
    with torch.no_grad():
        output = model.generate(
            input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), generation_config=settings
        )
    return [_cut(row, settings.eos_token_id) for row in output[:, width:].tolist()]


def _cut(tokens: list[int], eos_ids: list[int]) -> list[int]:
    for position, token in enumerate(tokens):
        if token in eos_ids:
            return tokens[: position + 1]
    return tokens
