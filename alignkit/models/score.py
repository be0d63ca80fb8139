"""The score head of a reward model.

Deliberately only its weights: where the score is read is transformers' business, what it is trained on the stage's.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from alignkit.errors import ModelError


def prepare_score_head(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> None:
    """Draw a new head from N(0, 1/sqrt(d + 1)) (Ziegler et al. 2019, arXiv 1909.08593) and set the pad token.

    A head that came with the weights is kept. The score is read at the last token that is not padding, so the
    config must know the pad token.
    """
    model.config.pad_token_id = tokenizer.pad_token_id
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise ModelError(f"a {model.config.model_type} model has no scalar score head; it cannot be a reward model")
    if not getattr(model, "score_is_new", False):
        return
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(head.weight.shape, generator=generator) / (head.in_features + 1) ** 0.5
    with torch.no_grad():
        head.weight.copy_(weight)
        if head.bias is not None:
            head.bias.zero_()
